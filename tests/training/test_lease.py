"""A job that nobody follows ends; one whose follower, or store, is only slow does not."""

import time
from pathlib import Path

import pytest

from osft import storage
from osft.training.lease import MINUTES, Lease, LeaseWatch


def renew(output: Path, text: str) -> None:
    (output / "lease").write_text(text)


def test_it_is_lost_when_it_has_not_changed_for_so_long(tmp_path):
    watch = LeaseWatch(tmp_path, minutes=1)
    watch.look(59)  # nobody has begun to follow
    assert not watch.is_lost
    for renewal in ("a 1", "a 2", "b 1"):  # b: a retried step
        renew(tmp_path, renewal)
        watch.look(50)
        watch.look(50)
        assert not watch.is_lost
    watch.look(10)
    assert watch.is_lost


def test_time_without_an_answer_does_not_count(tmp_path, monkeypatch):
    watch = LeaseWatch(tmp_path, minutes=1)

    def no_answer(address: object) -> bytes:
        raise TimeoutError("the store does not answer")

    with monkeypatch.context() as away:
        away.setattr(storage, "read", no_answer)
        watch.look(3600)
    watch.look(59)
    assert not watch.is_lost
    watch.look(1)
    assert watch.is_lost


@pytest.mark.parametrize("remote", [False, True])
def test_who_follows_renews_it_until_it_stops(tmp_path, monkeypatch, remote):
    output = "memory://lease-of-a-run" if remote else tmp_path
    monkeypatch.setenv(MINUTES, "0.02")  # 1.2 s
    with Lease(output, minutes=0.02):
        watch = LeaseWatch.of_this_process(output)
        time.sleep(2)
        assert not watch.is_lost
    time.sleep(2)
    assert watch.is_lost


def test_without_one_nothing_is_watched(tmp_path, monkeypatch):
    monkeypatch.delenv(MINUTES, raising=False)
    assert LeaseWatch.of_this_process(tmp_path) is None


def test_a_store_that_is_away_is_told_once_and_does_not_hold_the_job_up(tmp_path, monkeypatch, caplog):
    def no_answer(address: object, content: bytes) -> None:
        raise TimeoutError("the store does not answer")

    monkeypatch.setattr(storage, "write", no_answer)
    with Lease(tmp_path, minutes=0.01):
        time.sleep(0.5)
    assert caplog.text.count("cannot be renewed, trying again") == 1
