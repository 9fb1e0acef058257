"""The scheduler and the kubelet of the stand-in: they run the container `pytorch` of each pod as a local process."""

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import pod_status
from tests.cluster.container import Container, kill_marked
from tests.cluster.environment import ConfigError, container_environment, expand
from tests.cluster.event_recorder import EventRecorder
from tests.cluster.faults import Faults
from tests.cluster.pod_logs import ContainerLog, PodLogs
from tests.cluster.schema import CONTAINER
from tests.cluster.store import Object, Store
from tests.cluster.timestamps import seconds_text
from tests.cluster.users import root_problem

# What an image would bring. Nothing else of the test's own environment reaches a pod.
IMAGE_VARIABLES = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
ROOT = Path(__file__).resolve().parents[2]
NODE = "node-0"
INIT_CONTAINER = "init-pytorch"
EVICTION = "The node was low on resource: ephemeral-storage."


@dataclass
class Run:
    """What the kubelet knows of a pod that it has seen."""

    container: Container | None = None
    ended: bool = False
    """Whether the end of the container is in the pod's status."""
    restarts: int = 0
    restart_at: float = 0.0
    asked_to_stop: float | None = None
    """When SIGTERM was sent, in seconds since the epoch."""


class Kubelet:
    """Bring the processes of pods to what the store says of them, and their status into the store, on each `sync()`."""

    def __init__(
        self,
        store: Store,
        logs: PodLogs,
        faults: Faults,
        folder: Path,
        image_environment: Mapping[str, str],
        crash_loop_seconds: float,
    ) -> None:
        self._store, self._logs, self._faults, self._folder = store, logs, faults, folder
        self._image_environment = image_environment
        self._crash_loop_seconds = crash_loop_seconds
        self._runs: dict[str, Run] = {}
        self._ports: dict[str, int] = {}
        self._events = EventRecorder(store, "kubelet")
        self._scheduler_events = EventRecorder(store, "default-scheduler")
        self.marker = f"{os.getpid()}-{id(self)}/"

    def sync(self) -> None:
        pods = self._store.objects("pods")
        for pod in pods:
            self._sync_pod(pod, self._runs.setdefault(pod["metadata"]["uid"], Run()))
        for uid in self._runs.keys() - {pod["metadata"]["uid"] for pod in pods}:
            run = self._runs.pop(uid)  # taken out of the API at once: with a grace period of 0
            if run.container is not None:
                run.container.kill()
                run.container.poll()

    def stop(self) -> None:
        kill_marked(self.marker)
        for run in self._runs.values():
            if run.container is not None:
                run.container.poll()

    def container(self, pod: Object) -> Container:
        """Raises LookupError if the pod's container is not running."""
        run = self._runs.get(pod["metadata"]["uid"])
        if run is None or run.container is None or run.container.poll() is not None:
            raise LookupError(f"pod {pod['metadata']['name']} has no running container")
        return run.container

    def evict(self, pod: Object) -> None:
        """The pod fails without an exit code; its processes are killed."""
        run = self._runs.get(pod["metadata"]["uid"])
        if run is not None and run.container is not None:
            run.container.kill()
        pod.setdefault("status", {}).pop("containerStatuses", None)
        pod_status.set_phase(pod, "Failed", "Evicted", EVICTION)
        self._events.record(pod, "Evicted", EVICTION, warning=True)
        self._store.changed(pod)

    def _sync_pod(self, pod: Object, run: Run) -> None:
        spec = next((found for found in pod["spec"].get("containers") or [] if found["name"] == CONTAINER), None)
        if "deletionTimestamp" in pod["metadata"]:
            self._stop_pod(pod, spec, run)
        elif spec is None:
            self._stand_for(pod)
        elif pod.get("status", {}).get("phase") not in ("Succeeded", "Failed"):
            if run.container is None or run.ended:
                if time.time() >= run.restart_at:
                    self._start_pod(pod, spec, run)
            elif run.container.poll() is not None:
                self._end_container(pod, spec, run)

    def _stand_for(self, pod: Object) -> None:
        """A pod without the container, such as the step's own, is Running and has no processes."""
        if "phase" not in pod.setdefault("status", {}):
            pod_status.set_phase(pod, "Running")
            self._store.changed(pod)

    def _start_pod(self, pod: Object, spec: dict[str, Any], run: Run) -> None:
        if not self._schedule(pod):
            return
        if self._init_container_fails(pod):
            return
        waiting, message = self._reason_to_wait(pod)
        if not waiting and (message := root_problem(pod, spec)):
            waiting = "CreateContainerConfigError"
        if not waiting:
            try:
                values = self._environment(pod, spec)
            except ConfigError as error:
                waiting, message = "CreateContainerConfigError", str(error)
        if waiting:
            if "phase" not in pod["status"]:
                pod_status.set_phase(pod, "Pending")
            state = {"waiting": {"reason": waiting} | ({"message": message} if message else {})}
            if pod_status.set_container_state(pod, spec, state, run.restarts):
                self._store.changed(pod)
                if message:
                    self._events.record(pod, "Failed", f"Error: {message}", warning=True)
            return
        uid = pod["metadata"]["uid"]
        log = ContainerLog(self._folder / f"{pod['metadata']['name']}-{uid[:8]}-{run.restarts}.log")
        command = [expand(part, values) for part in (spec.get("command") or []) + (spec.get("args") or [])]
        run.container = Container(command, values, self._folder, log, f"{self.marker}{uid}/{run.restarts}")
        run.ended = False
        self._logs.add(uid, log)
        pod_status.set_phase(pod, "Running")
        pod["status"].setdefault("startTime", seconds_text())
        state = {"running": {"startedAt": seconds_text(run.container.started)}}
        pod_status.set_container_state(pod, spec, state, run.restarts)
        self._events.record(pod, "Started", f"Started container {spec['name']}")
        self._store.changed(pod)

    def _schedule(self, pod: Object) -> bool:
        problem = None if pod["spec"].get("nodeName") else self._faults.scheduling_problem(pod)
        if problem is not None:
            if pod_status.set_condition(pod, "PodScheduled", False, "Unschedulable", problem):
                pod_status.set_phase(pod, "Pending")
                self._store.changed(pod)
                self._scheduler_events.record(pod, "FailedScheduling", problem, warning=True)
            return False
        if pod_status.set_condition(pod, "PodScheduled", True):
            pod["spec"]["nodeName"] = NODE
            pod_status.set_phase(pod, "Pending")
            self._store.changed(pod)
            at = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
            self._scheduler_events.record(pod, "Scheduled", f"Successfully assigned {at} to {NODE}")
        return True

    def _init_container_fails(self, pod: Object) -> bool:
        """Whether an init container must not start, which the pod then waits for, for ever."""
        for spec in pod["spec"].get("initContainers") or []:
            problem = root_problem(pod, spec)
            if problem:
                state = {"waiting": {"reason": "CreateContainerConfigError", "message": problem}}
                if pod_status.set_init_state(pod, spec, state):
                    pod_status.set_phase(pod, "Pending")
                    self._store.changed(pod)
                    self._events.record(pod, "Failed", f"Error: {problem}", warning=True)
                return True
        return False

    def _reason_to_wait(self, pod: Object) -> tuple[str, str]:
        """Reason and message of the waiting state, empty if there is none."""
        if any(found["name"] == INIT_CONTAINER for found in pod["spec"].get("initContainers") or []):
            # The operator's init container asks for the name of the master until it resolves.
            (owner,) = pod["metadata"]["ownerReferences"]
            master = self._store.find("pods", pod["metadata"]["namespace"], f"{owner['name']}-master-0")
            if master is None or master.get("status", {}).get("phase") not in ("Running", "Succeeded", "Failed"):
                return "PodInitializing", ""
        if self._faults.image_is_missing(pod):
            image = pod["spec"]["containers"][0]["image"]
            return "ImagePullBackOff", f'Back-off pulling image "{image}"'
        return "", ""

    def _environment(self, pod: Object, spec: dict[str, Any]) -> dict[str, str]:
        values = {key: os.environ[key] for key in IMAGE_VARIABLES if key in os.environ}
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), values.get("PYTHONPATH", "")]))
        values |= self._image_environment
        values["HOSTNAME"] = pod["metadata"]["name"]
        values = self._resolved(values | container_environment(spec, pod, self._store), pod)
        return {name: self._empty_dirs(pod, spec).get(value, value) for name, value in values.items()}

    def _empty_dirs(self, pod: Object, spec: dict[str, Any]) -> dict[str, str]:
        """Volumes are not mounted: a variable that names the path of an emptyDir gets the pod's own folder instead."""
        volumes = {volume["name"] for volume in pod["spec"].get("volumes") or [] if "emptyDir" in volume}
        found = {}
        for mount in spec.get("volumeMounts") or []:
            if mount["name"] in volumes:
                folder = self._folder / pod["metadata"]["uid"] / mount["name"]
                folder.mkdir(parents=True, exist_ok=True)
                found[mount["mountPath"]] = str(folder)
        return found

    def _resolved(self, values: dict[str, str], pod: Object) -> dict[str, str]:
        """The names of services do not resolve here: 127.0.0.1 and a free port, one for each job, take their place."""
        owner = next(iter(pod["metadata"].get("ownerReferences") or []), None)
        if owner is None or owner["kind"] != "PyTorchJob":
            return values
        if owner["uid"] not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[owner["uid"]] = probe.getsockname()[1]
        port = str(self._ports[owner["uid"]])
        for prefix in ("", "PET_"):
            if values.get(f"{prefix}MASTER_ADDR") == f"{owner['name']}-master-0":
                values |= {f"{prefix}MASTER_ADDR": "127.0.0.1", f"{prefix}MASTER_PORT": port}
        if values.get("PET_RDZV_ENDPOINT", "").startswith(f"{owner['name']}-"):
            values["PET_RDZV_ENDPOINT"] = f"127.0.0.1:{port}"
        return values

    def _end_container(self, pod: Object, spec: dict[str, Any], run: Run) -> None:
        assert run.container is not None
        run.ended = True
        fall_back = spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        state = {"terminated": pod_status.terminated(run.container, fall_back)}
        pod_status.set_container_state(pod, spec, state, run.restarts)
        policy, failed = pod["spec"].get("restartPolicy", "Always"), run.container.exit_code != 0
        if "deletionTimestamp" not in pod["metadata"] and (policy == "Always" or (policy == "OnFailure" and failed)):
            run.restarts += 1
            run.restart_at = time.time() + self._crash_loop_seconds
            message = f"back-off {self._crash_loop_seconds:g}s restarting failed container={spec['name']}"
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
            pod_status.set_container_state(pod, spec, waiting, run.restarts)
            self._events.record(pod, "BackOff", message, warning=True)
        else:
            pod_status.set_phase(pod, "Failed" if failed else "Succeeded")
        self._store.changed(pod)

    def _stop_pod(self, pod: Object, spec: dict[str, Any] | None, run: Run) -> None:
        """SIGTERM to the main process, SIGKILL to all of them after the grace period; the pod goes when they have.

        Its last phase stays to be seen for one round, as since Kubernetes 1.27: the operator judges a pod that was
        told to stop by its exit code, so that a master that then exits with 0 makes the job Succeeded.
        """
        metadata = pod["metadata"]
        container = run.container
        if spec is None or container is None or run.ended:
            self._store.remove(pod)
            return
        if run.asked_to_stop is None:
            run.asked_to_stop = time.time()
            self._events.record(pod, "Killing", f"Stopping container {CONTAINER}")
            container.send(signal.SIGTERM)
        if time.time() >= run.asked_to_stop + metadata["deletionGracePeriodSeconds"]:
            container.kill()
        if container.poll() is not None:
            self._end_container(pod, spec, run)
