"""One winner among any number of runs, at any moment, whoever dies, sleeps or moves the alias by hand."""

import json
import multiprocessing
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from osft import storage
from osft.storage.atomic import atomic_path
from osft.storage.client import StorageRefused
from osft.storage.sealed import DamagedFile
from osft.tracking import champion
from osft.tracking.champion import ChampionChanged, promote, settled_champion
from tests.tracking.rounds import new_run

FORK = multiprocessing.get_context("fork")


class Version:
    def __init__(self, version: int, tags: dict[str, str]) -> None:
        self.version, self.tags = str(version), tags


class Registry:
    """A registry as MLflow's client shows it, which sets an alias unconditionally, in a file; with its latency."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self._alias, self._seconds = folder / "alias", seconds
        self.deleted: set[int] = set()
        self.refused: set[int] = set()

    def get_model_version_by_alias(self, name: str, alias: str) -> Version:
        self._wait()
        if not self._alias.exists():
            raise MlflowException("no alias", RESOURCE_DOES_NOT_EXIST)
        return Version(int(self._alias.read_text()), {})

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self._wait()
        with atomic_path(self._alias) as temporary:
            temporary.write_text(version)

    def get_model_version(self, name: str, version: str) -> Version:
        if int(version) in self.deleted:
            raise MlflowException("deleted", RESOURCE_DOES_NOT_EXIST)
        return Version(int(version), {"osft.decision": "refuse" if int(version) in self.refused else "promote"})

    def _wait(self) -> None:
        time.sleep(random.random() * self._seconds)


class Died(BaseException):
    """The run is gone."""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(champion, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(champion, "_POLL_SECONDS", 0.01)


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path)


@pytest.fixture(params=["path", "s3"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "root") if request.param == "path" else request.getfixturevalue("bucket")


def alias(registry: Registry) -> int:
    return int(registry.get_model_version_by_alias("m", "champion").version)


def claims(root: str) -> list[str]:
    return sorted(name for name in storage.names(storage.join(root, "champions", "m")))


def test_champion_moves_only_from_the_version_that_the_run_began_with(registry, root):
    assert promote(registry, "m", 1, storage_root=root, expected_champion=None) is None
    assert promote(registry, "m", 2, storage_root=root, expected_champion=1) == 1
    with pytest.raises(ChampionChanged, match="version 2 is the champion; when this run began, .* version 1"):
        promote(registry, "m", 3, storage_root=root, expected_champion=1)
    with pytest.raises(ChampionChanged, match="when this run began, it was no version"):
        promote(registry, "m", 3, storage_root=root, expected_champion=None)
    assert alias(registry) == 2
    assert promote(registry, "m", 2, storage_root=root, expected_champion=1) == 2, "a step can be repeated"
    assert promote(registry, "m", 3, storage_root=root) == 2, "without an expectation there is no check"
    assert claims(root) == [f"{n}{end}" for n in (1, 2, 3) for end in (".json", ".outcome.json")]


def test_real_registry(mlflow, tmp_path, request):
    from osft.tracking import registry

    name = request.node.name
    for content in ("first", "second"):
        folder = tmp_path / content
        folder.mkdir()
        (folder / "config.json").write_text(content)
        tags = {"osft.checkpoint": content}
        run_id = new_run(mlflow, folder)
        registry.register(mlflow, name, folder, run_id=run_id, description="d", tags=tags)
    assert settled_champion(mlflow, name, storage_root=str(tmp_path)) is None
    assert promote(mlflow, name, 1, storage_root=str(tmp_path), expected_champion=None) is None
    with pytest.raises(ChampionChanged):
        promote(mlflow, name, 2, storage_root=str(tmp_path), expected_champion=None)
    with pytest.raises(ChampionChanged, match="version 7 is not in the registry"):
        promote(mlflow, name, 7, storage_root=str(tmp_path), expected_champion=1)
    assert promote(mlflow, name, 2, storage_root=str(tmp_path), expected_champion=1) == 1
    assert registry.champion(mlflow, name) == 2


ROUNDS, PROCESSES = 100, 20


def race(number: int, folder: Path, barrier: Any) -> None:
    """A run in each round: all start from the same champion; some die after their claim, some sleep."""
    chance = random.Random(number)
    registry = Registry(folder, 0.0005)
    set_alias = registry.set_registered_model_alias
    won = []

    def late_or_never(name: str, alias: str, version: str) -> None:
        event = chance.random()
        if event < 0.1:
            raise Died
        if event < 0.3:
            time.sleep(0.02)
        set_alias(name, alias, version)

    registry.set_registered_model_alias = late_or_never
    champion.GRACE_SECONDS, champion._POLL_SECONDS = 0.0, 0.002
    for turn in range(ROUNDS):
        barrier.wait()
        found = settled_champion(Registry(folder), "m", storage_root=str(folder))
        barrier.wait()
        version = 1 + turn * PROCESSES + number
        try:
            promote(registry, "m", version, storage_root=str(folder), expected_champion=found, run=str(number))
            won.append((turn, version))
        except (ChampionChanged, Died):
            pass
    (folder / f"won-{number}.json").write_text(json.dumps(won))


def test_of_twenty_processes_one_wins_each_of_a_hundred_times(tmp_path):
    barrier = FORK.Barrier(PROCESSES)
    processes = [FORK.Process(target=race, args=(number, tmp_path, barrier)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    settled = settled_champion(Registry(tmp_path), "m", storage_root=str(tmp_path))
    made = {}
    for number in range(1, 10 * ROUNDS):
        file = tmp_path / "champions" / "m" / f"{number}.json"
        if not file.exists():
            break
        assert json.loads(file.with_suffix(".outcome.json").read_text())["promoted"]
        made[number] = json.loads(file.read_text())
    parents = [claim["parent_version"] for claim in made.values()]
    assert len(parents) == ROUNDS, "one in each round"
    assert parents == [None, *(claim["version"] for claim in made.values())][:-1], "each replaces the one before"
    assert settled == made[ROUNDS]["version"]
    files = [tmp_path / f"won-{number}.json" for number in range(PROCESSES)]
    told = [tuple(entry) for file in files for entry in json.loads(file.read_text())]
    versions = {claim["version"] for claim in made.values()}
    assert len({turn for turn, _ in told}) == len(told), "in no round two runs were told that they won"
    assert {version for _, version in told} <= versions, "who was told so, has"


def dies_before_the_alias(registry: Registry, root: str, version: int, monkeypatch, **expected: Any) -> None:
    def dies(*arguments):
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_registered_model_alias", dies)
        with pytest.raises(Died):
            promote(registry, "m", version, storage_root=root, **expected)


def test_alias_of_a_winner_that_died_is_set_by_who_comes_next(registry, root, monkeypatch):
    promote(registry, "m", 1, storage_root=root)
    dies_before_the_alias(registry, root, 2, monkeypatch, expected_champion=1)
    assert alias(registry) == 1
    with pytest.raises(ChampionChanged, match="version 2 is the champion; when this run began, it was version 1"):
        promote(registry, "m", 3, storage_root=root, expected_champion=1)
    assert alias(registry) == 2
    assert promote(registry, "m", 2, storage_root=root, expected_champion=1) == 2, "the retried step"


def test_round_that_begins_after_a_winner_died_starts_from_the_winner(registry, root, monkeypatch):
    dies_before_the_alias(registry, root, 1, monkeypatch, expected_champion=None)
    assert settled_champion(registry, "m", storage_root=root) == 1
    assert alias(registry) == 1


def test_winner_that_died_after_the_alias_has_won(registry, root, monkeypatch):
    create = storage.create

    def dies(location, content):
        if "outcome" in location:
            raise Died
        return create(location, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", dies)
        with pytest.raises(Died):
            promote(registry, "m", 1, storage_root=root)
    assert promote(registry, "m", 2, storage_root=root, expected_champion=1) == 1


@pytest.mark.parametrize("fate", ["deleted", "refused"])
def test_claim_of_a_version_that_must_not_be_champion_is_void(fate, registry, root, monkeypatch):
    promote(registry, "m", 1, storage_root=root)
    dies_before_the_alias(registry, root, 2, monkeypatch, expected_champion=1)
    getattr(registry, fate).add(2)
    assert promote(registry, "m", 3, storage_root=root, expected_champion=1) == 1
    assert alias(registry) == 3


def test_alias_that_was_set_back_by_hand_holds_and_the_next_round_can_be_promoted(registry, root):
    for version in (1, 2, 3):
        promote(registry, "m", version, storage_root=root)
    registry.set_registered_model_alias("m", "champion", "1")
    assert settled_champion(registry, "m", storage_root=root) == 1
    with pytest.raises(ChampionChanged, match="version 1 is the champion; when this run began, it was version 3"):
        promote(registry, "m", 4, storage_root=root, expected_champion=3)
    assert promote(registry, "m", 5, storage_root=root, expected_champion=1) == 1, "though version 1 had a successor"
    assert promote(registry, "m", 2, storage_root=root, expected_champion=5) == 5, "and an old version can come back"
    assert alias(registry) == 2


def test_alias_that_is_moved_by_hand_while_a_claim_is_open_holds(registry, root, monkeypatch):
    promote(registry, "m", 1, storage_root=root)
    dies_before_the_alias(registry, root, 2, monkeypatch, expected_champion=1)
    registry.set_registered_model_alias("m", "champion", "7")
    assert settled_champion(registry, "m", storage_root=root) == 7
    assert promote(registry, "m", 8, storage_root=root, expected_champion=7) == 7


def test_winner_that_sets_the_alias_late_gives_it_back(registry, root, monkeypatch):
    """It sleeps between its look at the alias and its set; another one sets it for it, and a third replaces it."""
    set_alias = registry.set_registered_model_alias
    asleep, awake = threading.Event(), threading.Event()

    def sleeps(name, alias, version):
        if not asleep.is_set():
            asleep.set()
            awake.wait(20)
        set_alias(name, alias, version)

    monkeypatch.setattr(registry, "set_registered_model_alias", sleeps)
    told = []
    slow = threading.Thread(target=lambda: told.append(promote(registry, "m", 1, storage_root=root)))
    slow.start()
    asleep.wait(20)
    assert settled_champion(registry, "m", storage_root=root) == 1
    assert promote(registry, "m", 2, storage_root=root, expected_champion=1) == 1
    assert promote(registry, "m", 3, storage_root=root, expected_champion=2) == 2
    awake.set()
    slow.join()
    assert alias(registry) == 3
    assert told == [None], "it was the champion"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"number": 1}', b'{"sha256": "0"}'])
def test_damaged_claim_is_named(content, registry, tmp_path):
    promote(registry, "m", 1, storage_root=str(tmp_path))
    (tmp_path / "champions" / "m" / "2.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"champions/m/2.json is damaged.*remove the file"):
        promote(registry, "m", 2, storage_root=str(tmp_path))
    assert alias(registry) == 1


def test_name_of_a_model_is_one_folder(registry, tmp_path):
    for version, name in enumerate(("a b", "ä", "../x")):
        promote(registry, name, version, storage_root=str(tmp_path / "root"))
    assert {path.name for path in (tmp_path / "root" / "champions").iterdir()} == {"..%2Fx", "%C3%A4", "a%20b"}


def test_object_is_created_by_one_of_several(bucket, object_store):
    assert storage.create(f"{bucket}/claim", b"first")
    assert not storage.create(f"{bucket}/claim", b"second")
    assert object_store.files.cat(f"{bucket}/claim") == b"first"
    assert storage.create(f"{bucket}/claim", b"first"), "the answer to the first request was lost"


def test_store_that_ignores_the_condition_is_refused(bucket, monkeypatch):
    import s3fs

    write = s3fs.S3FileSystem._pipe_file

    async def ignores(self, path, data, mode="overwrite", **given):
        return await write(self, path, data, **given)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", ignores)
    from osft.storage import client

    # A client keeps the methods that its class had when it was made: this one is for no other test.
    monkeypatch.setattr(client, "_connected", client._connected.__wrapped__)
    with pytest.raises(StorageRefused, match="ignores If-None-Match"):
        storage.create(f"{bucket}/claim", b"first")
