"""The Transformer encoder: pre-norm blocks without biases, dense or sparse in the last ones.

Shape suffixes: B examples, L tokens, D width, H heads, K features a head.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openimp.model.init import lecun_normal_, linear
from openimp.model.kernels import attend, gelu
from openimp.model.moe import RouterStats, SoftMLP, SparseMLP, mean_valid_tokens
from openimp.recipe.model import Model


class Attention(nn.Module):
    """Multi-head self-attention without biases; optional LayerNorm on queries and keys (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.attend = heads, qk_norm, attend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)
        head = width // heads
        self.q_norm = _norm(head) if qk_norm else nn.Identity()
        self.k_norm = _norm(head) if qk_norm else nn.Identity()
        # The release keeps these kernels as (width, heads, head), and JAX counts width x heads as their fan-in.
        lecun_normal_(self.qkv.weight, width * heads)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # The norms would copy what is not contiguous, in the forward pass and again in the backward one.
        q_BHLK, k_BHLK, v_BHLK = qkv.contiguous() if self.qk_norm else qkv
        q_BHLK, k_BHLK = self.q_norm(q_BHLK).type_as(v_BHLK), self.k_norm(k_BHLK).type_as(v_BHLK)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        x_BHLK = self.attend(q_BHLK, k_BHLK, v_BHLK, mask)
        return self.out(x_BHLK.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with GELU between them, without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = linear(width, hidden, bias=False)
        self.down = linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(gelu(self.up(x_BLD)))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP, or experts in its place."""

    def __init__(self, config: Model, sparse: bool) -> None:
        super().__init__()
        self.norm1 = _norm(config.width)
        self.attention = Attention(config.width, config.heads, config.qk_norm)
        self.norm2 = _norm(config.width)
        self.sparse = sparse
        self.mlp: nn.Module
        if sparse and config.moe:
            kind = SoftMLP if config.moe.routing == "soft" else SparseMLP
            self.mlp = kind(config.width, config.mlp_dim, config.moe)
        else:
            self.mlp = MLP(config.width, config.mlp_dim)

    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor | None, count: Tensor | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Tokens to tokens, and what a sparse block tells, which needs to know the `mean_valid_tokens` of its tokens."""
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask_BL)
        if not self.sparse:
            return x_BLD + self.mlp(self.norm2(x_BLD)), None
        assert count is not None
        valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device) if mask_BL is None else mask_BL
        y_BLD, stats = self.mlp(self.norm2(x_BLD), valid_BL, count)
        return x_BLD + y_BLD, stats


class Encoder(nn.Module):
    """Blocks and a final LayerNorm; sizes as in arXiv 2305.06324. It knows no modality.

    Args:
        config: the sizes.
        own: names of what has the first `config.own_layers` blocks of its own, for comparison with one shared encoder.

    Attributes:
        recompute: forget what happens within a block in training, and compute it again for the gradient.
    """

    def __init__(self, config: Model, own: Iterable[str] = ()) -> None:
        super().__init__()
        first_sparse = config.layers - (config.moe.layers if config.moe else 0)

        def blocks(first: int, last: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config, sparse=i >= first_sparse) for i in range(first, last))

        self.own = nn.ModuleDict(
            {name: blocks(0, config.modality_specific_layers) for name in own if config.modality_specific_layers}
        )
        self.blocks = blocks(config.modality_specific_layers, config.layers)
        self.norm = _norm(config.width, bias=True)
        self.recompute = False

    def begin(self, x_BLD: Tensor, mask_BL: Tensor | None, name: str) -> tuple[Tensor, list[RouterStats]]:
        """The blocks that `name` has of its own, as `forward`; nothing where there are none."""
        return self._run(self.own[name], x_BLD, mask_BL) if self.own else (x_BLD, [])

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, list[RouterStats]]:
        """Tokens to tokens, (B, L, D) both, through the shared blocks, and what each sparse layer tells, in order."""
        x_BLD, stats = self._run(self.blocks, x_BLD, mask_BL)
        return self.norm(x_BLD), stats

    def _run(self, blocks: nn.Module, x_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, list[RouterStats]]:
        stats = []
        # Once for all blocks, for each exchange makes the processes wait.
        count = mean_valid_tokens(x_BLD, mask_BL) if any(block.sparse for block in blocks.children()) else None
        for block in blocks.children():
            if self.recompute and torch.is_grad_enabled():
                x_BLD, told = checkpoint(block, x_BLD, mask_BL, count, use_reentrant=False)
            else:
                x_BLD, told = block(x_BLD, mask_BL, count)
            if told is not None:
                stats.append(told)
        return x_BLD, stats


def _norm(width: int, bias: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=bias)
