"""The commands: what they print, what they end with, and that a dry run sends nothing."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from osft.orchestration import submit
from tests.orchestration.test_runs import seen, task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_id(client, pipeline) -> str:
    return submit(client, pipeline, {"data_uri": "s3://bucket/inbox"})


def test_submit_prints_the_runs_id_and_nothing_else(osft, server, yaml_file, tmp_path):
    file = tmp_path / "parameters.yaml"
    file.write_text("data_uri: s3://a\n")
    done = osft("submit", file, "--set", "epochs=2", "--pipeline", yaml_file)
    assert done.exit_code == 0, done.output
    (run,) = server.runs.values()
    assert done.stdout == run["run_id"] + "\n"
    assert run["runtime_config"]["parameters"] == {"data_uri": "s3://a", "epochs": 2}


def test_submit_takes_an_uploaded_pipeline(osft, server, pipeline):
    done = osft("submit", "--set", "data_uri=a", "--pipeline-name", "tiny", "--pipeline-version", pipeline.version_name)
    assert done.exit_code == 0, done.output
    (run,) = server.runs.values()
    assert run["pipeline_version_reference"]["pipeline_version_id"] == pipeline.version_id


@pytest.mark.parametrize("command", ["submit", "schedule create weekly --every 6h"])
def test_dry_run_with_a_file_asks_no_server(osft, server, yaml_file, command):
    done = osft(*command.split(), "--set", "data_uri=a", "--pipeline", yaml_file, "--dry-run")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    body = printed.get("recurring_run")
    assert (body["runtime_config"] if body else printed)["parameters"] == {"data_uri": "a"}
    if body:
        assert (body["no_catchup"], body["max_concurrency"], body["mode"]) == (True, 1, "ENABLE")
        assert body["trigger"]["periodic_schedule"]["interval_second"] == 21600
    assert server.requests == []


def test_dry_run_of_an_uploaded_pipeline_changes_nothing(osft, server, pipeline):
    before = server.changes()
    given = ("--set", "data_uri=a", "--pipeline-name", "tiny", "--pipeline-version", "latest", "--dry-run")
    done = osft("schedule", "create", "weekly", "--cron", "0 3 * * 1", *given)
    assert done.exit_code == 0, done.output
    reference = json.loads(done.stdout)["recurring_run"]["pipeline_version_reference"]
    assert reference == {"pipeline_id": pipeline.pipeline_id, "pipeline_version_id": None}
    assert server.changes() == before


@pytest.mark.parametrize("given", [["--set", "epoch=2"], ["--set", "data_uri=a", "--pipeline-version", "7"], []])
def test_what_cannot_be_used_ends_with_2_and_nothing_was_sent(osft, server, yaml_file, given):
    refused = osft("submit", *given, "--pipeline", yaml_file)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert server.changes() == []


def test_server_that_fails_ends_with_1(osft, server):
    server.fail = lambda method, path: 503 if path == "/runs" else None
    failed = osft("status")
    assert failed.exit_code == 1
    assert "503" in failed.stderr


def test_schedule_from_create_to_delete(osft, server, yaml_file):
    given = ("schedule", "create", "weekly", "--cron", "0 3 * * 1", "--set", "data_uri=a", "--pipeline", yaml_file)
    assert osft(*given).stdout == "weekly: created, enabled, cron 0 0 3 * * 1\n"
    assert osft(*given).stdout == "weekly: unchanged, enabled, cron 0 0 3 * * 1\n"
    assert osft("schedule", "pause", "weekly").stdout == "weekly: paused\n"
    assert osft(*given).stdout == "weekly: unchanged, paused, cron 0 0 3 * * 1\n"
    assert osft("schedule", "resume", "weekly").stdout == "weekly: enabled\n"
    assert osft(*given, "--max-concurrency", 2).stdout == "weekly: replaced, enabled, cron 0 0 3 * * 1\n"
    listed = osft("schedule", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["schedule", "weekly"]
    assert osft("schedule", "delete", "weekly").stdout == "weekly: deleted\n"
    assert server.recurring_runs == {}
    assert osft("schedule", "delete", "weekly").exit_code == 2


def test_latest_follows_what_is_uploaded(osft, server, yaml_file):
    given = ("--every", "6h", "--set", "data_uri=a", "--pipeline", yaml_file, "--pipeline-version", "latest")
    assert osft("schedule", "create", "weekly", *given).exit_code == 0
    (one,) = server.recurring_runs.values()
    assert "pipeline_version_id" not in one["pipeline_version_reference"]
    assert len(server.versions) == 1


@pytest.mark.parametrize(("state", "exit_code"), [("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)])
def test_follow_in_a_log_has_a_line_for_each_change(osft, server, run_id, state, exit_code):
    error = {"error": {"message": "out of memory"}} if state == "FAILED" else {}
    running = task("learn", "RUNNING", end_time=None)
    server.progress[run_id] = [
        seen("RUNNING", running),
        seen("RUNNING", running),
        seen(state, task("learn", state, **error)),
    ]
    done = osft("status", run_id, "--follow", "--interval", "0.05")
    assert done.exit_code == exit_code, done.output
    lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert lines[0] == "learn RUNNING"
    assert lines[1] == f"run {run_id} RUNNING"
    assert lines[2] == f"learn {state} 1m05s" + (" out of memory" if error else "")
    assert lines[3].startswith(f"run {run_id} {state}")
    assert len(lines) == 4


def test_follow_in_a_terminal_is_a_table_that_changes_in_place(osft, server, run_id, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("osft.orchestration.display.output", Console(file=screen, force_terminal=True, width=100))
    failed = task("learn", "FAILED", error={"message": "out of memory"})
    server.progress[run_id] = [seen("RUNNING", task("learn", "RUNNING", end_time=None)), seen("FAILED", failed)]
    assert osft("status", run_id, "--follow", "--interval", "0.3").exit_code == 1
    shown = screen.getvalue()
    assert "\x1b[1A" in shown, "the cursor goes up to draw over the last picture"
    last = shown[shown.rindex("step") :]
    assert "FAILED" in last
    assert "1m05s" in last
    assert "learn: out of memory" in last


def test_interrupted_follow_ends_with_130_and_the_run_continues(server, run_id):
    server.runs[run_id] |= seen("RUNNING", task("learn", "RUNNING"))
    command = [sys.executable, "-m", "osft", "status", run_id, "--follow", "--interval", "0.1"]
    environment = os.environ | {"KFP_ENDPOINT": server.address, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit SIG_IGN
    ) as process:
        assert b"learn RUNNING" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"which continues" in printed
    assert server.runs[run_id]["state"] == "RUNNING"


def test_status_of_a_run_and_of_the_newest(osft, server, run_id):
    server.runs[run_id] |= seen("FAILED", task("learn", "FAILED", error={"message": "out of memory"}))
    one = osft("status", run_id)
    assert one.exit_code == 1
    assert "learn: out of memory" in one.stdout
    newest = osft("status")
    assert newest.exit_code == 0
    assert run_id in newest.stdout


def test_cancel_waits_and_says_how_it_ended(osft, server, run_id):
    server.progress[run_id] = [{}, {"state": "CANCELED"}]
    done = osft("cancel", run_id)
    assert (done.exit_code, done.stdout) == (0, f"{run_id} CANCELED\n")


def test_token_is_in_no_output(osft, server, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret-token")
    server.fail = lambda method, path: 401
    for command in (["status"], ["schedule", "list"], ["cancel", "17"]):
        done = osft(*command, "--token-file", token, "--namespace", "team")
        assert done.exit_code == 1
        assert "secret-token" not in done.output
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret-token"}


def test_importing_the_commands_loads_no_kfp():
    code = "import sys, osft.cli; print([n for n in ('kfp', 'kfp_server_api', 'torch') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
