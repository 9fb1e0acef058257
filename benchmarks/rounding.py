"""What rounding to bfloat16 leaves of an update: the gain on the task, the drift elsewhere, the leak.

    python -m benchmarks.rounding      # CPU, about ten minutes on a quiet core; needs apt and network for the data

SmolLM2-135M-Instruct learns German manual pages (Debian's package manpages-de) in its last blocks, by OSFT in float32,
at three learning rates. The exact weights are then rounded in each way of `osft.models.rounding`, and measured:

    gain kept      of the fall of the loss on held-out pages, the share that the rounded weights still have
    KL             from the base to the rounded model per token of web text, which has nothing to do with the task
    frozen share   |D' - P D'| / |D'| of the update D' that was written, P projecting on the free directions
    error          |D' - D| / |D|

Only the last blocks are trained, so all text is sent through the others once, and likelihoods are over the tokens
that occur in the data, a tenth of the vocabulary.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.machine import describe_machine
from benchmarks.texts import blocks_of_tokens, manual_pages, web_text
from osft.data import examples
from osft.models.rounding import Rounding, generator_of, round_weight
from osft.settings.subspace import SubspaceConfig
from osft.storage.atomic import write_json
from osft.subspace import inject, merge, osft_layers, refresh, select_targets
from osft.subspace.moment_sums import MomentSums
from osft.subspace.watching import Use, watched

MODEL, PAGES = "example:smollm2-135m-instruct", "manpages-de"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured."""

    learning_rates: tuple[float, ...] = (5e-6, 2e-5, 1e-4)
    seeds: tuple[int, ...] = (0, 1)
    """Of the order of the training text and of stochastic rounding."""
    blocks: int = 8
    """The last ones of the model, which are trained."""
    steps: int = 16
    samples_per_step: int = 2
    sample_tokens: int = 512
    held_out_samples: int = 8
    """Of the task, and of web text."""
    unfreeze_rank_ratio: float = 0.25


@dataclass(frozen=True, slots=True)
class Way:
    """A way of rounding."""

    method: Rounding
    moments_of: str | None = None
    """The text whose inputs' moments compensate."""

    @property
    def name(self) -> str:
        return f"{self.method}, moments of {self.moments_of}" if self.moments_of else self.method


WAYS = (Way("nearest"), Way("stochastic"), Way("compensated", "the training text"), Way("compensated", "web text"))


# ---- the model ----


@dataclass(frozen=True, slots=True)
class Text:
    """Samples as the trained blocks see them."""

    hidden: torch.Tensor
    """(samples, tokens, hidden size): the inputs of the first trained block."""
    targets: torch.Tensor
    """(samples, tokens): each token's place in the vocabulary that is used."""


