"""Training metrics in MLflow while training runs.

Training knows nothing of MLflow: this is a callback in the process that started it. MLflow has one axis for each
metric, its step, and that is the optimizer step here. The other axis, tokens, is a metric of its own on the same steps,
`train/tokens_seen`: MLflow's charts take any metric as their x axis ("Metric" beside "Step" and "Time"), so that runs
with batches of different sizes are compared over it, and no loss is logged twice.
"""

from osft.tracking.outbox import MetricOutbox
from osft.training.callbacks import TrainingCallback, TrainingContext

TOKENS_SEEN = "train/tokens_seen"
_NAMES = {"tokens": TOKENS_SEEN}


class LiveMetrics(TrainingCallback):
    """Hands the numbers of each step to an outbox; whoever made the outbox closes it when the run ends.

    It never waits: a run that is cancelled while the server is away must be cancelled in time.
    """

    def __init__(self, outbox: MetricOutbox) -> None:
        self._outbox = outbox

    def on_step_end(self, context: TrainingContext) -> None:
        """Take a step's numbers."""
        for name, value in context.numbers.items():
            known = _NAMES.get(name, f"train/{name}")
            self._outbox.put(known, value, step=context.step, seconds=context.metrics["timestamp"])
