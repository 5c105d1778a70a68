"""Muon: momentum whose matrices are orthogonalized (arXiv 2502.16982), in batches of equal shape.

Shape suffixes: N matrices, R rows, C columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openimp.parallel.division import divide_work
from openimp.parallel.layout import local_shard
from openimp.parallel.owners import matrix_shape

NEWTON_SCHULZ = (8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)
"""Coefficients (a, b, c) of each iteration x <- a x + b (x x') x + c (x x')^2 x.

They are chosen for singular values from 0.01 to 1. Each iteration moves the values as close to 1 as such a polynomial
can (Polar Express, arXiv 2505.16932). After the third, all are between 0.73 and 1.27."""
BATCH_NUMBERS = 2**24
"""Most numbers in a batch of matrices, unless a single parameter has more."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. An update has the same RMS as one of AdamW (section 2.2).

    `stacks` has the number of matrices that each parameter stacks in its first dimension: 1 for a linear layer, 3 for
    one that computes queries, keys and values, and the number of experts. Each matrix is orthogonalized separately.

    As in torch's fused optimizers, a step changes nothing if the attribute `found_inf`, a scalar on the device, is 1.
    Several ranks divide the work of a step; see `divide_work`. `lr_factors` has the factor of the learning rate of each
    parameter; by default, all are 1.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        stacks: Mapping[Tensor, int],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        lr_factors: Mapping[Tensor, float] | None = None,
    ) -> None:
        self.stacks, self.lr_factors = dict(stacks), lr_factors or dict.fromkeys(stacks, 1.0)
        self.divisions = divide_work(stacks)
        kept = [weight for division in self.divisions for weight in division.kept]
        # As a group, because that may be empty: with many ranks, some own no matrix.
        super().__init__([{"params": kept}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        (group,) = self.param_groups
        updates = self._updates([weight for weight in group["params"] if weight.grad is not None], group["momentum"])

        @cache
        def decay(share: float) -> Any:
            if self.found_inf is None:
                return 1 - share
            return torch.full_like(self.found_inf, 1 - share).masked_fill(self.found_inf.bool(), 1.0)

        for division in self.divisions:
            for weight, update in division.orthogonalized(updates, orthogonalize_in_batches):
                local, shape = local_shard(weight), matrix_shape(weight, self.stacks[weight])
                lr = group["lr"] * self.lr_factors[weight]
                local.mul_(decay(lr * group["weight_decay"]))
                local.add_(update.view_as(local), alpha=-lr * 0.2 * max(shape) ** 0.5)

    def _updates(self, weights: Sequence[Tensor], momentum: float) -> dict[Tensor, Tensor]:
        """Moves the momentum of weights towards their gradients. Returns the updates of the local shards in bf16."""
        if not weights:
            return {}
        grads = [cast(Tensor, weight.grad) for weight in weights]
        for weight, grad in zip(weights, grads):
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(grad)
        # On local shards, because the many small operations on DTensors take twice as long.
        gradients = [local_shard(grad) for grad in grads]
        momenta = [local_shard(self.state[weight]["momentum_buffer"]) for weight in weights]
        if self.found_inf is not None:
            # A gradient that equals the momentum leaves it as it is.
            for gradient, kept in zip(gradients, momenta):
                torch.where(self.found_inf.bool(), kept, gradient, out=gradient)
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum)
        if self.found_inf is not None:
            torch._foreach_mul_(updates, 1 - self.found_inf)
        return {weight: update.bfloat16() for weight, update in zip(weights, updates)}


def batches_by_shape(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Groups stacks of matrices (N, R, C) into those that are orthogonalized together: of one shape (R, C), and with at
    most `BATCH_NUMBERS` numbers."""
    found: dict[torch.Size, list[list[Tensor]]] = {}
    for tensor in tensors:
        same = found.setdefault(tensor.shape[1:], [[]])
        if same[-1] and sum(other.numel() for other in same[-1]) + tensor.numel() > BATCH_NUMBERS:
            same.append([])
        same[-1].append(tensor)
    return [batch for same in found.values() for batch in same]


def orthogonalize_in_batches(tensors: Sequence[Tensor]) -> None:
    """Orthogonalizes the matrices of bf16 tensors (N, R, C) in place. Those of one shape are computed together."""
    for batch in batches_by_shape(tensors):  # A result that had a name would be kept while the next one is computed.
        torch._foreach_copy_(batch, orthogonalize(torch.cat(batch)).split([len(x) for x in batch]))


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Brings the singular values of bf16 matrices to between about 0.73 and 1.27.

    Those below 0.01 of the Frobenius norm become 80 times as large.
    """
    x_NRC = x_NRC / x_NRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    for a, b, c in NEWTON_SCHULZ:
        # The smaller of the two Gram matrices. Both give the same result.
        gram = x_NRC @ x_NRC.mT if wide else x_NRC.mT @ x_NRC
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, *((factor, x_NRC) if wide else (x_NRC, factor)), beta=a)
    return x_NRC


def muon_flops(stacks: Mapping[Tensor, int]) -> int:
    """FLOPs of the matrix products in an update of these parameters."""
    weights = {torch.empty(weight.shape, device="meta", requires_grad=True): n for weight, n in stacks.items()}
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with FlopCounterMode(display=False) as counter:
        Muon(weights, lr=0.0).step()
    return int(counter.get_total_flops())
