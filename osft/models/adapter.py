"""The learned update as a LoRA adapter for PEFT, and the exact weights as a plain model folder.

An adapter (Hu et al., arXiv:2106.09685) adds `(alpha / r) B A x` to what a layer computes. Here B A is the update
D = W - W0 of the exact weights, to its own rank and with alpha = r, so that the base model with the adapter is the
trained model, also where the served weights are rounded ones.

| changed tensor                               | in the adapter                                               |
|----------------------------------------------|--------------------------------------------------------------|
| weight of `nn.Linear` or `Conv1D`            | a target module, with a rank of its own                      |
| experts stacked in a parameter (E, m, n)     | a target parameter; zeros fill up to the largest expert's rank |
| anything else: embeddings, norms, biases     | refused: LoRA cannot hold it                                 |
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D

from osft import storage
from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.export import base_of, new_folder, refuse_other_architecture
from osft.models.loading import empty_model, model_folder
from osft.models.low_rank import factorize, noise_floor
from osft.models.rounding import square


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedWeight:
    """A weight, or a stack of experts, in the adapter."""

    name: str
    """In the model's state dict."""
    shape: tuple[int, ...]
    rank: int
    """Of a stack, that of the expert with the largest."""
    full_rank: int
    """Without `rank`: the singular values above the noise of float32."""
    error: float
    """|D - B A| / |D|, B and A as they are stored."""
    square: float
    """|D|^2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What was written."""

    folder: Path
    base_model: str
    weights: list[ExportedWeight]
    num_bytes: int
    """Of the file of weights."""
    starts_from_exact: bool
    """Whether the model's weights are exact; else the update has the noise of their rounding in it."""
    base_is_rounded: bool
    """Whether the base's own weights are served rounded: the update is that of its exact ones."""

    @property
    def error(self) -> float:
        """|D - B A| / |D| over all weights."""
        total = sum(weight.square for weight in self.weights)
        return (sum(weight.error**2 * weight.square for weight in self.weights) / total) ** 0.5


