"""Write docs/scaling.md: what a step takes of a large model, by the dry run's own formulas (`python -m docs.generate`).

Every count of a Llama is linear in its number of blocks, so models of two and three blocks on the meta device say what
one of eighty takes. Tests compare that with the dry run, and the bytes with what processes send each other.
"""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from osft.data.packing import Batching
from osft.models.loading import empty_model
from osft.models.packed_attention import AttentionShape
from osft.settings.training import TrainConfig
from osft.subspace.model import osft_layers
from osft.subspace.preflight import Preflight
from osft.subspace.targets import select_targets, transformer_blocks
from osft.subspace.weight import OSFTWeight
from osft.training.memory import ResidentMemory, allowance_line
from osft.training.plan import described_model, lines_of_tokens, memory_estimate
from osft.training.sharded_model import gathered_dtype

ROOT = Path(__file__).parents[1]
LLAMA_8B: dict[str, Any] = json.loads((ROOT / "tests" / "data_llama_8b" / "config.json").read_text(encoding="utf-8"))
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
OSFT: dict[str, dict[str, Any]] = {
    'OSFT, `protect="activations"`': {"protect": "activations"},
    "OSFT on weights, complement": {},
    "OSFT on weights, core": {"free_subspace": "core"},
}
FULL, LORA = "full fine-tuning", "LoRA, rank 16"
LORA_RANK = 16
MEASURED = dict(zip((*OSFT, FULL, LORA), ("ours_activations", "ours", "ours_core", "full", "lora"), strict=True))
"""Their names in the results of benchmarks.step."""
TOKENS = 4096
"""Of a micro-batch."""
GPU_GIB = 80
FLOAT32_RATE = 50e12
"""Operations a second: three quarters of the 67e12 of an H100's or H200's data sheet."""
NODE, NETWORK = 300e9, 40e9
"""Bytes a second that reach a GPU, from the others of its node and from other nodes."""
Counts = dict[str, float]


def counts(
    shape: dict[str, Any], method: str, gpus: int, *, tokens: int = TOKENS, checkpointing: bool = True
) -> Counts:
    """What one step of one micro-batch on each of `gpus` GPUs takes of a Llama with this config.json.

    Bytes a GPU: "memory: …" and, received in a step, "wire: …". Operations: "token", of one token in the computation's
    dtype; once a step, in float32, "step", of all GPUs together. Numbers: "parameters", "targets" and "trained".
    """
    values = json.dumps(shape)
    two, three = (_of_blocks(values, method, blocks, gpus, tokens, checkpointing) for blocks in (2, 3))
    return {name: two[name] + (shape["num_hidden_layers"] - 2) * (three[name] - two[name]) for name in two}


@cache
def _of_blocks(shape: str, method: str, blocks: int, gpus: int, tokens: int, checkpointing: bool) -> Counts:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(json.loads(shape) | {"num_hidden_layers": blocks}))
        config = TrainConfig(
            model_path=temporary, data_path="-", ckpt_output_dir="-", unfreeze_rank_ratio=0.25, learning_rate=1e-5,
            effective_batch_size=gpus, max_tokens_per_gpu=tokens, max_seq_len=tokens,
            gradient_checkpointing=checkpointing, **OSFT.get(method, {}),
        )  # fmt: skip
        model, parameters, _ = described_model(config, folder)
        dtype = gathered_dtype(model)
        if method not in OSFT:
            model = empty_model(folder, dtype=dtype)
    assert dtype is not None, "a Llama has one"
    return _of_model(model, method, gpus, config, parameters, dtype.itemsize)


def _preflight(config: PreTrainedConfig, method: str) -> Preflight:
    """What is found of any Llama: packed samples need no mask, and the loss of a head that is not trained no logits."""
    heads, key_value_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape = AttentionShape(heads, key_value_heads, size, size, scale=size**-0.5, window=0)
    return Preflight(Batching.PACKED, "a Llama", attention=(shape,), loss_head=method != FULL)


