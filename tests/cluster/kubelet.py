"""The scheduler and the kubelet of the stand-in: they run the container that trains of each pod as a local process."""

import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.container import Container, ContainerLog, kill_marked
from tests.cluster.environment import ConfigError, container_environment, expand
from tests.cluster.schema import CONTAINER
from tests.cluster.store import Object, Store, timestamp

# What an image would bring. Nothing else of the test's own environment reaches a pod.
IMAGE_VARIABLES = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
ROOT = Path(__file__).resolve().parents[2]
CONTAINERS = (CONTAINER, "node")  # a PyTorchJob's, a TrainJob's
INIT_CONTAINER = "init-pytorch"
ROOT_IMAGES = ("alpine", "busybox", "debian", "ubuntu", "python")  # images whose user is root; all others': 1000
NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


@dataclass
class PodFaults:
    """What new pods wait for."""

    unschedulable: bool = False
    unpullable: bool = False
    missing_claims: set[str] = field(default_factory=set)
    missing_images: set[str] = field(default_factory=set)
    """Of containers for which no process stands."""


@dataclass
class Run:
    """What the kubelet knows of a pod that it has seen."""

    container: Container | None = None
    ended: bool = False
    """Whether the end of the container is in the pod's status."""
    asked_to_stop: float | None = None
    """When SIGTERM was sent, in seconds since the epoch."""


