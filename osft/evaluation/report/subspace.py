"""What training did in the free subspace: the split of each weight, the sizes of the updates, what they used."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from osft.evaluation.report.heat_map import Scale, heat_map
from osft.evaluation.report.svg import LINES, PANEL, WORSE, Plot, log_scale, plot_style, printable, to_svg
from osft.models.training_summary import TrainingSummary, WeightSummary

if TYPE_CHECKING:
    from osft.subspace.factor_summary import FactorSummary, WeightSpectrum

MAX_NUMBERED_BLOCKS = 36
"""Heat map columns up to which the cells are wide enough for their numbers."""

Place = tuple[int, str]
"""A block's number and the kind of a weight in it."""


def subspace_section(factors: "FactorSummary", training: TrainingSummary | None) -> dict[str, Any]:
    """What the section about the subspace shows."""
    spectra = factors.weights
    energy = sum(weight.energy for weight in spectra.values())
    frozen_energy = sum(weight.frozen_energy for weight in spectra.values())
    of_weights = factors.protect == "weights"  # else the spectrum is the inputs', and says nothing of a weight's size
    layouts = training.rank_layout if training else {}
    norms = {target: norm for target, layout in layouts.items() if (norm := layout.weight_norm) is not None}
    if of_weights and not norms:  # of an older release
        norms = {target: math.sqrt(weight.energy) for target, weight in spectra.items()}
    sizes = relative_update_sizes({target: layout.update_norm for target, layout in layouts.items()}, norms)
    used = used_shares(layouts)
    return {
        "key": factors.key,
        "unfreeze_rank_ratio": factors.unfreeze_rank_ratio,
        "protect": factors.protect,
        "free_subspace": factors.free_subspace,
        "num_weights": len(spectra),
        "frozen_energy": frozen_energy / energy if energy else None,
        "spectra_plots": _spectra_plots(spectra, "Singular values" if of_weights else "Inputs"),
        "updates_plot": by_block("updates", "Size of each update, in percent of its weight's norm", sizes, digits=2),
        "largest_update": max(sizes.items(), key=lambda item: item[1]) if sizes else None,
        "saved": training.saved if training else None,
        "frozen_plot": by_block(
            "frozen", "Share of each stored update in frozen directions, in percent", frozen_shares(layouts), high=1.0
        ),
        "used_plot": by_block("used", "Use of the free subspace, in percent of its directions", used, high=1.0),
        "used": sum(used.values()) / len(used) if used else None,
        "most_used": max(used.items(), key=lambda item: item[1]) if used else None,
        "least_used": min(used.items(), key=lambda item: item[1]) if used else None,
    }


def block_and_kind(target: str) -> Place | None:
    """`model.layers.3.self_attn.q_proj` -> (3, "q_proj"); None for a name without a block number."""
    block = re.search(r"(?:^|\.)(\d+)(?:\.|$)", target)
    return (int(block[1]), target.rsplit(".", 1)[-1]) if block else None


def relative_update_sizes(updates: dict[str, float], weights: dict[str, float]) -> dict[Place, float]:
    """(block, kind) -> Frobenius norm of the update over that of the weight, from both norms of each target.

    Several weights of one block and kind (experts) count as one: the root of the sum of their squares.
    """
    sums: dict[Place, list[float]] = {}
    for target, update in updates.items():
        place = block_and_kind(target)
        if place and target in weights and math.isfinite(update):
            total = sums.setdefault(place, [0.0, 0.0])
            total[0] += update**2
            total[1] += weights[target] ** 2
    return {place: math.sqrt(update / weight) for place, (update, weight) in sums.items() if weight}


def used_shares(layouts: Mapping[str, WeightSummary]) -> dict[Place, float]:
    """(block, kind) -> effective rank of the update over the number of unfrozen directions, of `rank_layout`.

    Several weights of one block and kind count by their mean. Runs before this was measured give nothing.
    """
    found: dict[Place, list[float]] = {}
    for target, layout in layouts.items():
        place, rank = block_and_kind(target), layout.effective_rank
        if place and rank is not None and math.isfinite(rank) and layout.unfrozen:
            found.setdefault(place, []).append(rank / layout.unfrozen)
    return {place: sum(shares) / len(shares) for place, shares in found.items()}


