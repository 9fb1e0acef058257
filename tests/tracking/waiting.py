"""Waiting for what another thread or process does, and a server that can be away."""

import time
from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class LeavingClient(MlflowClient):
    """A client of a real database that takes no writes while it is away, as after all repetitions over HTTP."""

    away = False
    batches = 0
    """How many it was asked to take."""

    def log_batch(self, *arguments: Any, **named: Any) -> None:
        self.batches += 1
        self._answer()
        super().log_batch(*arguments, **named)

    def set_tag(self, *arguments: Any, **named: Any) -> None:
        self._answer()
        super().set_tag(*arguments, **named)

    def set_terminated(self, *arguments: Any, **named: Any) -> None:
        self._answer()
        super().set_terminated(*arguments, **named)

    def _answer(self) -> None:
        if self.away:
            raise MlflowException("API request to http://… failed with exception: connection refused")
