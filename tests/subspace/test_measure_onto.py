"""Statistics of a text that are added to those of others, compared with sums of matrices."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from osft.subspace import moment_sums
from osft.subspace.calibration import measure
from osft.subspace.second_moment import SecondMoment
from osft.subspace.statistics import InputStatistics, Statistics
from osft.subspace.statistics_store import load_statistics, save_statistics
from osft.subspace.targets import select_targets
from tests.conftest import feeding
from tests.subspace.test_calibration import measured, moments, texts, tiny_gpt2, tiny_llama
from tests.subspace.test_watching import build

BASE, TASK, NEXT = (texts(seed=seed) for seed in (1, 2, 3))


def reordered(statistics: Statistics) -> Statistics:
    return Statistics(statistics.parts, list(statistics.inputs())[::-1])


def stored(statistics: Statistics, folder) -> Statistics:
    return load_statistics(save_statistics(statistics, folder))


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((value - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("place", ["memory", "store", "another order"])
def test_it_is_the_sum_of_both(make, place, tmp_path, monkeypatch):
    monkeypatch.setattr(moment_sums, "OUTPUT_DIRECTIONS", 1000)
    model = make()
    carried, own = measured(model, BASE), measured(model, TASK)
    if place == "store":
        carried = stored(carried, tmp_path)
    elif place == "another order":
        carried = reordered(carried)
    total = measured(model, TASK, onto=carried)
    assert total.layout == own.layout
    assert total.parts[:-1] == carried.parts
    before, here, both = (moments(each) for each in (carried, own, total))
    assert both.keys() == here.keys()
    for target, (c, s, outputs) in both.items():
        (c_before, s_before, outputs_before), (c_here, s_here, outputs_here) = before[target], here[target]
        share = c_before.trace() / (c_before.trace() + c_here.trace())
        assert close(c, c_before + c_here), target
        assert close(s, share * s_before + (1 - share) * s_here), target
        assert close(outputs, share * outputs_before + (1 - share) * outputs_here), target
        energy = sum(s.item() * c.trace().item() for c, s, _ in (before[target], here[target]))
        assert s.item() * c.trace().item() == pytest.approx(energy, rel=1e-5), "the product of the traces adds up"


def mean_curvature(model: torch.nn.Module, statistics: Statistics) -> float:
    """The mean of s * c over all entries of the weights."""
    shapes = {target.name: target.shape for target in select_targets(model)}
    curvature = sum(
        shapes[target][0] * each.gradient_energies[target].item() * each.moment.trace().item()
        for each in statistics.inputs()
        for target in each.targets
    )
    return curvature / sum(map(math.prod, shapes.values()))


def test_part_has_the_curvature_of_its_own_text():
    model = tiny_llama()
    carried, own = measured(model, BASE), measured(model, TASK)
    total = measured(model, TASK, onto=carried)
    assert total.parts == (carried.parts[0], own.parts[0])
    assert own.parts[0].mean_curvature == pytest.approx(mean_curvature(model, own), rel=1e-5)


def test_unit_makes_the_mean_curvature_of_the_sum_one():
    model = tiny_llama()
    total = measured(model, TASK, onto=measured(model, BASE))
    assert mean_curvature(model, total) * total.parts[0].weight_rms / total.unit == pytest.approx(1.0, rel=1e-5)


def test_compressed_moments_stay_within_their_bounds(monkeypatch):
    model = tiny_llama()
    parts = [moments(measured(model, text)) for text in (BASE, TASK, NEXT)]
    monkeypatch.setattr(moment_sums, "OUTPUT_DIRECTIONS", 5)
    monkeypatch.setattr(moment_sums, "WHOLE_UP_TO", 8)
    monkeypatch.setattr(moment_sums, "LEADING_DIRECTIONS", 10)
    total = measured(model, BASE)
    bounds = []
    for text in (TASK, NEXT):
        total = measured(model, text, onto=total)
        bounds.append([each.moment.error_bound.item() for each in total.inputs()])
    for each in total.inputs():
        for target in each.targets:
            traces = [part[target][0].trace() for part in parts]
            inputs = sum(part[target][0] for part in parts)
            outputs = sum(trace / sum(traces) * part[target][2] for trace, part in zip(traces, parts, strict=True))
            for moment, rank, expected in ((each.moment, 10, inputs), (each.output_moments[target], 5, outputs)):
                assert moment.rank == rank
                error = torch.linalg.matrix_norm(moment.dense() - expected, 2).item()
                assert 0 < error <= moment.error_bound.item() * (1 + 1e-4)
                assert moment.trace().item() == pytest.approx(expected.trace().item(), rel=1e-4)
    assert all(later > earlier for earlier, later in zip(*bounds, strict=True)), "bounds add up"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("directions", [5, 128])
def test_experts_add_up_each_with_its_own(family, directions, monkeypatch):
    model = build(family)
    before, here = (list(measured(model, text).inputs()) for text in (BASE, TASK))
    monkeypatch.setattr(moment_sums, "EXPERT_DIRECTIONS", directions)
    total = measured(model, TASK, onto=measured(model, BASE))
    stacks = 0
    for both, *parts in zip(total.inputs(), before, here, strict=True):
        if both.moment.basis.ndim == 2:
            continue
        stacks += 1
        expected = sum(part.moment.dense() for part in parts)
        error = torch.linalg.matrix_norm(both.moment.dense() - expected, 2)
        assert (error <= both.moment.error_bound * (1 + 1e-4) + 1e-5 * expected.norm()).all()
        for target in both.targets:
            energy = sum(part.moment.trace() * part.gradient_energies[target] for part in parts)
            torch.testing.assert_close(both.moment.trace() * both.gradient_energies[target], energy, rtol=1e-4, atol=0)
    assert stacks == 4


def test_gradients_that_one_text_was_measured_without_leave_no_output_moment():
    model = tiny_llama()
    for gradients in (False, True):
        total = measured(model, TASK, gradients=gradients, onto=measured(model, BASE, gradients=not gradients))
        assert not any(each.output_moments for each in total.inputs())


def test_statistics_of_other_targets_or_shapes_are_refused_by_name():
    model = tiny_llama()
    carried = measured(model, BASE)
    first, *others = carried.inputs()
    query, key, value = first.targets
    other_size = SecondMoment.of(torch.eye(10))
    refused = {
        f"only one of them has {key}": others,
        f"{query}, {key}, {value} share an input": [replace(first, targets=(query, value, key)), *others],
        rf"inputs of {query} are of different shapes: \(10,\).*\(32,\)": [replace(first, kept=other_size), *others],
        rf"inputs of {query} .*\(in, out\) and .*\(out, in\)": [replace(first, transposed=True), *others],
    }
    for message, inputs in refused.items():
        with pytest.raises(ValueError, match=message):
            measured(model, TASK, onto=Statistics(carried.parts, inputs))


def test_one_input_of_those_before_is_in_memory_at_a_time():
    model = tiny_llama()
    carried = measured(model, BASE)
    inputs = list(carried.inputs())
    read: list[weakref.ref[torch.Tensor]] = []

    class Reading(Sequence[InputStatistics]):
        def __len__(self) -> int:
            return len(inputs)

        def __getitem__(self, index):
            assert not any(basis() is not None for basis in read)
            moment = replace(inputs[index].kept, basis=inputs[index].kept.basis.clone())
            read.append(weakref.ref(moment.basis))
            return replace(inputs[index], kept=moment)

    measured(model, TASK, onto=Statistics(carried.parts, Reading(), carried.layout))
    assert len(read) == len(inputs)


def test_only_the_first_process_decomposes(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given, **settings: None)
    monkeypatch.setattr(SecondMoment, "of", None)
    other = measure(model, select_targets(model), TASK, feeding=feeding(rank=1, world_size=2))
    assert not list(other.inputs())
