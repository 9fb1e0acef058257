"""What a model does with several samples at once, tried before anything expensive.

Whether packed samples stay apart is a property of a model's code, not of its name or its weights: a recurrent state,
a convolution or a running position carries one sample into the next. So the code is run, on a few tokens, with random
weights and one block of each kind. The logits of samples that share a micro-batch are compared with those of a
sample alone:

    as alone, packed in one row                 PACKED
    as alone only with a row for each sample    PADDED
    neither, or other without what follows      refused

Where packed samples stay apart, samples that branch from one beginning are tried, too, and attention that is told where
samples begin instead of what to mask; and of every model, an output head that gives losses instead of logits.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from osft.data.chat import IGNORE, Sample
from osft.data.packing import Batching, collate
from osft.models.checkpoint import CheckpointReader
from osft.models.likelihood import target_logits, token_nll
from osft.models.loading import UnsupportedModelError, empty_model
from osft.models.loss_head import LossHead
from osft.models.packed_attention import AttentionShape, Packed, masked, register
from osft.process.private_names import attention_of, has_flash_attention, set_attention
from osft.subspace.model import inject_empty, osft_layers
from osft.subspace.random_weights import ROWS, compute_one_block_of_each_kind, fill_at_random
from osft.subspace.targets import select_targets

TOLERANCE = 1e-3
"""Largest difference of logits, as a share of their standard deviation, that rounding may make in float32."""
_LENGTHS = (9, 14, 11)
"""Tokens of the samples that are tried."""
_LARGEST_GRADIENT = 2**26
"""Elements of the largest weight whose training is tried: that of a stack of experts forms a gradient of its size."""
_MLP_WIDTH = 1024
"""The MLPs of a large model, most of its numbers, are cut to so many first: what its code does is the same."""
_WINDOW = 4
"""Tokens that sliding windows are cut to first, fewer than a sample has: else what they hide would not be seen."""
_CUT = 8
"""Tokens that are left of the second one, to see whether it misses what follows."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found out about a model."""

    batching: Batching
    """How its samples are fed."""
    reason: str
    """Why, in a few words."""
    branches: bool = False
    """Whether samples can share what they begin with: see `osft.data.branches`."""
    attention: tuple[AttentionShape, ...] = ()
    """What the layers ask of their attention where it can be told where samples begin, instead of what to mask
    (`osft.models.packed_attention`). Empty where it cannot."""
    loss_head: bool = False
    """Whether the loss is that of the output head's product and nothing more: see `osft.models.loss_head`."""

    @property
    def shared_batching(self) -> Batching:
        """How samples are fed where a mask over all of a row costs little: with shared beginnings, if that is right."""
        return Batching.BRANCHED if self.branches else self.batching

    def text(self) -> str:
        """Both, in a phrase."""
        how = "samples are packed" if self.batching is Batching.PACKED else "one sample a row"
        return f"{how}: {self.reason}"

    def line(self) -> str:
        """For a log."""
        return f"model: {self.text()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preflight":
        """What `to_dict` gave."""
        shapes = tuple(AttentionShape(**shape) for shape in values["attention"])
        return cls(
            Batching(values["batching"]), values["reason"], values["branches"], shapes, loss_head=values["loss_head"]
        )


