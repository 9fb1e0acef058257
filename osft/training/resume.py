"""What a call finds in its ckpt_output_dir, and what it makes of it.

what is there                                  what the call does
a finished run that is the same                returns it
a finished run whose models are not all there  says so, and trains from the beginning: its state went (below)
a training state of the same run               resumes from it, if the models that the run wrote before it are there
such a state, but a model before it is gone    trains from the beginning
a run that is not the same                     refused with the differences (`osft.training.identity`)
models of something else                       refused
training.json, config.json, position.json,     refused: the file is named, with what to do. It is not taken for a
a file of the state or metrics.jsonl damaged   finished run, and nothing is removed
a state that was not written to its end        not looked at; the one before it is still there
resume="off"                                   removes what is there and trains from the beginning

When a run has finished and has written a model, its training state is removed (`remove_states`), by the call that
finished it or, if that was killed before, by the next one.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osft import storage
from osft.models.training_summary import TrainingSummary
from osft.settings.training import TrainConfig
from osft.storage.record import RecordError
from osft.storage.sealed import DamagedFile, read_sealed
from osft.training.identity import MADE_OF, cannot_be_compared, differences
from osft.training.mirror import METRICS, MODELS, POSITION, SETTINGS, STOP_FILE, SUMMARY
from osft.training.result import TrainResult
from osft.training.state import check_state, complete, newest_state, read_position

logger = logging.getLogger(__name__)

_TRAIN_AGAIN = "Give resume='off' to train from the beginning, or another ckpt_output_dir"
_RESUME_OR_TRAIN_AGAIN = "Remove it to resume from the newest training state, or give resume='off' to begin again"


def finished_run(config: TrainConfig, output: Path, made_of: dict[str, str]) -> TrainResult | None:
    """The run in `output`, if it is finished and all of its models are there: the summary is written last.

    Raises ValueError if it is another run, DamagedFile if what it says of itself cannot be read.
    """
    if config.resume == "off" or not (output / SUMMARY).is_file():
        return None
    try:
        summary = TrainingSummary.read(output / SUMMARY, _RESUME_OR_TRAIN_AGAIN)
    except RecordError as error:
        raise DamagedFile(f"{error}. {_RESUME_OR_TRAIN_AGAIN}") from None
    _check_same_run(summary.config, config, made_of, output, "a finished")
    if summary.metrics_sha256:
        _check_metrics(output / METRICS, summary.steps, summary.metrics_sha256, _TRAIN_AGAIN)
    if gone := _gone(config, output, summary.checkpoints, summary.checkpoint_files):
        logger.warning(f"train: {output} was finished, but {', '.join(gone)} is not there or not whole any more")
        return None
    return TrainResult(output, summary, reused=True, uri=run_uri(config))


def run_uri(config: TrainConfig) -> str | None:
    """`ckpt_output_dir` if it is a URI."""
    return config.ckpt_output_dir if storage.is_remote(config.ckpt_output_dir) else None


def state_to_resume(config: TrainConfig, output: Path, made_of: dict[str, str]) -> Path | None:
    """The training state to resume from, None to train from the beginning.

    Raises ValueError if it is another run's, DamagedFile if it, or what belongs to it, is not what was written.
    """
    if config.resume == "off":
        return None
    if config.resume == "auto":
        state = newest_state(output)
    else:
        state = storage.find(config.resume, marker=POSITION)
        if state is None or not complete(state):
            raise FileNotFoundError(f"resume: {config.resume} is not a complete training state (…/state/step-<n>)")
        storage.find(storage.join(config.resume.rstrip("/").rsplit("/", 2)[0], SETTINGS))
    settings = (state.parent.parent if state else output) / SETTINGS
    has_models = (output / MODELS).exists()
    if settings.is_file() and (state or has_models):
        recorded = read_sealed(settings, _TRAIN_AGAIN)
        _check_same_run(recorded, config, made_of, output, "an unfinished")
    elif has_models:
        raise ValueError(
            f"ckpt_output_dir {output} holds models that something else wrote ({MODELS}). Give another "
            "ckpt_output_dir, or resume='off' to replace them"
        )
    if state is None:
        return None
    position = check_state(state)
    check_state_is_of(state, config, made_of, output)
    if position.get("metrics_sha256") and (output / METRICS).is_file():
        _check_metrics(output / METRICS, position["step"], position["metrics_sha256"], _TRAIN_AGAIN)
    if gone := _gone(config, output, models_until(output, position["step"]), {}):
        logger.warning(f"train: {', '.join(gone)} is gone from {output}: trained again from the beginning")
        return None
    logger.info(f"train: resumes from {state}")
    return state


def check_state_is_of(state: Path, config: TrainConfig, made_of: dict[str, str], output: Path) -> None:
    """Raise ValueError unless a training state was made of `made_of`, as far as it says; say what it does not."""
    there = read_position(state).get(MADE_OF)
    if there is None:
        return
    different = [
        f"{what}: {there[what][:12]} there, {now[:12]} now"
        for what, now in made_of.items()
        if there.get(what, now) != now
    ]
    if different:
        raise ValueError(
            f"the training state {state} belongs to another run ({'; '.join(different)}): what it "
            "learned means nothing there. Restore what it was made of, give another ckpt_output_dir, or resume='off' "
            "to replace that run"
        )


def models_until(output: Path, step: int) -> list[str]:
    """The models that a run wrote up to a step, relative to its folder."""
    metrics = output / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines()[:step] if metrics.is_file() else []
    return [path for line in lines for path in json.loads(line)["checkpoints"]]


def clear(config: TrainConfig, output: Path, state: Path | None) -> None:
    """Remove what an earlier run left. One that is resumed keeps its metrics, and the models from before its state."""
    location, names = config.ckpt_output_dir, [SUMMARY, STOP_FILE]
    if state is None:
        names += [METRICS, "state", MODELS]
    else:
        kept = set(models_until(output, read_position(state)["step"]))
        names += [name for name in _models(config, output) if name not in kept]
    for name in names:
        storage.remove(storage.join(location, name))
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)


def remove_states(config: TrainConfig, output: Path, models: Sequence[str]) -> None:
    """Remove the training state of a finished run, here and in the store. Without `models`, all it has is its state."""
    if models:
        if config.node_rank == 0:
            storage.remove(storage.join(config.ckpt_output_dir, "state"))
        shutil.rmtree(output / "state", ignore_errors=True)


def metrics_sha256(file: Path, steps: int) -> str:
    """SHA-256 of the lines of the first steps, in hexadecimal digits."""
    with file.open("rb") as lines:
        return hashlib.sha256(b"".join(line for _, line in zip(range(steps), lines, strict=False))).hexdigest()


def model_files(folder: Path) -> dict[str, int]:
    """Relative name -> bytes of each file of a model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _check_same_run(
    recorded: dict[str, Any], config: TrainConfig, made_of: dict[str, str], output: Path, kind: str
) -> None:
    differing = differences(recorded, config, made_of)
    if differing:
        others = "settings or contents" if any(line.split(":")[0] in made_of for line in differing) else "settings"
        raise ValueError(
            f"ckpt_output_dir {output} holds {kind} run with other {others} ({'; '.join(differing)}). "
            "Give another ckpt_output_dir, or resume='off' to replace that run"
        )
    if unknown := cannot_be_compared(recorded, made_of):
        logger.warning(
            f"train: the run in {output} is of a release that did not write down the hashes of {', '.join(unknown)}: "
            "they cannot be compared. What is known of it is the same",
        )


