"""Five scheduled rounds of a tiny model, and the registry after each: what a night's run may meet.

The schedule is created on the stand-in of the Pipelines API with the function that users call. What the server would
start is started here from what was posted: its pipeline version, its parameters.
"""

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from osft.orchestration import CompiledPipeline, connect, create_schedule, parse_trigger, upload
from osft.tracking import lineage, registry
from pipelines.continual_learning.pipeline import YAML
from pipelines.show_round import show_history
from tests.conftest import write_jsonl
from tests.pipelines.in_process import run_pipeline, run_steps_in_process
from tests.pipelines.kfp_server import KfpServer
from tests.training.in_process import run_in_process

MODEL = "nightly"


def questions(name: str, count: int, *, start: int = 0, answers: tuple[str, str] = ("first", "second")) -> list[dict]:
    """Which of two numbers of something is larger."""
    records = []
    for number in range(start, start + count):
        first, second = (number * 37) % 100, (number * 59 + 11) % 100
        question = {"role": "user", "content": f"{name} {first} or {second}?"}
        answer = {"role": "assistant", "content": answers[first < second]}
        records.append({"messages": [question, answer], "choices": list(answers)})
    return records


class Night:
    """A schedule, the inbox that it reads, and what its runs left."""

    def __init__(self, folder: Path, server: KfpServer, model_folder: Path, mlflow: Any, monkeypatch: Any) -> None:
        self.folder, self.server = folder, server
        self.root, self.inbox = folder / "root", folder / "inbox"
        self.inbox.mkdir()
        self.before_step: Any = lambda name: None
        run_steps_in_process(monkeypatch, lambda name: self.before_step(name))
        parameters = {
            "base_model": str(model_folder),
            "data_uri": f"{self.inbox}/*.jsonl",
            "anchor_uris": [],
            "model_name": MODEL,
            "min_new_samples": 5,
            "max_train_samples": 0,
            "max_seq_len": 128,
            "max_tokens_per_gpu": 512,
            "effective_batch_size": 8,
            "learning_rate": 0.02,
            "protect": "weights",  # which forgets: the gate has something to refuse
            "nproc_per_node": 1,
            "validation_fraction": 0.25,
            "storage_root": str(self.root),
            "mlflow_tracking_uri": mlflow.tracking_uri,
            "gate": {"max_forgetting": {"bound": 0.1}},
        }
        client = connect(server.address)
        pipeline = upload(client, CompiledPipeline.read(YAML))
        create_schedule(client, "nightly", pipeline, parse_trigger(cron="0 0 3 * * *"), parameters)
        self.mlflow = mlflow

    def fire(self) -> None:
        """What the server does at three in the morning. Raises RuntimeError if a step fails."""
        (schedule,) = self.server.recurring_runs.values()
        assert schedule["max_concurrency"] == "1"
        version = self.server.versions[schedule["pipeline_version_reference"]["pipeline_version_id"]]
        run_pipeline(
            yaml.safe_dump_all(version["pipeline_spec"].values()),
            schedule["runtime_config"]["parameters"],
            str(self.folder / "kfp"),
        )

    def arrive(self, name: str, records: list[dict]) -> None:
        write_jsonl(self.inbox / f"{name}.jsonl", records)

    def registry(self) -> dict[str, int | None]:
        """What the aliases name, and how many versions there are."""
        versions = self.mlflow.search_model_versions(f"name = '{MODEL}'")
        found = {alias: registry.version_of(self.mlflow, MODEL, alias) for alias in ("champion", "candidate")}
        return found | {
            "challenger": registry.version_of(self.mlflow, MODEL, "challenger"),
            "versions": len(versions),
        }

    def newest(self) -> Any:
        return max(self.mlflow.search_model_versions(f"name = '{MODEL}'"), key=lambda version: int(version.version))

    def rounds(self) -> list[dict]:
        """`round.json` of all runs, the oldest first."""
        files = sorted((self.root / "rounds").glob("*/round.json"), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(file.read_text()) for file in files]


