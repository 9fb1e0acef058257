"""`evaluation.json`: what a round measured of base, champion and candidate, and what the gate decided.

`osft.evaluation.evaluate` makes it, the steps add the matrix of all rounds and the decision; the report, the registry
and the terminal show it, and the lineage keeps of it what later rounds need. By model means "base", "champion" (not in
the first round) or "candidate"; by set, the name of an evaluation set. What was not measured is None.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from osft.storage.record import Migration, Record, RecordPart


class SetScore(RecordPart):
    """A model's scores on one evaluation set."""

    loss: float
    """Nats per token."""
    loss_stderr: float | None
    """Standard error of the loss; None of one record."""
    perplexity: float
    num_loss_tokens: int
    num_samples: int
    accuracy: float | None
    accuracy_stderr: float | None
    """Standard error of the accuracy, sqrt(p (1 - p) / n)."""
    accuracy_kind: str | None
    """`choice`, `exact match`, or None where the set has neither."""
    num_ties: int = 0
    """Records with choices of which none is right because another is as probable, or there is no other."""


class MetricChange(RecordPart):
    """What changed of a metric between two models on the same records."""

    change: float
    """After minus before."""
    relative: float | None
    """That over the value before; None where it is 0."""
    stderr: float | None
    """Standard error of `change`, from the differences of each record; None of one record."""


class SetChanges(RecordPart):
    """What changed on one evaluation set."""

    loss: MetricChange
    accuracy: MetricChange | None
    """None where one of the two models has none, or one of another kind."""


class SetDrift(RecordPart):
    """How far a model is from another on one evaluation set."""

    kl: float
    """KL(reference || model), nats per token."""
    stderr: float | None
    """Standard error of `kl`; None of one record."""
    num_tokens: int
    """The tokens whose predictions were compared."""
    dtype: str
    """In which the models were computed, such as "float32"."""


class EvaluatedModel(RecordPart):
    """A model that was measured."""

    path: str
    """Folder, URI or Hugging Face id."""
    version: int | None
    """In the registry."""


class EvaluatedSet(RecordPart):
    """A set that models were measured on."""

    role: str
    """"new task", "earlier task", "anchor" or "self-written" (`osft.evaluation.evaluate.EvaluationSet`)."""
    source: str
    num_samples: int
    notes: tuple[str, ...]
    """What a reader of the set's accuracy should know of it."""


class BenchmarkTask(RecordPart):
    """A public benchmark."""

    metric: str
    higher_is_better: bool
    num_samples: int


class BenchmarkScore(RecordPart):
    """A model's result on a public benchmark."""

    value: float
    stderr: float | None


class BenchmarkResults(RecordPart):
    """What lm-evaluation-harness measured."""

    tasks: dict[str, BenchmarkTask]
    """By benchmark."""
    results: dict[str, dict[str, BenchmarkScore]]
    """By model, by benchmark."""


class Example(RecordPart):
    """A record of an evaluation set, and what the models answered."""

    set: str
    prompt: str
    """The last message before the answer."""
    reference: str
    answers: dict[str, str]
    """By model."""


class MatrixRound(RecordPart):
    """A round of the matrix."""

    task: str
    version: int | None
    """Of its model; None if it is not registered."""


class MetricMatrix(RecordPart):
    """The continual-learning matrix of one metric, and its measures (`osft.evaluation.matrix`).

    Those of a loss are of the negated losses; one is None where a score that it needs is missing or not finite.
    """

    baseline: tuple[float | None, ...]
    """(T,) of the base model, as measured."""
    rows: tuple[tuple[float | None, ...], ...]
    """T rows, one a round, of up to T scores, one a task, as measured."""
    average_accuracy: float | None
    learning_accuracy: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    average_forgetting: float | None
    forgetting: dict[str, float]
    """By task; of the last one none."""


class AnchorScores(RecordPart):
    """One metric on one anchor over the rounds."""

    baseline: float | None
    """Of the base model."""
    values: tuple[float | None, ...]
    """After each round."""


class ContinualMatrix(RecordPart):
    """What all rounds so far did."""

    rounds: tuple[MatrixRound, ...]
    """The oldest first."""
    metrics: dict[str, MetricMatrix]
    """No accuracy unless each model was measured on all tasks learned so far."""
    anchors: dict[str, dict[str, AnchorScores]]
    """By anchor, by each metric that was ever measured."""
    drift: dict[str, tuple[float | None, ...]]
    """By set, on which it was ever measured: KL(base || model) after each round, in nats per token."""


class RuleOutcome(RecordPart):
    """The numbers of one rule of the gate on one set or benchmark."""

    rule: str
    subject: str
    metric: str
    against: str
    """The model or version that it was compared with."""
    before: float
    """Of a drift 0."""
    after: float
    value: float
    """Gained or lost, a share or absolute."""
    stderr: float | None
    """Of `value`."""
    standard_errors: float
    """How many of them are allowed, or asked for."""
    relative: bool
    bound: float
    comparison: str
    """"at least", "more than" or "at most"."""
    passed: bool


class Decision(RecordPart):
    """What the gate decided."""

    promote: bool
    reason: str
    """In one line; empty if it promotes."""
    rules: tuple[RuleOutcome, ...]


def _without_format(found: dict[str, Any]) -> dict[str, Any]:
    """Before records had a format. What the first releases did not measure is None, or empty."""
    found = {"exact": None, "drift": {}, "benchmarks": None, "matrix": None, "decision": None} | found
    found["models"] = {name: {"version": None} | model for name, model in found["models"].items()}
    found["sets"] = {name: {"notes": []} | described for name, described in found["sets"].items()}
    if found["matrix"] is not None:
        found["matrix"] = {"drift": {}} | found["matrix"]
    return found


class Evaluation(Record):
    """What was measured of the models of a round, and what was decided."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {0: _without_format}

    task: str
    """The new task."""
    created: str
    """ISO 8601, UTC."""
    models: dict[str, EvaluatedModel]
    """By model, in the order base, champion, candidate."""
    reference: str
    """The model that the candidate is compared with: the champion where there is one, else the base model."""
    sets: dict[str, EvaluatedSet]
    """By set."""
    results: dict[str, dict[str, SetScore]]
    """By model, by set; not of self-written text."""
    exact: SetScore | None
    """Of the candidate's exact weights on the new task, before they were rounded to be served; None where it keeps
    none."""
    changes: dict[str, dict[str, SetChanges]]
    """The candidate against each other model, by set; not of self-written text."""
    drift: dict[str, dict[str, SetDrift | None]]
    """How far the candidate's predictions moved from each other model's, by set: KL(model || candidate). None where the
    two read the records as different tokens."""
    benchmarks: BenchmarkResults | None
    examples: tuple[Example, ...]
    matrix: ContinualMatrix | None
    decision: Decision | None

    @property
    def decided(self) -> Decision:
        """The decision. Raises ValueError if there is none yet."""
        if self.decision is None:
            raise ValueError(f"the evaluation of {self.task} has no decision. Let the gate decide (`evaluate_model`)")
        return self.decision
