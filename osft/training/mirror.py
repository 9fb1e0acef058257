"""A run's output folder where `ckpt_output_dir` is a URI: what is published when, and what a new start fetches.

Every node writes to a scratch folder of its own, as it would to a plain `ckpt_output_dir`. With a path, all of this
does nothing. `osft.storage` lists what lies below the URI, who writes it and which file completes it.

- At the start, each node's folder is made equal to the store: settings, metrics, summary, newest complete state.
- A model is uploaded by a thread of rank 0 while training continues. Metrics are uploaded every INTERVAL_SECONDS, where
  the `stop` file of whoever follows the run elsewhere is looked for, too; if the store does not answer then, a line
  says so and the next time is another try.
- A state: every rank uploads its own files, while training continues; when all have, and models and metrics up to there
  are in the store, rank 0 uploads position.json and removes the older states (osft.training.state_upload). What fails
  here ends the run, which resumes from the older state.
- The summary goes last, when everything else is there.

Nothing keeps two runs on different machines from writing to one URI at once: give each its own. What lies below a path
is owned by one process at a time (`osft.storage.lock`); one that was taken over ends before it writes a model, state or
summary.
"""

import logging
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

from osft import storage
from osft.settings.training import TrainConfig
from osft.storage.atomic import atomic_path
from osft.storage.lock import check_owner

logger = logging.getLogger(__name__)

INTERVAL_SECONDS = 10.0
METRICS, SUMMARY, SETTINGS = "metrics.jsonl", "training.json", "config.json"
STOP_FILE = "stop"
"""Whoever follows the run writes it to the output folder when a callback ends training: STOP or INTERRUPT."""
MODELS = "hf_format"
POSITION = "position.json"
"""Completes a training state."""


def output_folder(config: TrainConfig) -> Path:
    """The folder that this node writes to: `ckpt_output_dir`, or this node's scratch folder for it."""
    folder = storage.local(config.ckpt_output_dir)
    if storage.is_remote(config.ckpt_output_dir) and config.node_rank:
        return folder.with_name(f"{folder.name}.node-{config.node_rank}")
    return folder


def fill(config: TrainConfig, output: Path) -> None:
    """Make this node's folder what a run resumes from. Models are not fetched; hf_format says that there are some.

    The caller owns the folder (`osft.storage.lock`). Raises as `storage.files`.
    """
    uri = config.ckpt_output_dir
    if not storage.is_remote(uri):
        return
    there = storage.files(uri) if config.resume != "off" else {}
    for name in (SETTINGS, METRICS, SUMMARY):
        if name in there:
            storage.fetch(storage.join(uri, name), to=output / name)
        else:
            (output / name).unlink(missing_ok=True)
    steps = [name.split("/")[1] for name in there if name.startswith("state/") and name.endswith(f"/{POSITION}")]
    newest = max(steps, key=lambda step: int(step.removeprefix("step-")), default=None)
    for state in (output / "state").glob("*"):
        if state.name != newest:
            shutil.rmtree(state)
    if newest is not None:
        storage.fetch(storage.join(uri, "state", newest), marker=POSITION, to=output / "state" / newest)
    if SUMMARY not in there:
        shutil.rmtree(output / MODELS, ignore_errors=True)
    if any(name.startswith(f"{MODELS}/") for name in there):
        (output / MODELS).mkdir(exist_ok=True)


def fetch_models(config: TrainConfig, output: Path, models: Sequence[str]) -> None:
    """Have those of a run's models here that an earlier start wrote. Only node 0 needs them."""
    if storage.is_remote(config.ckpt_output_dir) and config.node_rank == 0:
        for model in models:
            storage.fetch(storage.join(config.ckpt_output_dir, model), marker="config.json", to=output / model)


class Mirror:
    """Publishes what a training process writes to `folder`. Use it in a `with` block around training."""

    def __init__(self, location: str, folder: Path, *, rank: int, lock: Path | None = None) -> None:
        self.folder, self.rank = folder, rank
        self._lock_file = lock
        self.separate = storage.is_remote(location)
        """Whether each node has a folder of its own."""
        self.writes_here = rank == 0 or (self.separate and os.environ["LOCAL_RANK"] == "0")
        """Whether this process makes and removes the folders that several processes write to."""
        self._uri = location
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="osft-models")
        self._models: list[Future[None]] = []
        from osft.training.state_upload import StateUpload  # torch, which who only follows a run does not need

        self.state_upload = StateUpload()
        self._published_metrics = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="osft-mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        if self.separate and self.rank == 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.state_upload.join()
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
            if error is not None:  # whoever follows elsewhere sees how far it came
                self._look()
                self._uploads.shutdown(wait=False, cancel_futures=True)

    def check_owner(self) -> None:
        """Raise LockLost if another process has taken the folder over. Call it before what is written gets its name."""
        if self._lock_file is not None and self.rank == 0:
            check_owner(self._lock_file)

    def model(self, path: str) -> None:
        """Publish a model, in the background. Call it when rank 0 has written it."""
        if self.separate and self.rank == 0:
            address = storage.join(self._uri, path)
            publish = self._uploads.submit(storage.publish, address, marker="config.json", source=self.folder / path)
            self._models.append(publish)

    def state(self, name: str) -> None:
        """Publish a state, in the background. Call it on every rank, when the one before is settled."""
        if self.separate:
            stages = (self._forget_state, self._publish_shards, self._complete_state)
            self.state_upload.begin([partial(stage, name) for stage in stages])

    def _forget_state(self, name: str) -> None:
        """Remove what an earlier start left of a state."""
        if self.rank == 0:
            storage.remove(storage.join(self._uri, "state", name))

    def _publish_shards(self, name: str) -> None:
        """Publish this rank's files of a state."""
        folder = self.folder / "state" / name
        files = list(folder.glob(f"__{self.rank}_*"))
        for file in [*files, folder / ".metadata"] if self.rank == 0 else files:
            storage.publish(storage.join(self._uri, "state", name, file.name), source=file)

    def _complete_state(self, name: str) -> None:
        """Make a state the one that counts, and remove the others."""
        if self.rank != 0:
            return
        self._wait_for_models()
        self._publish_metrics()
        states = storage.join(self._uri, "state")
        storage.publish(storage.join(states, name, POSITION), source=self.folder / "state" / name / POSITION)
        for other in {path.split("/")[0] for path in storage.files(states)} - {name}:
            storage.remove(storage.join(states, other))

    def finish(self) -> None:
        """Wait until all is published, and publish the summary. Not before the other ranks need this one no more."""
        if self.separate and self.rank == 0:
            self._wait_for_models()
            self._publish_metrics()
            storage.publish(storage.join(self._uri, SUMMARY), source=self.folder / SUMMARY)

    def _wait_for_models(self) -> None:
        for publish in list(self._models):
            publish.result()
            self._models.remove(publish)

    def _publish_metrics(self) -> None:
        with self._lock:
            file = self.folder / METRICS
            content = file.read_bytes() if file.is_file() else b""
            content = content[: content.rfind(b"\n") + 1]  # training may be writing the next line
            if len(content) != self._published_metrics:
                storage.write(storage.join(self._uri, METRICS), content)
                self._published_metrics = len(content)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            self._publish_metrics()
            request = storage.read(storage.join(self._uri, STOP_FILE))
        except Exception as error:  # of any object store's client; whoever follows elsewhere waits for the next try
            logger.warning(f"train: the metrics could not be published, trying again later: {error}")
            return
        if request:
            with atomic_path(self.folder / STOP_FILE) as temporary:
                temporary.write_bytes(request)
