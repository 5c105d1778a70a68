"""The interface that training and evaluation need from a model: IMP, or one that a study compares with it.

Shape suffixes: B examples, D features, Z dimensions of the shared embedding space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openimp.common.modality import Tokens
from openimp.model.heads import Temperature
from openimp.model.moe import RouterStats
from openimp.parallel.distributed import all_reduce_mean
from openimp.recipe.model import Model


class Encoded(NamedTuple):
    """The result of encoding one modality of a batch."""

    features: Tensor  # (B, D)
    routing: list[RouterStats]  # statistics of each sparse layer, in order; empty for a dense model


EncodedAll = dict[str, Encoded]
"""By modality."""
EncodeAll = Callable[[Mapping[str, Tokens]], EncodedAll]
"""`Embedder.encode_all`, or a function that replaces it."""


def in_chunks(encode_all: EncodeAll, chunk_size: int | None) -> EncodeAll:
    """Wraps `encode_all` so that the activations of at most `chunk_size` examples per modality are in memory at a time.

    GradCache (arXiv 2101.06983): the forward pass keeps only the features of each chunk. The backward pass encodes the
    chunks again, one at a time. The loss may be any function of the features of the whole batch.
    """
    if chunk_size is None:
        return encode_all

    def encode_chunks(inputs: Mapping[str, Tokens]) -> EncodedAll:
        parts = {name: tokens.split(chunk_size) for name, tokens in inputs.items()}
        chunks = [
            {name: part for name, part in zip(inputs, chunk) if part is not None}
            for chunk in zip_longest(*parts.values())
        ]
        if len(chunks) == 1:
            return encode_all(inputs)
        encoded = [checkpoint(encode_all, chunk, use_reentrant=False) for chunk in chunks]
        return {name: _join(parts[name], [chunk[name] for chunk in encoded if name in chunk]) for name in inputs}

    return encode_chunks


def _join(parts: list[Tokens], encoded: list[Encoded]) -> Encoded:
    """The result for one modality from those for the parts of its batch."""
    features = torch.cat([part.features for part in encoded])
    if not encoded[0].routing:
        return Encoded(features, [])
    # Averaged over all ranks, because the routers' statistics are.
    mean_token_counts = all_reduce_mean(torch.stack([tokens.valid().sum().float() for tokens in parts]))
    token_shares = (mean_token_counts / mean_token_counts.sum().clamp(min=1)).unbind()
    by_layer = zip(*(part.routing for part in encoded))
    routing = [RouterStats.mean(stats, token_shares) for stats in by_layer]
    return Encoded(features, routing)


def pass_sizes(examples: Mapping[str, int], chunk_size: int | None) -> list[dict[str, int]]:
    """The number of examples of each modality in each pass of `in_chunks`, given those in the batch."""
    largest = max(examples.values())
    pass_size = chunk_size or largest
    return [
        {name: min(pass_size, count - start) for name, count in examples.items() if count > start}
        for start in range(0, largest, pass_size)
    ]


class Embedder(nn.Module, ABC):
    """A model that embeds several modalities so that pairs of them can be compared."""

    config: Model
    classifiers: nn.ModuleDict
    pairs: list[tuple[str, str]]  # the pairs of modalities that are trained to agree; each pair is sorted

    def encode(self, modality: str, tokens: Tokens) -> Encoded:
        """Encodes the tokens of a modality."""
        return self.encode_all({modality: tokens})[modality]

    @abstractmethod
    def encode_all(self, inputs: Mapping[str, Tokens]) -> EncodedAll:
        """Encodes each modality by itself. Their batch sizes may differ."""

    @abstractmethod
    def project(self, features_BD: Tensor, modality: str, other: str, normalize: bool = True) -> Tensor:
        """Maps features of `modality` to fp32 vectors (B, Z) of the space that it shares with `other`.

        The vectors are unit vectors unless `normalize` is false.
        """

    def classify(self, features_BD: Tensor, head: str) -> Tensor:
        """Maps features to the logits (B, K) of a classification head; fp32 unless autocast is on."""
        layer = cast(nn.Linear, self.classifiers[head])
        return F.linear(features_BD.float(), layer.weight.float(), layer.bias.float())

    @abstractmethod
    def temperature(self, a: str, b: str) -> Temperature:
        """The learned temperature of a pair of modalities, in either order."""

    @abstractmethod
    def head_name(self, modality: str, other: str) -> str:
        """The name of the space that `modality` shares with `other`, as `project` uses it."""

    @abstractmethod
    def share_a_space(self, a: str, b: str) -> bool:
        """Whether vectors of the two modalities can be compared."""

    @abstractmethod
    def hidden_matrices(self) -> dict[Tensor, int]:
        """The weights that map hidden features to hidden features, in order. Muon may update these.

        The values are the numbers of matrices that the weights stack in their first dimension.
        """

    @abstractmethod
    def depths(self) -> dict[Tensor, int]:
        """The number of layers from each parameter up to the heads, which may be left out, for `layer_decay`."""

    def blocks(self) -> list[nn.Module]:
        """The modules that hold most of the parameters. FSDP2 shards and gathers each of them separately."""
        return []

    def blocks_of(self, modalities: Iterable[str]) -> list[nn.Module]:
        """The `blocks` that a forward pass of these modalities goes through, in order."""
        return self.blocks()

    def experts(self) -> list[nn.Module]:
        """The modules whose parameters have the expert as first dimension. Expert parallelism splits them there."""
        return []

    @abstractmethod
    def fp32_modules(self) -> list[Temperature]:
        """All learned temperatures. Their parameters stay fp32 where all others are gathered in bf16. Losses call their
        `forward`."""

    def clamp_logit_scales(self) -> None:
        """Clamps the learned logit scales; called after each update."""
        for temperature in self.fp32_modules():
            temperature.clamp()
