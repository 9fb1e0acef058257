"""The command `osft export`: what was learned as an adapter, or the exact weights as a plain model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from osft.process.console import failures
from osft.process.console import output as console

if TYPE_CHECKING:
    from osft.models.adapter import Adapter


def export(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, URI or Hugging Face id of the tuned model.", show_default=False),
    ],
    format: Annotated[
        Literal["lora", "hf"],
        typer.Option(help="lora: the update, an adapter for PEFT. hf: all weights, a plain model folder."),
    ],
    output: Annotated[str, typer.Option(metavar="FOLDER", help="A new folder.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="The model that the lineage started from; by default the one that MODEL's osft.json names."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="lora: the largest rank of a weight; what that loses is printed. By default nothing is lost."
        ),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the tensors that are written.")] = "float32",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As in training.")] = False,
) -> None:
    """Take out what a model has learned, exactly, for programs that know nothing of OSFT.

    A tuned model in bfloat16 is rounded: what small steps learned is mostly in exact/ beside its weights, which other
    programs do not read. `--format lora` writes the update of the exact weights, of all rounds since the base model, as
    a LoRA adapter, which `peft.PeftModel.from_pretrained(base_model, FOLDER)` loads. It has the rank that the update
    has, about unfreeze_rank_ratio of a weight's smaller side for each round, and is exact to float32; `--rank 64` keeps
    the best 64 directions of each weight, `--dtype bfloat16` halves the file. Embeddings, norms and biases are not
    trained by OSFT; if something else changed them, `lora` refuses.

    `--format hf` writes all weights: in float32 exactly, in bfloat16 as they are served.
    """
    with failures():
        import torch

        from osft import storage
        from osft.storage.paths import expanded

        if storage.is_remote(output):
            raise ValueError(f"--output {output}: give a folder of this machine, and copy it from there")
        if format == "hf" and rank is not None:
            raise ValueError("--rank is for `--format lora`: a whole model has no rank")
        folder, model = Path(expanded(output)), expanded(model)
        base = base and expanded(base)
        tensor_dtype: torch.dtype = getattr(torch, dtype)
        if format == "hf":
            from osft.models.export import export_model

            export_model(model, folder, base=base, dtype=tensor_dtype, trust_remote_code=trust_remote_code)
            console.print(Text(str(folder)), soft_wrap=True)
            return
        from osft.models.adapter import export_adapter

        adapter = export_adapter(
            model, folder, base=base, rank=rank, dtype=tensor_dtype, trust_remote_code=trust_remote_code
        )
    _show(adapter)


def _show(adapter: "Adapter") -> None:
    """The weights of an adapter and what it loses of their updates."""
    table = Table("weight", "shape", "rank", "of", "lost of the update")
    for weight in adapter.weights:
        shape = " x ".join(str(size) for size in weight.shape)
        table.add_row(weight.name, shape, str(weight.rank), str(weight.full_rank), f"{weight.error:.2%}")
    console.print(table)
    facts = [
        f"{adapter.folder}: {len(adapter.weights)} weights, {adapter.num_bytes / 1e6:.1f} MB, an adapter of "
        f"{adapter.base_model}; lost of the update as a whole: {adapter.error:.2%} (norms)"
    ]
    if not adapter.starts_from_exact:
        facts.append(
            "the model keeps no exact weights (no exact/, not float32): its update holds the noise of their rounding, "
            "which has every direction; a small --rank leaves most of it out"
        )
    if adapter.base_is_rounded:
        facts.append(
            f"{adapter.base_model} is served rounded itself, and the update is that of its exact weights: load the "
            "adapter on what `osft export --format hf` makes of it, or give the first model of the lineage with --base"
        )
    for fact in facts:
        console.print(Text(fact), soft_wrap=True)
