"""A stand-in for a cluster with Kubeflow's training operator v1.9 and Kubeflow Trainer 2.3: a real HTTP API, and pods
that are real processes.

    with Cluster(tmp_path) as cluster:
        api = ClusterApi(cluster.namespace)  # with KUBECONFIG=cluster.kubeconfig

It does what a job of osft has it do; what that is on a real cluster, test_cluster.py says. Image pulls, volumes,
networks and limits do not exist in it; see `Cluster` for what can be broken on purpose.
"""

import base64
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.api_server import ApiServer, Call, Fault
from tests.cluster.container import marked_processes
from tests.cluster.installation import Installation
from tests.cluster.jobset import JobSets
from tests.cluster.kubelet import Kubelet, PodFaults
from tests.cluster.operator import Operator
from tests.cluster.store import Object, Store
from tests.cluster.trainer import Trainer

TICK_SECONDS = 0.02


class Cluster:
    """Serves from `with` to its end, where every process of a pod is killed.

    `folder`: for the kubeconfig and the logs of pods. `role`: the dict of a Role's manifest; calls beyond it are 403.
    """

    namespace = "kubeflow-user"

    def __init__(self, folder: Path, *, role: dict[str, Any] | None = None) -> None:
        pods_folder = folder / "pods"
        pods_folder.mkdir(parents=True, exist_ok=True)
        self.kubeconfig = folder / "kubeconfig"
        self.store = Store(self.namespace)
        self.kubelet = Kubelet(self.store, pods_folder)
        self.operator, self.trainer, self.jobsets = Operator(self.store), Trainer(self.store), JobSets(self.store)
        self.api = ApiServer(self.store, self.kubelet.logs)
        self.api.role = role
        self._stopping = threading.Event()
        self._operator_returns = 0.0
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)

    def __enter__(self) -> "Cluster":
        self.api.start()
        self._write_kubeconfig()
        self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._stopping.set()
        self._thread.join()
        self.kubelet.stop()
        self.api.stop()
        failure = self._failure or self.api.failure
        if failure is not None and kind is None:
            raise failure

    def _write_kubeconfig(self) -> None:
        context = {"cluster": "stand-in", "user": "pipeline-runner", "namespace": self.namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{self.api.port}"}}],
            "users": [{"name": "pipeline-runner", "user": {"token": "a-token"}}],
            "contexts": [{"name": "stand-in", "context": context}],
        }
        self.kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")

    def _run(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            try:
                with self.store.lock:
                    self.store.collect_garbage()
                    self.kubelet.sync()
                    if time.monotonic() >= self._operator_returns:
                        self.operator.sync()
                        self.trainer.sync()
                        self.jobsets.sync()
            except Exception as error:  # raised again at the end, where the test can see it
                self._failure = self._failure or error

    # What there is.

    @property
    def installation(self) -> Installation:
        """Nodes, claims, queues and the like, which a test may spoil."""
        return self.api.installation

    @property
    def calls(self) -> list[Call]:
        """Every request so far, refused ones too."""
        return list(self.api.calls)

    def jobs(self) -> list[Object]:
        """The PyTorchJobs and TrainJobs."""
        return self._copies("pytorchjobs") + self._copies("trainjobs")

    def pods(self) -> list[Object]:
        return self._copies("pods")

    def events(self) -> list[Object]:
        return self._copies("events")

    def _copies(self, plural: str) -> list[Object]:
        with self.store.lock:
            return json.loads(json.dumps(self.store.objects(plural)))

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
                there = [(found["metadata"]["name"], found.get("status")) for found in self.jobs() + self.pods()]
                raise TimeoutError(f"not so within {seconds} s; jobs and pods: {json.dumps(there, indent=1)}")
            time.sleep(TICK_SECONDS / 2)
        return result

    # What a test brings along.

    def add(self, plural: str, found: Object) -> Object:
        """Create an object past the API."""
        with self.store.lock:
            return self.store.create(plural, found)

    def add_secret(self, name: str, data: Mapping[str, str]) -> None:
        encoded = {key: base64.b64encode(text.encode()).decode() for key, text in data.items()}
        self.add("secrets", {"metadata": {"name": name}, "data": encoded})

    def add_step_pod(self, name: str, workflow: str) -> Object:
        """A Workflow and a pod of it that runs no process: the pod in which a pipeline step believes itself to be."""
        owner = self.add("workflows", {"metadata": {"name": workflow}})
        reference = {key: owner[key] for key in ("apiVersion", "kind")} | {"name": workflow}
        reference |= {"uid": owner["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}
        metadata = {"name": name, "ownerReferences": [reference]}
        return self.add("pods", {"metadata": metadata, "spec": {"containers": [{"name": "main", "image": "step"}]}})

    def delete(self, plural: str, name: str, propagation: str = "Background") -> None:
        """What somebody else deletes, such as the Workflow of a run. Raises ApiError (404) if there is none."""
        with self.store.lock:
            self.store.delete(self.store.get(plural, name), propagation=propagation)

    def admit(self, name: str) -> None:
        """What Kueue does when there is room: the job of that name is suspended no more."""
        self._suspend(name, False)

    def preempt(self, name: str) -> None:
        """What Kueue does when another job needs the place of this one."""
        self._suspend(name, True)

    def _suspend(self, name: str, suspend: bool) -> None:
        with self.store.lock:
            job = self.store.find("pytorchjobs", name) or self.store.get("trainjobs", name)
            (job["spec"]["runPolicy"] if job["kind"] == "PyTorchJob" else job["spec"])["suspend"] = suspend

    # Faults of pods. New pods wait until `recover()`.

    def never_schedule(self) -> None:
        """They find no node."""
        self.kubelet.faults.unschedulable = True

    def image_pull_error(self) -> None:
        """They stay in ImagePullBackOff."""
        self.kubelet.faults.unpullable = True

    def missing_claim(self, claim: str) -> None:
        """Those that mount the claim find no node."""
        self.kubelet.faults.missing_claims.add(claim)

    def exceed_quota(self) -> None:
        """None can be made."""
        self.operator.quota_exceeded = self.jobsets.quota_exceeded = True

    def restrict(self) -> None:
        """The namespace enforces PodSecurity "restricted", until `recover()`."""
        self.operator.restricted = self.jobsets.restricted = True

    def kill_pod(self, name: str) -> None:
        """SIGKILL to all processes of the container."""
        with self.store.lock:
            self.kubelet.kill(self.store.get("pods", name))

    def delete_pod(self, name: str) -> None:
        """As a node that is drained does."""
        self.delete("pods", name)

    def evict_pod(self, name: str) -> None:
        """Phase Failed, reason Evicted, no exit code."""
        with self.store.lock:
            self.kubelet.evict(self.store.get("pods", name))

    def restart_operator(self, seconds: float) -> None:
        """The operator and Kubeflow Trainer do nothing for so long; processes and garbage collector continue."""
        self._operator_returns = time.monotonic() + seconds

    # Faults of the API.

    def refuse(self, status: int, verb: str = "*", resource: str = "*", times: int | None = 1, **answer: Any) -> None:
        """Answer the next `times` matching calls (all until `recover()` if None) with `status`, doing nothing.

        `answer`: its `message` and `headers`. `verb` and `resource` are patterns: `create`, `pods/log`, `*`.
        """
        self.api.faults.append(Fault(verb=verb, resource=resource, times=times, status=status, **answer))

    def cut(self, verb: str, resource: str, where: str) -> None:
        """Cut the connection of the next matching call: `after` it was served, or `within` the answer's body."""
        self.api.faults.append(Fault(verb=verb, resource=resource, times=1, cut=where))

    def slow_down(self, seconds: float, verb: str, resource: str) -> None:
        """Every matching call waits so long for its turn, until `recover()`."""
        self.api.faults.append(Fault(verb=verb, resource=resource, times=None, seconds=seconds))

    def restart_api(self) -> None:
        """As `ApiServer.restart`; takes less than 3 s."""
        self.api.restart()

    def drop_streams(self) -> None:
        """Cut every log that is being followed now."""
        self.api.drop_streams()

    def recover(self) -> None:
        """End every standing fault."""
        self.api.faults.clear()
        self.kubelet.faults = PodFaults()
        self.operator.quota_exceeded = self.jobsets.quota_exceeded = False
        self.operator.restricted = self.jobsets.restricted = False
