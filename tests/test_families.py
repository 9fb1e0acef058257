"""Every supported architecture, as a random model of two layers: split, trained, saved, and read by transformers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from osft.data.chat import Sample
from osft.data.packing import collate
from osft.models.checkpoint import CheckpointReader
from osft.models.conversion import ModelWeights
from osft.models.likelihood import token_nll
from osft.models.loading import empty_model, load_model
from osft.settings.training import TrainConfig
from osft.subspace import osft_layers, select_targets
from osft.subspace.calibration import measure
from osft.subspace.factor_store import precompute, precompute_by_inputs
from osft.training.loop import run
from osft.training.saving import save_merged
from osft.training.sharded_model import load_sharded
from tests.conftest import feeding
from tests.subspace.test_linear import frozen_directions

VOCABULARY, RATIO = 64, 0.25
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 6}  # shorter than the samples
EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**COMMON, **HEADS),
    "mistral": lambda: MistralConfig(**COMMON, **WINDOW),
    "gemma": lambda: GemmaConfig(**COMMON, **HEADS),
    "gemma2": lambda: Gemma2Config(**COMMON, **HEADS, **WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, **HEADS, **WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "granite": lambda: GraniteConfig(**COMMON, embedding_multiplier=2.0, logits_scaling=2.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **HEADS, **EXPERTS, num_experts=3, moe_intermediate_size=24),
    "gpt_oss": lambda: GptOssConfig(**COMMON, **HEADS, **WINDOW, **EXPERTS, num_local_experts=3),
}
TIED = ("qwen2", "gemma", "gemma2", "gemma3", "gpt2", "opt")


def save_model(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():  # biases and norms that a transposed or misplaced tensor would show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def make_samples(count: int = 6) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCABULARY, (8 + 3 * i,), generator=generator).tolist() for i in range(count)]
    return [Sample(row, row) for row in rows]


class Samples(list[Sample]):
    """In memory, as the loop wants them."""

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self]

    @property
    def num_loss_tokens(self) -> list[int]:
        return [sample.num_loss_tokens for sample in self]


def train_config(folder: Path, *, factors: Path | None = None, **changes: object) -> TrainConfig:
    """Ten steps, each on all samples. The factors are computed for the settings unless they are given."""
    settings = {
        "model_path": str(folder),
        "data_path": "unused",
        "ckpt_output_dir": "unused",
        "unfreeze_rank_ratio": RATIO,
        "effective_batch_size": 6,
        "max_tokens_per_gpu": 60,
        "max_seq_len": 60,
        "learning_rate": 1e-2,
        "num_epochs": 10,
        "dtype": "float32",
    }
    config = TrainConfig(**(settings | changes))
    if factors is None:
        factors = factors_for(config, folder)
    return config.replace(factors=str(factors))


def factors_for(config: TrainConfig, folder: Path) -> Path:
    store = folder.parent / "factors"
    if config.protect == "weights":
        return precompute(folder, store, config.subspace).path
    model = load_model(folder, dtype=torch.float32)
    statistics = measure(model, select_targets(model), make_samples(), feeding=feeding())
    return precompute_by_inputs(folder, store, config.subspace, statistics, statistics_file="").path


def load(config: TrainConfig, mesh: DeviceMesh | None = None) -> tuple[nn.Module, ModelWeights]:
    return load_sharded(config, config.model_path, config.factors, device=torch.device("cpu"), mesh=mesh)


def train_here(config: TrainConfig, model: nn.Module, *, rank: int = 0, world_size: int = 1) -> list[float]:
    samples = make_samples()
    losses: list[float] = []
    run(
        model,
        Samples(samples),
        config,
        feeding=feeding(config.max_tokens_per_gpu, rank=rank, world_size=world_size),
        on_step=lambda metrics: losses.append(metrics.loss),
    )
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([make_samples()[5].input_ids])).logits


@dataclass(frozen=True, slots=True)
class Trained:
    family: str
    folder: Path
    tuned: Path
    model: nn.Module
    untrained_logits: torch.Tensor
    losses: list[float]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp(request.param)
    save_model(request.param, root / "model")
    config = train_config(root / "model")
    model, stored = load(config)
    untrained = logits(model)
    losses = train_here(config, model)
    save_merged(model, stored, root / "tuned")
    return Trained(request.param, root / "model", root / "tuned", model, untrained, losses)


def test_split_model_computes_what_transformers_loads(trained):
    expected = logits(AutoModelForCausalLM.from_pretrained(trained.folder))
    torch.testing.assert_close(trained.untrained_logits, expected, rtol=0, atol=1e-5)


def test_split_model_in_bfloat16_is_that_of_transformers_in_bfloat16(trained):
    """Buffers and what an architecture keeps in float32 included."""
    config = train_config(trained.folder, dtype="bfloat16")
    model, _ = load(config)
    expected = AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.bfloat16)
    assert logits(model).dtype == logits(expected).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_ten_steps_learn(trained):
    assert len(trained.losses) == 10
    assert trained.losses[-1] < 0.95 * trained.losses[0]
    for name, layer in osft_layers(trained.model):
        assert layer.coefficients.count_nonzero() > 0.9 * layer.coefficients.numel(), name


def as_weights(weight: torch.Tensor) -> list[torch.Tensor]:
    """A stack of experts as its experts."""
    return list(weight) if weight.ndim == 3 else [weight]


def test_saved_update_of_every_weight_and_expert_is_orthogonal_to_its_frozen_directions(trained):
    skeleton = empty_model(trained.folder)
    base, tuned = (ModelWeights(CheckpointReader(folder), skeleton) for folder in (trained.folder, trained.tuned))
    targets = select_targets(skeleton)
    assert [target.name for target in targets] == [name for name, _ in osft_layers(trained.model)]
    for target in targets:
        before, after = base.tensor(target.tensor), tuned.tensor(target.tensor)
        for old, new in zip(as_weights(before), as_weights(after), strict=True):
            update = new.double() - old.double()
            left, right = frozen_directions(old, round(RATIO * min(old.shape)))
            assert update.norm() > 1e-3 * old.norm(), f"{target.name} did not learn, so the test shows nothing"
            assert (left.T @ update).norm() < 1e-4 * update.norm(), target.name
            assert (update @ right).norm() < 1e-4 * update.norm(), target.name


def test_tuned_folder_opens_in_transformers_and_computes_what_was_trained(trained):
    tuned = AutoModelForCausalLM.from_pretrained(trained.tuned)
    found, expected = logits(tuned), logits(trained.model)
    assert not torch.allclose(found, trained.untrained_logits, atol=1e-2), "nothing was learned"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tied_embeddings_stay_tied_and_untied_ones_untied(trained):
    assert (trained.family in TIED) == trained.model.config.tie_word_embeddings
    for model in (trained.model, AutoModelForCausalLM.from_pretrained(trained.tuned)):
        head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head is embeddings) == (trained.family in TIED)


def test_tuned_folder_has_the_tensors_of_its_base_and_changes_the_targets_only(trained):
    base, tuned = CheckpointReader(trained.folder), CheckpointReader(trained.tuned)
    assert sorted(tuned.names()) == sorted(base.names())
    skeleton = empty_model(trained.folder)
    tensors = {target.tensor for target in select_targets(skeleton)}
    for group in ModelWeights(base, skeleton).groups:
        for name in group.stored_names:
            before, after = base.tensor(name), tuned.tensor(name)
            assert (after.dtype, after.shape) == (before.dtype, before.shape), name
            assert torch.equal(after, before) == tensors.isdisjoint(group.shapes), name


def test_packed_samples_do_not_see_each_other(trained):
    samples = make_samples(4)
    with torch.no_grad():
        packed = token_nll(trained.model.eval(), collate(samples))
        separate = torch.cat([token_nll(trained.model, collate([sample])) for sample in samples])
    torch.testing.assert_close(packed, separate, rtol=1e-4, atol=1e-5)


SHARDED = {
    "gpt2": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "gpt2 by inputs": {"protect": "activations", "stiffness": 10.0},
    "llama by inputs": {"protect": "activations", "stiffness": 10.0},
}
"""A family, and what is changed in its settings."""


def train_shard(rank: int, root: Path, configs: dict[str, TrainConfig]) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for family, config in configs.items():
        model, stored = load(config, mesh)
        losses = train_here(config, model, rank=rank, world_size=2)
        save_merged(model, stored, root / f"{family}-two", rank=rank)
        if rank == 0:
            (root / f"{family}.json").write_text(json.dumps(losses))
    distributed.barrier()
    distributed.destroy_process_group()


def test_shards_of_experts_and_of_transposed_weights_train_like_one_process(tmp_path):
    """Three experts over two processes; one model recomputes activations, through the experts' hooks."""
    configs, one_process = {}, {}
    for family, changes in SHARDED.items():
        save_model(family.split()[0], tmp_path / family / "model")
        configs[family] = train_config(tmp_path / family / "model", **changes)
        config = configs[family]
        model, stored = load(config)
        one_process[family] = train_here(configs[family], model)
        save_merged(model, stored, tmp_path / f"{family}-one")
    configs["qwen3_moe"] = configs["qwen3_moe"].replace(gradient_checkpointing=True)
    multiprocessing.spawn(train_shard, (tmp_path, configs), nprocs=2)
    for family in SHARDED:
        assert json.loads((tmp_path / f"{family}.json").read_text()) == pytest.approx(one_process[family], rel=1e-4)
        one, two = (CheckpointReader(tmp_path / f"{family}-{count}") for count in ("one", "two"))
        for name in one.names():
            torch.testing.assert_close(two.tensor(name), one.tensor(name), rtol=1e-3, atol=1e-4, msg=name)
