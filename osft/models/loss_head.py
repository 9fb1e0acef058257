"""The loss without the logits of a whole batch: an output head that computes a few rows at a time.

The logits of 8,192 tokens over 128,256 words are 2 GiB in bfloat16, and their gradient as much. A head that is not
trained needs neither: the logits z = W h of a position say what the gradient of h is, (softmax(z) - onehot(target)) W,
so both are computed while they are there, and what is kept is as large as the hidden states (as in Liger's fused linear
cross entropy, Hsu et al. 2024, arXiv:2410.10989, which computes the head's own gradient, too).

Only for a model whose logits are the head's product and nothing more, which is measured (`osft.subspace.preflight`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from osft.data.packing import MicroBatch
from osft.models.cpu_linear import fast_linear
from osft.models.row_slices import row_slices

LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**22}
"""Elements, by the kind of device: 128 MiB in bfloat16 on a GPU, 16 MiB in float32 on a CPU."""


class LossHead(nn.Linear):
    """An output head that gives losses in the place of logits when it is asked to."""

    _asked: MicroBatch | None = None

    @classmethod
    def take_place_in(cls, model: nn.Module) -> bool:
        """Make the output head of `model`, in place, one of this class; False if it is no frozen `nn.Linear`."""
        network: Any = model
        head = network.get_output_embeddings()
        if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
            return False
        head.__class__ = cls
        return True

    @contextmanager
    def asked_for_losses(self, batch: MicroBatch) -> Iterator[None]:
        """In the model's forward pass on `batch`, give the losses of its targets, (1, L, 1)."""
        self._asked = batch
        try:
            yield
        finally:
            self._asked = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states (R, T, in_features) -> the logits, or the losses that are asked for, float32."""
        if self._asked is None:
            return super().forward(input)
        asked, hidden = self._asked, input.flatten(0, -2)
        losses: torch.Tensor = _LinearCrossEntropy.apply(
            hidden, asked.loss_positions, self.weight, self.bias, asked.targets
        )
        return losses[None, :, None]


class _LinearCrossEntropy(torch.autograd.Function):
    """log sum_j exp(z_j) - z_target of z = h W^T + b at some rows h of `hidden`, with a gradient for `hidden` only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(positions), dtype=exact, device=hidden.device)
        gradient = hidden.new_empty(len(positions), hidden.shape[1]) if ctx.needs_input_grad[0] else None
        at_once = max(1, LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"]) // len(weight))
        for start in range(0, len(positions), at_once):
            rows = slice(start, start + at_once)
            logits, of_rows = fast_linear(hidden[positions[rows]], weight, bias), targets[rows]
            for few in row_slices(logits):
                values, expected = logits[few].to(exact), of_rows[few, None]
                log_sum_exp = values.logsumexp(-1, keepdim=True)
                losses[rows][few] = (log_sum_exp - values.gather(1, expected))[:, 0]
                if gradient is not None:
                    probabilities = values.sub_(log_sum_exp).exp_()
                    logits[few] = probabilities.scatter_add_(1, expected, -torch.ones_like(log_sum_exp))
            if gradient is not None:
                gradient[rows] = fast_linear(logits, weight.T)
        ctx.save_for_backward(gradient, positions)
        ctx.num_rows = len(hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_output,) = grad_outputs
        gradient, positions = ctx.saved_tensors
        of_all = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        of_targets = gradient * grad_output[:, None].to(gradient.dtype)
        # Answers that share their prompt have a position in common, with a target each.
        return of_all.index_put_((positions,), of_targets, accumulate=True), None, None, None, None
