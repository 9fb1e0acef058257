"""A stand-in for a cluster with Kubeflow's training operator v1.9: a real HTTP API, and pods that are real processes.

    with Cluster(tmp_path) as cluster:
        client = TrainingClient(config_file=str(cluster.kubeconfig), namespace=cluster.namespace)

Image pulls, volumes, networks and limits do not exist in it; see `Cluster` for what can be broken on purpose.
"""

import base64
import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.access import Call
from tests.cluster.api_server import ApiServer
from tests.cluster.container import marked_processes
from tests.cluster.faults import EXCEEDED_QUOTA, AnswerFault, Faults
from tests.cluster.kubelet import Kubelet
from tests.cluster.operator import Operator
from tests.cluster.pod_logs import PodLogs
from tests.cluster.store import Object, Store

TICK_SECONDS = 0.02


class Cluster:
    """Serves from `with` to its end, where every process of a pod is killed.

    `folder`: for the kubeconfig and the logs of pods. `role`: the dict of a Role's manifest; calls beyond it are 403.
    `image_environment`: what the image of every pod would set. `crash_loop_seconds`: the pause before a container is
    restarted in place (10 s and growing on a real node).
    """

    def __init__(
        self,
        folder: Path,
        *,
        namespace: str = "kubeflow-user",
        role: dict[str, Any] | None = None,
        image_environment: Mapping[str, str] | None = None,
        crash_loop_seconds: float = 0.1,
    ) -> None:
        pods_folder = folder / "pods"
        pods_folder.mkdir(parents=True, exist_ok=True)
        self.namespace = namespace
        self.kubeconfig = folder / "kubeconfig"
        self.store, self.faults, logs = Store(), Faults(), PodLogs()
        self.api = ApiServer(self.store, logs, self.faults, namespace)
        self.api.role = role
        self.operator = Operator(self.store, self.faults)
        self.kubelet = Kubelet(self.store, logs, self.faults, pods_folder, image_environment or {}, crash_loop_seconds)
        self._stopping = threading.Event()
        self._operator_returns = 0.0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)

    def __enter__(self) -> "Cluster":
        self.api.start()
        self.api.write_kubeconfig(self.kubeconfig)
        self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._stopping.set()
        self._thread.join()
        self.kubelet.stop()
        self.api.stop()
        if self._failure is not None and kind is None:
            raise self._failure

    def _run(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            try:
                with self.store.lock:
                    self.store.collect_garbage()
                    self.kubelet.sync()
                    if self.operator.active and time.monotonic() >= self._operator_returns:
                        self.operator.sync()
            except Exception as error:  # raised again at the end, where the test can see it
                self._failure = self._failure or error

    # What there is.

    @property
    def calls(self) -> list[Call]:
        """Every request so far, in the words of RBAC, refused ones too."""
        return list(self.api.calls)

    def jobs(self) -> list[Object]:
        return self._copies("pytorchjobs")

    def pods(self) -> list[Object]:
        return self._copies("pods")

    def events(self) -> list[Object]:
        return self._copies("events")

    def job(self, name: str) -> Object:
        """Raises ApiError (404) if there is none."""
        with self.store.lock:
            return json.loads(json.dumps(self.store.get("pytorchjobs", self.namespace, name)))

    def conditions(self, name: str) -> dict[str, str]:
        """The status (`True`, `False`) of each condition of a job."""
        return {found["type"]: found["status"] for found in self.job(name).get("status", {}).get("conditions", [])}

    def phase(self, pod: str) -> str | None:
        """None where there is no such pod, or nothing has looked at it yet."""
        with self.store.lock:
            found = self.store.find("pods", self.namespace, pod) or {}
            return found.get("status", {}).get("phase")

    def container_status(self, pod: str) -> dict[str, Any]:
        """What the API says of the container `pytorch` of a pod, empty before it says anything."""
        with self.store.lock:
            found = self.store.find("pods", self.namespace, pod) or {}
            (status,) = found.get("status", {}).get("containerStatuses") or [{}]
            return json.loads(json.dumps(status))

    def processes(self) -> list[int]:
        """The living processes of all pods."""
        return marked_processes(self.kubelet.marker)

    def wait_until(self, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        """What `condition` returns once it is true. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > deadline:
                raise TimeoutError(f"not so within {seconds} s; jobs and pods: {json.dumps(self._summary(), indent=1)}")
            time.sleep(TICK_SECONDS / 2)
        return result

    def wait_for(self, name: str, condition: str, seconds: float = 20.0) -> Object:
        """The job of that name once the condition is true. Raises TimeoutError after `seconds`."""
        self.wait_until(lambda: self.conditions(name).get(condition) == "True", seconds)
        return self.job(name)

    def _copies(self, plural: str) -> list[Object]:
        with self.store.lock:
            return json.loads(json.dumps(self.store.objects(plural)))

    def _summary(self) -> list[Any]:
        return [(found["metadata"]["name"], found.get("status")) for found in self.jobs() + self.pods()]

    # What a test brings along.

    def add(self, plural: str, found: Object) -> Object:
        """Create an object past the API. `plural`: one of store.KINDS."""
        with self.store.lock:
            return json.loads(json.dumps(self.store.create(plural, found, self.namespace)))

    def add_secret(self, name: str, data: Mapping[str, str]) -> None:
        encoded = {key: base64.b64encode(text.encode()).decode() for key, text in data.items()}
        self.add("secrets", {"metadata": {"name": name}, "data": encoded})

    def add_config_map(self, name: str, data: Mapping[str, str]) -> None:
        self.add("configmaps", {"metadata": {"name": name}, "data": dict(data)})

    def add_step_pod(self, name: str, workflow: str, labels: Mapping[str, str] | None = None) -> Object:
        """A Workflow and a pod of it that runs no process: the pod in which a pipeline step believes itself to be."""
        with self.store.lock:
            owner = self.store.find("workflows", self.namespace, workflow) or self.add(
                "workflows", {"metadata": {"name": workflow}}
            )
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": workflow,
            "uid": owner["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata = {"name": name, "labels": dict(labels or {}), "ownerReferences": [reference]}
        return self.add("pods", {"metadata": metadata, "spec": {"containers": [{"name": "main", "image": "step"}]}})

    def delete(self, plural: str, name: str, propagation: str | None = None) -> None:
        """What somebody else deletes, such as the Workflow of a run. Raises ApiError (404) if there is none."""
        with self.store.lock:
            self.store.delete(self.store.get(plural, self.namespace, name), propagation)

    def admit(self, name: str) -> None:
        """What Kueue does when there is room: the job of that name is suspended no more."""
        with self.store.lock:
            job = self.store.get("pytorchjobs", self.namespace, name)
            job["spec"]["runPolicy"]["suspend"] = False
            self.store.changed(job)

    # Faults of pods.

    def kill_pod(self, name: str, number: int = signal.SIGKILL, reason: str = "") -> None:
        """SIGKILL to all processes of the container, or another signal to its main process.

        `reason`: of the terminated state, such as OOMKilled. Raises LookupError if the container is not running.
        """
        with self.store.lock:
            container = self.kubelet.container(self.store.get("pods", self.namespace, name))
            if number == signal.SIGKILL:
                container.kill(reason)
            else:
                container.send(number)

    def delete_pod(self, name: str, grace_seconds: int | None = None) -> None:
        with self.store.lock:
            self.store.delete(self.store.get("pods", self.namespace, name), grace_seconds=grace_seconds)

    def evict_pod(self, name: str) -> None:
        """Phase Failed, reason Evicted, no exit code."""
        with self.store.lock:
            self.kubelet.evict(self.store.get("pods", self.namespace, name))

    def never_schedule(self, pods: str = "*") -> None:
        """New pods of that pattern find no node until `recover()`."""
        self.faults.unschedulable.append(pods)

    def image_pull_error(self, pods: str = "*") -> None:
        """New pods of that pattern stay in ImagePullBackOff until `recover()`."""
        self.faults.unpullable.append(pods)

    def missing_claim(self, claim: str) -> None:
        """New pods that mount the claim find no node until `recover()`."""
        self.faults.missing_claims.add(claim)

    def exceed_quota(self) -> None:
        """The operator can make no pods until `recover()`."""
        self.faults.quota_message = EXCEEDED_QUOTA

    def restart_operator(self, seconds: float) -> None:
        """The operator does nothing for so long; processes, the kubelet and the garbage collector go on."""
        self._operator_returns = time.monotonic() + seconds

    # Faults of the API.

    def refuse(
        self,
        status: int,
        verb: str = "*",
        resource: str = "*",
        times: int | None = 1,
        headers: Mapping[str, str] | None = None,
        message: str = "",
    ) -> None:
        """Answer the next `times` matching calls (all until `recover()` if None) with `status`, doing nothing.

        `verb` and `resource` are patterns over the words of RBAC: `create`, `pods/log`, `*`.
        """
        self.faults.add_answer(
            AnswerFault(
                verb=verb, resource=resource, times=times, status=status, headers=dict(headers or {}), message=message
            )
        )

    def delay(self, seconds: float, verb: str = "*", resource: str = "*", times: int | None = 1) -> None:
        """Serve the next `times` matching calls so much later."""
        self.faults.add_answer(AnswerFault(verb=verb, resource=resource, times=times, seconds=seconds))

    def cut(
        self,
        verb: str = "*",
        resource: str = "*",
        times: int | None = 1,
        served: bool = False,
        within_body: bool = False,
    ) -> None:
        """Reset the connection of the next `times` matching calls.

        `served`: after the call has done its work; `within_body`: then, too, when half of the answer's body is sent.
        """
        cut = "within" if within_body else "after" if served else "before"
        self.faults.add_answer(AnswerFault(verb=verb, resource=resource, times=times, cut=cut))

    def restart_api(self, refused: float = 0.3, forbidden: float = 0.3, unavailable: float = 2.0) -> None:
        """Restart the API server: every connection is cut, and new ones are refused for so many seconds; then it
        forbids everything (403), then it answers 503. Returns at once."""
        self.api.restart(refused, forbidden, unavailable)

    def drop_streams(self, clean: bool = False) -> None:
        """Cut every open log stream and watch now; `clean`: end them as a server does whose time for them is over."""
        self.api.drop_streams(clean)

    def stall_streams(self) -> None:
        """Every log stream and watch open now says nothing more and never ends, as after a lost connection."""
        self.api.stall_streams()

    def recover(self) -> None:
        """End every standing fault."""
        self.faults.recover()
