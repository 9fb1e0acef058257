"""The step `train_osft` of the compiled pipeline, run as its image would run it: the YAML's own command."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipelines.continual_learning.pipeline import YAML
from tests.cluster.cluster import Cluster
from tests.pipelines.kfp_server import parse_spec

ROOT = Path(__file__).parents[2]
STEP_POD = "osft-continual-learning-train-1"
WORKFLOW = "osft-continual-learning-x7k2p"


class TrainingStep:
    """One attempt of the step, and what it printed."""

    def __init__(
        self, cluster: Cluster, folder: Path, parameters: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        executor = parse_spec(YAML.read_text())["pipeline_spec"]["deploymentSpec"]["executors"]["exec-train-osft"]
        container = executor["container"]
        self.outputs = folder / "output.json"
        self.manifest = folder / "manifest"
        arguments = json.dumps(_executor_input(folder, parameters))
        command = [*container["command"], *(arguments if text == "{{$}}" else text for text in container["args"])]
        self.log = ""
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=step_environment(cluster) | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.log += line

    def signal(self, signum: int) -> None:
        """To the whole container: Argo's emissary signals the process group, and a killed pod loses every process."""
        os.killpg(self._process.pid, signum)

    def wait(self, seconds: float = 240.0) -> int:
        """The exit code."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"the step did not end within {seconds} s:\n{self.log}") from None
        self._reader.join()
        return code

    def wait_for(self, text: str, seconds: float = 120.0) -> None:
        """Until `text` was printed."""
        deadline = time.monotonic() + seconds
        while text not in self.log:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise AssertionError(f"the step did not print {text!r}:\n{self.log}")
            time.sleep(0.05)


def step_environment(cluster: Cluster) -> dict[str, str]:
    """What the step's pod would have: its name, its rights, the image's programs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PET_"))}
    return kept | {
        "KUBECONFIG": str(cluster.kubeconfig),
        "KFP_POD_NAME": STEP_POD,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _executor_input(folder: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """KFP's ExecutorInput: the step's parameters, and files for what it puts out."""

    def artifact(name: str, schema: str) -> dict[str, Any]:
        found = {"name": name, "type": {"schemaTitle": schema}, "uri": str(folder / name), "metadata": {}}
        return {"artifacts": [found]}

    return {
        "inputs": {"parameterValues": parameters},
        "outputs": {
            "parameters": {"Output": {"outputFile": str(folder / "Output")}},
            "artifacts": {
                "manifest": artifact("manifest", "system.Artifact"),
                "metrics": artifact("metrics", "system.Metrics"),
            },
            "outputFile": str(folder / "output.json"),
        },
    }