class LastBlocks:
    """The last blocks of a model with its head, fed with what the blocks before them computed once."""

    def __init__(self, model: Any, tokens: dict[str, torch.Tensor], blocks: int) -> None:
        vocabulary = torch.unique(torch.cat([samples.flatten() for samples in tokens.values()]))
        self.model = model
        self._head = model.lm_head.weight.detach()[vocabulary]
        layers, seen = model.model.layers, []

        def see(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append((arguments[0] if arguments else named["hidden_states"]).detach())

        handle = layers[-blocks].register_forward_pre_hook(see, with_kwargs=True)
        self.texts: dict[str, Text] = {}
        with torch.no_grad():
            for name, samples in tokens.items():
                for sample in samples:
                    model.model(sample[None], use_cache=False)
                self.texts[name] = Text(torch.cat(seen), torch.searchsorted(vocabulary, samples))
                seen.clear()
        handle.remove()
        model.model.layers = layers[-blocks:]

    def log_probabilities(self, text: Text, sample: int) -> torch.Tensor:
        """(tokens, vocabulary that is used) of one sample."""
        hidden = self.model.model(inputs_embeds=text.hidden[sample : sample + 1], use_cache=False).last_hidden_state[0]
        return (hidden @ self._head.T).log_softmax(-1)

    def nll(self, text: Text, sample: int) -> torch.Tensor:
        """Mean negative log-likelihood of one sample, in nats."""
        predicted = self.log_probabilities(text, sample)[:-1]
        return -predicted.gather(-1, text.targets[sample, 1:, None]).mean()

    @torch.no_grad()
    def loss(self, name: str) -> float:
        """`nll` of all samples of a text."""
        text = self.texts[name]
        return mean(self.nll(text, sample).item() for sample in range(len(text.targets)))

    @torch.no_grad()
    def distributions(self, name: str) -> Iterator[torch.Tensor]:
        """`log_probabilities` of each sample of a text."""
        text = self.texts[name]
        for sample in range(len(text.targets)):
            yield self.log_probabilities(text, sample)

    def linear_layers(self) -> dict[str, nn.Linear]:
        """The weights' modules of the blocks, by name."""
        return {
            name: module for name, module in self.model.model.layers.named_modules() if isinstance(module, nn.Linear)
        }

    @torch.no_grad()
    def put(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the linear layers these weights."""
        for name, layer in self.linear_layers().items():
            layer.weight.copy_(weights[name])


def input_moments(model: LastBlocks, text: str) -> dict[str, torch.Tensor]:
    """C = E[x x^T], (n, n) float32, of the inputs of each linear layer over a text."""
    targets = select_targets(model.model)
    sums = {target.name: MomentSums((target.name,), transposed=False) for target in targets}

    def observe(use: Use) -> torch.Tensor:
        sums[use.target].add_inputs(use, counts=True)
        return use.outputs

    with watched(model.model, targets, observe):
        model.loss(text)
    found = {}
    for name, one in sums.items():
        one.finish(model.texts[text].targets.numel(), world_size=1, outputs={})
        assert one.inputs is not None, f"no input reached {name}"
        found[name.removeprefix("model.layers.")] = one.inputs
    return found


def train(model: LastBlocks, learning_rate: float, seed: int, settings: Settings) -> dict[str, torch.Tensor]:
    """The exact weights after a training by OSFT: AdamW, cosine."""
    inject(model.model, SubspaceConfig(unfreeze_rank_ratio=settings.unfreeze_rank_ratio))
    parameters = [layer.coefficients for _, layer in osft_layers(model.model)]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    text = model.texts["the training text"]
    order = torch.randperm(len(text.targets), generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        optimizer.zero_grad()
        for sample in order[step * settings.samples_per_step : (step + 1) * settings.samples_per_step]:
            (model.nll(text, sample) / settings.samples_per_step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        refresh(model.model, learning_rate=optimizer.param_groups[0]["lr"])
    merge(model.model)
    return {name: layer.weight.detach().clone() for name, layer in model.linear_layers().items()}


# ---- the measurements ----


class Measure:
    """What there is to say of tuned weights, against the base's."""

    def __init__(self, model: LastBlocks, base: dict[str, torch.Tensor], ratio: float) -> None:
        self._model, self._base = model, base
        self._frozen = {}
        for name, weight in base.items():
            left, _, right = torch.linalg.svd(weight, full_matrices=False)
            frozen = min(weight.shape) - round(ratio * min(weight.shape))
            self._frozen[name] = left[:, :frozen], right[:frozen].T
        model.put(base)
        self.base_loss = model.loss("held-out pages")
        self._distributions = list(model.distributions("held-out web text"))

    def __call__(self, exact: dict[str, torch.Tensor], served: dict[str, torch.Tensor]) -> dict[str, float]:
        """Gain and drift of `served`, and what distinguishes its update from that of `exact`."""
        self._model.put(served)
        after = self._model.distributions("held-out web text")
        drift = [(p.exp() * (p - q)).sum(-1).mean().item() for p, q in zip(self._distributions, after, strict=True)]
        sums = dict.fromkeys(("update", "served", "error", "outside", "changed", "size"), 0.0)
        for name, base in self._base.items():
            update, written = exact[name] - base, served[name].float() - base
            left, right = self._frozen[name]
            free = written - left @ (left.T @ written)
            free = free - (free @ right) @ right.T
            for key, value in (("update", update), ("served", written), ("error", written - update)):
                sums[key] += value.square().sum().item()
            sums["outside"] += (written - free).square().sum().item()
            sums["changed"] += (written != 0).sum().item()
            sums["size"] += written.numel()
        return {
            "gain": self.base_loss - self._model.loss("held-out pages"),
            "kl": mean(drift),
            "frozen_share": math.sqrt(sums["outside"] / sums["served"]),
            "error": math.sqrt(sums["error"] / sums["update"]),
            "changed": sums["changed"] / sums["size"],
        }


def load(cache: Path, settings: Settings) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model in float32, and the tokens of each text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = examples.resolve(MODEL, cache)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pages, web = manual_pages(PAGES, cache), web_text(cache)
    size, held_out = settings.sample_tokens, settings.held_out_samples
    trained = settings.steps * settings.samples_per_step
    tokens = {
        "the training text": blocks_of_tokens(tokenizer, pages[: len(pages) // 2], trained, size),
        "held-out pages": blocks_of_tokens(tokenizer, pages[len(pages) // 2 :], held_out, size),
        "web text": blocks_of_tokens(tokenizer, web[: len(web) // 2], trained // 2, size),
        "held-out web text": blocks_of_tokens(tokenizer, web[len(web) // 2 :], held_out, size),
    }
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, tokens


def measure(
    whole: Any, tokens: dict[str, torch.Tensor], settings: Settings, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One record for each learning rate, seed and way of rounding, the exact weights first."""
    progress("the blocks that are not trained")
    model = LastBlocks(whole.eval().requires_grad_(False), tokens, settings.blocks)
    base = {name: layer.weight.detach().clone() for name, layer in model.linear_layers().items()}
    moments = {name: input_moments(model, name) for name in ("the training text", "web text")}
    measured = Measure(model, base, settings.unfreeze_rank_ratio)
    records = []
    for rate in settings.learning_rates:
        for seed in settings.seeds:
            progress(f"learning rate {rate:g}, seed {seed}: training")
            model.put(base)
            exact = train(model, rate, seed, settings)
            record = {"learning_rate": rate, "seed": seed, "base_loss": measured.base_loss}
            whole_update = measured(exact, exact)
            records.append({**record, "way": "exact", "kept": 1.0, **whole_update})
            for way in WAYS:
                progress(f"learning rate {rate:g}, seed {seed}: {way.name}")
                served = {
                    name: round_weight(
                        weight,
                        base[name],
                        torch.bfloat16,
                        way.method,
                        moments=moments[way.moments_of][name] if way.moments_of else None,
                        generator=generator_of(name, seed),
                    )
                    for name, weight in exact.items()
                }
                found = measured(exact, served)
                records.append({**record, "way": way.name, "kept": found["gain"] / whole_update["gain"], **found})
    return records


# ---- the report ----

MEASURED = ("gain", "kept", "kl", "frozen_share", "error", "changed")
COLUMNS = ("learning rate", "rounding", "gain", "gain kept", "KL, web text", "frozen share", "error", "entries changed")


def table_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells: for each learning rate and way, the mean over the seeds, and the extremes of what is kept."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["learning_rate"], record["way"]), []).append(record)
    rows = []
    for (rate, way), group in groups.items():
        average = {key: mean(record[key] for record in group) for key in MEASURED}
        kept = [record["kept"] for record in group]
        rows.append(
            [
                f"{rate:g}",
                way,
                f"{average['gain']:.4f}",
                f"{average['kept']:.3f} ({min(kept):.3f}-{max(kept):.3f})",
                f"{average['kl']:.2e}",
                f"{average['frozen_share']:.2g}",
                f"{average['error']:.2g}",
                f"{average['changed']:.1%}",
            ]
        )
    return rows


def report(result: dict[str, Any], folder: Path) -> None:
    """Write the records as JSON and the table as Markdown, and print the table."""
    write_json(folder / "rounding_cpu.json", result)
    machine, settings = result["machine"], Settings(**result["settings"])
    lines = [
        "# Rounding of the served weights",
        "",
        "Written by `python -m benchmarks.rounding`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in table_rows(result["records"])),
        "",
        f"- {machine['processor']}; torch {machine['torch']}, transformers {machine['transformers']}; "
        f"{result['date']}; {result['total_seconds'] / 60:.0f} minutes",
        f"- SmolLM2-135M-Instruct, dequantised Q4_1, its last {settings.blocks} blocks, trained in float32 by OSFT "
        f"(complement, unfrozen share {settings.unfreeze_rank_ratio}) on German manual pages: {settings.steps} steps "
        f"of {settings.samples_per_step} samples of {settings.sample_tokens} tokens, AdamW, cosine; loss of the base "
        f"on held-out pages {result['records'][0]['base_loss']:.3f}",
        f"- mean over {len(settings.seeds)} seeds (order of the text, random numbers of the rounding), in brackets the "
        "extremes; gains in nats per token, KL from the base in nats per token",
        "- the KL of exact weights is that of what was learned; what is above it is the rounding's noise",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (folder / "rounding_cpu.md").write_text(text, encoding="utf-8")


def main(
    cache: Annotated[Path, typer.Option(help="Folder for the model and the texts.")] = Path("runs/cache"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    results: Annotated[Path, typer.Option(help="Folder for rounding_cpu.json and rounding_cpu.md.")] = RESULTS,
) -> None:
    """Measure what each way of rounding to bfloat16 leaves of an update, at three learning rates."""
    torch.set_num_threads(threads)
    started, settings = time.perf_counter(), Settings()

    def progress(what: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {what}", file=sys.stderr, flush=True)

    records = measure(*load(cache, settings), settings, progress)
    result = {
        "date": date.today().isoformat(),
        "machine": describe_machine("cpu"),
        "settings": asdict(settings),
        "records": records,
        "total_seconds": time.perf_counter() - started,
    }
    report(result, results)


if __name__ == "__main__":
    typer.run(main)
