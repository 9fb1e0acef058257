import pytest
import torch
from torch import distributed, multiprocessing, nn

from osft.subspace.moments import input_moments


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5 + i, 6, generator=generator) for i in range(count)]


def mean_square(inputs: torch.Tensor) -> torch.Tensor:
    flat = inputs.flatten(0, -2).double()
    return (flat.T @ flat / len(flat)).float()


def test_moments_are_the_mean_over_all_inputs_of_all_batches():
    model, inputs = two_layers(), batches(3)
    found = input_moments({"first": model[0], "last": model[2]}, lambda: [model(batch) for batch in inputs])
    whole = torch.cat([batch.flatten(0, 1) for batch in inputs])
    torch.testing.assert_close(found["first"], mean_square(whole))
    torch.testing.assert_close(found["last"], mean_square(model[:2](whole)).detach())


def test_moments_of_bfloat16_inputs_are_summed_in_float32():
    model = two_layers().bfloat16()
    (inputs,) = batches(1)
    inputs = inputs.bfloat16()
    found = input_moments({"first": model[0]}, lambda: [model(inputs) for _ in range(100)])["first"]
    torch.testing.assert_close(found, mean_square(inputs.float()))


def test_layers_are_left_without_hooks_and_gradients_even_after_an_error():
    model = two_layers()

    def fail() -> None:
        assert not torch.is_grad_enabled()
        model(batches(1)[0])
        raise KeyError

    with pytest.raises(KeyError):
        input_moments({"first": model[0]}, fail)
    assert not model[0]._forward_pre_hooks
    assert torch.is_grad_enabled()


def test_layer_without_input_is_refused_by_name():
    model = two_layers()
    with pytest.raises(ValueError, match="no input reached the expert"):
        input_moments({"first": model[0], "the expert": nn.Linear(6, 6)}, lambda: model(batches(1)[0]))


def _rank(rank: int, address: str, results: "multiprocessing.SimpleQueue") -> None:
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model, inputs = two_layers(), batches(3)
    share = inputs[:1] if rank == 0 else inputs[1:]
    found = input_moments({"first": model[0]}, lambda: [model(batch) for batch in share])["first"]
    results.put(found.tolist())
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_with_unequal_shares_get_the_mean_over_all(tmp_path):
    results = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(_rank, args=(f"file://{tmp_path}/rendezvous", results), nprocs=2)
    expected = mean_square(torch.cat([batch.flatten(0, 1) for batch in batches(3)]))
    for _ in range(2):
        torch.testing.assert_close(torch.tensor(results.get()), expected)
