"""The notebook for a cluster, against the stand-in of the Pipelines API: what it shows, and what the server holds."""

import re
from collections.abc import Iterator

import pytest
from nbformat import NotebookNode

from osft.orchestration import CompiledPipeline
from tests.examples.conftest import Execute, shown
from tests.orchestration.test_runs import seen, task
from tests.pipelines.kfp_server import KfpServer

NO_DATA = "data /mnt/osft/nowhere/*.jsonl does not exist"
STORIES = (
    [
        seen("RUNNING", task("prepare-data", "RUNNING", end_time=None)),
        seen("SUCCEEDED", task("prepare-data", "SUCCEEDED")),
    ],
    [seen("FAILED", task("resolve-round", "FAILED", error={"message": NO_DATA}))],
    [{}, {}, {"state": "CANCELED"}],
)
"""What the server says of the first run, of the second and of the third, at one look after the other."""
PARAMETERS = {
    "model_name": "notebook",
    "base_model": "example:smollm2-135m-instruct",
    "data_uri": "example:sarcasm-headlines",
    "max_train_samples": 384,
}


@pytest.fixture(scope="module")
def server() -> Iterator[KfpServer]:
    with KfpServer() as server:
        stories = iter(STORIES)

        def tell(method: str, path: str) -> None:
            run = re.fullmatch("/runs/([^/:]+)", path)
            if method == "GET" and run and run[1] not in server.progress:
                server.progress[run[1]] = list(next(stories))

        server.fail = tell  # it is asked before each request, and the run's id is not known earlier
        yield server


@pytest.fixture(scope="module", autouse=True)
def notebook(execute: Execute, server: KfpServer, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    return execute(
        "rounds_on_a_cluster.ipynb",
        "SECONDS_BETWEEN_LOOKS = 0.01",
        KFP_ENDPOINT=server.address,
        KFP_EXISTING_TOKEN="secret-token",
        HOME=str(tmp_path_factory.mktemp("home")),  # kfp's client reads settings there
    )


def posted_schedules(server: KfpServer) -> list[dict]:
    return [body for method, path, body in server.requests if (method, path) == ("POST", "/recurringruns")]


def test_server_holds_three_runs_with_their_parameters(server):
    runs = list(server.runs.values())
    assert [run["state"] for run in runs] == ["SUCCEEDED", "FAILED", "CANCELED"]
    without_data = PARAMETERS | {"data_uri": "/mnt/osft/nowhere/*.jsonl"}
    assert [run["runtime_config"]["parameters"] for run in runs] == [PARAMETERS, without_data, PARAMETERS]


def test_server_holds_the_pipeline_of_the_checkout_once(server):
    (version,) = server.versions.values()
    assert version["display_name"] == CompiledPipeline.read().version_name


def test_server_holds_one_schedule_which_is_paused_and_pinned(server):
    (schedule,) = server.recurring_runs.values()
    assert (schedule["display_name"], schedule["status"]) == ("notebook", "DISABLED")
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 1,15 * *"}}
    assert (schedule["no_catchup"], schedule["max_concurrency"]) == (True, "1")
    assert schedule["runtime_config"]["parameters"] == PARAMETERS
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] in server.versions


def test_the_schedule_of_latest_left_the_version_open(server):
    versions = {
        body["display_name"]: body["pipeline_version_reference"].get("pipeline_version_id")
        for body in posted_schedules(server)
    }
    (pinned,) = server.versions
    assert versions == {"notebook": pinned, "notebook-latest": None}


def test_the_same_schedule_again_sent_nothing(notebook, server):
    assert shown(notebook, "schedule").endswith("created enabled cron 0 0 3 * * 1\n")
    assert re.findall("created|unchanged|replaced", shown(notebook, "again")) == ["unchanged", "replaced"]
    assert [body["display_name"] for body in posted_schedules(server)].count("notebook") == 2


def test_pause_outlives_the_same_schedule_again(notebook):
    assert re.findall("paused|enabled", shown(notebook, "pause")) == ["paused", "paused", "enabled"]


def test_following_draws_the_table_in_the_place_of_the_last_one(notebook):
    assert "prepare-data" in shown(notebook, "follow")
    assert "SUCCEEDED" in shown(notebook, "follow")
    assert "RUNNING" not in shown(notebook, "follow")


def test_failed_step_and_its_reason_are_named(notebook):
    assert shown(notebook, "why") == f"FAILED\nresolve-round: {NO_DATA}\n"


def test_cancelled_run_has_ended(notebook):
    assert shown(notebook, "cancel").endswith("CANCELED\n")


def test_each_mistake_is_refused_with_what_would_fit(notebook):
    name, value, setting = shown(notebook, "refused").splitlines()
    assert "Did you mean 'num_epochs'" in name
    assert "learning_rate must be a number" in value
    assert "'gpus'" in setting


def test_token_is_sent_and_not_shown(notebook, server):
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret-token"}
    assert "secret-token" not in str(notebook)
