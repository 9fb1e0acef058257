"""How far the candidate's predictions moved: on each set, over all rounds, and by which weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from osft.evaluation.record import Evaluation
from osft.evaluation.report.results import ROLES
from osft.evaluation.report.rounds import line_plot
from osft.evaluation.report.subspace import Place, block_and_kind, by_block
from osft.evaluation.report.svg import Plot
from osft.models.training_summary import SamplingQuality, TrainingSummary, WeightSummary


def drift_section(evaluation: Evaluation, training: TrainingSummary | None) -> dict[str, Any] | None:
    """What the section about the drift shows; None of an evaluation that did not measure it.

    `rows`: of each set, the new task first, `name`, `role` and `drift`: model -> `SetDrift` or None. `predicted`: what
    training found of its own update, see `predicted_drift`. `imprecise`: the dtype that adds an error of its own.
    `rounds_plot` is None after one round.
    """
    drift = evaluation.drift
    if not drift:
        return None
    sets = sorted(evaluation.sets.items(), key=lambda item: ROLES.index(item[1].role))
    rows = [
        {"name": name, "role": described.role, "drift": {model: found[name] for model, found in drift.items()}}
        for name, described in sets
    ]
    dtypes = {found.dtype for of_sets in drift.values() for found in of_sets.values() if found}
    written = [drift[evaluation.reference][name] for name, one in sets if one.role == "self-written"]
    matrix = evaluation.matrix
    return {
        "rows": rows,
        "imprecise": ", ".join(sorted(dtypes - {"float32"})),
        "predicted": predicted_drift(training.rank_layout, training.sampled_drift) if training else None,
        "measured": next((found for found in written if found), None),
        "rounds_plot": _rounds_plot(matrix.drift) if matrix and matrix.drift and len(matrix.rounds) > 1 else None,
    }


def predicted_drift(layouts: Mapping[str, WeightSummary], sampled: SamplingQuality | None) -> dict[str, Any] | None:
    """What the update of each weight does, of `rank_layout`; None if nothing was predicted or sampled.

    `total`: the sum of the formula in nats per token, None without. `plot`: each weight's share, of the sampled drift
    where there is one (`sampled`: how well it is known), else of the formula. `error`: of each sampled one, in percent.
    """
    formula, draws = (
        {target: found for target, layout in layouts.items() if (found := getattr(layout, key)) is not None}
        for key in ("predicted_drift", "sampled_drift")
    )
    if not (formula or draws):
        return None
    title = f"Share of each weight in the {'sampled' if draws else 'predicted'} drift, in percent"
    return {
        "total": sum(formula.values()) if formula else None,
        "plot": by_block("predicted-drift", title, drift_shares(draws or formula), digits=1),
        "error": 100 * sampled.relative_error if draws and sampled else None,
    }


def drift_shares(predicted: dict[str, float]) -> dict[Place, float]:
    """(block, kind) -> share of the sum over all targets; several weights of one block and kind (experts) add up.

    Nothing where no update moves the model, or one by what is no number.
    """
    total = sum(predicted.values())
    found: dict[Place, float] = {}
    for target, value in predicted.items():
        if (place := block_and_kind(target)) and total > 0 and math.isfinite(total):
            found[place] = found.get(place, 0.0) + value / total
    return found


def _rounds_plot(drifts: Mapping[str, Sequence[float | None]]) -> Plot:
    """KL(base || model) on each set after each round."""
    return line_plot("drift-kl", "Drift from the base model after each round (KL, nats per token)", drifts)
