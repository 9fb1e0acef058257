"""The methods that `benchmarks.step` compares, each on the same random Llama, stepped by the same loop."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.peers import LORA_RANK, adapted, mini_trainer_model, project_steps_
from osft.data.chat import Sample
from osft.data.packing import Feeding, MicroBatch, collate
from osft.settings.subspace import SubspaceConfig
from osft.settings.training import TrainConfig
from osft.storage.atomic import write_json
from osft.subspace import factor_store, select_targets
from osft.subspace.calibration import measure
from osft.subspace.preflight import preflight
from osft.training.loop import make_optimizer, train_step
from osft.training.sharded_model import load_sharded

METHODS = {
    "ours": "OSFT, complement",
    "ours_core": "OSFT, core",
    "ours_activations": "protect activations, with stiffness",
    "full": "full fine-tuning, every parameter",
    "full_targets": "full fine-tuning of the same weights",
    "peft_osf": "PEFT OSF",
    "mini_trainer": "mini-trainer OSFT",
    "lora": f"PEFT LoRA, rank {LORA_RANK}",
}
RATIO = 0.25
STIFFNESS = 1.0
"""Any but 0 costs the same."""
CALIBRATION_SAMPLES, CALIBRATION_TOKENS = 4, 1024
MAX_TOKENS = 4096


@dataclass(kw_only=True, slots=True)
class Settings:
    """What is measured."""

    device: str = "cpu"
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 4
    num_heads: int = 16
    num_key_value_heads: int = 4
    vocab_size: int = 8192
    """The head is then 16 % of the linear weights: between an 8B Llama's 7 % and a 1B Llama's 21 %. Only full
    fine-tuning trains it, so a larger one would flatter every other method."""
    micro_batches: int = 4
    tokens: int = 512
    """Of one micro-batch, which is one sample, all of them in the loss."""
    repetitions: int = 5
    threads: int = 2
    seed: int = 0
    dtype: Literal["auto", "float32"] = "auto"
    """Of the computation, for every method; "auto" is bfloat16 on CUDA, float32 on CPUs."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return torch.bfloat16 if self.device == "cuda" and self.dtype == "auto" else torch.float32


def give_spectrum_(weight: torch.Tensor, generator: torch.Generator) -> None:
    """Random singular vectors, and singular values as trained weights have them: a steep head, a long falling tail.

    s_i = (1 + 50 i / k)^-1/2 (1 - 0.9 i / k), i = 0 .. k - 1, scaled to entries of root mean square 0.02.
    `generator` is on the weight's device.
    """
    m, n = weight.shape
    k, device = min(m, n), weight.device
    i = torch.arange(k, device=device) / k
    singular_values = (1 + 50 * i).rsqrt() * (1 - 0.9 * i)
    singular_values *= 0.02 * (m * n) ** 0.5 / singular_values.norm()
    left, right = (torch.linalg.qr(torch.randn(size, k, generator=generator, device=device))[0] for size in (m, n))
    weight.copy_(left * singular_values @ right.T)


def prepare(folder: Path, settings: Settings) -> dict[str, float]:
    """Save the random model in bfloat16, as checkpoints come, its factors for each kind of `ours`, the settings.

    Returns the seconds that the statistics ("statistics") and the factors of each kind take; reading the weights and
    writing the factors are part of them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        vocab_size=settings.vocab_size,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
    )
    with torch.device(settings.device):
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator(device=settings.device).manual_seed(settings.seed)
    with torch.no_grad():
        for target in select_targets(model):
            give_spectrum_(model.get_submodule(target.name).weight, generator)
    samples = [random_sample(settings, CALIBRATION_TOKENS, generator) for _ in range(CALIBRATION_SAMPLES)]
    seconds: dict[str, float] = {}
    with _timed(seconds, "statistics", settings.device):
        statistics = measure(
            model,
            select_targets(model),
            samples,
            feeding=Feeding(max_tokens=MAX_TOKENS, device=torch.device(settings.device)),
        )
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    del model
    manifests = {}
    for method, subspace in subspaces().items():
        # A store for each: factors that two kinds share are otherwise computed once.
        store: dict[str, Any] = {
            "store": folder / "factors" / method,
            "device": settings.device,
        }
        with _timed(seconds, method, settings.device):
            if subspace.protect == "weights":
                made = factor_store.precompute(folder / "model", config=subspace, **store)
            else:
                made = factor_store.precompute_by_inputs(
                    folder / "model", config=subspace, statistics=statistics, statistics_file="", **store
                )
        manifests[method] = str(made.path)
    write_json(folder / "prepared.json", {"settings": asdict(settings), "factors": manifests})
    return seconds


@contextmanager
def _timed(seconds: dict[str, float], what: str, device: str) -> Iterator[None]:
    """Note how long the block takes, until the GPU is done with it."""
    synchronize(device)
    started = time.perf_counter()
    yield
    synchronize(device)
    seconds[what] = time.perf_counter() - started


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """How long it takes, until the GPU is done with it."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "", device):
        work()
    return seconds[""]


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def subspaces() -> dict[str, SubspaceConfig]:
    """The subspace settings of the kinds of `ours`."""
    return {
        "ours": SubspaceConfig(unfreeze_rank_ratio=RATIO, free_subspace="complement"),
        "ours_core": SubspaceConfig(unfreeze_rank_ratio=RATIO, free_subspace="core"),
        "ours_activations": SubspaceConfig(unfreeze_rank_ratio=RATIO, protect="activations"),
    }


