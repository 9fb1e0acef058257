"""A schedule is there once, as it was asked for last, whatever happens on the way."""

import kfp
import pytest

from osft.orchestration import (
    CompiledPipeline,
    create_schedule,
    delete_schedule,
    find_pipeline,
    list_schedules,
    parse_trigger,
    pause_schedule,
    resume_schedule,
    upload,
)
from tests.pipelines.kfp_server import KfpServer

WEEKLY = parse_trigger(cron="0 3 * * 1")
HOURLY = parse_trigger(every="1h")
DATA = {"data_uri": "s3://bucket/inbox"}


def create(client, pipeline, name="weekly", trigger=WEEKLY, arguments=DATA, **options):
    return create_schedule(client, name, pipeline, trigger, arguments, **options)


def posted(server: KfpServer) -> list[dict]:
    return [body for method, path, body in server.requests if (method, path) == ("POST", "/recurringruns")]


def by_name(server: KfpServer, name: str = "weekly") -> list[tuple[str, dict]]:
    kept = [one for one in server.recurring_runs.values() if one["display_name"] == name]
    return [(one["status"], one["trigger"]) for one in kept]


CRON = {"cron_schedule": {"cron": "0 0 3 * * 1"}}
INTERVAL = {"periodic_schedule": {"interval_second": 3600}}


@pytest.mark.parametrize(
    ("trigger", "in_sdk", "more"),
    [
        (WEEKLY, {"cron_expression": "0 0 3 * * 1"}, {}),
        (HOURLY, {"interval_second": 3600}, {"start_time": "2030-01-31T00:00:00Z", "service_account": "runner"}),
    ],
    ids=["cron", "interval"],
)
def test_body_is_what_the_sdk_sends(server, client, pipeline, trigger, in_sdk, more):
    create(client, pipeline, trigger=trigger, **more)
    (ours,) = posted(server)
    with KfpServer() as other:
        # The same ids, so that the bodies can be equal to the last character.
        other.pipelines, other.versions, other.experiments = server.pipelines, server.versions, server.experiments
        kfp.Client(host=other.address).create_recurring_run(
            experiment_id=ours["experiment_id"],
            job_name="weekly",
            description=ours["description"],
            max_concurrency=1,
            no_catchup=True,
            params=DATA,
            pipeline_id=pipeline.pipeline_id,
            version_id=pipeline.version_id,
            **in_sdk,
            **more,
        )
        assert posted(other) == [ours]


def test_latest_leaves_the_version_open_and_the_rest_as_it_is(server, client, pipeline):
    create(client, pipeline, name="pinned")
    create(client, find_pipeline(client, "tiny", "latest"), name="latest")
    pinned, latest = posted(server)
    assert latest["pipeline_version_reference"] == {"pipeline_id": pipeline.pipeline_id}
    assert latest.keys() == pinned.keys()
    assert {one.name: one.pipeline_version_id for one in list_schedules(client)} == {
        "latest": None,
        "pinned": pipeline.version_id,
    }


def test_same_content_again_changes_nothing(server, client, pipeline):
    first = create(client, pipeline)
    before = len(server.changes())
    again = create(client, pipeline)
    assert (first.outcome, again.outcome) == ("created", "unchanged")
    assert again.recurring_run_id == first.recurring_run_id
    assert server.changes()[before:] == []


