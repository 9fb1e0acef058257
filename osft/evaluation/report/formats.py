"""Numbers as the report writes them."""

import math


def format_number(value: float | None, digits: int = 0, *, signed: bool = False) -> str:
    """`1,234.50`, with a true minus sign, `+1.00` if signed; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if math.isfinite(value) and float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def format_percent(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """`0.421` -> `42.1 %`, or `+42.1 %` if signed; a dash for None."""
    return "–" if value is None else format_number(100 * value, digits, signed=signed) + "\N{NO-BREAK SPACE}%"


def format_duration(seconds: float) -> str:
    """`23.4 s`, `3 min 24 s` or `2 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
