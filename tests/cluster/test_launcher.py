"""The launcher's life of a job on the stand-in cluster, with pods that are small shell scripts.

Each test ends with what is left there: which jobs, and which processes.
"""

import json
import re
import threading
import time
from datetime import UTC, datetime

import pytest
from kubernetes.client.exceptions import ApiException

from osft.kubernetes.api import ClusterApi
from osft.kubernetes.pytorchjob import PyTorchJob
from osft.kubernetes.training_job import KINDS
from osft.training.job import JobUnreachable, Phase
from tests.cluster.cluster import Cluster
from tests.cluster.launched import NAME, assert_nothing_left, assert_only_job, pod_of_rank_0, uids

pytestmark = pytest.mark.cluster


def test_log_of_rank_0_continues_where_its_stream_broke(cluster, launch):
    running = launch("for i in 1 2 3 4 5 6 7 8 9; do echo $PET_NODE_RANK-$i; sleep 0.2; done")
    cut = threading.Timer(0.9, cluster.drop_streams)
    cut.start()
    printed = running.run()
    cut.join()
    assert [line for line in printed.splitlines() if line[0].isdigit()] == [f"0-{i}" for i in range(1, 10)]
    assert_only_job(cluster, "Succeeded")


def test_second_attempt_finds_the_running_job(cluster, launch, kind):
    first, second = launch("sleep 1; echo done"), launch("sleep 1; echo done")
    first.launcher.submit()
    before = uids(cluster)
    assert f"found {kind.resource.kind} {cluster.namespace}/{NAME}" in second.run()
    assert uids(cluster) == before
    assert_only_job(cluster, "Succeeded")


def test_finished_job_is_not_run_again(cluster, launch):
    launch().run()
    before = uids(cluster)
    launch().run()
    assert uids(cluster) == before
    assert_only_job(cluster, "Succeeded")


def test_job_with_another_spec_is_refused_with_the_difference_and_left_alone(cluster, launch):
    launch("sleep 60", memory="32Gi").launcher.submit()
    cluster.wait_until(cluster.processes)
    before = uids(cluster)
    with pytest.raises(ValueError, match=r"memory: '32Gi' there, '64Gi' now"):
        launch("sleep 60", memory="64Gi").run()
    assert uids(cluster) == before
    assert cluster.processes()


@pytest.mark.parametrize("where", ["after", "within"])
def test_creation_whose_answer_got_lost_or_breaks_off_makes_one_job(cluster, launch, where, kind):
    cluster.cut("create", kind.resource.plural, where)
    launch().run()
    assert [call.verb for call in cluster.calls if call.resource == kind.resource.plural].count("create") == 2
    assert_only_job(cluster, "Succeeded")


def test_transient_error_of_any_call_is_repeated(cluster, launch, kind):
    cluster.refuse(429, "create", kind.resource.plural, times=2)
    cluster.refuse(500, "get", kind.resource.plural, times=2)
    cluster.refuse(503, "list", "pods", times=2)
    cluster.refuse(500, "get", "pods/log", times=2)
    printed = launch("sleep 0.5; echo done").run()
    for told in ("429", "500", "503"):
        assert printed.count(f"kubernetes: {told}") == 2
    assert "done" in printed
    assert_only_job(cluster, "Succeeded")


def test_log_that_cannot_be_read_before_the_job_has_ended_is_read_after_it(cluster, launch):
    cluster.refuse(503, verb="get", resource="pods/log", times=20)
    assert "done" in launch("echo done").run()
    assert_only_job(cluster, "Succeeded")


def test_server_that_asks_for_a_pause_gets_it(cluster, launch, kind):
    cluster.refuse(429, verb="create", resource=kind.resource.plural, times=1, headers={"Retry-After": "2"})
    started = time.monotonic()
    launch().run()
    assert time.monotonic() - started > 2
    assert_only_job(cluster, "Succeeded")


def test_api_that_stays_away_leaves_the_job_alone(cluster, launch):
    running = launch("sleep 60", patience=1.0)
    running.launcher.submit()
    cluster.wait_until(cluster.processes)
    cluster.refuse(503, times=None)
    with pytest.raises(JobUnreachable, match="did not answer for 1 s"):
        running.run()
    cluster.recover()
    assert len(cluster.jobs()) == 1
    assert cluster.processes()


