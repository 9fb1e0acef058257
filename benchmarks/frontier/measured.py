"""What a model's layers are fed, for the methods that protect by it: on text of its own, and on what it learned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from osft.data.packing import Feeding
from osft.data.self_written import FORMAT, FORMS, as_samples, write_text
from osft.storage.sealed import read_sealed, write_sealed
from osft.subspace import select_targets
from osft.subspace.calibration import measure, measure_inputs
from osft.subspace.statistics import Statistics
from osft.subspace.statistics_store import find_statistics, load_statistics, save_statistics
from osft.subspace.targets import Target

OWN_TOKENS = 3072
"""Of the text that the model writes."""
MAX_TOKENS = 1024
"""Of a micro-batch."""


@dataclass(frozen=True, slots=True)
class BothSides:
    """The eigenbases of S and C of a weight (m, n), and its curvature in them, as a multiple of the model's unit."""

    left: torch.Tensor
    """(m, m)."""
    right: torch.Tensor
    """(n, n)."""
    curvature: torch.Tensor
    """(m, n): s_i c_j / unit."""


class Knowledge:
    """What the base model wrote and what its layers were fed, made on first use and kept below `cache`."""

    def __init__(
        self, folder: Path, cache: Path, device: str, progress: Callable[[str], None], *, opened: bool
    ) -> None:
        """`opened`: whether half of the text begins as code and other kinds do."""
        self._folder, self._cache, self._device, self._progress = folder, cache, device, progress
        self._forms = FORMS if opened else ("plain", "chat")
        self._key = f"{folder.name}-{OWN_TOKENS}" + (f"-opened-{FORMAT}" if opened else "")
        self._statistics: Statistics | None = None

    def own_text(self) -> list[list[int]]:
        """Samples that the model wrote, as tokens."""
        from transformers import AutoTokenizer

        file = self._cache / f"own-text-{self._key}.json"
        if not file.is_file():
            self._progress(f"the model writes {OWN_TOKENS} tokens")
            tokenizer: Any = AutoTokenizer.from_pretrained(self._folder)
            written = write_text(self._model(), tokenizer, num_tokens=OWN_TOKENS, seed=0, forms=self._forms)
            write_sealed(file, {"samples": written})
        samples_read: list[list[int]] = read_sealed(file, "Remove it: the text is written again")["samples"]
        return samples_read

    def statistics(self) -> Statistics:
        """Of all layers on that text."""
        if self._statistics is None:
            address = find_statistics(self._cache, self._key)
            if address is None:
                own = self.own_text()
                self._progress(f"statistics of {sum(map(len, own))} tokens")
                measured = statistics_of(self._model(), own, "base", self._device)
                address = save_statistics(measured, self._cache, self._key)
            stored = load_statistics(address)
            self._statistics = Statistics(stored.parts, list(stored.inputs()))  # every run reads them
        return self._statistics

    def both_sides(self, targets: Sequence[Target]) -> dict[str, BothSides]:
        """Eigenbases and curvature, by target, on that text."""
        self._progress(f"both sides of {len(targets)} weights")
        unit, found = self.statistics().unit, {}
        samples = as_samples(self.own_text())
        measured = measure_inputs(
            self._model(),
            targets,
            samples,
            feeding=_feeding(self._device),
            gradients=True,
            output_tokens=sum(len(sample.input_ids) for sample in samples),
        )
        for sums in measured:
            assert sums.inputs is not None
            c, right = torch.linalg.eigh(sums.inputs)
            for name in sums.targets:
                s, left = torch.linalg.eigh(sums.outputs[name])
                found[name] = BothSides(left, right, s.clamp_min(0)[:, None] * c.clamp_min(0) / unit)
        return found

    def _model(self) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        return model.to(self._device).eval()


def _feeding(device: str) -> Feeding:
    return Feeding(max_tokens=MAX_TOKENS, device=torch.device(device))


def statistics_of(
    model: Any, samples: Sequence[Sequence[int]], name: str, device: str, onto: Statistics | None = None
) -> Statistics:
    """The statistics of all layers of a whole model on samples of tokens, added to others."""
    targets = select_targets(model)
    return measure(model, targets, as_samples(samples), feeding=_feeding(device), name=name, onto=onto)


def without_gradients(statistics: Statistics) -> Statistics:
    """The same as if no gradients had been measured: every s is 1. Weights are stored (out, in)."""
    inputs = list(statistics.inputs())
    curvature, entries = 0.0, 0
    for each in inputs:
        for output in each.output_moments.values():
            curvature += float(each.kept.trace()) * output.size
            entries += each.kept.size * output.size
    each_part = curvature / entries / len(statistics.parts)
    return Statistics(
        [replace(part, mean_curvature=each_part) for part in statistics.parts],
        [replace(each, gradient_energies={name: torch.ones(()) for name in each.targets}) for each in inputs],
    )
