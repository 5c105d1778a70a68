"""What training and evaluation ask of a model, whoever wrote it.

Shape suffixes: B examples, D features, Z features of the common space.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from openimp.modalities import Tokens
from openimp.model.moe import RouterStats
from openimp.recipe import Model


class Encoded(NamedTuple):
    """One forward pass.

    Attributes:
        features: (B, D) of each example.
        routing: what each sparse layer tells, first layer first; empty in a dense model.
    """

    features: Tensor
    routing: list[RouterStats]


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

    @abstractmethod
    def limit_temperatures(self) -> None:
        """Keeps the learned scales of similarities within their limits, after each update."""
