"""The README.md of a tuned model: what it is, what it learned and from what, said by those who know it.

The base model's own card is not copied: its scores, its training and its examples are another model's. Its licence is,
since it holds for what is made of the model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from osft.models.origin import MODEL_CARD

if TYPE_CHECKING:
    from osft.models.origin import Origin
    from osft.settings.training import TrainConfig

_LICENCE_KEYS = ("license", "license_name", "license_link", "language")
_SCORES_HEADING = "## Scores"


def model_card(
    config: "TrainConfig",
    origin: "Origin",
    *,
    base_folder: Path,
    dataset: Mapping[str, Any],
    replay: Mapping[str, Any] | None = None,
    scores: Mapping[str, float | None],
    name: str,
) -> str:
    """The card of a model that a training run writes, as Markdown with the metadata that the Hugging Face hub reads.

    base_folder: of the model that was trained; dataset: the content of dataset.json; replay: that of the
    samples that were replayed; scores: by name, of the step after which it is written; name: of the checkpoint.
    """
    base = origin.base_model
    metadata: dict[str, Any] = {
        **_licence(base_folder),
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["osft", "continual-learning", "orthogonal-subspace-fine-tuning"],
    }
    licence = metadata.get("license_name") or metadata.get("license")
    files = [("file", "SHA-256"), *((f"`{file}`", f"`{digest}`") for file, digest in dataset.get("files", {}).items())]
    settings = (
        *("unfreeze_rank_ratio", "protect", "stiffness", "free_subspace", "rank_allocation", "target_patterns"),
        *("learning_rate", "lr_scheduler", "warmup_steps", "effective_batch_size", "num_epochs", "max_steps"),
        *("max_seq_len", "weight_decay", "seed", "dtype", "save_dtype"),
    )
    sections = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip() + "\n---",
        f"# {name}",
        f"A model that learned by Orthogonal Subspace Fine-Tuning ([arXiv:2504.07097](https://arxiv.org/abs/2504.07097))"
        f" on top of `{base}`" + (f", from `{origin.trained_from}`." if origin.trained_from != base else "."),
        _licence_text(licence, base),
        "## What it learned",
        f"{dataset.get('num_train_samples', '?')} samples ({dataset.get('num_tokens', '?')} tokens, "
        f"{dataset.get('num_loss_tokens', '?')} with loss) of `{dataset.get('data_uri', config.data_path)}`:",
        _table(files),
        *_replay_text(replay),
        "## How",
        _table([("setting", "value"), *((f"`{key}`", f"`{getattr(config, key)!r}`") for key in settings)]),
        "## What was frozen",
        f"In {len(origin.weights)} weights of the transformer blocks {_frozen(config)}, "
        f"{1 - config.unfreeze_rank_ratio:.0%} of them on average; embeddings, norms and the head as a whole. The "
        "update is orthogonal to what is frozen.",
        _rounding_text(origin),
        _SCORES_HEADING,
        _table([("", "value"), *((key, _number(value)) for key, value in scores.items() if value is not None)]),
        "Losses are in nats per token. They say nothing of what was forgotten: evaluate the model before you use it.",
    ]
    return "\n\n".join(sections) + "\n"


def with_scores(card: str, scores: str) -> str:
    """A card with other scores, Markdown, in the place of those that training gave."""
    return card.split(_SCORES_HEADING)[0] + f"{_SCORES_HEADING}\n\n{scores.strip()}\n"


def with_rounding(card: str, before: "Origin", after: "Origin") -> str:
    """The card of a copy without exact/, whose weights are rounded as `after` says."""
    return card.replace(_rounding_text(before), _rounding_text(after, has_exact=False))


def _licence(base_folder: Path) -> dict[str, Any]:
    """What the base model's card says of its licence and its languages, if it has a card that can be read."""
    card = base_folder / MODEL_CARD
    if not card.is_file():
        return {}
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return {}
    return {key: metadata[key] for key in _LICENCE_KEYS if key in metadata} if isinstance(metadata, dict) else {}


def _licence_text(licence: Any, base: str) -> str:
    if licence:
        return f"The base model's licence, {licence}, holds for this model too."
    return f"The folder of the base model does not say under which licence it is: look it up where `{base}` came from."


def _frozen(config: "TrainConfig") -> str:
    if config.protect == "weights":
        return "the directions with the largest singular values"
    return "the directions of the layers' inputs that carry most energy on what the model knew"


def _replay_text(replay: Mapping[str, Any] | None) -> list[str]:
    if replay is None:
        return []
    sources = ", ".join(f"{part['num_samples']} of `{part['data_uri']}`" for part in replay["sources"])
    return [
        f"Beside them, so that earlier data is not forgotten, {replay['num_train_samples']} samples of it "
        f"({replay['num_tokens']} tokens) were replayed: {sources}."
    ]


def _rounding_text(origin: "Origin", *, has_exact: bool = True) -> str:
    total = origin.total
    if total.rounding_error is None:
        return "Nothing was learned: all weights are the base model's."
    if origin.rounding == "none":
        return f"The weights are stored in {origin.dtype}, which holds the update to its own precision."
    sentences = [
        f"The weights are stored in {origin.dtype}, rounded ({origin.rounding}): {total.update_lost:.1%} of the update "
        f"was lost, and the rounding error is {total.rounding_error:.1%} of the update's norm."
    ]
    if total.frozen_share is not None:
        sentences.append(f"{total.frozen_share:.1%} of the norm of the stored update lies in frozen directions.")
    if has_exact:
        sentences.append("The folder `exact/` keeps what rounding took: a next round starts from the exact weights.")
    return " ".join(sentences)


def _table(rows: list[tuple[str, str]]) -> str:
    head, *rest = rows
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rest)])


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
