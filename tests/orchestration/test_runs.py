"""A run is submitted once, followed to its end, and cancelled."""

import pytest

from osft.orchestration import CompiledPipeline, cancel, find_pipeline, follow, newest_runs, status, submit, upload

DATA = {"data_uri": "s3://bucket/inbox"}


@pytest.fixture
def run_id(client, pipeline) -> str:
    return submit(client, pipeline, DATA)


def task(name: str, state: str, **more: object) -> dict:
    times = {"start_time": "2026-01-01T00:00:00Z", "end_time": "2026-01-01T00:01:05Z"}
    return {"task_id": name, "display_name": name, "state": state, "pod_name": f"tiny-x7k2p-{name}-1", **times, **more}


def seen(state: str, *tasks: dict) -> dict:
    """What the server says of a run, with the tasks that Pipelines adds to those of the author."""
    plumbing = [{"task_id": "w", "display_name": "tiny-x7k2p"}, task("root", state), task("root-driver", "SUCCEEDED")]
    own = [*tasks, *(task(f"{one['display_name']}-driver", "SUCCEEDED") for one in tasks)]
    return {"state": state, "run_details": {"task_details": plumbing + own}}


def test_submit_runs_the_uploaded_version_with_the_parameters(server, client, pipeline, run_id):
    body = server.runs[run_id]
    assert body["pipeline_version_reference"] == {
        "pipeline_id": pipeline.pipeline_id,
        "pipeline_version_id": pipeline.version_id,
    }
    assert body["runtime_config"]["parameters"] == DATA
    assert server.experiments[body["experiment_id"]]["display_name"] == "osft"


def test_same_content_is_uploaded_once(server, client, pipeline, yaml_file, tmp_path):
    same = tmp_path / "same.yaml"
    same.write_text("# another comment\n" + yaml_file.read_text())
    assert upload(client, CompiledPipeline.read(same)).version_id == pipeline.version_id
    assert len(server.pipelines) == len(server.versions) == 1


def test_interrupted_upload_is_resumed(server, client, yaml_file):
    server.fail = lambda method, path: 503 if path == "/pipelines/upload_version" else None
    with pytest.raises(ConnectionError):
        upload(client, CompiledPipeline.read(yaml_file))
    server.fail = lambda method, path: None
    upload(client, CompiledPipeline.read(yaml_file))
    assert len(server.pipelines) == len(server.versions) == 1


def test_newest_version_is_the_one_that_was_uploaded_last(client, pipeline, yaml_file, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml_file.read_text().replace("print(data_uri)", "print(data_uri, 2)"))
    newer = upload(client, CompiledPipeline.read(changed))
    assert find_pipeline(client, "tiny").version_id == newer.version_id
    assert find_pipeline(client, "tiny", pipeline.version_name) == pipeline
    with pytest.raises(ValueError, match=f"the newest version of 'tiny' is {newer.version_name}"):
        upload(client, CompiledPipeline.read(yaml_file), follow_latest=True)


def test_pipeline_or_version_that_is_not_there_is_named(client, pipeline):
    with pytest.raises(ValueError, match="no pipeline 'huge'"):
        find_pipeline(client, "huge")
    with pytest.raises(ValueError, match="'tiny' has no version 7"):
        find_pipeline(client, "tiny", "7")


def test_status_has_the_authors_steps_only(server, client, run_id):
    failed = task("executor", "FAILED", parent_task_id="learn", error={"message": "out of memory"})
    server.runs[run_id] |= seen("RUNNING", task("learn", "FAILED"))
    server.runs[run_id]["run_details"]["task_details"].append(failed)
    (step,) = status(client, run_id).steps
    assert (step.name, step.state, step.seconds(), step.error) == ("learn", "FAILED", 65.0, "out of memory")


def test_follow_ends_with_the_run(server, client, run_id):
    server.progress[run_id] = [
        seen("RUNNING"),
        seen("RUNNING", task("learn", "RUNNING", end_time=None)),
        seen("SUCCEEDED", task("learn", "SUCCEEDED")),
    ]
    states = []
    end = follow(client, run_id, lambda run: states.append([run.state, *(s.state for s in run.steps)]), interval=0)
    assert states == [["RUNNING"], ["RUNNING", "RUNNING"], ["SUCCEEDED", "SUCCEEDED"]]
    assert end.ended


def test_follow_outlives_a_server_that_restarts(server, client, run_id):
    answers = iter([503, None, 502, 503, None])
    server.progress[run_id] = [seen("RUNNING"), seen("SUCCEEDED")]
    server.fail = lambda method, path: next(answers)
    assert follow(client, run_id, lambda run: None, interval=0).state == "SUCCEEDED"


def test_follow_gives_up_on_a_server_that_stays_away(server, client, run_id):
    server.fail = lambda method, path: 503
    with pytest.raises(ConnectionError, match="503"):
        follow(client, run_id, lambda run: None, interval=0.02, patience=0.1)


@pytest.mark.parametrize("end", ["CANCELED", "FAILED"])
def test_cancel_waits_for_the_end(server, client, run_id, end):
    server.progress[run_id] = [{}, {}, {}, {"state": end}]
    assert cancel(client, run_id, interval=0).state == end
    assert server.changes()[-1] == "POST /runs/ID:terminate"


def test_cancel_of_a_run_that_is_being_cancelled_waits_for_its_end(server, client, run_id):
    cancel(client, run_id, wait=False)
    server.progress[run_id] = [{}, {}, {"state": "CANCELED"}]
    assert cancel(client, run_id, interval=0).state == "CANCELED"
    assert server.changes().count("POST /runs/ID:terminate") == 1


def test_cancel_without_waiting(server, client, run_id):
    assert cancel(client, run_id, wait=False).state == "CANCELING"


def test_cancel_of_a_run_that_does_not_end_says_so(client, run_id):
    with pytest.raises(TimeoutError, match="still CANCELING"):
        cancel(client, run_id, interval=0.01, timeout=0.05)


def test_cancel_leaves_an_ended_run(server, client, run_id):
    server.runs[run_id]["state"] = "SUCCEEDED"
    before = len(server.changes())
    assert cancel(client, run_id).state == "SUCCEEDED"
    assert len(server.changes()) == before


def test_cancel_of_a_run_that_ends_meanwhile_is_no_error(server, client, run_id):
    server.progress[run_id] = [{"state": "RUNNING"}, {"state": "SUCCEEDED"}]

    def ends_before_the_termination(method: str, path: str) -> int | None:
        return 400 if path.endswith(":terminate") else None

    server.fail = ends_before_the_termination
    assert cancel(client, run_id, interval=0).state == "SUCCEEDED"


def test_newest_runs_come_first(client, pipeline):
    ids = [submit(client, pipeline, DATA, run_name=f"run {number}") for number in range(3)]
    assert [run.run_id for run in newest_runs(client, 2)] == ids[:0:-1]


def test_unknown_run_is_named(client):
    with pytest.raises(ValueError, match="there is no run 17"):
        status(client, "17")
