"""Muon: momentum whose matrices are orthogonalized (arXiv 2502.16982), in batches of equal shape.

Shape suffixes: N matrices, R rows, C columns.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openimp.parallel.layout import gather_matrices, local_shard, shard_matrices

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
    """

    found_inf: Tensor | None = None

    def __init__(
        self, stacks: Mapping[Tensor, int], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        self.stacks = dict(stacks)
        # As a group, because that may be empty: with many ranks, some own no matrix.
        super().__init__([{"params": [*stacks]}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)
            if not weights:
                continue
            # On local shards, because the many small operations on DTensors take twice as long.
            gradients = [local_shard(weight.grad) for weight in weights]
            momenta = [local_shard(self.state[weight]["momentum_buffer"]) for weight in weights]
            decay: Any = 1 - group["lr"] * group["weight_decay"]
            if self.found_inf is not None:
                # A gradient that equals the momentum leaves it as it is.
                skip = self.found_inf.bool()
                for gradient, momentum in zip(gradients, momenta):
                    torch.where(skip, momentum, gradient, out=gradient)
                decay = torch.full_like(self.found_inf, decay).masked_fill(skip, 1.0)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            changes = torch._foreach_lerp(gradients, momenta, group["momentum"])
            if self.found_inf is not None:
                torch._foreach_mul_(changes, 1 - self.found_inf)
            torch._foreach_mul_([local_shard(weight) for weight in weights], decay)
            updates = dict(zip(weights, changes))
            for batch in self._batches(weights):
                self._apply({weight: updates[weight] for weight in batch}, group["lr"])

    def _batches(self, weights: Iterable[Tensor]) -> Iterable[list[Tensor]]:
        """Groups the parameters by the shape of their matrices."""
        batches: dict[tuple[int, int], list[list[Tensor]]] = {}
        for weight in weights:
            same = batches.setdefault(self._shape(weight), [[]])
            if same[-1] and sum(other.numel() for other in same[-1]) + weight.numel() > BATCH_NUMBERS:
                same.append([])
            same[-1].append(weight)
        return [batch for same in batches.values() for batch in same]

    def _shape(self, weight: Tensor) -> tuple[int, int]:
        """Rows and columns of each matrix of a parameter."""
        columns = weight.shape[-1]
        return weight.numel() // (columns * self.stacks[weight]), columns

    def _apply(self, updates: Mapping[Tensor, Tensor], lr: float) -> None:
        whole = [gather_matrices(update.bfloat16(), weight) for weight, update in updates.items()]
        shape = self._shape(next(iter(updates)))
        stacked = [x.view(-1, *shape) for x in whole]
        orthogonal = orthogonalize(torch.cat(stacked)).split([len(x) for x in stacked])
        for weight, x, part in zip(updates, whole, orthogonal):
            local_shard(weight).add_(shard_matrices(part.view_as(x), weight), alpha=-lr * 0.2 * max(shape) ** 0.5)


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
        left, right = (factor, x_NRC) if wide else (x_NRC, factor)
        x_NRC = torch.baddbmm(x_NRC, left, right, beta=a)
    return x_NRC


def muon_flops(stacks: Mapping[Tensor, int]) -> int:
    """FLOPs of the matrix products in an update of these parameters."""
    weights = {torch.empty(weight.shape, device="meta", requires_grad=True): n for weight, n in stacks.items()}
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    with FlopCounterMode(display=False) as counter:
        Muon(weights, lr=0.0).step()
    return int(counter.get_total_flops())
