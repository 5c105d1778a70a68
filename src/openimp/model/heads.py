"""From pooled features to the common space, and the learned temperatures."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from openimp.model.kernels import gelu


class Projection(nn.Module):
    """Two-layer GELU MLP with a final LayerNorm into the common space (arXiv 2305.06324)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, embed_dim)
        self.down = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.norm(self.down(gelu(self.up(x_BD))))


class Temperature(nn.Module):
    """A learned scale, and a bias that only the sigmoid loss uses, for the similarities of one pair of modalities.

    The scale is kept as a logarithm, so that it stays positive.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        # Of one element and not scalars, which cannot be cut into shards.
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        # SigLIP's start (arXiv 2303.15343, section 3.2): most pairs are negatives, so begin near "no".
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self.state_dict():  # They were scalars once.
            if prefix + name in state_dict:
                state_dict[prefix + name] = state_dict[prefix + name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def limit(self) -> None:
        """Keeps the scale below 100, after each update, as CLIP does (arXiv 2103.00020, section 2.5).

        In the forward pass a limit would leave no gradient to come back by. What has no gradient was not updated here;
        another process may be updating it.
        """
        if self.log_scale.grad is not None:
            self.log_scale.clamp_(max=math.log(100.0))