def deletions(cluster: Cluster) -> list[str]:
    return [call.verb for call in cluster.calls if call.verb == "delete"]


def test_restarting_api_server_does_not_end_the_job(cluster, launch):
    running = launch("for i in 1 2 3 4 5 6 7 8; do echo line-$i; sleep 0.5; done")
    running.launcher.submit()
    before = uids(cluster)
    restart = threading.Timer(0.7, cluster.restart_api)
    restart.start()
    printed = running.run()
    for told in ("Connection refused", "403", "503"):
        assert told in printed
    assert [line for line in printed.splitlines() if line.startswith("line-")] == [f"line-{i}" for i in range(1, 9)]
    assert (uids(cluster), deletions(cluster)) == (before, [])
    assert_only_job(cluster, "Succeeded")


def test_refusals_and_broken_answers_of_what_worked_before_are_repeated(cluster, launch, kind):
    running = launch("sleep 1.5; echo done")
    running.launcher.submit()
    running.launcher.status()
    cluster.refuse(401, verb="get", resource=kind.resource.plural)
    cluster.refuse(404, verb="get", resource=kind.resource.plural, message="404 page not found")
    cluster.refuse(403, verb="list", resource="pods")
    for verb, resource in (("get", kind.resource.plural), ("list", "pods")):
        cluster.cut(verb, resource, "within")
    printed = running.run()
    for told in ("401", "403", "404", "IncompleteRead"):
        assert told in printed
    assert "done" in printed
    assert deletions(cluster) == []
    assert_only_job(cluster, "Succeeded")


def test_attempt_that_begins_while_the_api_server_restarts_finds_the_job(cluster, launch, kind):
    launch("sleep 1; echo done").launcher.submit()
    cluster.refuse(403, times=1)
    cluster.refuse(503, times=1)
    assert f"found {kind.resource.kind}" in launch("sleep 1; echo done").run()
    assert deletions(cluster) == []
    assert_only_job(cluster, "Succeeded")


@pytest.mark.parametrize("status", [403, 422])
def test_answer_that_is_no_state_leaves_the_job_alone(cluster, launch, status):
    running = launch("sleep 60", patience=0.5)
    running.launcher.submit()
    cluster.wait_until(cluster.processes)
    running.launcher.status()
    cluster.refuse(status, verb="list", resource="pods", times=None)  # the job itself could be deleted
    with pytest.raises((JobUnreachable, PermissionError, ApiException)):
        running.run()
    assert deletions(cluster) == []
    assert cluster.processes()


