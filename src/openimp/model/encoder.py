"""The Transformer encoder: pre-norm blocks without biases, of which the last ones may be sparse.

Shape suffixes: B examples, L tokens, D width, H heads, K features per head.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openimp.model.init import lecun_normal_, linear
from openimp.model.kernels import attend, gelu
from openimp.model.moe import RouterStats, SoftMLP, SparseMLP, valid_tokens_per_rank
from openimp.recipe.model import Model


class Attention(nn.Module):
    """Multi-head self-attention without biases. LayerNorm on queries and keys is optional (arXiv 2302.05442)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.qk_norm, self.attend = heads, qk_norm, attend
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = linear(width, width, bias=False)
        head = width // heads
        self.q_norm = _norm(head) if qk_norm else nn.Identity()
        self.k_norm = _norm(head) if qk_norm else nn.Identity()
        # The release stores these kernels as (width, heads, head), so JAX takes width x heads as their fan-in.
        lecun_normal_(self.qkv.weight, width * heads)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Otherwise the norms would copy, in the forward pass and again in the backward pass.
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
    """Pre-norm attention, then a pre-norm MLP or Mixture-of-Experts."""

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
        """Maps (B, L, D) to (B, L, D), and returns router statistics if the block is sparse.

        A sparse block needs `count`, the `valid_tokens_per_rank` of its input.
        """
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask_BL)
        if not self.sparse:
            return x_BLD + self.mlp(self.norm2(x_BLD)), None
        valid_BL = torch.ones(x_BLD.shape[:2], dtype=torch.bool, device=x_BLD.device) if mask_BL is None else mask_BL
        y_BLD, stats = self.mlp(self.norm2(x_BLD), valid_BL, count)
        return x_BLD + y_BLD, stats


class Encoder(nn.Module):
    """Blocks and a final LayerNorm, with the sizes of arXiv 2305.06324. It does not depend on modalities.

    For comparison with a fully shared encoder, each of the stems, given by name, may have its own copy of the first
    `config.modality_specific_layers` blocks.
    """

    def __init__(self, config: Model, stems: Iterable[str] = ()) -> None:
        super().__init__()
        first_sparse = config.layers - (config.moe.layers if config.moe else 0)
        own_layers = config.modality_specific_layers

        def blocks(first: int, last: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config, sparse=i >= first_sparse) for i in range(first, last))

        self.own = nn.ModuleDict({name: blocks(0, own_layers) for name in stems if own_layers})  # by stem
        self.blocks = blocks(own_layers, config.layers)
        self.norm = _norm(config.width, bias=True)
        self.activation_checkpointing = False  # compute each block's activations again in the backward pass

    def forward_own(self, x_BLD: Tensor, mask_BL: Tensor | None, stem: str) -> tuple[Tensor, list[RouterStats]]:
        """Applies the stem's modality-specific blocks, as `forward` does the shared ones."""
        return self._run(self.own[stem], x_BLD, mask_BL) if self.own else (x_BLD, [])

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None = None) -> tuple[Tensor, list[RouterStats]]:
        """Maps (B, L, D) to (B, L, D), and returns the router statistics of each sparse block, in order."""
        x_BLD, stats = self._run(self.blocks, x_BLD, mask_BL)
        return self.norm(x_BLD), stats

    def _run(self, blocks: nn.Module, x_BLD: Tensor, mask_BL: Tensor | None) -> tuple[Tensor, list[RouterStats]]:
        all_stats = []
        # Computed once for all blocks, because it takes an all-reduce.
        sparse = any(block.sparse for block in blocks.children())
        count = valid_tokens_per_rank(x_BLD, mask_BL) if sparse else None
        for block in blocks.children():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BLD, stats = checkpoint(block, x_BLD, mask_BL, count, use_reentrant=False)
            else:
                x_BLD, stats = block(x_BLD, mask_BL, count)
            if stats is not None:
                all_stats.append(stats)
        return x_BLD, all_stats


def _norm(width: int, bias: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=bias)
