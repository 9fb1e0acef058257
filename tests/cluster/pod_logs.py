"""The logs of pods: which lines a request is given, and whether more can come."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.errors import ApiError
from tests.cluster.timestamps import parse_seconds


@dataclass(kw_only=True)
class LogRequest:
    """The parameters of `/log`."""

    container: str | None = None
    follow: bool = False
    timestamps: bool = False
    previous: bool = False
    since_seconds: float | None = None
    tail_lines: int | None = None

    @classmethod
    def parse(cls, params: Mapping[str, str]) -> "LogRequest":
        def flag(name: str) -> bool:
            return params.get(name, "").lower() in ("true", "1")

        since, tail = params.get("sinceSeconds"), params.get("tailLines")
        if since is not None and int(since) < 1:
            raise ApiError(422, "PodLogOptions is invalid: sinceSeconds: must be greater than 0")
        return cls(
            container=params.get("container"),
            follow=flag("follow"),
            timestamps=flag("timestamps"),
            previous=flag("previous"),
            since_seconds=float(since) if since else None,
            tail_lines=int(tail) if tail else None,
        )


@dataclass
class ContainerLog:
    """What one container instance writes: a line of the file is a timestamp, a space and the text."""

    path: Path
    closed: bool = False
    """Nothing will be written any more."""


@dataclass
class OpenLog:
    """The lines that a request is still to be given."""

    log: ContainerLog
    request: LogRequest
    _rest: bytes = b""
    _position: int = field(default=0, init=False)
    _began: bool = field(default=False, init=False)

    def read(self) -> tuple[bytes, bool]:
        """The next whole lines, and whether that was all."""
        closed = self.log.closed  # asked before reading: what is written until then is read
        with self.log.path.open("rb") as file:
            file.seek(self._position)
            content = file.read()
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        if not self._began:
            self._began = True
            if self.request.since_seconds is not None:
                oldest = time.time() - self.request.since_seconds
                lines = list(itertools.dropwhile(lambda line: parse_seconds(stamp(line)) < oldest, lines))
            if self.request.tail_lines is not None:
                lines = lines[max(0, len(lines) - self.request.tail_lines) :]
        if not self.request.timestamps:
            lines = [line.partition(b" ")[2] for line in lines]
        return b"".join(line + b"\n" for line in lines), closed or not self.request.follow


def stamp(line: bytes) -> str:
    return line.partition(b" ")[0].decode("ascii")


class PodLogs:
    """The logs of the container instances of each pod, by the pod's uid, oldest first."""

    def __init__(self) -> None:
        self.instances: dict[str, list[ContainerLog]] = {}

    def add(self, uid: str, log: ContainerLog) -> None:
        self.instances.setdefault(uid, []).append(log)

    def open(self, pod: dict[str, Any], request: LogRequest) -> OpenLog:
        """Raises ApiError (400) where a real kubelet has no such log."""
        name, containers = pod["metadata"]["name"], [found["name"] for found in pod["spec"].get("containers") or []]
        if request.container is None and len(containers) > 1:
            raise ApiError(400, f"a container name must be specified for pod {name}, choose one of: {containers}")
        container = request.container or (containers[0] if containers else "")
        if container not in containers:
            raise ApiError(400, f"container {container} is not valid for pod {name}")
        instances = self.instances.get(pod["metadata"]["uid"], [])
        if request.previous:
            if len(instances) < 2:
                raise ApiError(400, f'previous terminated container "{container}" in pod "{name}" not found')
            return OpenLog(instances[-2], request)
        if not instances:
            statuses = pod.get("status", {}).get("containerStatuses") or [{}]
            reason = statuses[0].get("state", {}).get("waiting", {}).get("reason", "ContainerCreating")
            raise ApiError(400, f'container "{container}" in pod "{name}" is waiting to start: {reason}')
        return OpenLog(instances[-1], request)
