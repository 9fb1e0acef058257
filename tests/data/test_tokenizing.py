"""Many records, tokenized together and by several processes, are what each of them is alone."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from osft.data import tokenizing
from osft.data.chat import tokenize, tokenize_all
from osft.data.prepare import prepare
from osft.data.record_hashes import HASH, union
from osft.data.records import DataError, Record, parse_record
from tests.conftest import arithmetic, write_jsonl
from tests.data.templates import SHAPES, shaped_tokenizer


@pytest.fixture
def three_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_usable_cores", lambda: 3)
    monkeypatch.setattr(tokenizing, "CHUNK", 5)
    monkeypatch.setattr(tokenizing, "LEAST_CHUNKS", 1)


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files that hold samples and records."""
    files = [*folder.rglob("*.arrow"), *folder.glob("*.jsonl"), *folder.glob("*.bin")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize("shape", SHAPES)
def test_chats_have_the_tokens_together_that_each_has_alone(shape):
    tokenizer = shaped_tokenizer(shape)
    records = [parse_record(json.dumps(record), f"f:{line}") for line, record in enumerate(arithmetic(4))]
    records.insert(1, Record(source="f:9", text="plain text"))
    assert tokenize_all(records, tokenizer) == [tokenize(record, tokenizer) for record in records]


def test_processes_write_what_one_process_writes(model_folder, tmp_path, request):
    records = arithmetic(90) + arithmetic(30)
    long = {"messages": [{"role": "developer", "content": "x" * 300}, *records[0]["messages"]]}
    file = write_jsonl(tmp_path / "a.jsonl", [*records, long])
    alone = prepare(str(file), model_folder, tmp_path / "one", max_seq_len=200)
    request.getfixturevalue("three_processes")
    together = prepare(str(file), model_folder, tmp_path / "three", max_seq_len=200)
    assert alone.statistics["dropped_as_too_long"]["samples"] == 1
    assert len(contents(alone.folder)) == 4
    assert contents(together.folder) == contents(alone.folder)


def test_a_chat_that_is_refused_in_a_process_is_named_and_leaves_nothing(model_folder, tmp_path, three_processes):
    file = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(60), arithmetic(61)[60] | {"style": "short"}])
    with pytest.raises(DataError, match=r"a\.jsonl:61: the model's chat template does not read style"):
        prepare(str(file), model_folder, tmp_path / "out", validation_fraction=0)
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("processes", [1, 3])
def test_a_killed_preparation_tokenizes_what_is_left(model_folder, tmp_path, monkeypatch, processes):
    """In a process of its own, which is killed at its twelfth chunk; what was kept is used, and then removed."""
    monkeypatch.setattr(tokenizing, "CHUNK", 5)
    monkeypatch.setattr(tokenizing, "_usable_cores", lambda: processes)
    long = {"messages": [{"role": "developer", "content": "x"}, *arithmetic(1, seed=1)[0]["messages"]]}
    file = write_jsonl(tmp_path / "a.jsonl", [*arithmetic(120), long])
    done = tmp_path / "done"

    def begin_and_die() -> None:
        chunk = tokenizing.Tokenizing._chunk

        def counted(work, numbers):
            with done.open("a") as lines:
                lines.write(f"{os.getpid()}\n")
            if len(done.read_text().splitlines()) >= 12:
                os.kill(os.getpid() if processes == 1 else os.getppid(), signal.SIGKILL)
                time.sleep(60)
            return chunk(work, numbers)

        tokenizing.Tokenizing._chunk = counted
        prepare(str(file), model_folder, tmp_path / "out")

    first = multiprocessing.get_context("fork").Process(target=begin_and_die)
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    while any(psutil.pid_exists(int(pid)) for pid in done.read_text().split()):
        time.sleep(0.01)
    kept = list((tmp_path / "out").glob("*.incomplete-*/training/*.arrow"))
    assert len(kept) >= 12 - processes  # each process was at work on one, maybe on an early one

    taken: list[int] = []
    chunk = tokenizing.Tokenizing._chunk
    monkeypatch.setattr(tokenizing, "_usable_cores", lambda: 1)
    monkeypatch.setattr(tokenizing.Tokenizing, "_chunk", lambda *work: taken.append(1) or chunk(*work))
    again = prepare(str(file), model_folder, tmp_path / "out")
    assert len(taken) == 25 - len(kept)
    monkeypatch.undo()
    whole = prepare(str(file), model_folder, tmp_path / "whole")
    assert contents(again.folder) == contents(whole.folder)
    unlike = {"written"}  # `datasets` gives each folder a fingerprint of its own
    assert {k: v for k, v in again.statistics.items() if k not in unlike} == {
        k: v for k, v in whole.statistics.items() if k not in unlike
    }
    assert not any((tmp_path / "out").glob("*.incomplete-*/training/*.arrow"))


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_a_container_uses_the_cores_that_it_may(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(tokenizing, "_CPU_LIMIT", tmp_path / "cpu.max")
    assert tokenizing._usable_cores() == 8
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert tokenizing._usable_cores() == cores


def test_a_union_has_each_hash_once_also_one_that_ends_in_zeros():
    numbers = np.random.default_rng(0).integers(0, 2, (60, 16), np.uint8)
    numbers[:, :13] = 0
    hashes = np.frombuffer(numbers.tobytes(), HASH)
    found = union([hashes[:20], hashes[20:25], hashes[25:]])
    wanted = sorted({row.tobytes() for row in numbers})
    assert found.tobytes() == b"".join(wanted)
