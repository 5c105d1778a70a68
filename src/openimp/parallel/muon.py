"""Muon: momentum whose matrices are orthogonalized (arXiv 2502.16982)."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openimp.parallel.division import divide_work
from openimp.parallel.layout import local_shard
from openimp.parallel.owners import matrix_shape


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. An update has the same RMS as one of AdamW (section 2.2).

    `stacks` has the number of matrices that each parameter stacks in its first dimension: 1 for a linear layer, 3 for
    one that computes queries, keys and values, and the number of experts. Each matrix is orthogonalized separately.

    As in torch's fused optimizers, a step changes nothing if the attribute `found_inf`, a scalar on the device, is 1.
    Several ranks divide the work of a step; see `divide_work`. `lr_factors` has each parameter's factor of the learning
    rate; the default is 1.
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
        self.stacks = dict(stacks)
        self.lr_factors = lr_factors or dict.fromkeys(stacks, 1.0)
        self.divisions = divide_work(stacks)
        kept = [weight for division in self.divisions for weight in division.kept]
        # A group may be empty, but a list of parameters may not: with many ranks, some own no matrix.
        super().__init__([{"params": kept}], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        (group,) = self.param_groups
        with_gradient = [weight for weight in group["params"] if weight.grad is not None]
        updates = self._updates(with_gradient, group["momentum"])

        @cache
        def decay_factor(decay: float) -> Any:
            if self.found_inf is None:
                return 1 - decay
            return torch.full_like(self.found_inf, 1 - decay).masked_fill(self.found_inf.bool(), 1.0)

        for division in self.divisions:
            for weight, update in division.orthogonalized(updates):
                shard = local_shard(weight)
                shape = matrix_shape(weight, self.stacks[weight])
                lr = group["lr"] * self.lr_factors[weight]
                shard.mul_(decay_factor(lr * group["weight_decay"]))
                shard.add_(update.view_as(shard), alpha=-lr * 0.2 * max(shape) ** 0.5)

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
