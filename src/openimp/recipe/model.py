"""The schema of `model` in the recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from openimp.common.schema import Count, Positive, Strict

BATCH_ROUTINGS = ("expert_choice_batch", "token_choice")
"""Routings that look at the tokens of a whole batch in training."""


class MoE(Strict):
    """Sparse Mixture-of-Experts in place of the MLP of the last blocks (arXiv 2305.06324)."""

    renamed = {"capacity": "capacity_factor"}

    experts: Count = 16
    """Experts a block: 16 in B and L, 4 in S."""
    layers: Count = 6
    """How many of the last blocks are sparse."""
    routing: Literal["expert_choice", "expert_choice_batch", "token_choice", "soft"] = "expert_choice"
    """Who chooses whom: experts choose among the tokens of one example, or of the whole batch (in training only), or
    each token chooses its `top_k` experts (in training up to the experts' capacity), or every slot of an expert takes
    a weighted mean of the example's tokens (Soft MoE, arXiv 2308.00951)."""
    capacity_factor: Positive = 1.0
    """Tokens an expert takes, as a multiple of tokens / experts (of `top_k` x tokens / experts in token choice); not in
    soft routing."""
    top_k: Count = 1
    """Experts a token, in token choice only."""
    slots: Count = 1
    """Slots an expert, in soft routing only; so its cost is by example, not by token."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the router z-loss: the mean over tokens of logsumexp(logits)^2, summed over layers (ST-MoE, arXiv
    2202.08906, section 3.2). The release and the `imp_moe_*` recipes use 1, which makes short trainings worse
    (docs/results/paper.md)."""
    balance_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the load-balancing loss, in token choice only (Switch, arXiv 2101.03961, section 2.2)."""


class Model(Strict):
    """The shared encoder and the space it embeds into. The defaults are IMP-S, dense."""

    renamed = {"mlp": "mlp_dim", "own_layers": "modality_specific_layers", "temperature": "init_temperature"}

    width: Count = 384
    """Features a token."""
    layers: Count = 12
    """Transformer blocks."""
    heads: Count = 6
    """Attention heads; the paper's are 64 wide."""
    mlp_dim: Count = 1536
    """Hidden features of the MLP, and of each expert."""
    qk_norm: bool = False
    """LayerNorm on queries and keys; on in the paper's MoE models."""
    moe: MoE | None = None
    """Left out: a dense encoder."""
    modality_specific_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the first blocks each stem has of its own, to compare one encoder with modality-specific ones: all
    blocks for an encoder a stem, fewer for encoders that shared layers fuse. 0: one encoder, as in the paper."""
    space: Literal["disjoint", "joint"] = "disjoint"
    """One head for each (source, target) pair of modalities, as in the authors' release, or one head per modality."""
    share_heads: bool = True
    """Modalities that share a stem (image and video) also share heads and temperatures, as in the release. So
    image-text tasks train the heads that video uses. false: each modality has its own heads and temperatures."""
    embed_dim: Count = 1024
    """Features of the common space, and of its heads' hidden layer."""
    init_temperature: Positive = 0.2
    """Where the learned temperature of each pair of modalities starts; the paper: 0.2 dense, 1.0 MoE."""

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.moe and self.moe.layers > self.layers:
            raise ValueError(f"moe.layers {self.moe.layers} is more than layers {self.layers}")
        if self.modality_specific_layers > self.layers:
            raise ValueError(
                f"modality_specific_layers {self.modality_specific_layers} is more than layers {self.layers}"
            )
        if self.moe and self.moe.top_k > self.moe.experts:
            raise ValueError(f"moe.top_k {self.moe.top_k} is more than moe.experts {self.moe.experts}")
        return self
