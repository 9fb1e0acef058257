"""Times as the Kubernetes API writes them: RFC 3339, UTC."""

import time
from datetime import UTC, datetime


def seconds_text(moment: float | None = None) -> str:
    """The form of metadata and status: whole seconds. `moment` in seconds since the epoch, now by default."""
    return datetime.fromtimestamp(time.time() if moment is None else moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def nanoseconds_text() -> str:
    """The form of log lines: now, with nanoseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{nanoseconds:09d}Z"


def parse_seconds(text: str) -> float:
    """Seconds since the epoch of either form."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    moment = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC).timestamp()
    return moment + (float(f"0.{fraction}") if fraction else 0.0)
