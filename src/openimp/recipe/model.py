"""The schema of `model` in the recipe."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from openimp.common.schema import Count, NotNegative, Positive, Strict, Whole

Gelu = Literal["tanh", "erf"]
"""tanh: the usual approximation of GELU. erf: GELU itself, by the error function."""


class MoE(Strict):
    """Sparse mixture of experts, which replaces the MLP of the last blocks (arXiv 2305.06324)."""

    removed = {
        "gates": ("softmax",),
        "slots": (1,),
        "routing": ("expert_choice", "expert_choice_batch"),
        "top_k": (1,),
        "balance_loss": (0.01,),
    }

    experts: Count | Annotated[dict[str, Count], Field(min_length=1)] = 16
    """Experts per block, which all modalities share. The paper: 16 in B and L, 4 in S. Or the experts per block that
    each stem has to itself, with a router of its own, such as {vision: 4, text: 4}."""
    layers: Count = 6
    """Number of sparse blocks, which are the last ones."""
    capacity_factor: Positive = 1.0
    """Capacity of an expert, as a multiple of tokens / experts, for each example."""
    z_loss: NotNegative = 1e-3
    """Weight of the router z-loss: the mean over tokens of logsumexp(logits)^2, summed over layers (ST-MoE, arXiv
    2202.08906, section 3.2). The authors' release and the `imp_moe_*` recipes use 1, which makes short trainings worse
    (docs/results/paper.md)."""

    @property
    def experts_by_stem(self) -> dict[str, int]:
        """The number of experts of each stem; empty if all modalities share the experts."""
        return self.experts if isinstance(self.experts, dict) else {}

    @property
    def group_sizes(self) -> list[int]:
        """The number of experts of each router in a block."""
        return [*self.experts.values()] if isinstance(self.experts, dict) else [self.experts]


class Model(Strict):
    """The shared encoder and its embedding space. The defaults are the dense IMP-S."""

    removed = {"wrap": (None,)}

    width: Count = 384
    """Features per token."""
    layers: Whole = 12
    """Transformer blocks. 0: no encoder, for towers. The vectors of a tower then go through a linear layer that starts
    as the identity, and heads that add a small MLP; `width` and `embed_dim` must be equal."""
    heads: Count = 6
    """Attention heads. The paper's have 64 features each."""
    mlp_dim: Count = 1536
    """Hidden features of the MLP, and of each expert."""
    qk_norm: bool = False
    """LayerNorm on queries and keys, as in the paper's MoE models."""
    bias: bool = False
    """Biases in attention and MLPs, but not in experts. The paper's encoder has none, most public vision Transformers
    do."""
    attention_init: Literal["release", "mimetic"] = "release"
    """Initial weights of attention. release: random, as in the authors' release. mimetic: the keys' weights start equal
    to the queries', and the output layer's start as minus the transpose of the values'. Trained vision Transformers
    have similar weights (arXiv 2305.09828)."""
    gelu: Gelu = "tanh"
    """GELU in MLPs and experts. tanh: its approximation, as in the paper. erf: exact."""
    moe: MoE | None = None
    """Options of a sparse encoder; null: a dense encoder."""
    modality_specific_layers: Whole = 0
    """Number of first blocks that each stem has for itself. In short trainings of tasks that share little, two of three
    blocks avoid most of what sharing an encoder costs (docs/results/moe_mixture.md). 0: one shared encoder, as in the
    paper. All blocks: one encoder per stem."""
    space: Literal["disjoint", "joint"] = "disjoint"
    """disjoint: one projection head per ordered pair of modalities, as in the authors' release. joint: one per
    modality."""
    share_heads: bool = True
    """Modalities that share a stem (image and video) also share heads and temperatures, as in the authors' release, so
    image-text tasks also train the heads of video. false: each modality has its own heads and temperatures."""
    embed_dim: Count = 1024
    """Features of the embedding space, and of the hidden layer of its heads."""
    init_temperature: Positive = 0.2
    """Initial value of the learned temperature of each pair of modalities. The paper: 0.2 dense, 1.0 MoE."""

    @model_validator(mode="before")
    @classmethod
    def _explain_wrap(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("wrap"):
            raise ValueError(
                "wrap is no longer a key: name the public model as a tower in `modalities`; docs/fine-tuning.md has an "
                "example"
            )
        return data

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if not self.layers and self.width != self.embed_dim:
            raise ValueError(f"layers 0 needs equal sizes, but width is {self.width} and embed_dim {self.embed_dim}")
        if self.moe and self.moe.layers > self.layers:
            raise ValueError(f"moe.layers {self.moe.layers} is more than layers {self.layers}")
        if self.modality_specific_layers > self.layers:
            raise ValueError(
                f"modality_specific_layers {self.modality_specific_layers} is more than layers {self.layers}"
            )
        first_sparse = self.layers - (self.moe.layers if self.moe else 0)
        if self.moe and self.moe.experts_by_stem and self.modality_specific_layers > first_sparse:
            raise ValueError("moe.experts by stem: the modality-specific layers must come before the sparse layers")
        return self
