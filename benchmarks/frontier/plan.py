"""Which runs there are, the most deciding ones first."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.frontier.bench import Scope
from benchmarks.frontier.materials import PACKAGES
from benchmarks.frontier.methods import Method
from benchmarks.frontier.runs import Run
from benchmarks.frontier.summary import EARLIER

FULL, LORA = Method(kind="full"), Method(kind="lora")
WEIGHTS, PEFT_OSF = Method(kind="weights", ratio=0.25), Method(kind="peft_osf", ratio=0.25)
BEST = Method(kind="activations", ratio=0.25, stiffness=10000.0)
"""The pipeline's default (osft.settings.training)."""


PROSE = replace(BEST, opened=False)
"""The same with what the model writes of itself: prose and chats, so that code is not protected."""


def _prose(ratio: float, stiffness: float = 0.0, *, measured_energy: bool = True) -> Method:
    return replace(PROSE, ratio=ratio, stiffness=stiffness, measured_energy=measured_energy)


PICTURED = (FULL, LORA, WEIGHTS, PEFT_OSF, Method(kind="full", replay_ratio=0.05), _prose(0.25), PROSE, BEST)
"""What the picture shows."""


LIMITS = {
    (str(FULL), "web"): 0.08, (str(FULL), EARLIER): 0.08, (str(FULL), "python"): 0.25,
    **{(str(other), text): 0.15 for other in (LORA, WEIGHTS, PEFT_OSF) for text in ("web", EARLIER)},
}  # fmt: skip
"""What the default's drift was to be at most, relative to other methods', over a sequence in the whole model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Runs that are compared with each other."""

    title: str
    scope: Scope
    tasks: tuple[str, ...]
    steps: int
    rates: Mapping[Method, tuple[float, ...]]
    """Learning rates by method, those that are likely the best first."""
    most_seeds: int = 3
    """There are samples for no more."""

    def runs(self, seeds: int) -> list[Run]:
        """For each seed the first rate of each method, then the second."""
        return [
            Run(
                scope=self.scope,
                tasks=self.tasks,
                steps=self.steps,
                method=method,
                learning_rate=rates[place],
                seed=seed,
            )
            for seed in range(min(seeds, self.most_seeds))
            for place in range(max(map(len, self.rates.values())))
            for method, rates in self.rates.items()
            if place < len(rates)
        ]


EXPERIMENTS = {
    "screen": Experiment(
        title="One far domain, the last 8 blocks",
        scope="screen",
        tasks=("german",),
        steps=16,
        rates={
            FULL: (3e-4, 1e-4, 1e-3),
            BEST: (3e-3, 1e-3, 1e-2),
            LORA: (3e-3, 1e-3, 1e-2),
            WEIGHTS: (1e-3, 3e-4, 1e-4, 3e-3),
            PEFT_OSF: (3e-4, 1e-3, 1e-4),
            replace(BEST, ratio=1.0): (3e-3, 1e-3, 3e-4),
            PROSE: (3e-3, 1e-3, 1e-2),
            _prose(0.25): (1e-3, 3e-3, 3e-4),
            _prose(0.5): (1e-3, 3e-3, 3e-4),
            _prose(1.0, 1000.0): (1e-3, 3e-3, 3e-4),
            _prose(1.0, 3000.0): (1e-3, 3e-3, 3e-4),
            _prose(1.0, 10000.0): (3e-3, 1e-3, 1e-2),
            _prose(1.0, 30000.0): (3e-3, 1e-2, 3e-2),
            _prose(0.5, 3000.0): (1e-3, 3e-3, 3e-4),
            _prose(0.25, 3000.0): (1e-3, 3e-3, 3e-4),
            _prose(0.5, 10000.0): (3e-3, 1e-3, 1e-2),
            _prose(0.5, 30000.0): (3e-3, 1e-2, 3e-2),
            _prose(1.0, 10000.0, measured_energy=False): (3e-3, 1e-3, 1e-2),
            _prose(1.0, 3000.0, measured_energy=False): (3e-3, 1e-3, 1e-2),
            Method(kind="curvature", stiffness=10000.0, opened=False): (1e-3, 3e-3, 3e-4),
            Method(kind="full", distill_weight=1.0, opened=False): (3e-4, 1e-3, 1e-4),
            replace(PROSE, distill_weight=1.0): (3e-3, 1e-3, 1e-2),
            Method(kind="full", replay_ratio=0.05): (3e-4, 1e-4, 1e-3),
            Method(kind="full", replay_ratio=0.01): (3e-4, 1e-4, 1e-3),
            Method(kind="lora", weight_decay=5.0): (3e-3, 1e-3, 1e-2),
        },
    ),
    "reviews": Experiment(
        title="Questions with a word as the answer, the last 8 blocks",
        scope="screen",
        tasks=("reviews",),
        steps=16,
        most_seeds=2,
        rates={
            FULL: (1e-4, 3e-5, 3e-4),
            BEST: (1e-3, 3e-4, 3e-3),
            PROSE: (1e-3, 3e-4, 3e-3),
            LORA: (1e-3, 3e-4, 3e-3),
            WEIGHTS: (3e-4, 1e-4, 1e-3),
        },
    ),
    "whole": Experiment(
        title="Three far domains in a sequence, the whole model",
        scope="whole",
        tasks=tuple(PACKAGES),
        steps=12,
        rates={
            FULL: (2e-4, 1e-4, 4e-4, 5e-5, 1e-3),
            BEST: (2e-3, 4e-3, 8e-3),
            LORA: (1e-3, 5e-4, 2e-3, 2.5e-4),
            WEIGHTS: (3e-4, 1e-4, 1e-3, 3e-5),
            PEFT_OSF: (3e-4, 1e-4, 1e-3),
            replace(BEST, ratio=0.5): (2e-3, 4e-3, 1e-3),
            replace(BEST, ratio=1.0): (2e-3, 4e-3, 1e-3),
            PROSE: (2e-3, 1e-3, 4e-3),
            _prose(0.25, 3000.0): (2e-3, 1e-3, 4e-3),
            _prose(0.25, 30000.0): (4e-3, 2e-3, 8e-3),
            _prose(1.0, 10000.0): (2e-3, 1e-3, 4e-3),
            _prose(0.5, 10000.0): (2e-3, 1e-3, 4e-3),
            replace(PROSE, memory=False): (2e-3, 1e-3),
            _prose(0.25): (1e-3, 5e-4, 2e-3),
            _prose(1.0, 3000.0): (2e-3, 1e-3, 4e-3),
            Method(kind="full", replay_ratio=0.05): (2e-4, 1e-4, 4e-4),
        },
    ),
}
