"""Projection heads and learned temperatures."""

import torch
from torch import Tensor, nn

from openimp.model.init import linear
from openimp.model.kernels import gelu

MIN_TEMPERATURE = 0.01
"""Lower bound of a learned temperature. The logit scale, 1 / temperature, is then at most 100, as in CLIP."""


class Projection(nn.Module):
    """Two-layer GELU MLP with a final LayerNorm, from pooled features to embeddings (arXiv 2305.06324)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.up = linear(width, embed_dim)
        self.down = linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.norm(self.down(gelu(self.up(x_BD))))


class Adapter(nn.Module):
    """Adds to vectors the outputs of a two-layer GELU MLP, which are zero at first (CLIP-Adapter, arXiv 2110.04544)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = linear(width, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.down(gelu(self.up(x_BD)))


class Temperature(nn.Module):
    """The learned temperature of one pair of modalities, and a bias that only the sigmoid loss uses.

    The parameter is the temperature itself, as in the authors' release; CLIP learns its logarithm. Both stay fp32 when
    FSDP2 gathers the other parameters in bf16, because rounding the temperature would change all logits by up to 0.2 %.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        # Both have one element instead of being scalars, because FSDP2 cannot shard scalars.
        self.temperature = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.temperature, temperature)
        # SigLIP's initial value (arXiv 2303.15343, section 3.2): most pairs are negatives.
        nn.init.constant_(self.bias, -10.0)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The temperature and the bias, as copies, because FSDP2 may free the parameters after this call."""
        return self.temperature.clone(), self.bias.clone()

    @property
    def scale(self) -> Tensor:
        """The logit scale, 1 / temperature."""
        return 1 / self.temperature

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamps the logit scale to at most 100; called after each update, as in CLIP (arXiv 2103.00020, section 2.5).

        A clamp in the forward pass would have no gradient beyond the limit, so the temperature could never return.
        A temperature without a gradient was not updated.
        """
        if self.temperature.grad is not None:
            self.temperature.clamp_(min=MIN_TEMPERATURE)