@pytest.mark.parametrize("kind", [PyTorchJob()], ids=["pytorchjob"])
def test_worker_never_starts_where_the_whole_pod_must_not_be_root(cluster, launch):
    running = launch("sleep 60", max_queued_minutes=0.03)
    for replica in running.manifest["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["securityContext"]["runAsNonRoot"] = True
    with pytest.raises(RuntimeError, match=r"max_queued_minutes.*CreateContainerConfigError.*will run as root.*init-"):
        running.run()
    assert_nothing_left(cluster)


def test_operator_that_is_away_for_a_while_changes_nothing(cluster, launch, kind):
    running = launch("sleep 1; echo done")
    cluster.restart_operator(1.0)
    printed = running.run()
    assert f"{kind.controller} has not taken the job up" in printed
    assert_only_job(cluster, "Succeeded")


def test_failed_pod_gives_rank_code_and_last_lines(cluster, launch):
    script = "if [ $PET_NODE_RANK = 1 ]; then echo before; echo the reason of it; exit 3; fi; sleep 60"
    running = launch(script)
    with pytest.raises(RuntimeError) as error:
        running.run()
    pod = rf"{NAME}-(worker-0|node-0-1-\w{{5}})"
    assert re.search(rf"node 1 \(pod {pod}\) ended with exit code 3 \(Error\)", str(error.value))
    assert str(error.value).endswith("before\nthe reason of it")
    assert_only_job(cluster, "Failed")


def test_first_failure_is_told_from_its_consequences(cluster, launch):
    """The Master only lost its peer (141), and that is seen before the Worker's own error."""
    script = "if [ $PET_NODE_RANK = 0 ]; then sleep 0.7; exit 141; fi; sleep 1; echo the reason of it; exit 1"
    with pytest.raises(RuntimeError, match="node 1 .* exit code 1 .*\n(.*\n)*.*the reason of it"):
        launch(script).run()
    assert_only_job(cluster, "Failed")


def test_end_of_an_earlier_pod_is_not_the_reason_of_the_failure(cluster, launch, tmp_path):
    """The Worker is killed once; recreated, it fails by itself."""
    script = f"if mkdir {tmp_path}/was-here-$PET_NODE_RANK; then kill -9 $$; fi; echo the reason of it; exit 7"
    with pytest.raises(RuntimeError, match=r"^node \d \(pod .*\) ended with exit code 7 .*\n(.*\n)*the reason of it"):
        launch(script).run()
    assert_only_job(cluster, "Failed")


def test_last_lines_come_from_the_status_if_the_log_cannot_be_read(cluster, launch):
    cluster.refuse(400, verb="get", resource="pods/log", times=None)
    with pytest.raises(RuntimeError, match="the reason of it"):
        launch("echo the reason of it; exit 1").run()
    assert_only_job(cluster, "Failed")


def test_program_error_is_not_repeated_by_a_retry_until_the_job_is_deleted(cluster, launch, kind):
    with pytest.raises(RuntimeError, match="exit code 1"):
        launch("exit 1").run()
    before = uids(cluster)
    with pytest.raises(RuntimeError, match=f"kubectl delete {kind.launcher} {NAME}"):
        launch("exit 1").run()
    assert uids(cluster) == before
    cluster.delete(kind.resource.plural, NAME)
    cluster.wait_until(lambda: not cluster.jobs())
    with pytest.raises(RuntimeError, match="exit code 1"):
        launch("exit 1").run()
    assert uids(cluster) != before
    assert_only_job(cluster, "Failed")


def test_job_that_ended_for_nobody_followed_it_is_recreated_by_a_retry(cluster, launch, tmp_path):
    script = f"if [ $PET_NODE_RANK = 0 ]; then mkdir {tmp_path}/was-here && exit 75; else sleep 1; fi; echo second time"
    with pytest.raises(RuntimeError, match="exit code 75"):
        launch(script).run()
    before = uids(cluster)
    assert "second time" in launch(script).run()
    assert uids(cluster) != before
    assert_only_job(cluster, "Succeeded")


def test_cancelling_a_job_that_was_seen_begins_with_its_deletion(cluster, launch):
    running = launch("sleep 60")
    running.launcher.submit()
    running.status(lambda status: status.phase is Phase.RUNNING)
    cluster.refuse(503, verb="get", times=None)  # the API is slow: there is time for one request
    cancelling = threading.Thread(target=running.launcher.cancel)
    cancelling.start()
    cluster.wait_until(lambda: not cluster.jobs(), seconds=5)
    assert cancelling.is_alive()
    cluster.recover()
    cancelling.join(timeout=10)
    assert_nothing_left(cluster)


def test_killed_pod_is_recreated(cluster, launch, tmp_path):
    script = f"if mkdir {tmp_path}/was-here-$PET_NODE_RANK; then sleep 1; kill -9 $$; fi; echo second time"
    printed = launch(script).run()
    assert "ended with exit code 137" in printed
    assert "second time" in printed
    assert_only_job(cluster, "Succeeded")


def test_evicted_pod_is_recreated(cluster, launch, tmp_path):
    running = launch(f"if mkdir {tmp_path}/was-here-$PET_NODE_RANK; then sleep 60; fi; echo second time", num_workers=1)
    running.launcher.submit()
    cluster.wait_until(cluster.processes)
    cluster.evict_pod(pod_of_rank_0(cluster))
    assert "second time" in running.run()
    assert_only_job(cluster, "Succeeded")


def test_pods_that_die_for_ever_end_the_job(cluster, launch, kind):
    """The launcher ends a PyTorchJob, which would go on; JobSet counts by itself."""
    by_launcher = kind.launcher == "pytorchjob"
    reason = r"restarted 3 times, more than max_restarts=2.*exit code 137"
    reason = reason if by_launcher else r"exit code 137.*ReachedMaxRestarts"
    with pytest.raises(RuntimeError, match=reason):
        launch("sleep 1; kill -9 $$", max_restarts=2).run()
    if by_launcher:
        assert_nothing_left(cluster)
    else:
        assert_only_job(cluster, "Failed")
        assert cluster.pods()[0]["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == "2"


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("heartbeat_minutes", "made no training step for heartbeat_minutes"),
        ("max_running_minutes", "ran longer than max_running_minutes"),
    ],
)
def test_job_ends_at_its_limit(cluster, launch, limit, reason):
    with pytest.raises(RuntimeError, match=reason):
        launch("sleep 60", **{limit: 0.02}).run()
    assert_nothing_left(cluster)