def _of_model(
    model: PreTrainedModel, method: str, gpus: int, config: TrainConfig, parameters: int, itemsize: int
) -> Counts:
    layers = [layer for _, layer in osft_layers(model)]
    shapes = [tuple(layer.base_weight.shape) for layer in layers] or [target.shape for target in select_targets(model)]
    targets = sum(m * n for m, n in shapes)
    head = model.get_output_embeddings().weight.numel()
    if method not in OSFT:
        for target in select_targets(model):  # so that their inputs are saved
            model.get_parameter(target.tensor).requires_grad_(True)
    fixed, activations, problem = lines_of_tokens(model, config, _preflight(model.config, method), 1.0)
    assert activations is not None, problem
    inside, outside = gathered_numbers(model)
    passes = 3 if config.gradient_checkpointing else 2  # forward, again, and backward to the inputs
    per_token = 2 * passes * targets + 4 * head  # the head's output is not computed again
    if method == FULL:
        trained = parameters
        per_token += 2 * (targets + head)
    elif method == LORA:
        trained = LORA_RANK * sum(m + n for m, n in shapes)
        inside += trained
        per_token += 2 * (passes + 1) * trained
    else:
        trained = sum(layer.coefficients.numel() for layer in layers)
        per_token += _operations_per_token(layers, passes - 1)
    if method in OSFT:
        memory = {line.name: line.bytes for line in memory_estimate(ResidentMemory(model), gpus, fixed).lines}
    else:
        blocks = len(transformer_blocks(model)[1])
        gradients = trained / blocks if method == LORA else inside / blocks + outside
        gathered = itemsize * (outside + 2 * inside / blocks + gradients) + 4 * gradients
        memory = {
            "weights": itemsize * parameters // gpus if method == LORA else 0,
            "coefficients": 16 * trained // gpus,
            "gathered by FSDP2": int(gathered) if gpus > 1 else 0,
        } | {line.name: line.bytes for line in fixed}
        memory["allowance"] = allowance_line(sum(memory.values()), gpus).bytes
    others = (gpus - 1) / gpus
    return {f"memory: {name}": float(size) for name, size in memory.items()} | {
        "wire: gathered": others * itemsize * (2 * inside + outside),  # blocks again in the backward pass
        "wire: reduced": others * 4 * trained,
        "wire: refreshed": others * refreshed_bytes(layers),
        "token": float(per_token),
        "step": float(sum(_operations_per_step(layer, gpus) for layer in layers)),
        "parameters": float(parameters),
        "targets": float(targets),
        "trained": float(trained),
    }


def gathered_numbers(model: PreTrainedModel) -> tuple[int, int]:
    """How many numbers FSDP2 gathers for a pass through the blocks, and of all that is outside of them."""
    unread = {id(layer.coefficients) for _, layer in osft_layers(model)}
    in_blocks = {id(parameter) for block in transformer_blocks(model)[1] for parameter in block.parameters()}
    inside = outside = 0
    for parameter in model.parameters():
        if id(parameter) in in_blocks:
            inside += parameter.numel() if id(parameter) not in unread else 0
        else:
            outside += parameter.numel()
    return inside, outside


def _operations_per_token(layers: Sequence[OSFTWeight], forward_passes: int) -> int:
    """For the gradients of X: x R in each forward pass, once for layers with one R; then dY^T L and their product."""
    right = sum(basis.numel() for basis in _right_bases(layers))
    left = sum(layer.left_basis.numel() for layer in layers if layer.left_basis is not None)
    return 2 * (right * forward_passes + left + sum(layer.coefficients.numel() for layer in layers))


def _right_bases(layers: Sequence[OSFTWeight]) -> list[torch.Tensor]:
    """Each once: layers with the same input share one."""
    bases = (layer.right_basis for layer in layers if layer.right_basis is not None)
    return list({id(basis): basis for basis in bases}.values())


def _operations_per_step(layer: OSFTWeight, gpus: int) -> int:
    """Of `OSFTWeight.refresh_`, L X R^T and the projection of a long side: of all GPUs together."""
    m, n = layer.base_weight.shape
    operations = 2 * m * n * layer.rank
    if layer.frozen_basis is not None:
        operations += 4 * (m * n + layer.frozen_basis.numel()) * layer.rank
    if layer.left_basis is not None and layer.right_basis is not None:
        operations += 2 * layer.rank**2 * min(m, gpus * n)  # of each GPU, its rows of L X or all of X R^T
    return operations


def refreshed_bytes(layers: Sequence[OSFTWeight]) -> int:
    """What `refresh` gathers whole, or sums up for each rank's rows, and twice what it sums up whole."""
    sent = sum(basis.nbytes for basis in _right_bases(layers))
    for layer in layers:
        rank, is_wide = layer.rank, layer.left_basis is not None
        sent += layer.coefficients.nbytes if is_wide else 0
        if layer.frozen_basis is not None:
            n, frozen_rank = layer.base_weight.shape[1], layer.frozen_basis.shape[1]
            sent += 2 * 4 * rank * (n + frozen_rank)  # two of r x n, and a sum of r x k
    return sent


