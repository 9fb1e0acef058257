"""When a schedule starts a run: a cron expression or an interval.

The rules of an expression are those of the server's parser (github.com/robfig/cron, version 1), which has seconds first
and knows no `L`, `#`, weekday 7 or range that runs backwards; Python's croniter takes all of these, and names no field.
"""

import re
from dataclasses import dataclass

_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of the week", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_LONGEST = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Days of the months."""
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Trigger:
    """Either of the two."""

    cron: str | None = None
    """Six fields, the first the second; in the time zone of the server, UTC unless its operator set another."""
    interval_seconds: int | None = None

    def __str__(self) -> str:
        if self.cron:
            return f"cron {self.cron}"
        seconds = self.interval_seconds or 0
        unit = next(unit for unit in ("d", "h", "m", "s") if seconds % _SECONDS[unit] == 0)
        return f"every {seconds // _SECONDS[unit]}{unit}"


def parse_trigger(*, cron: str | None = None, every: str | None = None) -> Trigger:
    """The trigger of a cron expression (five fields, or six with seconds first) or an interval such as "6h", "1h30m".

    Raises ValueError with the reason for what the server would refuse, or would take for something else: it reads
    five fields as those from second to month.
    """
    if (cron is None) == (every is None):
        raise ValueError("give either a cron expression (--cron) or an interval (--every)")
    if cron is not None:
        return Trigger(cron=_cron(cron))
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", every or "")
    seconds = (
        sum(int(part or 0) * _SECONDS[unit] for part, unit in zip(parts.groups(), "dhms", strict=True)) if parts else 0
    )
    if seconds < 60:
        raise ValueError(f"--every {every}: expected an interval of a minute or more, such as 30m, 6h or 7d")
    return Trigger(interval_seconds=seconds)


def _cron(expression: str) -> str:
    fields = expression.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != len(_FIELDS):
        raise ValueError(
            f"cron {expression!r} has {len(fields)} fields, expected five (minute hour day month weekday), or six with "
            "the second first"
        )
    values: list[set[int]] = []
    for text, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        try:
            values.append({value for part in text.split(",") for value in _values(part, low, high, names)})
        except ValueError as error:
            raise ValueError(f"cron {expression!r}: {name} {text!r}: {error}") from None
    # Where a weekday is given too, either is enough. The server accepts a date that never comes.
    if fields[5][0] in "*?" and min(values[3]) > max(_LONGEST[month - 1] for month in values[4]):
        raise ValueError(f"cron {expression!r}: no month of {fields[4]!r} has a day {fields[3]!r}")
    return " ".join(fields)


def _values(part: str, low: int, high: int, names: tuple[str, ...]) -> range:
    """What a part of a field stands for. Raises ValueError with the reason if it is none."""
    span, slash, step = part.partition("/")
    if slash and not (step.isdecimal() and int(step) > 0):
        raise ValueError(f"the step {step!r} is not a positive number")
    ends = [low, high]
    if span not in ("*", "?"):
        ends = [_value(end, low, names) for end in span.split("-")]
    if len(ends) > 2:
        raise ValueError(f"{span!r} is not a range")
    if not all(low <= end <= high for end in ends):
        raise ValueError(f"must be between {low} and {high}{' (Sunday is 0)' if high == 6 else ''}")
    if ends[0] > ends[-1]:
        raise ValueError(f"the range {span} runs backwards")
    last = high if slash and len(ends) == 1 else ends[-1]  # 5/15 is 5-59/15
    return range(ends[0], last + 1, int(step) if slash else 1)


def _value(text: str, low: int, names: tuple[str, ...]) -> int:
    if text.lower() in names:
        return low + names.index(text.lower())
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a number{' or a name such as ' + names[1] if names else ''}")
    return int(text)
