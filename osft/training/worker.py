"""One training process. Started by torchrun's agent: `python -m osft.training.worker CONFIG.json`."""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

from osft.atomic import write_json
from osft.config import TrainConfig
from osft.data.chat import Sample
from osft.subspace.model import osft_layers
from osft.training.loop import StepMetrics, num_steps, run
from osft.training.progress import Progress
from osft.training.sharded_model import load_sharded, save_merged


@record
def main() -> None:
    """Load, train, save; rank 0 writes metrics, the checkpoint and, last, the summary."""
    config = TrainConfig(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device()
    mesh = None
    if world_size > 1:
        mesh = init_device_mesh(device.type, (world_size,))  # gloo on CPUs, NCCL on CUDA
    output = Path(config.output_dir)
    started = time.perf_counter()

    from datasets import load_from_disk

    dataset = load_from_disk(Path(config.data_path) / "train").with_format("numpy")
    columns = {name: list(dataset[name]) for name in ("input_ids", "labels")}
    lengths = [len(tokens) for tokens in columns["input_ids"]]

    def sample(index: int) -> Sample:
        return Sample(columns["input_ids"][index].tolist(), columns["labels"][index].tolist())

    model, reader = load_sharded(config, device=device, mesh=mesh)
    loaded = time.perf_counter()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for name, p in model.named_parameters() if name in reader)
    steps: list[StepMetrics] = []
    metrics_file = output / "metrics.jsonl"
    if rank == 0:
        shutil.rmtree(output / "checkpoint", ignore_errors=True)  # of a run that died before its summary
        print(f"train: {trainable:,} trainable of {total:,} parameters, {world_size} x {device}", flush=True)
    with Progress(num_steps(len(lengths), config), metrics_file, enabled=rank == 0) as progress:

        def on_step(metrics: StepMetrics) -> None:
            steps.append(metrics)
            progress.advance(metrics)

        run(model, sample, lengths, config, device=device, on_step=on_step, rank=rank, world_size=world_size)
    trained = time.perf_counter()

    update_norms = {name: _norm(layer.coefficients) for name, layer in osft_layers(model)}
    save_merged(model, reader, output / "checkpoint", rank=rank)
    if rank == 0:
        summary = {
            "config": config.to_dict(),
            "steps": len(steps),
            "tokens": steps[-1].tokens,
            "loss_tokens": steps[-1].loss_tokens,
            "first_loss": steps[0].loss,
            "final_loss": steps[-1].loss,
            "world_size": world_size,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "trainable_parameters": trainable,
            "total_parameters": total,
            "load_seconds": loaded - started,
            "train_seconds": trained - loaded,
            "save_seconds": time.perf_counter() - trained,
            "peak_memory_bytes": _peak_memory(device),
            "update_norms": update_norms,
        }
        write_json(output / "training.json", summary)
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _device() -> torch.device:
    """This process's GPU, or the CPU with its share of the cores."""
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    return torch.device("cpu")


def _norm(coefficients: torch.Tensor) -> float:
    """Frobenius norm of a layer's update: that of its coefficients, because the bases are orthonormal."""
    norm = torch.linalg.vector_norm(coefficients.detach())
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
