"""OSFT as arXiv:2504.07097 describes it, in three factors: what the library's form is compared with.

A weight is `U_high S_high V_high^T + U_low diag(S_low) V_low^T`. The first term is frozen; U_low, S_low and V_low
are trained. The gradients of U_low and V_low are projected onto what is orthogonal to U_high and V_high before
the optimizer's step; Adam rescales entries one by one and leaves that space, so the factors themselves are
projected again after the step. Nothing here is fast, and nothing comes from `osft.subspace` but the targets' names.
"""

from collections.abc import Iterator

import torch
from torch import nn

from osft.subspace import select_targets


class PublishedOSFTLinear(nn.Module):
    """A linear layer without bias in the published form. U: (m, .), S: (.,), V: (n, .)."""

    def __init__(self, weight: torch.Tensor, unfreeze_rank_ratio: float) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        u, s, v = u.float(), s.float(), vh.T.float()
        rank_high = len(s) - round(unfreeze_rank_ratio * len(s))
        self.register_buffer("u_high", u[:, :rank_high].clone())
        self.register_buffer("s_high", s[:rank_high].clone())
        self.register_buffer("v_high", v[:, :rank_high].clone())
        self.u_low = nn.Parameter(u[:, rank_high:].clone())
        self.s_low = nn.Parameter(s[rank_high:].clone())
        self.v_low = nn.Parameter(v[:, rank_high:].clone())

    @property
    def weight(self) -> torch.Tensor:
        return self.u_high * self.s_high @ self.v_high.T + self.u_low * self.s_low @ self.v_low.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Before the optimizer's step."""
        self.u_low.grad -= self.u_high @ (self.u_high.T @ self.u_low.grad)
        self.v_low.grad -= self.v_high @ (self.v_high.T @ self.v_low.grad)

    @torch.no_grad()
    def project_factors_(self) -> None:
        """After the optimizer's step."""
        self.u_low -= self.u_high @ (self.u_high.T @ self.u_low)
        self.v_low -= self.v_high @ (self.v_high.T @ self.v_low)


def inject_published(model: nn.Module, unfreeze_rank_ratio: float) -> nn.Module:
    """Put the published form in the place of every target, in place, and freeze the rest."""
    model.requires_grad_(False)
    for target in select_targets(model):
        linear = model.get_submodule(target.name)
        assert linear.bias is None
        model.set_submodule(target.name, PublishedOSFTLinear(linear.weight, unfreeze_rank_ratio))
    return model


def published_layers(model: nn.Module) -> Iterator[PublishedOSFTLinear]:
    return (module for module in model.modules() if isinstance(module, PublishedOSFTLinear))


def published_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The part of a training step that follows the backward pass."""
    for layer in published_layers(model):
        layer.project_gradients_()
    optimizer.step()
    optimizer.zero_grad()
    for layer in published_layers(model):
        layer.project_factors_()
