"""What a plan says is what training then needs, to the byte where nothing is measured."""

import json
import math
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from docs import scaling
from osft import osft
from osft.data.chat import Sample
from osft.data.packing import collate
from osft.models import row_slices
from osft.models.loading import empty_model, load_model
from osft.models.loss_head import LossHead
from osft.settings.training import TrainConfig
from osft.subspace.calibration import measure
from osft.subspace.factor_store import precompute, precompute_by_inputs
from osft.subspace.model import inject_empty
from osft.subspace.rank_allocation import allocate_ranks
from osft.subspace.targets import select_targets
from osft.training import data_counts, sharded_model
from osft.training.loop import train_step
from osft.training.memory import count_activations, use_counted_attention
from osft.training.plan import TrainingPlan, plan
from osft.training.prepare import prepare_training_data
from osft.training.sharded_model import load_sharded
from tests.architectures import small_config
from tests.conftest import byte_tokenizer, feeding, tiny_llama, write_jsonl

LLAMA_8B = Path(__file__).parents[1] / "data_llama_8b"
GIB = 2**30


def config(model: Path, data: Path, **changes: object) -> TrainConfig:
    settings = {
        "model_path": str(model),
        "data_path": str(data),
        "ckpt_output_dir": str(data.parent / "never-written"),
        "unfreeze_rank_ratio": 0.25,
        "effective_batch_size": 16,
        "max_tokens_per_gpu": 128,
        "max_seq_len": 64,
        "learning_rate": 1e-4,
    }
    return TrainConfig(**(settings | changes))


def bytes_by_name(planned: TrainingPlan, gpus: int) -> dict[str, int]:
    (estimate,) = [estimate for estimate in planned.memory if estimate.gpus == gpus]
    return {line.name: line.bytes for line in estimate.lines}


@pytest.fixture(scope="module")
def eight_billion(chats) -> TrainingPlan:
    return plan(config(LLAMA_8B, chats, max_tokens_per_gpu=8192, max_seq_len=4096))


def loaded_bytes(settings: TrainConfig, factors: Path, world_size: int) -> dict[str, int]:
    """Bytes that the first process holds of the really loaded model, by the names of a plan's lines."""
    mesh = None
    if world_size > 1:  # a group without peers: sharding and loading need no communication
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
        mesh = init_device_mesh("cpu", (world_size,))
    try:
        model, _ = load_sharded(settings, settings.model_path, factors, device=torch.device("cpu"), mesh=mesh)
        found = dict.fromkeys(("weights", "base weights", "bases", "frozen bases", "coefficients", "buffers"), 0)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            leaf = name.rsplit(".", 1)[-1]
            kind = {
                "coefficients": "coefficients",
                "base_weight": "base weights",
                "frozen_basis": "frozen bases",
                "curvature": "buffers",
            }.get(leaf, "bases" if leaf.endswith("_basis") else "buffers" if "rotary" in name else "weights")
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found[kind] += local.nbytes
    finally:
        if mesh:
            distributed.destroy_process_group()
    return found | {"coefficients": 4 * found["coefficients"]}


SPLITS = {
    "complement": {},
    "core": {"free_subspace": "core"},
    "activations": {"protect": "activations"},
}


def factor_set(settings: TrainConfig, store: Path) -> Path:
    """That of a run with these settings, in a store."""
    model_path, subspace = settings.model_path, settings.subspace
    if subspace.protect == "weights":
        return precompute(model_path, store, subspace).path
    model = load_model(model_path, dtype=torch.float32)
    statistics = measure(model, select_targets(model), packed(64), feeding=feeding())
    return precompute_by_inputs(model_path, store, subspace, statistics, statistics_file="").path


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_static_lines_are_the_bytes_of_the_loaded_model(model_folder, chats, tmp_path, world_size, split):
    settings = config(model_folder, chats, nproc_per_node=world_size, dtype="bfloat16", **SPLITS[split])
    factors = factor_set(settings, tmp_path / "factors")
    planned = bytes_by_name(plan(settings), world_size)
    loaded = loaded_bytes(settings, factors, world_size)
    assert {name: planned[name] for name in loaded} == loaded


def real_model(folder: Path, attn_implementation: str) -> torch.nn.Module:
    """The model with OSFT layers on the CPU, in bfloat16 and with any numbers."""
    model = empty_model(folder, dtype=torch.bfloat16, attn_implementation=attn_implementation)
    targets = select_targets(model)
    ranks = allocate_ranks(targets, config(folder, folder).subspace)
    inject_empty(model, targets, ranks, split_kinds=dict.fromkeys(ranks, "complement"))
    model._apply(lambda t: torch.zeros_like(t, device="cpu") if t.is_meta else t)
    model.tie_weights()
    return model


