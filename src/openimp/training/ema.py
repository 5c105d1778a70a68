"""Exponential moving average (EMA) of a model's weights, which is evaluated and saved beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openimp.parallel.layout import local_shard


class EMA:
    """Moving average of all tensors in a model's state dict: `weights`, each sharded like the model's own tensor.

    A frozen weight is its own average, so there is no copy of it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.weights: dict[str, Tensor] = {}
        for name, weight in model.state_dict().items():
            self.weights[name] = weight.detach() if name in self.frozen else weight.detach().clone()

    def update(self, step: int) -> None:
        """Moves the averages towards the weights after step `step`, which counts from 0.

        Early steps use a smaller decay, so that the initial weights are forgotten (timm's ModelEmaV3 with warm-up).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = zip(*self._pairs())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchanges the values of the model and of `weights` within the context."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weight in self._pairs():  # One tensor at a time, to save memory.
            weight_copy = weight.clone()
            weight.copy_(average)
            average.copy_(weight_copy)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The local shards of each average and of its weight, without frozen weights."""
        model_weights = self.model.state_dict()
        return [
            (local_shard(average), local_shard(model_weights[name]))
            for name, average in self.weights.items()
            if name not in self.frozen
        ]