class Kubelet:
    """Bring the processes of pods to what the store says of them, and their status into the store, on each `sync()`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        self.faults = PodFaults()
        self.image_environment: dict[str, str] = {}
        """What the image of every pod would set."""
        self.logs: dict[str, ContainerLog] = {}
        """By the pod's uid."""
        self._runs: dict[str, Run] = {}
        self._ports: dict[str, str] = {}
        self.marker = f"{os.getpid()}-{id(self)}/"

    def sync(self) -> None:
        for pod in self._store.objects("pods"):
            self._sync_pod(pod, self._runs.setdefault(pod["metadata"]["uid"], Run()))

    def stop(self) -> None:
        kill_marked(self.marker)
        for run in self._runs.values():
            if run.container is not None:
                run.container.poll()

    def kill(self, pod: Object) -> None:
        """SIGKILL to the processes of its container, as the kernel does if memory runs out."""
        container = self._runs[pod["metadata"]["uid"]].container
        assert container is not None
        container.kill()

    def evict(self, pod: Object) -> None:
        """The pod fails without an exit code; its processes are killed."""
        self.kill(pod)
        self._runs[pod["metadata"]["uid"]].ended = True
        pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}

    def _sync_pod(self, pod: Object, run: Run) -> None:
        status = pod.setdefault("status", {"phase": "Pending"})
        spec = next((one for one in pod["spec"]["containers"] if one["name"] in CONTAINERS), None)
        if "deletionTimestamp" in pod["metadata"]:
            self._stop_pod(pod, run)
        elif spec is None:  # such as the step's own, for which no process stands
            self._only_pull(pod)
        elif run.container is None:
            self._start_pod(pod, spec, run)
        elif status["phase"] == "Running" and run.container.poll() is not None:
            self._end_container(pod, run)

    def _start_pod(self, pod: Object, spec: dict[str, Any], run: Run) -> None:
        problem = self._scheduling_problem(pod)
        scheduled = {"type": "PodScheduled", "status": "False" if problem else "True"}
        if problem:
            scheduled |= {"reason": "Unschedulable", "message": problem}
        pod["status"]["conditions"] = [scheduled]
        if problem:
            return
        for init in pod["spec"].get("initContainers") or []:
            if problem := _root_problem(pod, init):
                pod["status"]["initContainerStatuses"] = [_waiting(init, "CreateContainerConfigError", problem)]
                return
        waiting = self._reason_to_wait(pod, spec)
        if waiting is not None:
            pod["status"]["containerStatuses"] = [_waiting(spec, *waiting)]
            return
        uid = pod["metadata"]["uid"]
        environment = self._environment(pod, spec)
        command = [expand(part, environment) for part in (spec.get("command") or []) + (spec.get("args") or [])]
        self.logs[uid] = ContainerLog(self._folder / f"{pod['metadata']['name']}-{uid[:8]}.log")
        run.container = Container(command, environment, self._folder, self.logs[uid], f"{self.marker}{uid}")
        pod["status"]["phase"] = "Running"
        state = {"running": {"startedAt": timestamp()}}
        pod["status"]["containerStatuses"] = [{"name": spec["name"], "state": state}]

    def _only_pull(self, pod: Object) -> None:
        """The images of a pod without a process are pulled, or are not in their registry."""
        missing = [one for one in pod["spec"]["containers"] if one["image"] in self.faults.missing_images]
        pod["status"]["phase"] = "Pending" if missing else "Running"
        pod["status"]["containerStatuses"] = [
            _waiting(one, "ErrImagePull", f"{one['image']}: not found")
            if one in missing
            else {"name": one["name"], "state": {"running": {"startedAt": timestamp()}}}
            for one in pod["spec"]["containers"]
        ]

    def _scheduling_problem(self, pod: Object) -> str:
        if self.faults.unschedulable:
            return NO_GPU
        for volume in pod["spec"].get("volumes") or []:
            claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
            if claim in self.faults.missing_claims:
                return f'0/3 nodes are available: persistentvolumeclaim "{claim}" not found.'
        return ""

    def _reason_to_wait(self, pod: Object, spec: dict[str, Any]) -> tuple[str, str] | None:
        """Reason and message of the waiting state."""
        if any(one["name"] == INIT_CONTAINER for one in pod["spec"].get("initContainers") or []):
            # It asks for the name of the master until it resolves.
            (owner,) = pod["metadata"]["ownerReferences"]
            master = self._store.find("pods", f"{owner['name']}-master-0")
            if master is None or master.get("status", {}).get("phase", "Pending") == "Pending":
                return "PodInitializing", ""
        if self.faults.unpullable:
            return "ImagePullBackOff", f'Back-off pulling image "{spec["image"]}"'
        if problem := _root_problem(pod, spec):
            return "CreateContainerConfigError", problem
        try:
            container_environment(spec, pod, self._store)
        except ConfigError as error:
            return "CreateContainerConfigError", str(error)
        return None

    def _environment(self, pod: Object, spec: dict[str, Any]) -> dict[str, str]:
        values = {key: os.environ[key] for key in IMAGE_VARIABLES if key in os.environ}
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH", "")]))
        values |= self.image_environment
        values["HOSTNAME"] = pod["metadata"]["name"]
        values |= container_environment(spec, pod, self._store)
        # The names of services do not resolve here: 127.0.0.1 and a free port, one for each job, take their place.
        (owner,) = pod["metadata"]["ownerReferences"]
        port = self._ports.setdefault(owner["uid"], _free_port())
        for prefix in ("", "PET_"):
            # <job>-master-0, or of a TrainJob's Job <job>-0.<service>
            if values.get(f"{prefix}MASTER_ADDR", "").partition(".")[0] in (
                f"{owner['name']}-master-0",
                f"{owner['name']}-0",
            ):
                values |= {f"{prefix}MASTER_ADDR": "127.0.0.1", f"{prefix}MASTER_PORT": port}
        # Nor is a volume mounted: a variable with the path of an emptyDir gets a folder of the pod's own.
        empty = {volume["name"] for volume in pod["spec"].get("volumes") or [] if "emptyDir" in volume}
        for mount in spec.get("volumeMounts") or []:
            if mount["name"] in empty:
                folder = self._folder / pod["metadata"]["uid"] / mount["name"]
                folder.mkdir(parents=True)
                values |= {name: str(folder) for name, value in values.items() if value == mount["mountPath"]}
        return values

    def _end_container(self, pod: Object, run: Run) -> None:
        assert run.container is not None
        run.ended = True
        code = run.container.exit_code
        (spec,) = (one for one in pod["spec"]["containers"] if one["name"] in CONTAINERS)
        started = pod["status"]["containerStatuses"][0]["state"].get("running", {}).get("startedAt")
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": started}
        ended["finishedAt"] = timestamp()
        if code and spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            ended["message"] = run.container.log.last_lines()
        pod["status"]["containerStatuses"] = [{"name": spec["name"], "state": {"terminated": ended}}]
        pod["status"]["phase"] = "Failed" if code else "Succeeded"

    def _stop_pod(self, pod: Object, run: Run) -> None:
        """SIGTERM to the main process, SIGKILL to all of them after the grace period; the pod goes when they have.

        Its last phase stays to be seen for one round, as since Kubernetes 1.27: the operator judges a pod that was
        told to stop by its exit code, so that a master that then exits with 0 makes the job Succeeded.
        """
        if run.container is None or run.ended:
            self._store.remove(pod)
            return
        if run.asked_to_stop is None:
            run.asked_to_stop = time.time()
            run.container.terminate()
        if time.time() >= run.asked_to_stop + pod["metadata"]["deletionGracePeriodSeconds"]:
            run.container.kill()
        if run.container.poll() is not None:
            self._end_container(pod, run)


def _waiting(spec: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    """The status of a container that has not started."""
    return {"name": spec["name"], "state": {"waiting": {"reason": reason} | ({"message": message} if message else {})}}


def _root_problem(pod: Object, container: dict[str, Any]) -> str:
    """Why a container must not start as root, in the kubelet's words; "" if it may start.

    What the container's securityContext does not say, the pod's says for all of its containers, init containers too.
    """
    context = {**(pod["spec"].get("securityContext") or {}), **(container.get("securityContext") or {})}
    image = container["image"].rsplit("/", 1)[-1].partition(":")[0]
    if context.get("runAsNonRoot") and context.get("runAsUser") is None and image in ROOT_IMAGES:
        where = f'(pod: "{pod["metadata"]["name"]}_{pod["metadata"]["namespace"]}", container: {container["name"]})'
        return f"container has runAsNonRoot and image will run as root {where}"
    return ""


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
