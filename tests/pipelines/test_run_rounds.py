"""Several rounds in a row: what arrives, and what is refused before the first one."""

import json
from pathlib import Path

from typer.testing import CliRunner

from pipelines.run_rounds import app, round_arguments


def test_every_round_has_the_parameters_of_the_file_and_those_that_are_given():
    found = round_arguments(Path("runs"), ["num_epochs=2"])
    assert found["num_epochs"] == 2
    assert found["max_train_samples"] == 0
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
            "gate: min_gain: bound must be float, got 'a'",
        ),
        (["--tasks", "sarcasm"], "there is no example:sarcasm"),
    ):
        result = CliRunner().invoke(app, [*given, "--storage", str(tmp_path / "runs")])
        assert result.exit_code == 2
        assert problem in " ".join(result.output.split())
        assert not (tmp_path / "runs" / "rounds").exists()