@pytest.mark.parametrize(
    "change",
    [
        {"trigger": HOURLY},
        {"arguments": DATA | {"epochs": 2}},
        {"max_concurrency": 2},
        {"no_catchup": False},
        {"experiment": "other"},
        {"end_time": "2031-01-01T00:00:00Z"},
        {"service_account": "runner"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_content_replaces(server, client, pipeline, change):
    create(client, pipeline)
    replaced = create(client, pipeline, **change)
    assert (replaced.outcome, replaced.enabled) == ("replaced", True)
    assert len(by_name(server)) == 1
    assert server.most_enabled["weekly"] == 1


def test_new_version_replaces_a_pinned_schedule(server, client, pipeline, yaml_file, tmp_path):
    create(client, pipeline)
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml_file.read_text().replace("print(data_uri)", "print(data_uri, 2)"))
    newer = upload(client, CompiledPipeline.read(changed))
    assert newer.version_id != pipeline.version_id
    assert create(client, newer).pipeline_version_id == newer.version_id
    assert len(by_name(server)) == 1


@pytest.mark.parametrize("third", [False, True], ids=["same again", "third content"])
@pytest.mark.parametrize("dies_after", [0, 1, 2, 3])
def test_crash_in_a_replacement_leaves_at_most_one_enabled_and_the_next_call_repairs(
    server, client, pipeline, dies_after, third
):
    create(client, pipeline)
    done = len(server.changes())
    server.fail = lambda method, path: 503 if method != "GET" and len(server.changes()) >= done + dies_after else None
    with pytest.raises(ConnectionError):
        create(client, pipeline, trigger=HOURLY)
    enabled = [status for status, _ in by_name(server)].count("ENABLED")
    assert enabled <= 1
    assert len(by_name(server)) == (1 if dies_after == 0 else 2)
    server.fail = lambda method, path: None
    trigger = parse_trigger(every="2h") if third else HOURLY
    create(client, pipeline, trigger=trigger)
    assert by_name(server) == [("ENABLED", {"periodic_schedule": {"interval_second": 7200 if third else 3600}})]
    assert server.most_enabled["weekly"] == 1


@pytest.mark.parametrize("existing", [False, True], ids=["first", "replacement"])
def test_lost_answer_leaves_no_duplicate(server, client, pipeline, existing):
    if existing:
        create(client, pipeline)
    server.lose_answer = lambda method, path: (method, path) == ("POST", "/recurringruns")
    with pytest.raises(ConnectionError, match="504"):
        create(client, pipeline, trigger=HOURLY)
    server.lose_answer = lambda method, path: False
    assert create(client, pipeline, trigger=HOURLY).outcome == ("repaired" if existing else "unchanged")
    assert by_name(server) == [("ENABLED", INTERVAL)]
    assert server.most_enabled["weekly"] == 1


@pytest.mark.parametrize("dies_after", [1, 99])
def test_replacing_a_paused_schedule_starts_nothing(server, client, pipeline, dies_after):
    create(client, pipeline)
    pause_schedule(client, "weekly")
    done = len(server.changes())
    server.most_enabled.clear()
    server.fail = lambda method, path: 503 if method != "GET" and len(server.changes()) >= done + dies_after else None
    if dies_after == 1:
        with pytest.raises(ConnectionError):
            create(client, pipeline, trigger=HOURLY)
        server.fail = lambda method, path: None
    create(client, pipeline, trigger=HOURLY)
    assert by_name(server) == [("DISABLED", INTERVAL)]
    assert server.most_enabled["weekly"] == 0


def test_paused_stays_paused_when_created_again_and_resumes(server, client, pipeline):
    create(client, pipeline)
    assert not pause_schedule(client, "weekly").enabled
    again = create(client, pipeline)
    assert (again.outcome, again.enabled) == ("unchanged", False)
    assert resume_schedule(client, "weekly").enabled
    assert by_name(server) == [("ENABLED", CRON)]


def test_created_paused_is_the_same_schedule(server, client, pipeline):
    create(client, pipeline, paused=True)
    assert by_name(server) == [("DISABLED", CRON)]
    assert create(client, pipeline).outcome == "unchanged"


def test_pause_in_an_interrupted_replacement_leaves_one_that_stays_paused(server, client, pipeline):
    create(client, pipeline)
    done = len(server.changes())
    server.fail = lambda method, path: 503 if method != "GET" and len(server.changes()) > done + 1 else None
    with pytest.raises(ConnectionError):
        create(client, pipeline, trigger=HOURLY)
    server.fail = lambda method, path: None
    pause_schedule(client, "weekly")
    create(client, pipeline, trigger=HOURLY)
    assert [status for status, _ in by_name(server)] == ["DISABLED"]


def test_replacement_leaves_the_run_that_is_under_way(server, client, pipeline, caplog):
    run = server.runs[server.start(create(client, pipeline).recurring_run_id)]
    assert create(client, pipeline, trigger=HOURLY).outcome == "replaced"
    assert run["state"] == "RUNNING"
    assert sorted(by_name(server)) == [("DISABLED", CRON), ("ENABLED", INTERVAL)]
    assert f"has a run under way ({run['run_id']}), which its deletion may end" in caplog.text
    resume_schedule(client, "weekly")
    assert run["state"] == "RUNNING"
    run["state"] = "SUCCEEDED"
    assert create(client, pipeline, trigger=HOURLY).outcome == "repaired"
    assert by_name(server) == [("ENABLED", INTERVAL)]
    assert server.most_enabled["weekly"] == 1


def test_deletion_waits_for_the_run_that_is_under_way(server, client, pipeline):
    run = server.runs[server.start(create(client, pipeline).recurring_run_id)]
    with pytest.raises(ValueError, match=rf"weekly is paused, and not deleted.*{run['run_id']}"):
        delete_schedule(client, "weekly")
    assert (run["state"], by_name(server)) == ("RUNNING", [("DISABLED", CRON)])
    run["state"] = "FAILED"
    assert delete_schedule(client, "weekly") == 1
    assert by_name(server) == []


def test_run_that_starts_while_its_schedule_is_deleted_is_left_where_the_server_can(server, client, pipeline):
    server.can_orphan = True
    schedule = create(client, pipeline)

    def start(method: str, path: str) -> None:
        if method == "DELETE":
            server.start(schedule.recurring_run_id)

    server.fail = start
    assert delete_schedule(client, "weekly") == 1
    assert [run["state"] for run in server.runs.values()] == ["RUNNING"]


@pytest.mark.parametrize("act", [pause_schedule, resume_schedule, delete_schedule])
def test_unknown_name_is_refused_with_the_known_ones(client, pipeline, act):
    create(client, pipeline)
    with pytest.raises(ValueError, match="no schedule 'daily'; there are: weekly"):
        act(client, "daily")


def test_recurring_run_of_someone_else_is_not_replaced(server, client, pipeline):
    create(client, pipeline)
    next(iter(server.recurring_runs.values()))["description"] = "made in the UI"
    with pytest.raises(ValueError, match="not made by osft"):
        create(client, pipeline, trigger=HOURLY)
    assert by_name(server) == [("ENABLED", CRON)]


def test_names_that_differ_in_case_are_two_schedules(server, client, pipeline):
    create(client, pipeline)
    create(client, pipeline, name="Weekly", trigger=HOURLY)
    assert by_name(server) == [("ENABLED", CRON)]
    assert by_name(server, "Weekly") == [("ENABLED", INTERVAL)]


def test_list_has_all_pages(client, pipeline, monkeypatch):
    monkeypatch.setattr("osft.orchestration.connection._PAGE_SIZE", 2)
    for number in range(5):
        create(client, pipeline, name=f"schedule {number}")
    assert [one.name for one in list_schedules(client)] == [f"schedule {number}" for number in range(5)]


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        ({"data_url": "x"}, {}, "unknown parameter 'data_url'. Did you mean 'data_uri'"),
        ({}, {}, "needs a value for data_uri"),
        (DATA, {"max_concurrency": 11}, "between 1 and 10"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(server, client, pipeline, arguments, options, problem):
    before = len(server.requests)
    with pytest.raises(ValueError, match=problem):
        create(client, pipeline, arguments=arguments, **options)
    assert len(server.requests) == before
