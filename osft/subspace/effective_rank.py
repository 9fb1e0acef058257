"""How many directions of the free subspace an update uses."""

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
