"""Several rounds in a row: what arrives, and what is refused before the first one."""

import json
from pathlib import Path

from typer.testing import CliRunner

from osft import examples
from osft.data.records import read_records
from pipelines.run_rounds import app, arrive, round_arguments
from tests.conftest import arithmetic, write_jsonl


def test_records_with_the_smallest_hashes_arrive_and_stay(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "numbers.jsonl", arithmetic(30))
    monkeypatch.setattr(examples, "resolve", lambda uri, cache: {"example:numbers": str(source)}[uri])
    arrive(tmp_path, "numbers", 10)
    arrived = [record.content_hash for record in read_records(str(tmp_path / "inbox" / "numbers.jsonl"))]
    assert arrived == sorted(record.content_hash for record in read_records(str(source)))[:10]
    arrive(tmp_path, "numbers", 20)  # a second run goes on with what is there
    assert len((tmp_path / "inbox" / "numbers.jsonl").read_text().splitlines()) == 10


def test_every_round_has_the_parameters_of_the_file_and_those_that_are_given():
    found = round_arguments(Path("runs"), ["num_epochs=2"])
    assert found["num_epochs"] == 2
    assert found["max_train_samples"] == 256
    assert found["data_uri"] == f"{Path('runs').absolute()}/inbox/*.jsonl"


def test_dry_run_shows_the_parameters_and_leaves_nothing(tmp_path):
    result = CliRunner().invoke(app, ["--dry-run", "--storage", str(tmp_path / "runs"), "--tasks", "a,b"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["tasks"] == ["a", "b"]
    assert list(tmp_path.iterdir()) == []


def test_bad_parameter_or_task_is_refused(tmp_path):
    for given, problem in (
        (["--set", "epochs=2"], "unknown parameter 'epochs'. Did you mean 'num_epochs'?"),
        (
            ["--set", 'gate={"min_gain": {"bound": "a"}}'],
            "bound of the gate rule min_gain must be a number",
        ),
        (["--tasks", "sarcasm"], "there is no example:sarcasm"),
    ):
        result = CliRunner().invoke(app, [*given, "--storage", str(tmp_path / "runs")])
        assert result.exit_code == 2
        assert problem in " ".join(result.output.split())
        assert not (tmp_path / "runs" / "rounds").exists()
