"""Metrics on their way to an MLflow run: sent from a thread, kept until the server has them.

MLflow's own asynchronous logging drops a batch whose request has failed, which `mlflow.flush_async_logging` does not
tell, and waits at the end of the process for as long as it takes.
"""

import logging
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

_BATCH = 1000  # MLflow's limit
_RETRY_SECONDS = 2.0  # between attempts once the outbox is closing
_LASTING = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
"""What a server answers that will not take these metrics later either: the run was deleted, say."""


class MetricOutbox:
    """The metrics of one run that the tracking server has not got yet.

    Whoever measures only puts; a thread sends every `interval_seconds`. What the server does not take stays and is sent
    again. A metric that is sent twice (the answer to the first was lost) is equal to itself, and MLflow keeps one.

    `send` gives up to 1000 metrics to the server. What it raises is the server's answer, a ValueError one for good.
    """

    def __init__(self, send: "Callable[[list[Metric]], object]", *, interval_seconds: float = 5.0) -> None:
        self._take, self._interval = send, interval_seconds
        self._pending: list[Metric] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metric-outbox", daemon=True)
        self._starting = threading.Lock()
        self.problem = ""
        """What the server said to the last attempt, if it did not take the metrics. An outage is told while this is
        empty; who has told it sets it."""

    def put(self, name: str, value: float, *, step: int, seconds: float) -> None:
        """Take a metric; `seconds` since the epoch. It does not wait for the server."""
        from mlflow.entities import Metric

        self._pending.append(Metric(name, float(value), int(seconds * 1000), step))
        with self._starting:  # training and the machine are measured in threads of their own
            if self._thread.ident is None:
                self._thread.start()

    def close(self, wait_seconds: float) -> int:
        """Send what is left, trying again for `wait_seconds` at most. Returns how many metrics were not sent."""
        self._closing.set()
        if self._thread.ident is not None:
            # A request can take longer than the wait: MLflow repeats it by itself for minutes. It is left behind.
            self._thread.join(wait_seconds)
        return len(self._pending)

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            if self._send() is _Answer.REFUSED:
                return
        while self._send() is _Answer.NONE:
            time.sleep(min(self._interval, _RETRY_SECONDS))

    def _send(self) -> "_Answer":
        """Send all that is pending."""
        from mlflow.exceptions import MlflowException

        while self._pending:
            batch = self._pending[:_BATCH]
            try:
                self._take(batch)
            except (MlflowException, OSError, ValueError) as error:
                if not self.problem:  # an outage is told once, however long it lasts
                    logger.warning(f"mlflow: metrics cannot be sent, they are kept: {error}")
                self.problem = str(error)
                lasting = isinstance(error, ValueError) or getattr(error, "error_code", "") in _LASTING
                return _Answer.REFUSED if lasting else _Answer.NONE
            del self._pending[: len(batch)]
        self.problem = ""
        return _Answer.TAKEN


class _Answer(Enum):
    """What became of an attempt."""

    TAKEN = auto()
    REFUSED = auto()
    """For good: it is not tried again."""
    NONE = auto()
