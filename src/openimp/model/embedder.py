"""What training and evaluation ask of a model, whoever wrote it.

Shape suffixes: B examples, D features, Z features of the common space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openimp.common.modality import Tokens
from openimp.model.moe import RouterStats
from openimp.parallel.distributed import mean
from openimp.recipe.model import Model


class Encoded(NamedTuple):
    """One forward pass.

    Attributes:
        features: (B, D) of each example.
        routing: what each sparse layer tells, first layer first; empty in a dense model.
    """

    features: Tensor
    routing: list[RouterStats]


Encode = Callable[[Mapping[str, Tokens]], Encoded]


def in_chunks(encode: Encode, chunk_size: int | None) -> Encode:
    """`encode`, with the activations of no more than `chunk_size` examples in memory at a time.

    Each piece keeps nothing but its result. When the gradient of the features is known, one piece after the other is
    encoded again, now for its gradient: GradCache (arXiv 2101.06983), for any loss on the features.
    """
    if chunk_size is None:
        return encode

    def encode_pieces(inputs: Mapping[str, Tokens]) -> Encoded:
        valid = torch.cat([tokens.valid() for tokens in inputs.values()], dim=1)
        if len(valid) <= chunk_size:
            return encode(inputs)
        pieces = zip(*(tokens.split(chunk_size) for tokens in inputs.values()))
        done = [checkpoint(encode, dict(zip(inputs, piece)), use_reentrant=False) for piece in pieces]
        # Of the tokens of all processes, as the routers' means are.
        counts = mean(torch.stack([part.sum().float() for part in valid.split(chunk_size)]))
        shares = (counts / counts.sum().clamp(min=1)).unbind()
        routing = [RouterStats.mean(stats, shares) for stats in zip(*(piece.routing for piece in done))]
        return Encoded(torch.cat([piece.features for piece in done]), routing)

    return encode_pieces


def chunk_sizes(examples: int, chunk_size: int | None) -> set[int]:
    """The numbers of examples that `in_chunks` hands on."""
    return (
        {examples}
        if chunk_size is None or examples <= chunk_size
        else {chunk_size, examples % chunk_size or chunk_size}
    )


class Embedder(nn.Module, ABC):
    """A model that embeds several modalities so that pairs of them can be compared.

    Attributes:
        config: its sizes.
        pairs: the pairs of modalities that are trained to agree, each sorted.
    """

    config: Model
    pairs: list[tuple[str, str]]

    @abstractmethod
    def encode(self, inputs: Mapping[str, Tokens]) -> Encoded:
        """One pass over the tokens of one modality."""

    @abstractmethod
    def project(self, features_BD: Tensor, source: str, target: str, normalize: bool = True) -> Tensor:
        """Features of `source` to vectors (B, Z) of the space that it shares with `target`, of length 1 unless told
        otherwise, in fp32.

        Raises:
            KeyError: they share none.
        """

    @abstractmethod
    def share_a_space(self, a: str, b: str) -> bool:
        """Whether vectors of two modalities can be compared."""

    @abstractmethod
    def hidden_matrices(self) -> dict[Tensor, None]:
        """The weights that take hidden features to hidden features, in order: those that Muon may update."""

    def blocks(self) -> list[nn.Module]:
        """The parts that hold most parameters, to be gathered one after the other where a model is in shards."""
        return []

    def experts(self) -> list[nn.Module]:
        """The parts whose parameters have experts as their first dimension, which processes may share."""
        return []

    @abstractmethod
    def clamp_logit_scales(self) -> None:
        """Keeps the learned scales of similarities within their limits, after each update."""