def test_training_steps_keep_the_job_alive(cluster, launch):
    metrics = {"epoch": 0.5, "loss": 1.0, "learning_rate": 0.1, "validation_loss": None, "checkpoints": []}
    running = launch("sleep 3", heartbeat_minutes=0.02)  # 1.2 s

    def steps() -> None:
        for step in range(1, 8):
            with (running.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics | {"step": step, "timestamp": 0}) + "\n")
            time.sleep(0.4)

    running.output.mkdir()
    writer = threading.Thread(target=steps)
    writer.start()
    running.run()
    writer.join()
    assert_only_job(cluster, "Succeeded")


def test_queueing_does_not_count_as_running(cluster, launch):
    running = launch("sleep 1", kueue_queue="research", max_running_minutes=0.05, heartbeat_minutes=0.05)  # 3 s
    threading.Timer(4.0, lambda: cluster.admit(NAME)).start()
    assert "waits for Kueue to admit it to the queue research" in running.run()
    assert_only_job(cluster, "Succeeded")


def test_preemption_is_no_restart_and_its_wait_is_counted_anew(cluster, launch):
    running = launch("sleep 60", kueue_queue="research", max_restarts=1, max_queued_minutes=0.05)  # 3 s
    running.launcher.submit()
    for _ in range(3):
        cluster.admit(NAME)
        pods = {
            pod["metadata"]["uid"] for pod in cluster.wait_until(lambda: len(cluster.pods()) == 2 and cluster.pods())
        }
        assert running.status(lambda status: status.phase is Phase.RUNNING).restarts == 0
        time.sleep(1.1)  # times are in whole seconds
        cluster.preempt(NAME)
        queued = running.status(lambda status: "suspended" in status.reason)
        assert (queued.restarts, queued.failure) == (0, "")
        assert (datetime.now(UTC) - queued.since).total_seconds() < 2.5
        cluster.wait_until(lambda: not cluster.pods())
    cluster.admit(NAME)
    assert running.status(lambda status: status.phase is Phase.RUNNING).restarts == 0
    assert pods.isdisjoint(pod["metadata"]["uid"] for pod in cluster.pods())
    cluster.kill_pod(pod_of_rank_0(cluster))
    assert running.status(lambda status: status.restarts).restarts == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda cluster: cluster.never_schedule(), "Unschedulable: .*3 Insufficient nvidia.com/gpu"),
        (lambda cluster: cluster.image_pull_error(), "ImagePullBackOff"),
        (lambda cluster: cluster.missing_claim("osft-storage"), 'persistentvolumeclaim "osft-storage" not found'),
        (lambda cluster: cluster.exceed_quota(), "exceeded quota"),
    ],
    ids=["unschedulable", "image", "claim", "quota"],
)
def test_waiting_job_says_for_what(cluster, launch, fault, reason):
    fault(cluster)
    running = launch("sleep 60", max_queued_minutes=0.03)
    with pytest.raises(RuntimeError, match=f"did not start within max_queued_minutes.*{reason}"):
        running.run()
    assert_nothing_left(cluster)