def train_config(folder: Path, method: str, settings: Settings, learning_rate: float = 1e-5) -> TrainConfig:
    """The training worker's configuration; methods other than `ours` take their optimizer settings from it."""
    method = method if method in subspaces() else "ours"
    return TrainConfig(
        model_path=str(folder / "model"),
        data_path="unused",
        factors=json.loads((folder / "prepared.json").read_text())["factors"][method],
        ckpt_output_dir="unused",
        effective_batch_size=1,
        max_tokens_per_gpu=MAX_TOKENS,
        max_seq_len=MAX_TOKENS,
        learning_rate=learning_rate,
        dtype=settings.dtype,
        stiffness=STIFFNESS if method == "ours_activations" else 0.0,
        **subspaces()[method].to_dict(),
    )


def build(method: str, folder: Path, settings: Settings) -> Any:
    """The model of a method, ready to train. Ours is loaded as the training worker loads it, from the factor store."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = torch.device(settings.device)
    if method in subspaces():
        config = train_config(folder, method, settings)
        assert config.factors is not None
        found = preflight(config.model_path)
        loaded, _ = load_sharded(
            config,
            config.model_path,
            config.factors,
            device=device,
            attention=found.attention,
            loss_head=found.loss_head,
        )
        return loaded.train()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=settings.torch_dtype)
    model.to(device)
    if method == "full_targets":
        model.requires_grad_(False)
        for target in select_targets(model):
            model.get_submodule(target.name).weight.requires_grad_(True)
    elif method in ("peft_osf", "mini_trainer"):
        with _svd_by_eigenvectors() if settings.device == "cuda" else nullcontext():
            model = adapted(model, "peft_osf", RATIO) if method == "peft_osf" else mini_trainer_model(model, RATIO)
    elif method == "lora":
        model = adapted(model, "lora")
    return model.train()


@contextmanager
def _svd_by_eigenvectors() -> Iterator[None]:
    """Let PEFT find its factors sooner: CUDA's own SVD of a wide weight takes far longer than all the steps.

    How a method gets its factors is not part of what is measured of it. Float64, so no less exact than the other.
    """
    original = torch.linalg.svd

    def svd(weight: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
        if weight.shape[0] < weight.shape[1]:
            u, values, vh = svd(weight.T, full_matrices)
            return vh.T, values, u.T
        exact = weight.double()
        eigenvalues, vectors = torch.linalg.eigh(exact.T @ exact)
        vectors = vectors.flip(-1)
        left, triangle = torch.linalg.qr(exact @ vectors)
        left = left * triangle.diagonal().sign()  # Householder's reflections choose signs of their own
        return (
            left.to(weight.dtype),
            eigenvalues.flip(-1).clamp_min(0).sqrt().to(weight.dtype),
            vectors.T.to(weight.dtype),
        )

    torch.linalg.svd = svd
    try:
        yield
    finally:
        torch.linalg.svd = original


def random_batches(settings: Settings, *, count: int, tokens: int, seed: int) -> list[MicroBatch]:
    """`count` micro-batches of one sample each."""
    generator = torch.Generator().manual_seed(seed)
    return [collate([random_sample(settings, tokens, generator)]).to(settings.device) for _ in range(count)]


def random_sample(settings: Settings, tokens: int, generator: torch.Generator) -> Sample:
    """Random tokens, all of them in the loss."""
    row = torch.randint(settings.vocab_size, (tokens,), generator=generator, device=generator.device).tolist()
    return Sample(row, row)


def stepper(model: nn.Module, config: TrainConfig) -> Callable[[Sequence[MicroBatch]], None]:
    """A function that does one training step on some micro-batches."""
    # As the worker does: the fused kernel, on a single process.
    optimizer = make_optimizer(model, config, fused=True)
    if hasattr(model, "project_gradients"):
        project_steps_(optimizer, model)

    def step(batches: Sequence[MicroBatch]) -> None:
        loss_tokens = sum(len(batch.targets) for batch in batches)
        train_step(model, optimizer, batches, num_loss_tokens=loss_tokens, max_grad_norm=config.max_grad_norm)

    return step
