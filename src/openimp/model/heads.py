"""From pooled features to the common space, and the learned temperatures."""

import torch
from torch import Tensor, nn

from openimp.model.init import linear
from openimp.model.kernels import gelu

MIN_TEMPERATURE = 0.01


class Projection(nn.Module):
    """Two-layer GELU MLP with a final LayerNorm into the common space (arXiv 2305.06324)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.up = linear(width, embed_dim)
        self.down = linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.norm(self.down(gelu(self.up(x_BD))))


class Temperature(nn.Module):
    """The learned temperature of one pair of modalities, and a bias that only the sigmoid loss uses.

    The temperature itself is the parameter, as in the authors' release, and not its logarithm, as in CLIP.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        # One element each and not scalars, which FSDP2 cannot shard.
        self.temperature = nn.Parameter(torch.tensor([temperature]))
        # SigLIP's start (arXiv 2303.15343, section 3.2): most pairs are negatives, so begin near "no".
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by: 1 / temperature."""
        return 1 / self.temperature

    @torch.no_grad()
    def limit(self) -> None:
        """Keeps the scale at most 100, after each update, as CLIP does (arXiv 2103.00020, section 2.5).

        In the forward pass a limit would leave no gradient to come back by. A parameter without a gradient was not
        updated on this rank; another one may be updating it.
        """
        if self.temperature.grad is not None:
            self.temperature.clamp_(min=MIN_TEMPERATURE)