def preflight(
    model_path: str | Path, *, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Preflight:
    """Check the files of a model folder against each other and try its architecture.

    The headers of weights and the tokenizer are checked where the folder has them; config.json it must have. Raises
    FileNotFoundError for what is missing, DamagedFileError for a file that is not whole, ValueError for weights that
    are quantized, a tokenizer that is larger than the model and an attention that the architecture does not have, and
    UnsupportedModelError for one that cannot be trained as a causal language model.
    """
    folder = Path(model_path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model_path} is not a model folder: it has no config.json")
    if any(folder.glob("*.safetensors*")):
        CheckpointReader(folder)
    key = ((folder / "config.json").read_bytes(), attn_implementation)
    if trust_remote_code or key not in _tried:  # custom code is no part of the key
        try:
            _tried[key] = _preflight(folder, attn_implementation, trust_remote_code, cut=True)
        except Exception:  # perhaps other shapes depend on what was cut; what else is wrong is so again
            _tried[key] = _preflight(folder, attn_implementation, trust_remote_code, cut=False)
    found, vocabulary = _tried[key]
    if any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        _check_tokenizer(folder, vocabulary, trust_remote_code)
    return found


TOKENIZER_FILES = ("tokenizer", "vocab", "merges")
"""What the names of a tokenizer's files begin with."""
_tried: dict[tuple[bytes, str | None], tuple[Preflight, int]] = {}
"""By config.json and attention: what this process has tried, and the rows of the embeddings."""


def _check_tokenizer(folder: Path, vocabulary: int, trust_remote_code: bool) -> None:
    """Raise ValueError if the tokenizer gives ids for which the model has no embedding.

    A padding token of its own is not used in training and allowed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocabulary}
    outside.pop(tokenizer.pad_token, None)
    if outside:
        first = min(outside, key=outside.__getitem__)
        raise ValueError(
            f"{folder}: the tokenizer is larger than the model: {first!r} is token {outside[first]}"
            f"{f' and {len(outside) - 1} more follow' if len(outside) > 1 else ''}, and the model has embeddings for 0 "
            f"to {vocabulary - 1}. Give the model's own tokenizer, or call `model.resize_token_embeddings("
            f"{max(outside.values()) + 1})`, train the new rows and save both"
        )


def check_data(folder: Path, model_path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Raise ValueError if a prepared dataset has a token for which the model has no embedding."""
    from osft.data.dataset_folder import load_split

    vocabulary = _vocabulary(empty_model(model_path, trust_remote_code=trust_remote_code))
    largest = load_split(folder, "train").largest_token
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer of {model_path} gave token {largest} for the data, and the model has embeddings for 0 to "
            f"{vocabulary - 1}. Give the model's own tokenizer"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """Rows of the embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _preflight(
    folder: Path, attn_implementation: str | None, trust_remote_code: bool, *, cut: bool
) -> tuple[Preflight, int]:
    """What was found out, and the rows of the embeddings. `cut`: of the model with what is wide made narrow."""
    varlen = attn_implementation not in (None, "sdpa", "eager")
    model = empty_model(
        folder,
        attn_implementation=None if varlen else attn_implementation,
        max_mlp_width=_MLP_WIDTH if cut else None,
        max_window=_WINDOW if cut else None,
        trust_remote_code=trust_remote_code,
    )
    if varlen and not has_flash_attention(model):
        raise ValueError(
            f"attn_implementation={attn_implementation!r}: {type(model).__name__} does not have it. Use 'sdpa' or "
            "'eager'"
        )
    vocabulary = _vocabulary(model)
    model.set_experts_implementation("eager")  # the others copy all experts
    targets = [target for target in select_targets(model) if math.prod(target.shape) < _LARGEST_GRADIENT]
    names = [target.name for target in targets]
    inject_empty(model, targets, dict.fromkeys(names, 1), split_kinds=dict.fromkeys(names, "complement"))
    fill_at_random(model)
    compute_one_block_of_each_kind(model)
    found = examine(model, name=str(folder))
    if found.batching is Batching.PACKED and attn_implementation is None and (cut or not _hidden_parts(model)):
        found = replace(found, attention=_try_boundaries(model))
    if varlen and found.batching is Batching.PACKED:
        set_attention(model.config, _VARLEN)
        try:
            found = examine(model, name=str(folder))
        except UnsupportedModelError:  # it has a way of its own into the kernel, which a CPU cannot go
            found = Preflight(Batching.PADDED, f"whether {attn_implementation} packs them well cannot be seen here")
    return found, vocabulary


def examine(model: PreTrainedModel, *, name: str = "the model") -> Preflight:
    """Try `model`, which has its OSFT layers, in float32 on any device. Raises UnsupportedModelError as `preflight`."""
    first, second, third = _samples(model)
    cut = Sample(second.input_ids[:_CUT], second.labels[:_CUT])
    model.eval()
    try:
        (alone,) = _logits(model, [second], Batching.PADDED)
        *rows, cut_row = _logits(model, [first, second, third, cut], Batching.PADDED)
    except Exception as error:
        raise UnsupportedModelError(f"{name}: {_what(model)} cannot compute a plain text: {_told(error)}") from error
    if not alone.isfinite().all():
        raise UnsupportedModelError(f"{name}: {_what(model)} computes logits that are not finite")
    if not _difference(cut_row, alone[: _CUT - 1]) <= TOLERANCE:
        raise UnsupportedModelError(
            f"{name}: {_what(model)} sees the tokens that follow, so it is not a causal language model. Give one that "
            "is (with is_decoder=true in config.json, where its architecture has that setting)"
        )
    if not (difference := _difference(rows[1], alone)) <= TOLERANCE:
        raise UnsupportedModelError(
            f"{name}: {_what(model)} lets samples that are computed together change each other's logits (by "
            f"{difference:.2g} standard deviations), so they cannot be trained in batches"
        )
    result = _try_packed(model, [first, second, third], rows)
    result = replace(result, loss_head=_try_loss_head(model, [first, second, third], result.batching))
    try:
        _backward(model, [first, second, third], result.batching)
    except Exception as error:
        raise UnsupportedModelError(f"{name}: {_what(model)} cannot be trained: {_told(error)}") from error
    finally:
        model.eval()
    return result


def _what(model: PreTrainedModel) -> str:
    return type(model).__name__


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _try_packed(model: PreTrainedModel, samples: Sequence[Sample], rows: Sequence[torch.Tensor]) -> Preflight:
    """Compare `samples` in one row with what they are in `rows` of their own."""
    try:
        packed = _logits(model, samples, Batching.PACKED)
    except Exception as error:
        return Preflight(Batching.PADDED, f"packed ones cannot be computed ({_told(error)[:80]})")
    difference = max(_difference(*pair) for pair in zip(packed, rows, strict=True))
    if not difference <= TOLERANCE:
        return Preflight(
            Batching.PADDED, f"packed ones would change each other's logits, by {difference:.2g} standard deviations"
        )
    reason = f"they do not change each other's logits (by {difference:.0e})"
    return Preflight(Batching.PACKED, reason, branches=_try_branches(model, samples))


@torch.no_grad()
def _try_branches(model: PreTrainedModel, samples: Sequence[Sample]) -> bool:
    """Whether `samples` that go on from one beginning have the logits that they have with one each.

    Not tried where a layer sees a part of a row only: how far it is from a prompt to its last answer in a row says
    nothing of how far it is in a sample.
    """
    if _hidden_parts(model):
        return False
    beginning, *others = samples
    answers = [
        Sample(beginning.input_ids + sample.input_ids, [IGNORE] * len(beginning.input_ids) + sample.labels)
        for sample in others
    ]
    together = [*answers, samples[1]]
    try:
        branched, packed = (
            target_logits(model, collate(together, batching).to(model.device))
            for batching in (Batching.BRANCHED, Batching.PACKED)
        )
    except Exception:  # it takes no mask of this form
        return False
    return _difference(branched.float(), packed.float()) <= TOLERANCE


@torch.no_grad()
def _try_loss_head(model: PreTrainedModel, samples: Sequence[Sample], batching: Batching) -> bool:
    """Whether losses are the same if the output head computes them from its own product."""
    batch = collate(samples, batching).to(model.device)
    expected = token_nll(model, batch)
    head: Any = model.get_output_embeddings()
    if not LossHead.take_place_in(model):
        return False
    try:
        found = token_nll(model, batch)
    except Exception:  # its code looks at the logits
        return False
    finally:
        head.__class__ = nn.Linear
    return found.shape == expected.shape and _difference(found, expected) <= TOLERANCE


def _hidden_parts(model: PreTrainedModel) -> set[str]:
    """What keeps a layer of the model from seeing all of a row: its kind, or where kinds have no names, the setting."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return kinds - {"full_attention"}
    return {name for name, value in vars(config).items() if ("window" in name or "chunk" in name) and value}


@torch.no_grad()
def _try_boundaries(model: PreTrainedModel) -> tuple[AttentionShape, ...]:
    """What the layers ask of their attention, if packed samples stay what they are by their boundaries alone."""
    if attention_of(model.config) != "sdpa" or not has_flash_attention(model):
        return ()
    if _hidden_parts(model) - {"sliding_attention", "sliding_window"}:  # by masks that kernels know nothing of
        return ()
    shapes: set[AttentionShape] = set()

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed) -> torch.Tensor:
        heads = query.shape[1], key.shape[1], query.shape[2], value.shape[2]
        shapes.add(AttentionShape(*heads, scale=packed.scale, window=packed.window))
        return masked(query, key, value, packed)

    register(_TRIED, kernel)
    samples = _samples(model)
    expected = _logits(model, samples, Batching.PACKED)
    set_attention(model.config, _TRIED)
    try:
        found = _logits(model, samples, Batching.PACKED)
    except Exception:  # its code wants a mask
        return ()
    finally:
        set_attention(model.config, "sdpa")
    right = all(_difference(*pair) <= TOLERANCE for pair in zip(found, expected, strict=True))
    return tuple(sorted(shapes)) if right else ()


