"""Muon: momentum whose matrices are orthogonalized (arXiv 2502.16982)."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openimp.parallel.layout import gather_matrices, local_shard, shard_matrices
from openimp.parallel.newton_schulz import orthogonalize

BATCH_NUMBERS = 2**24
"""Most numbers in a batch of matrices, unless a single parameter has more."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. An update has the same RMS as one of AdamW (section 2.2).

    `stacks` has the number of matrices that each parameter stacks in its first dimension: 1 for a linear layer, 3 for
    one that computes queries, keys and values, and the number of experts. Each matrix is orthogonalized separately.

    As in torch's fused optimizers, a step changes nothing if the attribute `found_inf`, a scalar on the device, is 1.
    `lr_factors` has each parameter's factor of the learning rate; the default is 1. Of a DTensor, a rank gathers the
    update of whole matrices, orthogonalizes it, and keeps its shard.
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
        self.shapes = {weight: _stack_shape(weight, count) for weight, count in stacks.items()}
        self.lr_factors = lr_factors or dict.fromkeys(stacks, 1.0)
        # A group may be empty, but a list of parameters may not: all matrices may be frozen.
        super().__init__([{"params": [*stacks]}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        (group,) = self.param_groups
        with_gradient = [weight for weight in group["params"] if weight.grad is not None]
        if not with_gradient:
            return
        updates = self._updates(with_gradient, group["momentum"])

        @cache
        def decay_factor(decay: float) -> Any:
            if self.found_inf is None:
                return 1 - decay
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
            if batches[-1] and numbers > BATCH_NUMBERS:
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

    def _updates(self, weights: Sequence[Tensor], momentum: float) -> dict[Tensor, Tensor]:
        """Moves the momentum of weights towards their gradients. Returns the updates of the local shards in bf16."""
        grads = [cast(Tensor, weight.grad) for weight in weights]
        for weight, grad in zip(weights, grads):
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(grad)
        # On local shards, because the many small operations on DTensors take twice as long.
        gradients = [local_shard(grad) for grad in grads]
        buffers = [local_shard(self.state[weight]["momentum_buffer"]) for weight in weights]
        if self.found_inf is not None:
            # A gradient that equals the momentum buffer leaves it as it is.
            for gradient, buffer in zip(gradients, buffers):
                torch.where(self.found_inf.bool(), buffer, gradient, out=gradient)
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        if self.found_inf is not None:
            torch._foreach_mul_(updates, 1 - self.found_inf)
        return {weight: update.bfloat16() for weight, update in zip(weights, updates)}


def _stack_shape(weight: Tensor, count: int) -> tuple[int, int, int]:
    """Number, rows and columns of the matrices of a weight; of experts, only of those that this rank holds."""
    *_, rows, columns = weight.shape
    if weight.ndim == 3:
        return len(local_shard(weight)), rows, columns
    return count, rows // count, columns


def muon_flops(stacks: Mapping[Tensor, int]) -> int:
    """FLOPs of the matrix products in an update of these parameters."""
    meta_stacks = {}
    for weight, count in stacks.items():
        meta_weight = torch.empty(weight.shape, device="meta", requires_grad=True)
        meta_weight.grad = torch.empty_like(meta_weight)
        meta_stacks[meta_weight] = count
    with FlopCounterMode(display=False) as counter:
        Muon(meta_stacks, lr=0.0).step()
    return int(counter.get_total_flops())