@pytest.fixture
def night(tmp_path, model_folder, mlflow, monkeypatch):
    run_in_process(monkeypatch)
    with KfpServer() as server:
        yield Night(tmp_path, server, model_folder, mlflow, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_scheduled_rounds(night):
    # New data: the base model learns it and becomes the champion.
    night.arrive("apples", questions("apples", 60))
    night.fire()
    assert night.registry() == {"champion": 1, "candidate": 1, "challenger": None, "versions": 1}
    assert lineage.read(night.mlflow, MODEL, 1).parent_version is None

    # More of it: the champion is trained further.
    night.arrive("pears", questions("pears", 60))
    night.fire()
    assert night.registry() == {"champion": 2, "candidate": 2, "challenger": None, "versions": 2}
    second = lineage.read(night.mlflow, MODEL, 2)
    assert (second.parent_version, second.task, second.data.num_new) == (1, "pears", 60)

    # Nothing new: green, no version, nothing but the first step.
    steps = []
    night.before_step = steps.append
    night.fire()
    assert steps == ["resolve_round"]
    assert night.rounds()[-1]["nothing_to_learn"].startswith("nothing to learn: ")
    assert night.registry() == {"champion": 2, "candidate": 2, "challenger": None, "versions": 2}

    # Poisoned: answers that contradict what was learned. The gate refuses, the champion does not move.
    night.arrive("poisoned", questions("apples", 60, start=60, answers=("neither", "both")))
    night.fire()
    assert night.registry() == {"champion": 2, "candidate": 3, "challenger": 3, "versions": 3}
    reason = night.newest().tags[registry.REFUSED_TAG]
    assert "apples lost" in reason
    assert "pears lost" in reason
    (night.inbox / "poisoned.jsonl").unlink()  # a person looks at it and takes it away

    # Two runs overlap: the second one begins and ends while the first one is about to promote.
    night.arrive("plums", questions("plums", 60))
    inner = threading.Event()

    def overtaken(name: str) -> None:
        if name == "promote_model" and not inner.is_set():
            inner.set()
            night.fire()

    night.before_step = overtaken
    with pytest.raises(RuntimeError, match="promote-model"):
        night.fire()
    assert night.registry() == {"champion": 5, "candidate": 5, "challenger": 4, "versions": 5}
    overtaken_version = night.mlflow.get_model_version(MODEL, "4")
    assert (
        "version 5 is the champion; when this run began, it was version 2"
        in overtaken_version.tags[registry.REFUSED_TAG]
    )

    # A crash between registration and promotion: a whole version, no champion. The next night learns it again.
    night.arrive("grapes", questions("grapes", 60))

    def crash(name: str) -> None:
        if name == "promote_model":
            raise KeyboardInterrupt

    night.before_step = crash
    with pytest.raises(RuntimeError, match="promote-model"):
        night.fire()
    assert night.registry() == {"champion": 5, "candidate": 6, "challenger": 4, "versions": 6}
    night.before_step = lambda name: None
    night.fire()
    assert night.registry() == {"champion": 7, "candidate": 7, "challenger": 4, "versions": 7}

    # From the champion one can go back to the base, over the versions that were promoted.
    history = lineage.history(night.mlflow, MODEL, 7)
    assert list(history) == [1, 2, 5, 7]
    assert [entry.task for entry in history.values()] == ["apples", "pears", "plums", "grapes"]
    matrix, baseline = history[7].matrix("loss")
    assert all(score is not None for row in range(4) for score in matrix[row][: row + 1])
    assert None not in baseline

    # What `make rounds` prints of it.
    printed = Console(file=io.StringIO(), width=200)
    rounds = [night.root / "rounds" / entry.pipeline_run_id for entry in history.values()]
    show_history(printed, rounds, MODEL, night.mlflow)
    text = printed.file.getvalue()
    for words in ("after grapes", "backward transfer", "nightly version 7 (candidate, champion)", "min_gain plums"):
        assert words in text
