"""Where one is in a container's log, so that a stream that broke is taken up with no line lost or shown twice."""

from datetime import UTC, datetime


class LogPosition:
    """The last line that was taken from one container's log, by its time; several lines can have the same one."""

    def __init__(self) -> None:
        self._last = ("", "")
        self._last_text = ""
        self._taken = 0  # lines with the last one's time
        self._to_skip = 0

    def reopen(self) -> int | None:
        """The stream begins again: how many seconds back it should. None: at the log's beginning."""
        self._to_skip = self._taken
        if not self._last_text:
            return None
        back = datetime.now(UTC) - datetime.fromisoformat(self._last_text)
        return max(1, int(back.total_seconds()) + 10)  # some more, for clocks that differ

    def take(self, line: str) -> str | None:
        """The text of a line that begins with its time, or None if it was taken before."""
        written, _, text = line.partition(" ")
        seconds, _, fraction = written.rstrip("Z").partition(".")
        time = (seconds, fraction.ljust(9, "0"))  # RFC 3339 leaves out trailing zeros, which would not sort
        if time < self._last:
            return None
        if time > self._last:
            self._last, self._last_text, self._taken, self._to_skip = time, written, 1, 0
            return text
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._taken += 1
        return text
