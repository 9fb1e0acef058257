"""Self-distillation in the training loop: what is added to the loss, and that it holds the model back."""

import random

import pytest
import torch
from torch.nn import functional as F

from osft.data.chat import Sample
from osft.data.packing import Batching
from osft.data.samples import SampleList
from osft.settings.training import TrainConfig
from osft.subspace.model import inject, osft_layers
from osft.training.distillation import Distillation
from osft.training.loop import StepMetrics, make_optimizer, run, train_step
from tests.conftest import feeding, tiny_llama


def random_texts(count: int, seed: int, longest: int = 40) -> SampleList:
    numbers = random.Random(seed)
    texts = [[numbers.randrange(256) for _ in range(numbers.randrange(8, longest))] for _ in range(count)]
    return SampleList([Sample(text, text) for text in texts])


DATA, TEXT = random_texts(12, seed=0), random_texts(10, seed=1)


def settings(**changes) -> TrainConfig:
    given = {
        "model_path": "model",
        "data_path": "data",
        "ckpt_output_dir": "output",
        "unfreeze_rank_ratio": 0.5,
        "effective_batch_size": 4,
        "max_tokens_per_gpu": 200,
        "max_seq_len": 100,
        "learning_rate": 1e-2,
        "num_epochs": 10,
        "max_steps": 8,
        "distill_weight": 1.0,
        "distill_tokens": 16,
    }
    return TrainConfig(**(given | changes))


def trained(config: TrainConfig, batching=Batching.PACKED) -> tuple[torch.nn.Module, list[StepMetrics]]:
    model, steps = inject(tiny_llama(), config.subspace), []
    how = feeding(config.max_tokens_per_gpu, batching=batching)
    run(model, DATA, config, feeding=how, on_step=steps.append, text=TEXT)
    return model, steps


def mean_divergence(model: torch.nn.Module, texts: SampleList) -> float:
    """KL(start || model) in nats per token, by PyTorch's function and one text at a time."""
    start, total = tiny_llama(), 0.0
    with torch.no_grad():
        for i in range(len(texts.lengths)):
            tokens = torch.tensor([texts[i].input_ids])
            log_p, log_q = (m(tokens).logits[0, :-1].log_softmax(1) for m in (start, model))
            total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
    return total / sum(texts.num_loss_tokens)


def test_gradient_of_a_step_is_that_of_both_losses():
    config = settings(distill_weight=3.0, distill_tokens=64, max_grad_norm=0.0)
    model = inject(tiny_llama(), config.subspace)
    distilled = Distillation(config, model, TEXT, feeding(200)).of_step(1)
    layers = [layer for _, layer in osft_layers(model)]
    with torch.no_grad():  # away from the start, where the divergence has no gradient
        for layer in layers:
            layer.coefficients.normal_(std=0.1)
            layer.refresh_(learning_rate=0.0)
    gradients = []
    optimizer = make_optimizer(model, config, fused=False)
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(layer.coefficients.grad.clone() for layer in layers))

    loss = torch.zeros(())
    for i in range(4):
        tokens = torch.tensor([DATA[i].input_ids])
        loss = loss + model(tokens, labels=tokens).loss * DATA.num_loss_tokens[i]
    loss, divergence = loss / sum(DATA.num_loss_tokens[:4]), torch.zeros(())
    start = tiny_llama()
    for taught in distilled.batches:
        batch = taught.batch
        packed = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        log_p, log_q = (m(**packed).logits[0, batch.loss_positions].log_softmax(1) for m in (start, model))
        divergence = divergence + F.kl_div(log_q, log_p.detach(), log_target=True, reduction="sum")
    divergence = divergence / distilled.num_tokens
    (loss + 3.0 * divergence).backward()
    expected = [layer.coefficients.grad.clone() for layer in layers]
    model.zero_grad()

    batches = [batch for _, batch in feeding(200).batches(DATA, range(4))]
    sums = train_step(model, optimizer, batches, num_loss_tokens=sum(DATA.num_loss_tokens[:4]), distilled=distilled)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert sums[1].item() / distilled.num_tokens == pytest.approx(divergence.item(), rel=1e-4)
    assert divergence > 1e-3


