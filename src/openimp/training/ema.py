"""Exponential moving average (EMA) of a model's weights, which is evaluated and saved beside them."""

import torch
from torch import Tensor, nn

from openimp.parallel.layout import local_shard


class EMA:
    """Moving average of all tensors in a model's state dict: `weights`, each sharded like the model's own tensor."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {name: x.detach().clone() for name, x in model.state_dict().items()}

    def update(self, step: int) -> None:
        """Moves the averages towards the weights after step `step`, which counts from 0.

        Early steps use a smaller decay, so that the initial weights are forgotten (timm's ModelEmaV3 with warm-up).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = (
            [local_shard(x) for x in tensors.values()] for tensors in (self.weights, self.model.state_dict())
        )
        torch._foreach_lerp_(averages, weights, 1 - decay)
