"""What a check found, and what to do about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from osft.process.errors import explained, one_line
from osft.storage.record import RecordPart

if TYPE_CHECKING:
    from osft.doctor.subject import Subject

Level = Literal["ok", "warning", "error", "not checked"]


class Finding(RecordPart):
    """One line of the doctor's table."""

    level: Level
    """error: a round would fail or wait for ever. warning: it may. not checked: the text says why."""
    about: str
    """The thing that was looked at: a claim, a secret, a server."""
    text: str
    """What was seen."""
    remedy: str = ""
    """What to do; of every warning and error."""
    area: str = ""
    """The check's; whoever runs it fills it in."""


class NotChecked(Exception):
    """The check cannot be made from here, for a reason that is no fault of what is checked."""


def ok(about: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(level="ok", about=about, text=text)


def warning(about: str, text: str, remedy: str) -> Finding:
    """Something that may go wrong."""
    return Finding(level="warning", about=about, text=text, remedy=remedy)


def error(about: str, text: str, remedy: str) -> Finding:
    """Something with which a round cannot work."""
    return Finding(level="error", about=about, text=text, remedy=remedy)


def not_checked(about: str, reason: str) -> Finding:
    """Something that could not be looked at from here."""
    return Finding(level="not checked", about=about, text=reason)


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its area, what it is about in a few words, and the function that makes it."""

    area: str
    about: str
    find: "Callable[[Subject], Iterator[Finding]]"

    def findings(self, subject: "Subject") -> Iterator[Finding]:
        """What it finds. A check that fails is a finding itself, never an exception."""
        try:
            for finding in self.find(subject):
                yield finding.replace(area=self.area)
        except NotChecked as reason:
            yield not_checked(self.about, str(reason)).replace(area=self.area)
        except Exception as failure:
            told = explained(failure)
            text = one_line(told) if told is not None else f"{type(failure).__name__}: {one_line(failure)}"
            yield not_checked(self.about, f"could not be checked: {text}").replace(area=self.area)


def separated(error: Exception) -> tuple[str, str]:
    """Reason and remedy of an error in this project's words, which end with what to do in a sentence of its own."""
    reason, dot, remedy = one_line(error).partition(". ")
    return (reason, remedy) if dot else (reason, "Correct it as the message says")