def test_missing_secret_is_named(cluster, launch):
    running = launch(env={"HF_TOKEN": {"secret": "no-such-secret", "key": "k"}})
    running.launcher.submit()
    status = running.status(lambda status: "no-such-secret" in status.reason)
    assert status.phase is Phase.QUEUED
    assert "CreateContainerConfigError" in status.reason
    running.launcher.cancel()
    assert_nothing_left(cluster)


def test_job_that_somebody_deletes_fails_the_step(cluster, launch, kind):
    threading.Timer(1.0, lambda: cluster.delete(kind.resource.plural, NAME)).start()
    with pytest.raises(RuntimeError, match="somebody has deleted it"):
        launch("exec sleep 60").run()
    cluster.wait_until(lambda: not cluster.pods())
    assert_nothing_left(cluster)


def test_attempt_waits_for_the_end_of_a_job_that_is_being_deleted(cluster, launch, kind):
    first = launch("trap 'sleep 1; exit 0' TERM; while true; do sleep 0.1; done")
    first.launcher.submit()
    cluster.wait_until(cluster.processes)
    before = uids(cluster)
    cluster.delete(kind.resource.plural, NAME, propagation="Foreground")
    second = launch("trap 'sleep 1; exit 0' TERM; while true; do sleep 0.1; done")
    second.launcher.submit()
    assert len(uids(cluster)) == 1
    assert uids(cluster) != before
    second.launcher.cancel()
    assert_nothing_left(cluster)


def test_cancelling_waits_until_the_processes_are_gone(cluster, launch):
    running = launch("trap 'sleep 1; exit 143' TERM; while true; do sleep 0.1; done")
    running.launcher.submit()
    cluster.wait_until(lambda: len(cluster.processes()) >= 2)
    running.launcher.cancel()
    assert_nothing_left(cluster)


def test_cancelling_does_not_touch_another_specs_job(cluster, launch):
    launch("sleep 60", memory="1Gi").launcher.submit()
    launch("sleep 60", memory="2Gi").launcher.cancel()
    assert len(cluster.jobs()) == 1


def test_deleting_a_job_that_is_gone_leaves_the_one_that_has_its_name_now(cluster, launch, kind):
    launch("sleep 60").launcher.submit()
    (earlier,) = uids(cluster)
    cluster.delete(kind.resource.plural, NAME)
    launch("sleep 60").launcher.submit()
    (now,) = uids(cluster)
    api = ClusterApi(cluster.namespace)
    api.delete(kind.resource, NAME, earlier)
    (job,) = cluster.jobs()
    assert (job["metadata"]["uid"], job["metadata"].get("deletionTimestamp")) == (now, None)
    api.delete(kind.resource, NAME, now)
    cluster.wait_until(lambda: not cluster.jobs())


def test_missing_right_is_named(cluster, launch, kind):
    may = {"apiGroups": [kind.resource.group], "resources": [kind.resource.plural], "verbs": ["get"]}
    needed = {"apiGroups": ["*"], "resources": [each.plural for each in kind.needs], "verbs": ["get", "create"]}
    cluster.api.role = {"rules": [may, needed]}
    with pytest.raises(PermissionError, match=f"may not create {kind.resource.kind}s in namespace kubeflow-user"):
        launch().run()
    assert cluster.jobs() == []


def test_manifest_that_the_server_refuses_is_told_with_its_words(cluster, launch, kind):
    running = launch()
    spec = running.manifest["spec"]
    (spec["runPolicy"] if kind.launcher == "pytorchjob" else spec["trainer"])["cleanPodPolicies"] = "All"
    with pytest.raises(ValueError, match=rf"refused the {kind.resource.kind} \(4..\).*cleanPodPolicies"):
        running.run()
    assert cluster.jobs() == []


def test_cluster_that_knows_the_other_kind_only_says_which(cluster, launch, kind):
    (other,) = (each for each in KINDS if each.launcher != kind.launcher)
    del cluster.api.installation.groups[kind.resource.group]
    with pytest.raises(ValueError, match=f"knows no {kind.resource.kind}s.*use launcher={other.launcher}"):
        launch().run()
    del cluster.api.installation.groups[other.resource.group]
    with pytest.raises(ValueError, match=rf"{kind.resource.brought_by} installed\?$"):
        launch().run()
