"""The training state on disk, from which a run that was killed resumes.

    <ckpt_output_dir>/state/step-<n>/    coefficients and optimizer state (torch.distributed.checkpoint, each process
                                         its shard) and position.json, which makes it complete

The number of processes may differ when the run is resumed. The frozen weights are not in it, they come from the model.
With several nodes, `ckpt_output_dir` must be shared between them: a folder that all see, or a URI. With a URI every
node writes to a folder of its own, and what is in the store counts: there the older state is removed after the newer
one is complete, too.

    what happens while a state is written    what is there afterwards
    a process or machine dies                the older state; the incomplete new one is not read, the next replaces it
    the disk is full                         the older state; the new one is removed, and the run ends with a message
    it was written                           the new state, flushed to disk before it got its name, then the older one
                                             is removed
    it is damaged later                      position.json holds the hash of each file and its own: `check_state` names
                                             the damaged file, and the state is not used
"""

import errno
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from osft import storage
from osft.storage.atomic import flush, flush_folder
from osft.storage.hashes import files_sha256
from osft.storage.sealed import DamagedFile, read_sealed, write_sealed
from osft.subspace.model import recompute
from osft.training.mirror import POSITION, Mirror

_FILES = "files"
_REMEDY = (
    "This training state cannot be used. Put the file back, or give resume='off' to train from the beginning, or "
    "another ckpt_output_dir"
)


def newest_state(output: Path) -> Path | None:
    """The last complete training state of a run."""
    steps = {int(folder.name.split("-")[1]): folder for folder in (output / "state").glob("step-*") if complete(folder)}
    return steps[max(steps)] if steps else None


def complete(folder: Path) -> bool:
    """Whether `folder` is a training state that was written to its end."""
    return folder.suffix == "" and (folder / POSITION).is_file()


def read_position(folder: Path) -> dict[str, Any]:
    """What `save_state` was given as `position`. Raises DamagedFile if that is not what the file holds."""
    position = read_sealed(folder / POSITION, _REMEDY)
    position.pop(_FILES, None)
    return position


def check_state(folder: Path) -> dict[str, Any]:
    """Its position, if all files of a state are what was written. Raises DamagedFile that names one that is not."""
    files = read_sealed(folder / POSITION, _REMEDY).get(_FILES, {})  # of an older release: none
    for name, (size, _) in files.items():
        file = folder / name
        if not file.is_file():
            raise DamagedFile(f"{storage.name_of(file)} is missing. {_REMEDY}")
        if file.stat().st_size != size:
            raise DamagedFile(
                f"{storage.name_of(file)} is damaged: it has {file.stat().st_size} of {size} bytes. {_REMEDY}"
            )
    for file, digest in files_sha256(folder / name for name in files).items():
        if digest != files[file.name][1]:
            raise DamagedFile(f"{storage.name_of(file)} is damaged: its sha256 is another. {_REMEDY}")
    return read_position(folder)


def save_state(mirror: Mirror, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]) -> None:
    """Write the state of step `position["step"]` to the mirror's folder, and begin to publish it. All ranks call it.

    Raises OSError (ENOSPC) if the disk is full; the state before it is kept.
    """
    folder = mirror.folder / "state" / f"step-{position['step']}"
    temporary = folder.with_suffix(".incomplete")
    mirror.state_upload.settle()  # the state that is being published is about to be removed here
    if mirror.writes_here:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    try:
        dcp.save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=not torch.distributed.is_initialized())
        files = _written_files(temporary, mirror.rank)
        if mirror.writes_here:
            write_sealed(temporary / POSITION, position | {_FILES: files})
            flush(temporary)
    except Exception as error:
        if mirror.writes_here:
            shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left in {mirror.folder} for the training state of step {position['step']}. The one before "
                "it is kept: free space, and the same call resumes from there",
            ) from None
        raise
    mirror.check_owner()
    if mirror.writes_here:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        flush_folder(folder.parent)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    _barrier()
    mirror.state(folder.name)


def _written_files(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Name -> size and SHA-256 of all files of a state. Each rank reads its own."""
    mine = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    found = {file.name: (file.stat().st_size, digest) for file, digest in files_sha256(mine).items()}
    if not torch.distributed.is_initialized():
        return found
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)
    return {name: described for part in everyone for name, described in part.items()}


def _is_disk_full(error: BaseException) -> bool:
    """Whether an error, or what it follows from, is that of a full disk, on any rank."""
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]  # of dcp.CheckpointException
    causes = [cause for cause in (*failures, error.__cause__, error.__context__) if cause is not None]
    # torch's writer of zip files tells of a full disk by its text only.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
    return full or any(_is_disk_full(cause) for cause in causes)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a state into `model` and `optimizer`, in place. Call it on every rank."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step_device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=step_device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    dcp.load(_tensors(model, optimizer), checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())
    recompute(model)  # and not projected a second time, which would round differently


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that training changes, by name. The tensors are the live ones."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = value
    return tensors


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
