"""The Transformer encoder: pre-norm blocks, of which the last ones may be sparse.

A pass processes several inputs, for example one per modality, each with its own B and L. Attention and
routers treat the inputs separately. All other layers process the tokens of all inputs at once.

Shape suffixes: B examples, L tokens, T tokens of all inputs, D width, H heads, K features per head.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openimp.model.init import lecun_normal_, linear, mimetic_
from openimp.model.kernels import attend, gelu
from openimp.model.moe import ExpertGroups, RouterStats, SparseMLP, split_tokens, valid_tokens_per_rank
from openimp.recipe.model import Model, MoE

Shapes = Sequence[torch.Size]
"""The shape (B, L) of each input of a pass."""
Masks = Sequence[Tensor | None]
"""The mask (B, L) of each input, False for padding; None if it has none."""


class Attention(nn.Module):
    """Multi-head self-attention. LayerNorm on queries and keys is optional (arXiv 2302.05442)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width = config.width
        heads = config.heads
        self.heads = heads
        self.qk_norm = config.qk_norm
        self.attend = attend  # `planning` replaces it
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.out = linear(width, width, bias=config.bias)
        head_width = width // heads
        self.q_norm = _norm(head_width) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(head_width) if config.qk_norm else nn.Identity()
        # The authors' JAX code stores these kernels as (width, heads, head width), so their fan-in is width x heads.
        lecun_normal_(self.qkv.weight, width * heads)
        if config.bias:
            nn.init.zeros_(self.qkv.bias)
        if config.attention_init == "mimetic":
            mimetic_(self.qkv.weight, self.out.weight)

    def forward(self, x_TD: Tensor, shapes: Shapes, masks: Masks) -> Tensor:
        qkv = split_tokens(self.qkv(x_TD), shapes)
        # If `out` were applied after the concatenation, autograd would keep a fused kernel's results twice.
        return torch.cat([self.out(self._head_results(*one_input)) for one_input in zip(qkv, masks)])

    def _head_results(self, qkv_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The heads' results (B L, D) for the queries, keys and values of one input."""
        qkv = qkv_BLD.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Norms of tensors that are not contiguous would copy them in the forward pass and again in the backward pass.
        q_BHLK, k_BHLK, v_BHLK = qkv.contiguous() if self.qk_norm else qkv
        q_BHLK = self.q_norm(q_BHLK).type_as(v_BHLK)
        k_BHLK = self.k_norm(k_BHLK).type_as(v_BHLK)
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None, :]
        x_BHLK = self.attend(q_BHLK, k_BHLK, v_BHLK, mask_B11L)
        return x_BHLK.transpose(1, 2).flatten(2).flatten(0, 1)


class MLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gelu_kind = config.gelu
        self.up = linear(config.width, config.mlp_dim, config.bias)
        self.down = linear(config.mlp_dim, config.width, config.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(gelu(self.up(x_TD), self.gelu_kind))


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm MLP or, if the block is sparse, a Mixture-of-Experts."""

    def __init__(self, config: Model, moe: MoE | None = None) -> None:
        """`moe` makes the block sparse."""
        super().__init__()
        self.norm1 = _norm(config.width)
        self.attention = Attention(config)
        self.norm2 = _norm(config.width)
        self.sparse = moe is not None
        if moe is None:
            self.mlp: nn.Module = MLP(config)
        elif moe.experts_by_stem:
            self.mlp = ExpertGroups(config, moe)
        else:
            self.mlp = SparseMLP(moe.group_sizes[0], config, moe)

    def forward(
        self, x_TD: Tensor, shapes: Shapes, masks: Masks, tokens_per_rank: Sequence[Tensor], stems: Sequence[str]
    ) -> tuple[Tensor, list[RouterStats]]:
        """Maps (T, D) to (T, D), and returns router statistics per input if the block is sparse.

        A sparse block needs `tokens_per_rank`: per input, its valid tokens averaged over ranks
        (`valid_tokens_per_rank`). If stems have their own experts, it needs `stems`: per input, the stem that made it.
        """
        x_TD = x_TD + self.attention(self.norm1(x_TD), shapes, masks)
        if not self.sparse:
            return x_TD + self.mlp(self.norm2(x_TD)), []
        valid = [
            torch.ones(shape, dtype=torch.bool, device=x_TD.device) if mask_BL is None else mask_BL
            for shape, mask_BL in zip(shapes, masks)
        ]
        # Experts get bf16 tokens, also where CUDA's autocast lets the norm return fp32.
        groups = (stems,) if stems else ()
        y_TD, stats = self.mlp(self.norm2(x_TD).type_as(x_TD), valid, tokens_per_rank, *groups)
        return x_TD + y_TD, stats


class Encoder(nn.Module):
    """Blocks and a final LayerNorm, as in arXiv 2305.06324. All stems share them, except experts if `moe.experts` gives
    each stem its own.

    Each stem may have its own copy of the first `config.modality_specific_layers` blocks. `stems` are their names.
    """

    def __init__(self, config: Model, stems: Iterable[str] = ()) -> None:
        super().__init__()
        first_sparse = config.layers - (config.moe.layers if config.moe else 0)
        specific_layers = config.modality_specific_layers

        def blocks(start: int, end: int) -> nn.ModuleList:
            return nn.ModuleList(Block(config, config.moe if i >= first_sparse else None) for i in range(start, end))

        # The modality-specific blocks of each stem.
        self.own = nn.ModuleDict({name: blocks(0, specific_layers) for name in stems if specific_layers})
        self.blocks = blocks(specific_layers, config.layers)
        self.norm = _norm(config.width, bias=True) if config.layers else nn.Identity()
        self.has_expert_groups = bool(config.moe and config.moe.experts_by_stem)
        self.activation_checkpointing = False  # compute each block's activations again in the backward pass

    def forward(
        self, inputs: Sequence[Tensor], masks: Masks, stems: Sequence[str] = ()
    ) -> tuple[list[Tensor], list[list[RouterStats]]]:
        """Maps each input (B, L, D) to (B, L, D), and returns, per input, the router statistics of each sparse block.

        All inputs go through the shared blocks in one pass. `stems` are, per input, the stem that made it; they may be
        left out if the stems share all blocks and experts.
        """
        inputs = [*inputs]
        router_stats: list[list[RouterStats]] = [[] for _ in inputs]
        if self.own:
            for i, (x_BLD, mask_BL, stem) in enumerate(zip(inputs, masks, stems, strict=True)):
                x_TD, (router_stats[i],) = self._run(self.own[stem], [x_BLD], [mask_BL], [stem])
                inputs[i] = x_TD.view_as(x_BLD)
        x_TD, shared_stats = self._run(self.blocks, inputs, masks, stems)
        for stats_of_input, shared in zip(router_stats, shared_stats):
            stats_of_input.extend(shared)
        return split_tokens(self.norm(x_TD), [x_BLD.shape[:2] for x_BLD in inputs]), router_stats

    def _run(
        self, blocks: nn.Module, inputs: Sequence[Tensor], masks: Masks, stems: Sequence[str]
    ) -> tuple[Tensor, list[list[RouterStats]]]:
        """The output (T, D) of consecutive blocks, and per input the statistics of each sparse one."""
        shapes = [x_BLD.shape[:2] for x_BLD in inputs]
        x_TD = torch.cat([x_BLD.flatten(0, 1) for x_BLD in inputs])
        router_stats: list[list[RouterStats]] = [[] for _ in inputs]
        tokens_per_rank = []
        if sparse := any(block.sparse for block in blocks.children()):
            # Computed once for all blocks, because it takes an all-reduce.
            tokens_per_rank = [valid_tokens_per_rank(*one_input) for one_input in zip(inputs, masks)]
        if not sparse or not self.has_expert_groups:
            stems = ()  # The other layers do not depend on stems.
        for block in blocks.children():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD, block_stats = checkpoint(block, x_TD, shapes, masks, tokens_per_rank, stems, use_reentrant=False)
            else:
                x_TD, block_stats = block(x_TD, shapes, masks, tokens_per_rank, stems)
            for stats_of_input, stats in zip(router_stats, block_stats):
                stats_of_input.append(stats)
        return x_TD, router_stats


def _norm(width: int, bias: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, bias=bias)
