"""When a schedule starts a run: a cron expression or an interval."""

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
    for text, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            reason = _wrong(part, low, high, names)
            if reason:
                raise ValueError(f"cron {expression!r}: {name} {text!r}: {reason}")
    return " ".join(fields)


def _wrong(part: str, low: int, high: int, names: tuple[str, ...]) -> str:
    """Why a part of a field is not one, or an empty text."""
    span, slash, step = part.partition("/")
    if slash and not (step.isdecimal() and int(step) > 0):
        return f"the step {step!r} is not a positive number"
    if span in ("*", "?"):
        return ""
    values = []
    for end in span.split("-"):
        if end.lower() in names:
            values.append(low + names.index(end.lower()))
        elif end.isdecimal():
            values.append(int(end))
        else:
            return f"{end!r} is not a number{' or a name such as ' + names[1] if names else ''}"
    if len(values) > 2:
        return f"{span!r} is not a range"
    if not all(low <= value <= high for value in values):
        return f"must be between {low} and {high}{' (Sunday is 0)' if high == 6 else ''}"
    if values[0] > values[-1]:
        return f"the range {span} runs backwards"
    return ""