def packed(tokens: int, samples: int = 4) -> list[Sample]:
    return [Sample([1] * (tokens // samples), [1] * (tokens // samples)) for _ in range(samples)]


@pytest.mark.parametrize("kernel", ["flash_attention_2", "sdpa", "eager"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_activations_on_shapes_are_those_on_numbers(model_folder, chats, kernel, gradient_checkpointing):
    settings = config(model_folder, chats, attn_implementation=kernel, gradient_checkpointing=gradient_checkpointing)
    planned = bytes_by_name(plan(settings), 1)["activations"]
    model = real_model(model_folder, "eager")
    use_counted_attention(model, kernel)
    counted = count_activations(model, collate(packed(settings.max_tokens_per_gpu)))
    assert planned == pytest.approx(counted.total(gradient_checkpointing=gradient_checkpointing), rel=0.05)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_counted_attention_saves_what_the_real_kernel_saves(model_folder, kernel):
    model, batch = real_model(model_folder, kernel), collate(packed(256))
    real = count_activations(model, batch).total(gradient_checkpointing=False)
    use_counted_attention(model, kernel)
    assert count_activations(model, batch).total(gradient_checkpointing=False) == pytest.approx(real, rel=0.05)


def test_real_step_stays_just_below_the_estimate(tmp_path, monkeypatch):
    # The estimate is of a GPU, which takes more logits at a time.
    monkeypatch.setattr(row_slices, "ELEMENTS_IN_CACHE", row_slices.ELEMENTS_AT_ONCE)
    tiny_llama(hidden_size=128, intermediate_size=448, vocab_size=6000).save_pretrained(tmp_path / "model")
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"input_ids": [1] * 128, "labels": [1] * 128}] * 8)
    settings = config(
        tmp_path / "model",
        texts,
        use_processed_dataset=True,
        max_tokens_per_gpu=512,
        max_seq_len=128,
        attn_implementation="sdpa",
    )
    planned = bytes_by_name(plan(settings), 1)

    model = real_model(tmp_path / "model", "sdpa").train()
    assert LossHead.take_place_in(model)
    micro_batches = [collate(packed(512))] * 2  # in the second one the gradients are there from the first
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    train_step(model, optimizer, micro_batches, num_loss_tokens=1016)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(model, optimizer, micro_batches, num_loss_tokens=1016)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))

    gradients = planned["coefficients"] // 4  # the rest of the line was there before the step
    estimate = planned["activations"] + planned["logits"] + gradients
    print(peak / estimate)
    assert 0.85 * estimate < peak <= estimate


def test_gradient_checkpointing_leaves_the_inputs_of_the_blocks_and_one_block(model_folder):
    model = real_model(model_folder, "eager")
    use_counted_attention(model, "flash_attention_2")
    counted = count_activations(model, collate(packed(64)))
    assert counted.block_inputs == 2 * 64 * 32 * 2  # blocks, tokens, hidden size, bytes
    assert counted.total(gradient_checkpointing=True) == (
        counted.outside_blocks + counted.block_inputs + counted.largest_block
    )
    tables, first_norm = 2 * 64 * 8 * 2, 64 * 32 * 4 + 64 * 4  # shared by the blocks; without a gradient
    assert counted.blocks == counted.block_inputs + 2 * counted.largest_block - tables - first_norm


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "afmoe", "mamba2", "modernbert-decoder"])
def test_other_architectures_are_counted_too(kind, chats, tmp_path):
    small_config(kind).save_pretrained(tmp_path)
    planned = plan(config(tmp_path, chats))
    assert planned.activations_counted
    assert bytes_by_name(planned, 1)["activations"] > 0


def test_what_cannot_be_computed_on_shapes_is_planned_without_activations_and_says_so(chats, tmp_path):
    small_config("falcon").save_pretrained(tmp_path)
    planned = plan(config(tmp_path, chats))
    assert not planned.activations_counted
    assert bytes_by_name(planned, 1)["activations"] == 0
    assert "FalconForCausalLM cannot be computed on shapes alone" in planned.notes[0]
    assert "without the activations" in planned.verdict()
    assert all(estimate.bytes for estimate in planned.memory)


def test_flash_attention_keeps_no_mask(model_folder, chats):
    tokens = 128
    sdpa, flash = (
        bytes_by_name(plan(config(model_folder, chats, attn_implementation=kernel)), 1)["activations"]
        for kernel in ("sdpa", "flash_attention_2")
    )
    repeated = 2 * (4 - 2) * tokens * 8 * 2  # keys and values for all 4 heads instead of 2, 8 numbers of 2 bytes
    assert sdpa - flash == 2 * (tokens * tokens * 2 + repeated)