def export_adapter(
    model: str,
    output: Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Adapter:
    """Write what `model` learned on top of `base` as a PEFT adapter to the folder `output`.

    model, base: folder, URI or Hugging Face id; the base is by default the one that the model's osft.json names. rank:
    the largest of any weight, None for all that was learned. dtype: of the adapter's weights. One weight, or stack of
    experts, is in memory at a time, beside the adapter.

    Raises FileNotFoundError for a missing model, ValueError for models of different architectures, models that do not
    differ, a change that LoRA or PEFT cannot hold, and an output folder that is not empty.
    """
    with new_folder(output) as temporary:
        folder = model_folder(model)
        base, base_folder = base_of(model, folder, base)
        skeleton = empty_model(folder, trust_remote_code=trust_remote_code)
        refuse_other_architecture(folder, base_folder, trust_remote_code=trust_remote_code)
        tuned, before = (ModelWeights(CheckpointReader(path), skeleton) for path in (folder, base_folder))
        changed = {name: _target(skeleton, name) for name in _changed_tensors(tuned, before, skeleton)}
        if not changed:
            raise ValueError(f"{model} has the same weights as {base}: there is nothing to export")
        targets = _loadable(changed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensor_names = _tensor_names(targets.values(), skeleton)
        tensors: dict[str, torch.Tensor] = {}
        weights = []
        for name, target in tqdm(targets.items(), desc="factorize", unit="weight", mininterval=2.0):
            exact, old = (stored.tensor(name).to(device).float() for stored in (tuned, before))
            update = exact - old
            b, a, full_rank = _factors(target, exact, update, rank, dtype)
            weights.append(
                ExportedWeight(
                    name=name,
                    shape=tuple(update.shape),
                    rank=a.shape[1],
                    full_rank=full_rank,
                    error=_relative_error(update, b, a, transposed=target.transposed),
                    square=square(update),
                )
            )
            # Of a stack, A has the experts one after the other, B for each rank the experts' columns.
            tensors[f"{tensor_names[target]}.lora_A.weight"] = a.flatten(0, 1).cpu().contiguous()
            tensors[f"{tensor_names[target]}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).cpu().contiguous()
        temporary.mkdir()
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        ranks = {target: weight.rank for target, weight in zip(targets.values(), weights, strict=True)}
        config = _adapter_config(skeleton, ranks, base)
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Adapter(
        folder=output,
        base_model=base,
        weights=weights,
        num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        starts_from_exact=tuned.are_exact(list(targets)),
        base_is_rounded=any(before.reader.has_residual(name) for name in before.reader.names()),
    )


def _changed_tensors(tuned: ModelWeights, before: ModelWeights, skeleton: PreTrainedModel) -> list[str]:
    """Names, in the model's order, of the tensors that differ. Raises ValueError if one has no counterpart."""
    names = [name for name in skeleton.state_dict() if name in tuned or name in before]
    changed = []
    for name in tqdm(names, desc="compare", unit="weight", mininterval=2.0):
        if (name in tuned) != (name in before):
            has, lacks = (tuned, before) if name in tuned else (before, tuned)
            other = _tied_to(skeleton, name, lacks)
            if other is not None and torch.equal(has.tensor(name).float(), lacks.tensor(other).float()):
                continue
            raise ValueError(
                f"{has.folder} stores {name} and {lacks.folder} does not: they are no two states of one model. Give "
                "the model that it was trained from with --base"
            )
        if not torch.equal(tuned.tensor(name).float(), before.tensor(name).float()):
            changed.append(name)
    return changed


def _tied_to(skeleton: PreTrainedModel, name: str, stored: ModelWeights) -> str | None:
    """The stored tensor that the model takes for `name`, which is tied to it."""
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    return next((other for other, parameter in parameters.items() if parameter is own and other in stored), None)


def _loadable(targets: Mapping[str, "_Target | str"]) -> dict[str, "_Target"]:
    """The targets. Raises ValueError for the tensors that have none."""
    refused = [f"{name} ({target})" for name, target in targets.items() if isinstance(target, str)]
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ValueError(
            f"LoRA cannot hold what changed in {', '.join(refused[:5])}{more}. `--format hf` holds all weights"
        )
    return {name: target for name, target in targets.items() if not isinstance(target, str)}


@dataclass(frozen=True, slots=True)
class _Target:
    """What PEFT adapts."""

    module: str
    """The module that holds the weight."""
    parameter: str | None
    """The weight's name in the module if PEFT is to wrap the parameter, None if it is to wrap the linear layer."""
    transposed: bool
    """Whether the weight is (in, out), (E, in, out) of experts."""

    @property
    def name(self) -> str:
        """As PEFT's configuration has it."""
        return f"{self.module}.{self.parameter}" if self.parameter else self.module


def _target(skeleton: PreTrainedModel, name: str) -> _Target | str:
    """What PEFT adapts to change a tensor of the model, or why it cannot."""
    module_name, _, leaf = name.rpartition(".")
    module = skeleton.get_submodule(module_name)
    if leaf not in dict(module.named_parameters(recurse=False)):
        return "a buffer"
    parameter = module.get_parameter(leaf)
    if sum(other is parameter for _, other in skeleton.named_parameters(remove_duplicate=False)) > 1:
        return "tied to another weight"
    last, model_type = module_name.rpartition(".")[2], skeleton.config.model_type
    if last == "dt_proj" or (last in _MAMBA_LAYERS and model_type in _MAMBA_MODELS):
        return "Mamba layers read this weight without the layer that PEFT would change"
    if leaf == "weight" and isinstance(module, Conv1D):
        return _Target(module_name, None, transposed=True)
    if leaf == "weight" and isinstance(module, nn.Linear):
        # A router that is a linear layer and gives more than its output would be torn apart.
        plain = type(module).forward is nn.Linear.forward and last not in _old_expert_layers(model_type)
        return _Target(module_name, None if plain else leaf, transposed=False)
    if parameter.ndim not in (2, 3) or isinstance(module, nn.Embedding | nn.Conv1d | nn.ConvTranspose1d):
        return "neither the weight of a linear layer nor a stack of experts"
    if parameter.ndim == 3 and parameter.shape[0] == 1:
        return "a stack of one expert, which PEFT takes for a plain weight"
    return _Target(module_name, leaf, transposed=parameter.ndim == 3 and bool(getattr(module, "is_transposed", False)))


_MAMBA_LAYERS = ("x_proj", "out_proj", "conv1d")
_MAMBA_MODELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Where PEFT refuses these layers, or fused kernels read them."""


def _old_expert_layers(model_type: str) -> set[str]:
    """Names of linear layers that PEFT 0.21 takes for the experts of older releases of transformers.

    It takes them so wherever they are, in a dense block or a shared expert too, and adapts the stacks instead. The
    weights of such layers are named as parameters, which it leaves as they are.
    """
    conversions = get_checkpoint_conversion_mapping(model_type) or ()
    patterns = [
        pattern for each in conversions if isinstance(each, WeightConverter) for pattern in each.source_patterns
    ]
    return (
        {"gate"} | {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns} if patterns else set()
    )


def _factors(
    target: _Target, exact: torch.Tensor, update: torch.Tensor, rank: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """B (E, out, r) and A (E, r, in) of a stack, or with E = 1 of a single weight, and the r that loses nothing."""
    stacks = [tensor if tensor.ndim == 3 else tensor[None] for tensor in (update, exact)]
    stack, weights = (each.mT for each in stacks) if target.transposed else stacks
    pairs = [factorize(one, noise_floor(weight)) for one, weight in zip(stack, weights, strict=True)]
    full_rank = max(a.shape[0] for _, a in pairs)
    kept = full_rank if rank is None else min(rank, full_rank)
    b = stack.new_zeros(len(stack), stack.shape[1], kept, dtype=dtype)
    a = stack.new_zeros(len(stack), kept, stack.shape[2], dtype=dtype)
    for expert, (left, right) in enumerate(pairs):
        b[expert, :, : left.shape[1]] = left[:, :kept]
        a[expert, : right.shape[0]] = right[:kept]
    return b, a, full_rank


def _relative_error(update: torch.Tensor, b: torch.Tensor, a: torch.Tensor, *, transposed: bool) -> float:
    """|D - B A| / |D|."""
    product = b.float() @ a.float()
    difference = update - (product.mT if transposed else product).view(update.shape)
    return (square(difference) / square(update)) ** 0.5


def _tensor_names(targets: Collection[_Target], skeleton: PreTrainedModel) -> dict[_Target, str]:
    """Where PEFT looks for the factors of each target.

    Parameters of one module are wrapped one after the other, in the module's order, each wrapper around the last.
    """
    names = {}
    for target in targets:
        around = 0
        if target.parameter:
            wrapped = {other.parameter for other in targets if other.module == target.module}
            order = [leaf for leaf, _ in skeleton.get_submodule(target.module).named_parameters(recurse=False)]
            around = sum(leaf in wrapped for leaf in order[order.index(target.parameter) + 1 :])
        names[target] = f"base_model.model.{target.module}{'.base_layer' * around}"
    return names


def _adapter_config(skeleton: PreTrainedModel, ranks: Mapping[_Target, int], base: str) -> dict[str, Any]:
    """The content of adapter_config.json (`peft.LoraConfig`)."""
    largest = max(ranks.values())
    patterns = {re.escape(target.name): rank for target, rank in ranks.items() if rank != largest}
    modules = [target.module for target in ranks if target.parameter is None]
    name, _, revision = (base, "", "") if Path(base).exists() or storage.is_remote(base) else base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(Path(name).resolve()) if Path(name).is_dir() else name,
        "revision": revision or None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _shortest(modules, [name for name, _ in skeleton.named_modules()]),
        "target_parameters": [target.name for target in ranks if target.parameter] or None,
        "fan_in_fan_out": any(target.transposed for target in ranks if target.parameter is None),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _shortest(modules: list[str], all_modules: list[str]) -> list[str]:
    """Names for PEFT, which compares their ends: the last part where it stands for these modules only, else all."""
    found: dict[str, None] = {}
    for module in modules:
        last = module.rpartition(".")[2]
        same = {name for name in all_modules if name.rpartition(".")[2] == last}
        found[last if same <= set(modules) else module] = None
    return list(found)
