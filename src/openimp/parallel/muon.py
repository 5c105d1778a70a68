"""Muon: momentum whose matrices are orthogonalized (arXiv 2502.16982).

Shape suffixes: N matrices, R rows, C columns.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from openimp.parallel.layout import gather_matrices, local_shard, shard_matrices

COEFFICIENTS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)
"""Coefficients (a, b, c) of each Newton-Schulz iteration x <- a x + b (x x') x + c (x x')^2 x.

They are chosen for singular values from 0.01 to 1. Each iteration moves the values as close to 1 as such a polynomial
can (Polar Express, arXiv 2505.16932). After the third, all are between 0.73 and 1.27."""
MARGIN = 1.01
"""bf16 rounds a norm and a quotient by up to 0.4 %. A singular value above 1, as a matrix of rank 1 could then have,
would explode: 1.004 would become 56."""
BATCH_ELEMENTS = 2**24
"""Maximum number of elements in a batch of matrices, unless a single parameter has more."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. An update has the same RMS as one of AdamW (section 2.2 of the paper).

    `stacks` has the number of matrices that each parameter stacks in its first dimension: 1 for a linear layer, 3 for
    one that computes queries, keys and values, and the number of experts. Each matrix is orthogonalized separately.

    As in torch's fused optimizers, a step changes nothing if the attribute `found_inf`, a scalar on the device, is 1.
    `momentum` is the share of the momentum that a step keeps. `lr_factors` has each parameter's factor of the learning
    rate; the default is 1. Of a DTensor, a rank gathers the update of whole matrices, orthogonalizes it, and keeps its
    shard.
    """

    found_inf = torch.zeros(())

    def __init__(
        self,
        stacks: Mapping[Tensor, int],
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        lr_factors: Mapping[Tensor, float] | None = None,
    ) -> None:
        self.momentum = momentum
        self.shapes = {weight: stack_shape(weight, count) for weight, count in stacks.items()}
        self.lr_factors = lr_factors or dict.fromkeys(stacks, 1.0)
        # All matrices may be frozen. The optimizer accepts an empty group, but not an empty list.
        super().__init__([{"params": [*stacks]}], {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        (group,) = self.param_groups
        with_gradient = [weight for weight in group["params"] if weight.grad is not None]
        if not with_gradient:
            return
        updates = self._updates(with_gradient)

        @cache
        def decay_factor(decay: float) -> Tensor:
            return torch.full_like(self.found_inf, 1 - decay).masked_fill(self.found_inf.bool(), 1.0)

        for batch in self._batches(with_gradient):
            self._orthogonalize(batch, updates)
            for weight in batch:
                shard = local_shard(weight)
                lr = group["lr"] * self.lr_factors[weight]
                shard.mul_(decay_factor(lr * group["weight_decay"]))
                shard.add_(updates[weight], alpha=-lr * 0.2 * max(self.shapes[weight][1:]) ** 0.5)

    def _batches(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """Groups weights into those that are orthogonalized together: with matrices of one shape."""
        by_shape: dict[tuple[int, ...], list[list[Tensor]]] = {}
        for weight in weights:
            batches = by_shape.setdefault(self.shapes[weight][1:], [[]])
            numbers = sum(prod(self.shapes[other]) for other in (*batches[-1], weight))
            if batches[-1] and numbers > BATCH_ELEMENTS:
                batches.append([])
            batches[-1].append(weight)
        return [batch for batches in by_shape.values() for batch in batches]

    def _orthogonalize(self, batch: Sequence[Tensor], updates: Mapping[Tensor, Tensor]) -> None:
        """Orthogonalizes the updates of a batch of weights in place."""
        shapes = [self.shapes[weight] for weight in batch]
        # If the whole matrices had a name, they would be kept in memory during the iterations.
        orthogonal = orthogonalize(
            torch.cat([gather_matrices(updates[weight], weight).view(shape) for weight, shape in zip(batch, shapes)])
        )
        results = orthogonal.split([count for count, _, _ in shapes])
        shards = [shard_matrices(x.view(-1, *weight.shape[1:]), weight) for weight, x in zip(batch, results)]
        torch._foreach_copy_([updates[weight] for weight in batch], shards)

    def _updates(self, weights: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Moves the momentum of weights towards their gradients. Returns the updates of the local shards in bf16."""
        grads = [cast(Tensor, weight.grad) for weight in weights]
        for weight, grad in zip(weights, grads):
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(grad)
        # On local shards, because the many small operations on DTensors take twice as long.
        gradients = [local_shard(grad) for grad in grads]
        buffers = [local_shard(self.state[weight]["momentum_buffer"]) for weight in weights]
        for gradient, buffer in zip(gradients, buffers):
            # A gradient that equals the momentum buffer leaves it as it is.
            torch.where(self.found_inf.bool(), buffer, gradient, out=gradient)
        torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
        updates = torch._foreach_lerp(gradients, buffers, self.momentum)
        torch._foreach_mul_(updates, 1 - self.found_inf)
        return {weight: update.bfloat16() for weight, update in zip(weights, updates)}


def stack_shape(weight: Tensor, count: int) -> tuple[int, int, int]:
    """Number, rows and columns of the matrices of a weight; of experts, only of those that this rank holds."""
    *_, rows, columns = weight.shape
    if weight.ndim == 3:
        return len(local_shard(weight)), rows, columns
    return count, rows // count, columns


def orthogonalize(x_NRC: Tensor) -> Tensor:
    """Brings the singular values of bf16 matrices to between about 0.73 and 1.27.

    A singular value below 0.01 of the Frobenius norm becomes about 78 times its share of the norm.
    """
    x_NRC = x_NRC / (MARGIN * x_NRC.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    is_wide = x_NRC.shape[1] <= x_NRC.shape[2]
    for a, b, c in COEFFICIENTS:
        # The smaller of the two Gram matrices. Both give the same result.
        gram = x_NRC @ x_NRC.mT if is_wide else x_NRC.mT @ x_NRC
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor, x_NRC, beta=a) if is_wide else torch.baddbmm(x_NRC, x_NRC, factor, beta=a)
    return x_NRC


def muon_flops(stacks: Mapping[Tensor, int]) -> int:
    """FLOPs of the matrix products in an update of these parameters."""
    flops = 0
    for weight, stacked in stacks.items():
        count, *sides = stack_shape(weight, stacked)
        small, large = sorted(sides)
        # In each iteration: the Gram matrix, its square, and the product with the matrix.
        flops += len(COEFFICIENTS) * count * 2 * small * small * (2 * large + small)
    return flops