def _samples(model: PreTrainedModel) -> list[Sample]:
    """Samples of ordinary tokens."""
    text_config = model.config.get_text_config()
    special: set[int] = set()
    for config in (model.config, text_config):
        for key, value in vars(config).items():
            if key.endswith(("token_id", "token_index")) and value is not None:
                special |= set(value if isinstance(value, list) else [value])
    ordinary = [token for token in range(min(ROWS, text_config.vocab_size)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in _LENGTHS:
        row = [ordinary[i] for i in torch.randint(len(ordinary), (length,), generator=generator).tolist()]
        samples.append(Sample(row, row))
    return samples


@torch.no_grad()
def _logits(model: PreTrainedModel, samples: Sequence[Sample], batching: Batching) -> list[torch.Tensor]:
    """Of each sample but for its last token, (tokens - 1, vocabulary)."""
    logits = target_logits(model, collate(samples, batching).to(model.device))
    return list(logits.float().split([len(sample.input_ids) - 1 for sample in samples]))


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of two sets of logits, as a share of the standard deviation of the second."""
    return ((found - expected).abs().max() / expected.std().clamp_min(1e-30)).item()


def _backward(model: PreTrainedModel, samples: Sequence[Sample], batching: Batching) -> None:
    """One backward pass in training mode. Raises what the model raises, and FloatingPointError without a gradient."""
    token_nll(model.train(), collate(samples, batching).to(model.device)).sum().backward()
    gradients = [layer.coefficients.grad for _, layer in osft_layers(model)]
    there = [gradient for gradient in gradients if gradient is not None]
    if not there or not all(gradient.isfinite().all() for gradient in there):
        raise FloatingPointError("its gradient is not finite" if there else "no weight gets a gradient")


_TRIED = "osft_tried"
_VARLEN = "osft_by_positions"


def _by_positions(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Flash attention of transformers on any device: it takes no mask, and knows packed samples by position ids."""
    rows, _, length, size = query.shape
    position_ids = settings.get("position_ids")
    if position_ids is None or rows != 1:
        position_ids = torch.arange(length, device=query.device)[None]
    (starts,) = (position_ids[0].diff(prepend=position_ids[0, :1]) != 1).nonzero(as_tuple=True)
    scale = settings.get("scaling") or size**-0.5
    boundaries = nn.functional.pad(starts.to(torch.int32), (0, 1), value=length)
    packed = Packed(boundaries, length, scale, settings.get("sliding_window") or 0)
    each_row = zip(*(tensor.transpose(1, 2) for tensor in (query, key, value)), strict=True)
    return torch.stack([masked(q, k, v, packed) for q, k, v in each_row]), None


AttentionInterface.register(_VARLEN, _by_positions)
AttentionMaskInterface.register(_VARLEN, flash_attention_mask)
