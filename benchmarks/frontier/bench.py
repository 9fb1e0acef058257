"""Where runs happen: the network of a scope, what is read and measured there, and what is known of its layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from benchmarks.frontier.materials import REPLAYED_TOKENS, Materials
from benchmarks.frontier.measured import BothSides, Knowledge, statistics_of, without_gradients
from benchmarks.frontier.methods import Known, Method
from benchmarks.frontier.network import Network, Reference, Seen, Text, measure, reference
from benchmarks.frontier.training import Others
from osft.subspace import select_targets
from osft.subspace.statistics import Statistics

Scope = Literal["screen", "whole"]
SCREENED_BLOCKS = 8
CARRIED_SAMPLES = 6
"""Training samples of a task that its statistics are measured on."""


class Bench:
    """The network of a scope, and what runs need beside it; everything is made on first use."""

    def __init__(
        self, materials: Materials, scope: Scope, cache: Path, device: str, progress: Callable[[str], None]
    ) -> None:
        cut = scope == "screen"
        self.network = Network(
            materials.folder,
            device,
            blocks=SCREENED_BLOCKS if cut else None,
            vocabulary=materials.vocabulary if cut else None,
            cache=cache,
        )
        self._knowledge = {
            opened: Knowledge(materials.folder, cache, device, progress, opened=opened) for opened in (True, False)
        }
        self._materials = materials
        self._seen: dict[str, Seen] = {}
        self._both_sides: dict[bool, dict[str, BothSides]] = {}
        self._base = Reference({}, self.network.head().clone())
        self.base: dict[str, dict[str, list[float]]] = {}
        """What there is to measure of the base, by the text's name."""

    def task(self, name: str) -> Seen:
        """The training samples of a task."""
        return self._see(f"train {name}", self._materials.train[name])

    def held_out(self, name: str) -> Seen:
        """The held-out samples of a task, or a text that measures drift."""
        return self._see(f"held out {name}", self._materials.held_out[name])

    def others(self, method: Method, learned: tuple[str, ...]) -> Others:
        """What a method trains on beside a task, after some others."""
        replay: tuple[Seen, ...] = ()
        own: Seen | None = None
        if method.replay_ratio:
            earlier = {f"pieces {name}": self._materials.train[name].pieces(REPLAYED_TOKENS) for name in learned}
            texts = {"replay": self._materials.replay, **earlier}
            replay = tuple(self._see(name, text) for name, text in texts.items())
        if method.distill_weight:
            pieces = [
                Text.of_blocks(torch.tensor([sample])).pieces(REPLAYED_TOKENS).tokens
                for sample in self._knowledge[method.opened].own_text()
            ]
            own = self._see(f"own, opened: {method.opened}", Text.of_blocks(torch.cat(pieces)))
        return Others(replay, own)

    def known(self, method: Method, carried: Statistics | None) -> Known:
        """What a method knows of the layers before a task; `carried`: the statistics of the base and earlier tasks."""
        if method.kind == "activations":
            statistics = carried or self._knowledge[method.opened].statistics()
            return Known(statistics=statistics if method.measured_energy else without_gradients(statistics))
        if method.kind == "curvature":
            if method.opened not in self._both_sides:
                targets = select_targets(self.network.model)
                self._both_sides[method.opened] = self._knowledge[method.opened].both_sides(targets)
            return Known(both_sides=self._both_sides[method.opened])
        return Known()

    def carry(self, method: Method, carried: Statistics | None, task: str, samples: list[int]) -> Statistics | None:
        """The statistics after a task, measured on some of its training samples."""
        if method.kind != "activations" or not method.memory:
            return None
        tokens = self.task(task).text.tokens[samples[:CARRIED_SAMPLES]].tolist()
        before = carried or self._knowledge[method.opened].statistics()
        return statistics_of(self.network.model, tokens, task, self.network.device, before)

    def base_reference(self, names: list[str]) -> Reference:
        """The base on held-out texts. The network must hold the base's weights when a name is new."""
        for name in names:
            if name not in self.base:
                seen = self.held_out(name)
                self._base.hidden.update(reference(self.network, {name: seen}).hidden)
                self.base[name] = measure(self.network, seen, name, {})
        return self._base

    def _see(self, name: str, text: Text) -> Seen:
        if name not in self._seen:
            self._seen[name] = self.network.see(text)
        return self._seen[name]
