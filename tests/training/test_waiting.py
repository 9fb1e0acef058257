"""A step asks the device for its numbers once: each time more, a GPU stands still until the CPU has new work for it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from osft.data.packing import collate
from osft.models.packed_attention import masked, register
from osft.process.private_names import set_attention
from osft.subspace.model import inject
from osft.training import loop
from osft.training.distillation import Distillation
from osft.training.loop import make_optimizer, run, train_step
from tests.conftest import feeding, tiny_llama
from tests.training.test_distillation import DATA, TEXT, settings
from tests.training.test_predicted_drift import measured, prediction


class Waits(TorchDispatchMode):
    """Operations whose result, or its size, the CPU needs to know before it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].partition(".")[0]
        by_truth = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1] or ()
        )
        if by_truth or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model() -> torch.nn.Module:
    """With packed samples by their boundaries; to make a mask, transformers asks whether there are several."""
    register("osft_test", masked)
    model = tiny_llama(attn_implementation="sdpa")
    set_attention(model.config, "osft_test")
    return model


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_step_waits_for_nothing(model, gradient_checkpointing):
    config = settings()
    inject(model, config.subspace).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(model, config, fused=True)
    distilled = Distillation(config, model, TEXT, feeding(200)).of_step(1)
    batches = [collate([DATA[i] for i in part]) for part in ([0, 1, 2], [3, 4])]
    with Waits() as waits:
        for _ in range(2):
            *_, norm = train_step(
                model, optimizer, batches, num_loss_tokens=100, max_grad_norm=1.0, distilled=distilled
            )
    assert waits.names == []
    with Waits() as waits:
        norm.item()
    assert waits.names, "the test sees them"


def test_run_waits_once_a_step(model, monkeypatch):
    config = settings(max_steps=3, protect="activations")
    statistics = measured(tiny_llama())
    inject(model, config.subspace, statistics=statistics)
    predicted = prediction(model, statistics)
    waits, asked, steps = Waits(), [], []
    tolist, whole_step = torch.Tensor.tolist, train_step

    def step(*given, **options):
        waits.names.clear()
        # On a CPU it is no operation.
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(tensor.shape) or tolist(tensor))
        return whole_step(*given, **options)

    def on_step(metrics) -> None:
        monkeypatch.setattr(torch.Tensor, "tolist", tolist)
        assert waits.names == []
        steps.append(metrics)

    monkeypatch.setattr(loop, "train_step", step)
    how = feeding(config.max_tokens_per_gpu)
    with waits:
        run(model, DATA, config, feeding=how, on_step=on_step, text=TEXT, prediction=predicted)
    assert len(steps) == len(asked) == 3
    assert steps[-1].predicted_drift == pytest.approx(sum(predicted.by_target().values()))