@pytest.mark.parametrize(
    ("settings", "like", "said"),
    [
        ({}, "flash_attention_2", "by flash-attn where it is installed, else by PyTorch's varlen kernel"),
        ({"dtype": "float32"}, "sdpa", "SDPA keeps a mask of packed samples, 128 x 128 numbers in each block"),
    ],
    ids=["bfloat16", "float32"],
)
def test_packed_samples_are_planned_for_what_computes_them(model_folder, chats, settings, like, said):
    planned, other = (
        plan(config(model_folder, chats, **settings, **change)) for change in ({}, {"attn_implementation": like})
    )
    (line,) = [line for line in planned.memory[0].lines if line.name == "activations"]
    assert line.bytes == bytes_by_name(other, 1)["activations"]
    assert said in line.explanation


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unmask_messages": True},
        {"max_seq_len": 48},
        {"validation_split": 0.2},
    ],
    ids=str,
)
def test_chats_are_counted_as_they_are_prepared(model_folder, chats, tmp_path, changes):
    settings = config(model_folder, chats, data_output_dir=str(tmp_path), **changes)
    assert_as_prepared(settings, model_folder)


def test_documents_are_counted_as_they_are_prepared(model_folder, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "word " * (3 + i)} for i in range(40)])
    settings = config(
        model_folder,
        texts,
        data_output_dir=str(tmp_path / "prepared"),
        is_pretraining=True,
        block_size=32,
        document_column_name="text",
        validation_split=0.2,
    )
    assert_as_prepared(settings, model_folder)


