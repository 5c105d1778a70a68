"""`Modality`, the base class of image, video, audio, text and of modalities in other packages.

A modality turns raw values into tokens: values, coordinates and, for text, a mask. It registers through the entry point
group `openimp.modalities`. docs/modalities.md shows a modality in a package of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from openimp.common.schema import Strict

Rng = np.random.Generator
CONV_KERNEL = 4
"""Height and width of the kernel of a stem's convolution."""
CONV_STRIDE = 2
"""Pixels between two places of that kernel."""
CONV_MARGIN = CONV_KERNEL - CONV_STRIDE
"""Pixels around a patch that the kernel reaches, on each side."""


class BadMedia(Exception):
    """An example that cannot be read. It is skipped, counted and listed, and does not stop a run by itself."""


class UnknownText(BadMedia):
    """A text without a word that the model knows. Its vector would be zero."""


class Tokens(NamedTuple):
    """A batch of one modality: B examples with L tokens each, P values per token, A axes."""

    values: Tensor  # (B, L, P) float, or uint8 where 0..255 stands for -1..1, or (B, L) integer ids of a table
    coords: Tensor  # (B, L, A) int64, the row of each axis' position table
    mask: Tensor | None = None  # (B, L) bool, False for padding; None if there is none

    def to(self, device: torch.device | str) -> "Tokens":
        return cast(Tokens, tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), self))

    def split(self, examples: int) -> "list[Tokens]":
        """Chunks of at most `examples` examples."""
        parts = [() if part is None else part.split(examples) for part in self]
        return [Tokens(*chunk) for chunk in zip_longest(*parts)]

    def pad(self, examples: int) -> "Tokens":
        """Repeats the last example until there are `examples` of them."""
        index = torch.arange(examples, device=self.coords.device).clamp(max=len(self.coords) - 1)
        return cast(Tokens, tree_map_only(Tensor, lambda tensor: tensor[index], self))

    def valid(self) -> Tensor:
        """The mask (B, L), all True if there is none."""
        return self.mask if self.mask is not None else self.coords.new_ones(self.coords.shape[:2], dtype=torch.bool)


@dataclass(frozen=True)
class StemSpec:
    """Shapes that the model needs to embed a modality's tokens."""

    values: int  # P, the values per token; if `table`, the size of the vocabulary
    axes: tuple[int, ...]  # number of rows in the position table of each axis
    table: bool = False  # tokens are ids, which an embedding table embeds
    position_norm: bool = True  # the sum of a token's position embeddings is normalized
    patch: tuple[int, int, int, int] | None = None  # frames, height, width and channels, if tokens are patches
    conv_channels: int = 0  # of the convolution of patches with a margin of `CONV_MARGIN`; 0: there is none
    vector: bool = False  # the only token of an item is the vector of a frozen encoder


class Modality(ABC):
    """Base class of modalities. One instance serves a whole run, also in worker processes, so it must be picklable.

    Only these methods are needed for training, evaluation and inference. `openimp.common.protocols` has optional ones.

    Class attributes:
        name: its name in recipes.
        stem: name of its stem; modalities with the same stem share its weights and its `Config`.
        masked: whether its tokens have a mask.
        reads_text: whether its raw values are strings, from a column or a template; otherwise they are media: bytes,
            a path, or an array.
        extensions: file extensions in lower case with the dot, for commands that take files.
        other_extensions: those of files that it reads in a model without the modality to which they belong.
        decoders: installed packages that decode its raw values; evaluation results list their versions.
    """

    name: ClassVar[str]
    stem: ClassVar[str]
    masked: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    extensions: ClassVar[tuple[str, ...]] = ()
    other_extensions: ClassVar[tuple[str, ...]] = ()
    decoders: ClassVar[tuple[str, ...]] = ()

    class Config(Strict):
        """Options of the stem, which are constant in a run."""

    class View(Strict):
        """Options that may differ between steps."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def stem_spec(self) -> StemSpec:
        """Shapes that the model needs to embed the tokens."""

    def values(self) -> int:
        """Values per token: as many as in `stem_spec`, or a divisor of that number if the stem repeats them."""
        return self.stem_spec().values

    @abstractmethod
    def check(self, view: Any) -> None:
        """Raises ValueError, with one sentence that suggests valid options, if the view does not give whole tokens."""

    @abstractmethod
    def length(self, view: Any) -> int:
        """Tokens per example in training, after token dropping."""

    @abstractmethod
    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """Decodes a raw value (bytes, a path, or an array) to an array, no larger than the largest of `views` needs.

        Without `rng`, the result is the whole item, within memory limits. With `rng`, it may be just the part that a
        random crop for `views[0]` sees, so that one training clip does not decode a whole long file.

        Raises:
            BadMedia: the value cannot be read; the message says why.
        """

    @abstractmethod
    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """Transforms a decoded array to the shape of the view: with `rng` augmented at random, else deterministically.

        Without `rng`, the result has an additional first axis: the clips whose embeddings are averaged (often one).
        """

    @abstractmethod
    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """Makes tokens of a stack of transformed arrays (B, ...). With `rngs`, one per example, tokens are dropped.

        An example's tokens must not depend on the other examples, because workers make parts of a batch.
        """

    def zeros(self, rows: int, length: int) -> Tokens:
        """Tokens as `tokens` makes them, of zeros. All of them are valid."""
        stem = self.stem_spec()
        ids = torch.zeros(rows, length, dtype=torch.int64)
        values = ids if stem.table else torch.zeros(rows, length, self.values())
        coords = torch.zeros(rows, length, len(stem.axes), dtype=torch.int64)
        mask = torch.ones(rows, length, dtype=torch.bool) if self.masked else None
        return Tokens(values, coords, mask)

    def encode_input(self, value: Any, view: Any) -> np.ndarray:
        """Makes clips, as `tokens` takes them, of one input of `model.encode_<name>` (a path, bytes, or an array)."""
        return self.transform(self.decode(value, [view]), view, None)


Modalities = Mapping[str, Modality]
"""By name."""
Classes = Mapping[str, list[Any]]
"""The classes of each classification head."""
