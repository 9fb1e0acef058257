"""Answers that stay open: watches and followed logs, and cutting them."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp.web

from tests.cluster.errors import ApiError
from tests.cluster.pod_logs import OpenLog
from tests.cluster.store import Store

POLL_SECONDS = 0.02


class Stream:
    """An answer in chunks."""

    def __init__(self, request: aiohttp.web.BaseRequest) -> None:
        self.request = request
        self.response = aiohttp.web.StreamResponse()
        self.ended = False
        self.stalled = False
        """Open, and silent for good."""

    async def start(self, content_type: str) -> None:
        self.response.content_type = content_type
        await self.response.prepare(self.request)

    async def write(self, content: bytes) -> None:
        if content and not self.gone:
            await self.response.write(content)

    async def finish(self) -> aiohttp.web.StreamResponse:
        if not self.gone:
            with contextlib.suppress(ConnectionError):
                await self.response.write_eof()
        return self.response

    @property
    def gone(self) -> bool:
        return self.request.transport is None or self.request.transport.is_closing()


class Streams:
    """The streams that are open now."""

    def __init__(self) -> None:
        self._open: set[Stream] = set()

    @contextlib.contextmanager
    def opened(self, request: aiohttp.web.BaseRequest) -> Iterator[Stream]:
        stream = Stream(request)
        self._open.add(stream)
        try:
            yield stream
        finally:
            self._open.discard(stream)

    def stall(self) -> None:
        for stream in self._open:
            stream.stalled = True

    async def drop(self, clean: bool) -> None:
        for stream in list(self._open):
            stream.ended = True
            if not clean and stream.request.transport is not None:
                stream.request.transport.abort()

    @property
    def count(self) -> int:
        return len(self._open)


async def write_log(stream: Stream, log: OpenLog) -> aiohttp.web.StreamResponse:
    await stream.start("text/plain")
    with contextlib.suppress(ConnectionError):
        while not stream.ended and not stream.gone:
            if stream.stalled:
                await asyncio.sleep(POLL_SECONDS)
                continue
            content, complete = log.read()
            await stream.write(content)
            if complete:
                break
            await asyncio.sleep(POLL_SECONDS)
    return await stream.finish()


async def write_watch(
    stream: Stream,
    store: Store,
    plural: str,
    selected: Callable[[dict[str, Any]], bool],
    since: int | None,
    seconds: float | None,
) -> aiohttp.web.StreamResponse:
    """Changes after version `since`; without one, what there is now comes first. `seconds`: when the watch ends."""
    events: list[tuple[str, dict[str, Any]]] = []
    with store.lock:
        if since is None:
            present = json.loads(json.dumps(store.objects(plural)))
            events = [("ADDED", found) for found in present if selected(found)]
            since = store.version
        elif store.changes and since < store.changes[0].version - 1:
            expired = ApiError(410, f"too old resource version: {since} ({store.changes[0].version})")
            events = [("ERROR", expired.body())]
            stream.ended = True
    ends = None if seconds is None else time.monotonic() + seconds
    await stream.start("application/json")
    with contextlib.suppress(ConnectionError):
        await stream.write(encoded(events))
        while not stream.ended and not stream.gone and (ends is None or time.monotonic() < ends):
            if stream.stalled:
                await asyncio.sleep(POLL_SECONDS)
                continue
            with store.lock:
                newer = [change for change in store.changes if change.version > since]
                since = store.version
            relevant = [change for change in newer if change.plural == plural and selected(change.found)]
            await stream.write(encoded([(change.type, change.found) for change in relevant]))
            await asyncio.sleep(POLL_SECONDS)
    return await stream.finish()


def encoded(events: list[tuple[str, dict[str, Any]]]) -> bytes:
    return b"".join(json.dumps({"type": kind, "object": found}).encode() + b"\n" for kind, found in events)