def _check_metrics(file: Path, steps: int, digest: str, remedy: str) -> None:
    if not file.is_file():
        raise DamagedFile(f"{storage.name_of(file)} is missing. {remedy}")
    if metrics_sha256(file, steps) != digest:
        raise DamagedFile(
            f"{storage.name_of(file)} is damaged: its first {steps} lines are not what was written. {remedy}"
        )


def _models(config: TrainConfig, output: Path) -> set[str]:
    """All models of a run, relative to its folder, here and in the store."""
    found = {f"{MODELS}/{folder.name}" for folder in (output / MODELS).glob("*")}
    if uri := run_uri(config):
        found |= {f"{MODELS}/{name.split('/')[0]}" for name in storage.files(storage.join(uri, MODELS))}
    return found


def _gone(config: TrainConfig, output: Path, models: Sequence[str], files: dict[str, dict[str, int]]) -> list[str]:
    """Those of the models that are not there, or lack a file or a part of one. `files`: as `model_files`, by model."""
    if not models:
        return []
    if uri := run_uri(config):
        sizes = {name: entry.size for name, entry in storage.files(uri).items() if name.startswith(f"{MODELS}/")}
    else:
        sizes = {f"{MODELS}/{name}": size for name, size in model_files(output / MODELS).items()}
    gone = []
    for model in models:
        wanted: dict[str, int | None] = {**files[model]} if model in files else {"config.json": None}
        for name, size in wanted.items():
            found = sizes.get(f"{model}/{name}")
            if found is None or size not in (None, found):
                gone.append(model)
                break
    return gone
