"""Second moments: kept whole or in part, added up."""

import pytest
import torch

from osft.subspace.statistics import InputStatistics, Part, SecondMoment, Statistics


def matrix(n=12, seed=0, vectors=40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vectors, n, generator=generator) * torch.logspace(0, -2, n)
    return rows.T @ rows / vectors


def part(name: str, mean_curvature=2.0, weight_rms=0.5) -> Part:
    return Part(
        name=name,
        source="a test",
        num_tokens=40,
        text_sha256=name,
        model_sha256="",
        weight_rms=weight_rms,
        mean_curvature=mean_curvature,
    )


def statistics(name="base", seed=0, n=12, energy=1.0, targets=("q", "k")) -> Statistics:
    each = InputStatistics(
        targets=targets,
        transposed=False,
        moment=SecondMoment.of(matrix(n, seed)),
        gradient_energies={target: torch.tensor(energy) for target in targets},
        output_moments={target: SecondMoment.of(matrix(5, seed + 7), 3) for target in targets},
    )
    return Statistics([part(name)], [each])


def test_whole_moment_is_the_matrix():
    torch.testing.assert_close(SecondMoment.of(matrix()).dense(), matrix(), atol=1e-6, rtol=0)


def test_directions_are_orthonormal_and_descend():
    moment = SecondMoment.of(matrix())
    torch.testing.assert_close(moment.basis.T @ moment.basis, torch.eye(12), atol=1e-6, rtol=0)
    assert torch.equal(moment.energies, moment.energies.sort(descending=True).values)


def test_leading_directions_keep_the_trace_and_err_by_no_more_than_the_next_energy():
    whole, leading = SecondMoment.of(matrix()), SecondMoment.of(matrix(), 5)
    torch.testing.assert_close(leading.trace(), matrix().trace())
    error = torch.linalg.matrix_norm(matrix() - leading.dense(), 2)
    assert error <= whole.energies[5] * (1 + 1e-5)


def test_experts_are_moments_each_of_its_own():
    both = torch.stack([matrix(seed=0), matrix(seed=1)])
    moment = SecondMoment.of(both, 4)
    for index in range(2):
        alone = SecondMoment.of(both[index], 4)
        torch.testing.assert_close(moment.dense()[index], alone.dense())
        torch.testing.assert_close(moment.trace()[index], alone.trace())


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        SecondMoment.of(matrix() * torch.nan)


def test_sum_of_whole_moments_is_exact():
    total = SecondMoment.of(matrix(seed=0)) + SecondMoment.of(matrix(seed=1))
    torch.testing.assert_close(total.dense(), matrix(seed=0) + matrix(seed=1), atol=1e-6, rtol=0)


def test_sums_do_not_depend_on_their_order():
    first, second, third = (statistics(str(seed), seed, energy=1.0 + seed) for seed in range(3))
    (one,) = ((first + second) + third).inputs()
    (other,) = (third + (first + second)).inputs()
    (nested,) = (first + (second + third)).inputs()
    for again in (other, nested):
        torch.testing.assert_close(one.moment.dense(), again.moment.dense(), atol=1e-6, rtol=0)
        torch.testing.assert_close(one.gradient_energies["q"], again.gradient_energies["q"])


def test_sum_keeps_the_product_of_traces():
    first, second = statistics("a", 0, energy=1.0), statistics("b", 1, energy=5.0)
    (total,) = (first + second).inputs()
    expected = sum(each.moment.trace() * each.gradient_energies["k"] for s in (first, second) for each in s.inputs())
    torch.testing.assert_close(total.moment.trace() * total.gradient_energies["k"], expected)


def test_unit_is_the_mean_of_the_parts():
    (each,) = statistics().inputs()
    both = Statistics([part("a", 2.0, 0.5), part("b", 4.0, 0.7)], [each])
    assert both.unit == pytest.approx(3.0 * 0.6)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"targets": ("q", "v")}, "only one of them has k"),
        ({"targets": ("k", "q")}, "share an input"),
        ({"n": 10}, "inputs of q are of different shapes"),
    ],
)
def test_statistics_of_other_targets_or_shapes_are_refused_by_name(other, named):
    with pytest.raises(ValueError, match=named):
        statistics() + statistics("other", **other)


def test_hash_is_of_the_content():
    assert statistics().sha256 == statistics().sha256
    assert statistics().sha256 != statistics(energy=2.0).sha256
    assert statistics().sha256 != statistics("other").sha256