def _memory(found: Counts) -> float:
    return sum(value for name, value in found.items() if name.startswith("memory: "))


def _wire(found: Counts) -> float:
    return sum(value for name, value in found.items() if name.startswith("wire: "))


def _measured(device: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"step_{device}.json").read_text())
    if "shapes" in result:  # several lengths
        result["methods"] = result["shapes"][str(result["settings"]["tokens"])]
    return result


def _spread(seconds: list[float]) -> tuple[float, float]:
    return min(seconds), max(seconds)


def _benchmark_counts(device: str) -> tuple[dict[str, Counts], int]:
    """Of what benchmarks.step measured, by method, and the tokens of its step."""
    found = _measured(device)["settings"]
    shape = LLAMA_8B | {
        "hidden_size": found["hidden_size"], "intermediate_size": found["intermediate_size"], "head_dim": 64,
        "num_hidden_layers": found["num_layers"], "num_attention_heads": found["num_heads"],
        "num_key_value_heads": found["num_key_value_heads"], "vocab_size": found["vocab_size"],
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    of_methods = {name: counts(shape, name, 1, tokens=found["tokens"], checkpointing=False) for name in MEASURED}
    return of_methods, found["tokens"] * found["micro_batches"]


def rate(device: str) -> float:
    """Operations a second that full fine-tuning reached where benchmarks.step measured it."""
    found, tokens = _benchmark_counts(device)
    return found[FULL]["token"] * tokens / float(_measured(device)["methods"]["full"]["median_seconds"])


def _seconds(found: Counts, tokens: int, gpus: int, fast: float, exact: float) -> float:
    return found["token"] * tokens / fast + found["step"] / gpus / exact


def _check_rows(device: str) -> list[tuple[str, ...]]:
    found, tokens = _benchmark_counts(device)
    fast, measured = rate(device), _measured(device)["methods"]
    exact = FLOAT32_RATE if device == "cuda" else fast
    rows = []
    for name, key in MEASURED.items():
        seconds = _seconds(found[name], tokens, 1, fast, exact)
        one = measured[key]["median_seconds"]
        bias = f"{seconds / one - 1:+.0%}" if name != FULL else "sets the rate"
        rows.append((name, f"{found[name]['token'] / 1e9:.2f}", f"{seconds:.3f}", f"{one:.3f}", bias))
    return rows


def _scale_rows(gpus: int) -> list[tuple[str, ...]]:
    rows = []
    for name in MEASURED:
        found = counts(LLAMA_70B, name, gpus)
        memory, wire = _memory(found) / 2**30, _wire(found)
        computing = _seconds(found, TOKENS, gpus, rate("cuda"), FLOAT32_RATE)
        sending = wire / (NODE if gpus <= 8 else NETWORK)
        rows.append(
            (
                name,
                f"{memory:.0f}{'' if memory <= GPU_GIB else ', too much'}",
                f"{computing:.1f}",
                *(f"{found[f'wire: {part}'] / 1e9:.0f}" for part in ("gathered", "reduced", "refreshed")),
                f"{sending:.1f}",
            )
        )
    return rows


def largest_on_one_gpu(method: str) -> float:
    """Parameters of the largest model as wide as an 8B Llama that one GPU can tune."""
    short, long = (LLAMA_8B | {"num_hidden_layers": blocks} for blocks in (10, 20))
    first, second = counts(short, method, 1), counts(long, method, 1)
    blocks = int((GPU_GIB * 2**30 - _memory(first)) / ((_memory(second) - _memory(first)) / 10))
    return first["parameters"] + blocks * (second["parameters"] - first["parameters"]) / 10


def _round_rows() -> list[tuple[str, ...]]:
    rows = []
    for name in OSFT:
        found = counts(LLAMA_70B, name, 1)
        factors = found["memory: bases"] + found["memory: frozen bases"]
        sizes = (2 * found["parameters"], 2 * found["targets"], factors, 2 * 12 * found["trained"])
        rows.append((name, *(f"{size / 1e9:.0f}" for size in sizes), f"{sum(sizes) / 1e9:.0f}"))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render() -> str:
    """The document."""
    check_head = ("method", "10^9 operations a token", "computed s", "measured s", "computed - measured")
    scale_head = (
        "method", "GiB per GPU", "s computing", "GB gathered", "GB reduced", "GB for the refresh", "s sending",
    )  # fmt: skip
    largest = [(name, f"{largest_on_one_gpu(name) / 1e9:.1f}") for name in MEASURED]
    round_head = ("GB", "served model", "exact weights", "bases", "training state, twice", "sum")
    return _TEXT.format(
        rate=f"{rate('cuda') / 1e12:.0f}",
        spread="{:.2f} to {:.2f}".format(*_spread(_measured("cpu")["methods"][MEASURED[FULL]]["seconds"])),
        cuda=_table(check_head, _check_rows("cuda")),
        cpu=_table(check_head, _check_rows("cpu")),
        eight=_table(scale_head, _scale_rows(8)),
        many=_table(scale_head, _scale_rows(64)),
        most=_table(scale_head, _scale_rows(512)),
        largest=_table(("method", "10^9 parameters"), largest),
        round=_table(round_head, _round_rows()),
    )


_TEXT = """# What a step takes at the size that people have

Written by `make compile` from the dry run's formulas ([`scaling.py`](scaling.py)). **Everything here is computed, but
for the columns that say measured**: the largest model that was timed has 0.7 billion parameters, on one GPU.

## Formulas

For G GPUs, T tokens in a micro-batch on each, target weights (m, n) of N numbers in all, r free directions of a weight
(`unfreeze_rank_ratio` 0.25 of all), X of K numbers in all, a head of H numbers; with gradient checkpointing c = 1, else 0.

| | full fine-tuning | OSFT |
| --- | --- | --- |
| operations a token | (6 + 2c) N + 6 H | (4 + 2c) N + 4 H + 2 K + sum of (1 + c) 2 n r of each right basis and 2 m r of each left one |
| operations a step, in float32 | – | sum of 2 m n r, and 2 m r r of "core" and square weights; where a long side is projected, of l the short one, 4 m n r and 4 l (l - r) r more; divided by G |
| bytes a GPU holds | 16 (N + …) / G | (2 + 2) N / G, 16 K / G, bases and frozen bases in float32 / G |
| bytes that reach a GPU | 2 x 2 bytes of each number in a block and 2 of the others for gathering, 4 of each gradient | the same, of weights and bases; 4 K for the gradient of X, whose values are not gathered; `refresh` gathers its right bases, or what stands in [`weight.py`](../osft/subspace/weight.py) |

With `protect="activations"`, layers with the same input (q, k and v; gate and up) have one right basis: it is held,
gathered and multiplied with once. LoRA is as OSFT with adapters of rank 16 in place of X, and no refresh. Attention's
own operations, which grow with the length of a sample, are left out for all; bytes count as (G - 1) / G of a ring. What
a GPU holds beside that (blocks that are gathered, activations, logits, an allowance) is the dry run's own line by line,
for full fine-tuning and LoRA, too.

## Checked against what was measured

One rate, that of full fine-tuning, and 50e12 operations a second for what is in float32 (three quarters of the data
sheet's 67e12) say the others' seconds. [Two blocks of an 8B Llama](../benchmarks/results/step_cuda.md), H200, bfloat16,
{rate}e12 operations a second:

{cuda}

[Four small blocks](../benchmarks/results/step_cpu.md), two CPU cores, float32, one rate for all. It is as
uncertain as the median of the {spread} seconds that full fine-tuning's steps took:

{cpu}

LoRA's small products take more time than operations: of its seconds below, expect half as many again. So the time that
"complement" takes on a GPU is that of its float32 products, half of it. Since these seconds were measured, the product
that recomputes weights in bfloat16 is left to the tensor cores (TF32), a tenth of its time by the data sheet; that has
not been measured, and is not in what follows.

## A Llama of 70 billion parameters

A step of one micro-batch of 4,096 tokens on each GPU of 80 GiB, gradient checkpointing, the H200's rate (an H100 has the
same), all in bfloat16 but for 16 bytes (float32 value, gradient, two moments) for each trained number. Between the GPUs
of a node 300 GB/s reach each, between nodes 40 GB/s (400 Gbit/s a GPU); these two are assumptions. What is sent
overlaps with computing but for the refresh: a step takes the larger of the two, and something.

On 8 GPUs:

{eight}

On 64:

{many}

On 512:

{most}

Sharded over nodes, any method waits for the network with so few tokens. What is sent does not depend on them, so a step
with twice the `max_tokens_per_gpu` takes hardly longer.

The largest model, as wide as an 8B Llama and deeper, that one GPU of 80 GiB can tune so:

{largest}

## What a round keeps

Of 70 billion parameters; the bases can be computed again, the state goes when a run ends. `protect="activations"` adds
its [statistics](../osft/subspace/statistics_store.py), 9 GB.

{round}
"""  # noqa: E501  rows of a table
