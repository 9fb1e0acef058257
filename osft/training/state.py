"""The training state on disk, from which a run that was killed goes on.

    <ckpt_output_dir>/state/step-<n>/    coefficients and optimizer state (torch.distributed.checkpoint, each process
                                         its shard) and position.json, which makes it complete

A state is written under a temporary name and renamed, then the one before it is removed: a run that dies while it
writes still has the older one. The number of processes may differ when the run is taken up again. The frozen weights
are not in it, they come from the model. With several nodes, `ckpt_output_dir` must be shared between them: a folder
that all see, or a URI. With a URI every node writes to a folder of its own, and what is in the store counts: there the
older state is removed after the newer one is complete, too.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from osft.atomic import write_json
from osft.subspace.model import osft_layers
from osft.training.mirror import POSITION, Mirror


def newest_state(output: Path) -> Path | None:
    """The last complete training state of a run."""
    steps = {int(folder.name.split("-")[1]): folder for folder in (output / "state").glob("step-*") if complete(folder)}
    return steps[max(steps)] if steps else None


def complete(folder: Path) -> bool:
    """Whether `folder` is a training state that was written to its end."""
    return folder.suffix == "" and (folder / POSITION).is_file()


def read_position(folder: Path) -> dict[str, Any]:
    """What `save_state` was given as `position`."""
    position: dict[str, Any] = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    return position


def save_state(mirror: Mirror, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]) -> None:
    """Write the state of step `position["step"]` to the mirror's folder, and publish it. Call it on every rank."""
    folder = mirror.folder / "state" / f"step-{position['step']}"
    temporary = folder.with_suffix(".incomplete")
    mirror.begin_state(folder.name)
    if mirror.writes_here:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    dcp.save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=not torch.distributed.is_initialized())
    if mirror.writes_here:
        write_json(temporary / POSITION, position)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    _barrier()
    mirror.publish_shards(folder.name)
    _barrier()
    mirror.complete_state(folder.name)


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
    for _, layer in osft_layers(model):
        layer.recompute_()  # and not projected a second time, which would round differently


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
