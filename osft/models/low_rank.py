"""The rank of a weight's update: how many directions it uses, and the product of two thin matrices that it is."""

import torch


def effective_rank(update: torch.Tensor) -> float:
    """How many directions an update is spread over: 1 for a rank-one update, min(p, q) for equal singular values.

    It is the exponential of the entropy of the squared singular values, taken as shares of their sum (Roy & Vetterli
    2007, "The effective rank", with squares, so that a direction counts by its part of the squared norm).

    update: (p, q), any float dtype; of a stack (experts, p, q) the mean. Every update of zeros counts 0; NaN for one
    with an entry that is not finite.
    """
    if not torch.isfinite(update).all():
        return float("nan")
    update = update.float()
    if update.shape[-2] < update.shape[-1]:
        update = update.mT
    # The squared singular values are the eigenvalues of the smaller Gram matrix; a long side costs one product.
    squares = torch.linalg.eigvalsh(update.mT @ update).clamp(min=0)
    total = squares.sum(-1, keepdim=True)
    entropy = torch.special.entr(squares / total.where(total > 0, 1)).sum(-1)
    return (entropy.exp() * (total.squeeze(-1) > 0)).mean().item()


def noise_floor(weight: torch.Tensor) -> float:
    """The largest singular value that rounding alone is expected to give the update of a weight.

    weight: (m, n), float32, known to a unit in the last place of each row's largest entry, 2^-23 of it: what
    `osft.models.rounding` keeps. A random matrix whose entries have the standard deviation s has a largest singular
    value of s (sqrt(m) + sqrt(n)) (Vershynin, arXiv:1011.3027, theorem 5.32). For s stands the root mean square of
    those units, 3.5 times the deviation of one rounding, so that the roundings of a dozen rounds stay below.
    """
    m, n = weight.shape
    unit = 2.0**-23 * weight.abs().amax(dim=1).square().mean().sqrt().item()
    return unit * (m**0.5 + n**0.5)


def factorize(update: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """B (m, r) and A (r, n), float32, whose product is `update` (m, n) but for its singular values below `floor`.

    The columns of B and the rows of A are orthogonal, of falling and equal norms, the roots of the singular values: the
    first k of them are the best approximation of rank k. r is at least 1, and 0 for zeros. The singular vectors of the
    short side are the eigenvectors of the smaller Gram matrix in float64, which tells values down to 1e-8 of the
    largest one apart.
    """
    m, n = update.shape
    if m < n:
        right, left = factorize(update.T, floor)
        return left.T.contiguous(), right.T.contiguous()
    if not update.any():
        return update.new_zeros(m, 0), update.new_zeros(0, n)
    exact = update.to(torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh(exact.T @ exact)
    singular_values = eigenvalues.flip(-1).clamp_min(0).sqrt()
    rank = max(1, int((singular_values > floor).sum()))
    right, root = eigenvectors.flip(-1)[:, :rank], singular_values[:rank].sqrt()
    return (exact @ right / root).float(), (right * root).T.float().contiguous()
