"""Taking a tuned model out: what both forms of `osft export` share, and the exact weights as a plain model folder.

`osft.models.adapter` writes the other form, the update alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

from osft.models.checkpoint import CheckpointReader, SavedTensor, write_checkpoint
from osft.models.loading import model_folder
from osft.models.model_card import with_rounding
from osft.models.origin import MODEL_CARD, ORIGIN, RoundingLoss, read_origin
from osft.models.rounding import UpdateSums, generator_of, round_weight
from osft.storage.atomic import atomic_path

_IRRELEVANT = frozenset(
    {
        *("dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache", "architectures"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    }
)
"""Keys of a config.json on which a model's logits do not depend."""


def export_model(
    model: str, output: Path, *, dtype: torch.dtype, base: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Write the exact weights of `model` in `dtype`, float32 or bfloat16, as a plain Hugging Face folder.

    What is stored in bfloat16 already is written to a bfloat16 folder as it is. Of float32 weights what was trained is
    rounded stochastically (`osft.models.rounding`), so that nothing that was learned is lost on average, and the rest
    to the nearest number; which is which is seen by `base`, by default the model that osft.json names. A weight with a
    dtype of its own, as a router in float32, keeps it.

    Raises FileNotFoundError for a missing model, ValueError for a base of another architecture and an output folder
    that is not empty.
    """
    with new_folder(output) as temporary:
        folder = model_folder(model)
        reader = CheckpointReader(folder)
        names = reader.names()
        sizes: dict[torch.dtype, int] = {}
        for name in names:
            kept_in = reader.served_dtype(name)
            sizes[kept_in] = sizes.get(kept_in, 0) + reader.empty(name).numel()
        main_dtype = max(sizes, key=lambda each: sizes[each])
        before = None
        if dtype not in (torch.float32, main_dtype):
            _, base_folder = base_of(model, folder, base)
            refuse_other_architecture(folder, base_folder, trust_remote_code=trust_remote_code)
            before = CheckpointReader(base_folder)
        sums = UpdateSums()

        def tensors() -> Iterator[SavedTensor]:
            for name in tqdm(names, desc="write", unit="weight", mininterval=2.0):
                own = reader.served_dtype(name) != main_dtype and not reader.has_residual(name)
                if own or dtype == main_dtype != torch.float32:
                    yield SavedTensor(name, reader.served(name))
                elif before is None:
                    yield SavedTensor(name, reader.tensor(name).to(dtype))
                else:
                    exact, old = reader.tensor(name), _counterpart(before, name, reader)
                    rounded = round_weight(exact, old, dtype, "stochastic", generator=generator_of(name))
                    update = exact.double() - old.double()
                    if update.any():
                        sums.add(UpdateSums.of(update, rounded.double() - old.double()))
                    yield SavedTensor(name, rounded)

        origin = read_origin(folder)
        text = str(dtype).removeprefix("torch.")

        def files() -> dict[str, str]:
            card = folder / MODEL_CARD
            texts = {MODEL_CARD: card.read_text(encoding="utf-8")} if card.is_file() else {}
            if origin is None:
                return texts
            written = origin
            if dtype == torch.float32 or before is not None:
                rounding = "none" if before is None else "stochastic"
                total = RoundingLoss(update_lost=0.0, rounding_error=0.0, frozen_share=None)
                if sums.update:
                    total = sums.loss().replace(frozen_share=None)  # what is frozen is not known here
                written = origin.replace(dtype=text, rounding=rounding, total=total, weights={})
            described = {name: with_rounding(card_text, origin, written) for name, card_text in texts.items()}
            return described | {ORIGIN: written.to_json()}

        write_checkpoint(temporary, tensors(), folder, dtype=dtype, files=files)
    return output


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder's name that becomes `output`. Raises ValueError if that is there and not empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is there already. Give the name of a new folder")
    with atomic_path(output) as temporary:
        yield temporary
        if output.is_dir():
            output.rmdir()


def base_of(model: str, folder: Path, base: str | None) -> tuple[str, Path]:
    """The model that training started from, as given or as osft.json of `model` names it, and its local folder.

    Raises ValueError where neither says it, FileNotFoundError if it is not there.
    """
    if base is not None:
        return base, model_folder(base)
    origin = read_origin(folder)
    if origin is None:
        raise ValueError(f"{model} does not say what it was trained from (it has no {ORIGIN}). Give it with --base")
    try:
        return origin.base_model, model_folder(origin.base_model)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{model} was trained from another model, which is given with --base: {error}"
        ) from error


def refuse_other_architecture(folder: Path, base_folder: Path, *, trust_remote_code: bool) -> None:
    """Raise ValueError where the config.json of two models differ in what logits depend on."""
    ours, theirs = (
        _relevant(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict())
        for path in (folder, base_folder)
    )
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        key = different[0]
        raise ValueError(
            f"{folder} is no tuned form of {base_folder}: their config.json differ in {', '.join(different)} "
            f"({key}: {ours.get(key)!r} and {theirs.get(key)!r}). Give the model that it was trained from with --base"
        )


def _relevant(value: Any) -> Any:
    """A config without the irrelevant keys, of its parts too."""
    if isinstance(value, Mapping):
        return {key: _relevant(part) for key, part in value.items() if key not in _IRRELEVANT}
    return value


def _counterpart(base: CheckpointReader, name: str, reader: CheckpointReader) -> torch.Tensor:
    """The base's tensor of a name and shape."""
    if name not in base or base.empty(name).shape != reader.empty(name).shape:
        raise ValueError(
            f"{base.folder} has no {name} of the shape that {reader.folder} has. Give the model that it was trained "
            "from with --base"
        )
    return base.tensor(name)
