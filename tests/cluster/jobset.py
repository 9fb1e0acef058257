"""JobSet (v0.12) and the Job controller of the stand-in: JobSets to Indexed Jobs, these to pods, and restarts.

They do what a job of osft has them do: one replicated job of one replica, a failure policy, a pod failure policy with
backoffLimit 0. Left out: times to live, services, network settings, pauses between retries.
"""

import copy
import time
import uuid

from tests.cluster.installation import refuse_unrestricted
from tests.cluster.operator import EXCEEDED_QUOTA
from tests.cluster.store import ApiError, Object, Store
from tests.cluster.trainer import INDEX, is_true, owner_of, set_condition

JOBSET = "jobset.sigs.k8s.io"
BATCH_SECONDS = 0.5  # a real Job controller looks at the changes of a Job's pods once a second
JOB_NAME = "batch.kubernetes.io/job-name"


class JobSets:
    """Reconcile every JobSet, and the Jobs of all, on each `sync()`."""

    def __init__(self, store: Store) -> None:
        self.quota_exceeded = False
        """Whether pods cannot be made."""
        self.restricted = False
        """Whether the namespace enforces PodSecurity "restricted"."""
        self._store = store
        self._next_looks: dict[str, float] = {}  # at each Job, by its uid

    def sync(self) -> None:
        for jobset in self._store.objects("jobsets"):
            if "deletionTimestamp" not in jobset["metadata"] and not is_true(jobset, "Completed", "Failed"):
                self._reconcile_jobset(jobset)
        for job in self._store.objects("jobs"):
            uid, now = job["metadata"]["uid"], time.monotonic()
            if "deletionTimestamp" in job["metadata"] or is_true(job, "Complete", "Failed"):
                continue
            if now >= self._next_looks.get(uid, 0.0):
                self._next_looks[uid] = now + BATCH_SECONDS
                self._reconcile_job(job)

    def _reconcile_jobset(self, jobset: Object) -> None:
        status = jobset.setdefault("status", {"restarts": 0})
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job = self._store.find("jobs", f"{jobset['metadata']['name']}-{replicated['name']}-0")
        if job is None:
            self._store.create("jobs", _job(jobset, replicated))
        elif job["metadata"]["ownerReferences"][0]["uid"] != jobset["metadata"]["uid"]:
            return
        elif "deletionTimestamp" in job["metadata"]:
            return  # of the attempt before
        elif is_true(job, "Complete"):
            set_condition(jobset, "Completed", "jobset completed successfully", reason="AllJobsCompleted")
        elif is_true(job, "Failed"):
            self._judge(jobset, job)
        else:
            job["spec"]["suspend"] = jobset["spec"]["suspend"]
        active = int(job is not None and not is_true(job, "Complete", "Failed") and not jobset["spec"]["suspend"])
        counts = {"active": active, "ready": active, "suspended": int(jobset["spec"]["suspend"])}
        counts |= {"succeeded": int(is_true(jobset, "Completed")), "failed": int(is_true(jobset, "Failed"))}
        status["replicatedJobsStatus"] = [{"name": replicated["name"], **counts}]

    def _judge(self, jobset: Object, job: Object) -> None:
        """What a failed Job means: the end of all by a rule, or after too many restarts; else another attempt."""
        policy, status = jobset["spec"].get("failurePolicy", {}), jobset["status"]
        (failed,) = (found for found in job["status"]["conditions"] if found["type"] == "Failed")
        for rule in policy.get("rules", []):
            if failed["reason"] in rule.get("onJobFailureReasons", [failed["reason"]]):
                assert rule["action"] == "FailJobSet", "the stand-in knows no other action"
                message = f"jobset failed due to FailJobSet failure policy rule (first failed job: {_name(job)})"
                set_condition(jobset, "Failed", message, reason="FailJobSetFailurePolicyAction")
                return
        if status["restarts"] >= policy.get("maxRestarts", 0):
            message = "jobset failed due to reaching max number of restarts"
            set_condition(jobset, "Failed", message, reason="ReachedMaxRestarts")
            return
        status["restarts"] += 1
        self._store.record(jobset, "Restarting", f"restarting jobset, attempt {status['restarts']}", warning=True)
        self._store.delete(job, propagation="Foreground")

    def _reconcile_job(self, job: Object) -> None:
        spec, status = job["spec"], job.setdefault("status", {"succeeded": [], "judged": []})
        pods = self._store.owned_by(job)
        active = [pod for pod in pods if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")]
        self._judge_pods(job, pods)
        if is_true(job, "FailureTarget") or spec["suspend"]:
            for pod in active:
                if "deletionTimestamp" not in pod["metadata"]:
                    self._store.delete(pod)
            if is_true(job, "FailureTarget") and not active:
                (why,) = (found for found in job["status"]["conditions"] if found["type"] == "FailureTarget")
                set_condition(job, "Failed", why["message"], reason=why["reason"])
        elif len(status["succeeded"]) == spec["completions"]:
            set_condition(job, "Complete", reason="CompletionsReached")
        else:
            taken = {_index(pod) for pod in active} | set(status["succeeded"])
            for index in sorted(set(range(spec["completions"])) - taken):
                self._create_pod(job, index)

    def _judge_pods(self, job: Object, pods: list[Object]) -> None:
        """Each once, when it has ended; of those of one look FailJob goes before the limit of retries."""
        status, actions = job["status"], {}
        for pod in pods:
            phase, uid = pod.get("status", {}).get("phase"), pod["metadata"]["uid"]
            if phase not in ("Failed", "Succeeded") or uid in status["judged"]:
                continue
            status["judged"].append(uid)
            if phase == "Succeeded":
                status["succeeded"].append(_index(pod))
            elif not job["spec"]["suspend"]:  # it was deleted for that
                actions[_action(job, pod)] = _name(pod)
        if is_true(job, "FailureTarget"):
            return  # the first reason stays
        if "FailJob" in actions:
            message = f"Container node for pod {actions['FailJob']} failed with an exit code of rule 0"
            set_condition(job, "FailureTarget", message, reason="PodFailurePolicy")
        elif "" in actions:
            message = "Job has reached the specified backoff limit"
            set_condition(job, "FailureTarget", message, reason="BackoffLimitExceeded")

    def _create_pod(self, job: Object, index: int) -> None:
        template, name = copy.deepcopy(job["spec"]["template"]), f"{_name(job)}-{index}-{uuid.uuid4().hex[:5]}"
        metadata = template.setdefault("metadata", {})
        labels = {**metadata.get("labels", {}), INDEX: str(index), JOB_NAME: _name(job)}
        annotations = {**metadata.get("annotations", {}), INDEX: str(index)}
        for container in template["spec"]["containers"]:
            field = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
            container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": field})
        pod = {
            "metadata": {
                "name": name,
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [owner_of(job)],
            },
            "spec": template["spec"],
        }
        try:
            if self.quota_exceeded:
                raise ApiError(403, f'pods "{name}" is forbidden: {EXCEEDED_QUOTA}')
            if self.restricted:
                refuse_unrestricted(pod)
            self._store.create("pods", pod)
        except ApiError as error:
            self._store.record(job, "FailedCreate", f"Error creating: {error}", warning=True)


def _job(jobset: Object, replicated: Object) -> Object:
    name, jobset_name = replicated["name"], jobset["metadata"]["name"]
    labels = {
        f"{JOBSET}/jobset-name": jobset_name,
        f"{JOBSET}/replicatedjob-name": name,
        f"{JOBSET}/restart-attempt": str(jobset["status"]["restarts"]),
    }
    spec = copy.deepcopy(replicated["template"]["spec"])
    metadata = spec["template"].setdefault("metadata", {})
    metadata["labels"] = {**metadata.get("labels", {}), **labels}
    own = {**replicated["template"].get("metadata", {}).get("labels", {}), **labels}
    return {
        "metadata": {"name": f"{jobset_name}-{name}-0", "labels": own, "ownerReferences": [owner_of(jobset)]},
        "spec": spec | {"suspend": jobset["spec"]["suspend"]},
    }


def _action(job: Object, pod: Object) -> str:
    """That of the first rule of the pod failure policy that the exit code is in; "" if none says anything."""
    codes = [
        found["state"]["terminated"]["exitCode"]
        for found in pod["status"].get("containerStatuses", [])
        if "terminated" in found["state"]
    ]
    for rule in job["spec"].get("podFailurePolicy", {}).get("rules", []):
        if any(code in rule["onExitCodes"]["values"] for code in codes):
            return str(rule["action"])
    return ""


def _index(pod: Object) -> int:
    return int(pod["metadata"]["labels"][INDEX])


def _name(found: Object) -> str:
    return str(found["metadata"]["name"])