def frozen_shares(layouts: Mapping[str, WeightSummary]) -> dict[Place, float]:
    """(block, kind) -> share of the stored update in frozen directions, of `rank_layout`; of several weights the mean.

    Runs before this was measured give nothing.
    """
    found: dict[Place, list[float]] = {}
    for target, layout in layouts.items():
        place, share = block_and_kind(target), layout.frozen_share
        if place and share is not None:
            found.setdefault(place, []).append(share)
    return {place: sum(shares) / len(shares) for place, shares in found.items()}


def _representatives(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Kind -> block -> target for up to four kinds, in the model's order, and the first, middle and last block."""
    found: dict[str, dict[int, str]] = {}
    for target in names:
        if place := block_and_kind(target):
            found.setdefault(place[1], {}).setdefault(place[0], target)
    kinds = list(found)
    chosen = [kinds[i] for i in sorted({round(i * (len(kinds) - 1) / 3) for i in range(4)})] if kinds else []
    return {
        kind: {block: found[kind][block] for block in sorted({b[0], b[len(b) // 2], b[-1]})}
        for kind in chosen
        if (b := sorted(found[kind]))
    }


def _spectra_plots(spectra: "Mapping[str, WeightSpectrum]", what: str) -> list[Plot]:
    """Spectra of representative weights, or of their inputs, and where they are split."""
    from matplotlib.figure import Figure

    plots = []
    for number, (kind, targets) in enumerate(_representatives(spectra).items()):
        with plot_style():
            figure = Figure(figsize=(PANEL[0], 2.5), layout="constrained")
            axes = figure.add_subplot()
            for (block, target), (color, line) in zip(targets.items(), LINES, strict=False):
                weight = spectra[target]
                points = [(i + 1, v) for i, v in zip(weight.indices, weight.values, strict=True) if v > 0]
                numbers, heights = zip(*points, strict=True) if points else ((), ())  # a log scale has no 0
                axes.plot(numbers, heights, color=color, linestyle=line, label=f"block {block}")
            split, size = weight.size - weight.rank, weight.size
            axes.axvspan(split + 0.5, size + 0.5, facecolor="#fff1d6", zorder=0)
            axes.axvline(split + 0.5, color=WORSE, linewidth=1, linestyle=":")
            axes.set_xlim(0.5, size + 0.5)
            log_scale(axes)
            axes.set_xlabel(f"{split} frozen | {size - split} unfrozen")
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=7.5)
            plots.append(to_svg(figure, f"spectra-{number}", f"{what} of {printable(kind)}"))
    return plots


def by_block(
    name: str, title: str, shares: dict[Place, float], *, digits: int = 0, high: float | None = None
) -> Plot | None:
    """Heat map of percentages, kinds x blocks; `high` is the end of the scale, by default the largest."""
    if not shares:
        return None
    blocks, kinds = sorted({block for block, _ in shares}), list(dict.fromkeys(kind for _, kind in shares))
    numbered = len(blocks) <= MAX_NUMBERED_BLOCKS
    cells = [[shares.get((block, kind)) for block in blocks] for kind in kinds]
    largest = 100 * (high or max(shares.values()) or 1.0)  # or a run that changed nothing
    return heat_map(
        name,
        title,
        [[None if share is None else 100 * share for share in row] for row in cells],
        [[f"{100 * share:.{digits}f}" if numbered and share is not None else "" for share in row] for row in cells],
        rows=kinds,
        columns=[str(block) for block in blocks],
        scale=Scale(label=title, low=0.0, high=largest, write=lambda value: f"{value:.3g} %"),
        column_label="block",
        cell_width=0.42 if numbered else 10 / len(blocks),
    )