def test_processed_data_is_counted_as_it_is_taken_over(model_folder, tmp_path):
    rows = [{"input_ids": list(range(i + 3)), "labels": [-100, *range(1, i + 3)]} for i in range(70)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = config(model_folder, data, data_output_dir=str(tmp_path / "prepared"), use_processed_dataset=True)
    assert_as_prepared(settings, model_folder)
    prepared = prepare_training_data(settings, model_folder)
    again = config(model_folder, prepared.folder, use_processed_dataset=True)
    assert plan(again).data.tokens == plan(settings).data.tokens


def assert_as_prepared(settings: TrainConfig, model: Path) -> None:
    counted = data_counts.count_data(settings, model)
    written = prepare_training_data(settings, model).statistics
    assert counted.exact
    assert counted.samples == written["num_train_samples"]
    assert counted.tokens == written["num_tokens"]
    assert counted.loss_tokens == written["num_loss_tokens"]
    if not settings.validation_split:  # the preparation counts both sides
        assert counted.dropped_samples == written["dropped_as_too_long"]["samples"]


def test_large_data_is_extrapolated_and_says_so(model_folder, chats, monkeypatch):
    settings = config(model_folder, chats)
    exact = data_counts.count_data(settings, model_folder)
    monkeypatch.setattr(data_counts, "MAX_COUNTED", 30)
    planned = plan(settings)
    assert (planned.data.counted, planned.data.exact, planned.data.samples) == (30, False, 120)
    assert planned.data.tokens == pytest.approx(exact.tokens, rel=0.1)
    assert "about 120" in repr(planned)


def test_sample_longer_than_max_tokens_per_gpu_is_named(model_folder, chats):
    with pytest.raises(ValueError, match=r"larger-number.jsonl:\d+: the sample has \d+ tokens, more than max_tokens"):
        plan(config(model_folder, chats, max_tokens_per_gpu=40))


def test_steps_follow_epochs_batches_and_max_steps(model_folder, chats):
    assert plan(config(model_folder, chats, num_epochs=3)).steps == 3 * math.ceil(120 / 16)
    assert plan(config(model_folder, chats, num_epochs=3, max_steps=5)).steps == 5


def test_smallest_number_of_gpus_is_the_first_that_fits(chats):
    tokens = {"max_tokens_per_gpu": 2048, "max_seq_len": 2048}
    settings = config(LLAMA_8B, chats, **tokens)
    for memory in (24.0, 48.0, 80.0):
        planned = plan(settings, gpu_memory_gib=memory)
        fits = planned.smallest_fit
        assert fits
        (estimate,) = [e for e in planned.memory if e.gpus == fits]
        assert estimate.bytes <= memory * GIB
        if fits > 1:
            halved = config(LLAMA_8B, chats, **tokens, nproc_per_node=fits // 2)
            half = plan(halved, gpu_memory_gib=memory).memory[0]
            assert half.gpus == fits // 2
            assert half.bytes > memory * GIB


def test_what_no_number_of_gpus_can_hold_names_the_parameter_to_lower(chats):
    planned = plan(config(LLAMA_8B, chats, max_tokens_per_gpu=32768, max_seq_len=4096))
    assert planned.smallest_fit is None
    (remedy,) = [note for note in planned.notes if "max_tokens_per_gpu from 32,768" in note]
    lowered = int(remedy.split("to about ")[1].rstrip(".").replace(",", ""))
    assert plan(config(LLAMA_8B, chats, max_tokens_per_gpu=lowered, max_seq_len=4096)).smallest_fit


@pytest.mark.timeout(20)
def test_llama_8b_is_planned_from_its_config_alone(chats):
    planned = plan(config(LLAMA_8B, chats, max_tokens_per_gpu=8192, max_seq_len=4096))
    assert planned.total_parameters == 8_030_261_248
    square, grouped, mlp = 1024 * 1024, 256 * 4096, 1024 * 14336
    assert planned.trainable_parameters == 32 * (2 * square + 2 * grouped + 3 * mlp)
    assert planned.num_target_weights == 32 * 7
    assert planned.ranks == (256, 1024)
    assert planned.data.tokens is None
    assert "no tokenizer" in repr(planned)


def test_lines_of_llama_8b_add_up(eight_billion):
    for estimate in eight_billion.memory:
        assert estimate.bytes == sum(line.bytes for line in estimate.lines)
        assert all(line.explanation for line in estimate.lines)
    one, eight = (bytes_by_name(eight_billion, gpus) for gpus in (1, 8))
    for name in ("weights", "base weights", "bases", "frozen bases", "coefficients"):
        assert one[name] == 8 * eight[name]
    assert one["weights"] == 2 * eight_billion.total_parameters
    assert one["coefficients"] == 16 * eight_billion.trainable_parameters


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_layers_with_one_input_hold_one_basis_and_keep_what_it_is_multiplied_with_once(
    chats, model_folder, tmp_path, monkeypatch, gradient_checkpointing
):
    settings = config(
        model_folder,
        chats,
        protect="activations",
        gradient_checkpointing=gradient_checkpointing,
        dtype="bfloat16",
        attn_implementation="sdpa",
    )
    planned = bytes_by_name(plan(settings), 1)
    hidden, intermediate, tokens = 32, 64, settings.max_tokens_per_gpu
    alone = hidden // 4 * (3 * hidden) + intermediate // 4 * intermediate  # q, k, v; o; gate, up; down
    assert planned["bases"] == 2 * 4 * alone

    factors = factor_set(settings, tmp_path / "factors")
    monkeypatch.setattr(sharded_model, "use_gated_product", lambda model, **_: None)  # as on GPUs
    model, _ = load_sharded(settings, settings.model_path, factors, device=torch.device("cpu"))
    model.gradient_checkpointing_disable()
    use_counted_attention(model, "sdpa")
    counted = count_activations(model, collate(packed(tokens)))
    assert planned["activations"] == pytest.approx(
        counted.total(gradient_checkpointing=gradient_checkpointing), rel=0.02
    )


def test_document_about_scaling_says_what_the_dry_run_does(eight_billion):
    found = scaling.counts(scaling.LLAMA_8B, "OSFT on weights, complement", 8, tokens=8192, checkpointing=False)
    expected = bytes_by_name(eight_billion, 8)
    assert {name: found[f"memory: {name}"] for name in expected} == pytest.approx(expected, rel=1e-7)
    assert found["trained"] == eight_billion.trainable_parameters
    assert found["parameters"] == eight_billion.total_parameters


def test_plan_as_dict_survives_json_and_holds_the_sums(eight_billion):
    restored = json.loads(json.dumps(eight_billion.to_dict()))
    assert [estimate["bytes"] for estimate in restored["memory"]] == [e.bytes for e in eight_billion.memory]


def test_planning_writes_nothing(tmp_path):
    model, data = tmp_path / "model", write_jsonl(tmp_path / "data.jsonl", [])
    tiny_llama().config.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(data, [{"messages": messages}] * 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert plan(config(model, data)).data.samples == 3  # without weights, too
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.covers("dry_run")
def test_dry_run_of_the_function_is_the_plan(model_folder, chats):
    settings = config(model_folder, chats)
    assert osft(**(settings.to_dict() | {"dry_run": True})) == plan(settings)
    assert not Path(settings.ckpt_output_dir).exists()


def test_adaptive_ranks_are_planned_as_uniform_and_say_so(model_folder, chats):
    uniform = plan(config(model_folder, chats))
    adaptive = plan(config(model_folder, chats, rank_allocation="adaptive"))
    assert adaptive.memory == uniform.memory
    assert any("uniform ratio" in note for note in adaptive.notes)


def test_missing_model_is_refused_before_anything(chats):
    with pytest.raises(FileNotFoundError, match="no-model"):
        plan(config(Path("./no-model"), chats))
