"""A log that is read in pieces: nothing is lost, nothing comes twice."""

import pytest

from osft.kubernetes.pods import LogPosition

LINES = [
    "2026-11-22T10:00:00.1Z a",
    "2026-11-22T10:00:00.12Z b",
    "2026-11-22T10:00:00.12Z b",
    "2026-11-22T10:00:01Z c",
    "2026-11-22T10:00:01Z d",
    "2026-11-22T10:00:01.000000001Z e",
]


def take(position, lines):
    return [text for line in lines if (text := position.take(line)) is not None]


@pytest.mark.parametrize("broken_at", range(len(LINES) + 1))
@pytest.mark.parametrize("begins_again_at", [0, 1, 2, 3])
def test_stream_that_breaks_anywhere_is_resumed_without_a_line_twice(broken_at, begins_again_at):
    position = LogPosition()
    position.reopen()
    first = take(position, LINES[:broken_at])
    position.reopen()
    # The server may begin earlier than where it broke, but at the first line of a time.
    again = min(begins_again_at, {3: 1, 2: 1, 5: 3}.get(broken_at, broken_at))
    second = take(position, LINES[again if again != 2 else 1 :])
    assert first + second == ["a", "b", "b", "c", "d", "e"]


def test_it_asks_for_the_log_from_a_little_before_the_last_line():
    position = LogPosition()
    assert position.reopen() is None
    position.take(LINES[0])
    assert position.reopen() > 10


def test_a_line_without_a_time_is_shown_and_moves_nothing():
    position = LogPosition()
    assert take(position, LINES[:2]) == ["a", "b"]
    unstamped = ["failed to create fsnotify watcher: too many open files", "", "2026-11-22 is no time", "zzz"]
    assert take(position, unstamped) == unstamped
    assert position.reopen() is not None
    assert take(position, LINES) == ["b", "c", "d", "e"]