@pytest.mark.parametrize(
    "change", [{"max_tokens_per_gpu": 60}, {"max_tokens_per_gpu": 2000}, {"batching": Batching.PADDED}]
)
def test_training_does_not_depend_on_how_the_work_is_cut(change):
    batching = change.pop("batching", Batching.PACKED)
    expected_model, expected = trained(settings())
    model, found = trained(settings(**change), batching=batching)
    for name in ("loss", "distillation_loss"):
        assert [getattr(step, name) for step in found] == pytest.approx(
            [getattr(step, name) for step in expected], rel=1e-3, abs=1e-6
        )
    for (_, mine), (_, wanted) in zip(osft_layers(model), osft_layers(expected_model), strict=True):
        torch.testing.assert_close(mine.coefficients, wanted.coefficients, rtol=1e-2, atol=1e-4)


def test_model_has_not_moved_before_the_first_step_and_has_after_it():
    _, steps = trained(settings())
    assert steps[0].distillation_loss == 0.0
    assert all(step.distillation_loss > 1e-4 for step in steps[1:])


def test_distillation_keeps_the_model_closer_to_its_start():
    long = {"max_steps": 30, "distill_tokens": 120}
    free, without = trained(settings(distill_weight=0.0, **long))
    held, _ = trained(settings(distill_weight=10.0, **long))
    assert without[-1].distillation_loss is None
    assert mean_divergence(held, TEXT) < 0.5 * mean_divergence(free, TEXT)


def test_steps_go_through_the_whole_text_before_they_begin_again():
    config = settings()
    model = inject(tiny_llama(), config.subspace)
    distillation = Distillation(config, model, TEXT, feeding(200))

    def tokens(step: int) -> list[int]:
        return [t for taught in distillation.of_step(step).batches for t in taught.batch.input_ids[0].tolist()]

    number = next(n for n in range(2, 100) if tokens(n) == tokens(1)) - 1
    seen = [token for step in range(1, number + 1) for token in tokens(step)]
    written = [token for i in range(len(TEXT.lengths)) for token in TEXT[i].input_ids]
    assert sorted(seen) == sorted(written)
    assert all(len(tokens(step)) <= 16 for step in range(1, number + 1))
    pieces = [distillation.of_step(step).num_tokens for step in range(1, number + 1)]
    assert sum(pieces) < len(written), "the first token of a piece is not predicted"


def test_resumed_run_is_taught_by_the_start():
    """Not by what the model had become when its state was saved."""
    config = settings()
    whole, expected = trained(config)
    state = {}

    class Keeping:
        """Keeps the state of step 4 in memory."""

        def request(self) -> int:
            return 0

        def is_uploading(self) -> bool:
            return False

        def continue_upload(self) -> None: ...

        def settle(self) -> None: ...

        def state(self, optimizer, position) -> None:
            coefficients = [layer.coefficients.detach().clone() for _, layer in osft_layers(model)]
            moments = {key: {k: v.clone() for k, v in s.items()} for key, s in optimizer.state_dict()["state"].items()}
            state.update(coefficients=coefficients, moments=moments, position=dict(position_of(position)))

    def position_of(position):
        return {name: getattr(position, name) for name in position.__dataclass_fields__}

    halves = settings(save_state_steps=4, save_final_checkpoint=False)
    model = inject(tiny_llama(), config.subspace)
    run(model, DATA, halves, feeding=feeding(200), on_step=lambda _: None, text=TEXT, checkpointer=Keeping())

    from osft.training.loop import Position

    resumed, steps = inject(tiny_llama(), config.subspace), []

    def restore(optimizer) -> None:
        for (_, layer), coefficients in zip(osft_layers(resumed), state["coefficients"], strict=True):
            layer.coefficients.data.copy_(coefficients)
            layer.recompute_()
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"]})

    position = Position.of(state["position"])
    run(
        resumed, DATA, halves, feeding=feeding(200), on_step=steps.append, text=TEXT, position=position, restore=restore
    )
    assert [step.distillation_loss for step in steps] == [step.distillation_loss for step in expected[4:]]
    for (_, mine), (_, wanted) in zip(osft_layers(resumed), osft_layers(whole), strict=True):
        assert torch.equal(mine.coefficients, wanted.coefficients)
