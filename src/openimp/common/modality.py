"""What a modality is: the only code that knows what a picture, a clip, a sound or a sentence is.

A modality turns raw bytes into tokens: values, coordinates and, for text, a mask. It registers through the entry point
group `openimp.modalities`; see docs/modalities.md for one from outside the package.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from openimp.common.schema import Strict


class BadMedia(Exception):
    """An example that cannot be read. It is skipped, counted and named; it does not stop a run by itself."""


class Tokens(NamedTuple):
    """A batch of one modality. B examples, L tokens each, P values a token, A axes.

    Attributes:
        values: (B, L, P) float, or uint8 where 0..255 stands for -1..1, or (B, L) integer ids of a table.
        coords: (B, L, A) int64, the row of each axis' position table.
        mask: (B, L) bool, True for tokens that count; None where all do.
    """

    values: torch.Tensor
    coords: torch.Tensor
    mask: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Tokens":
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return Tokens(self.values.to(device, non_blocking=True), self.coords.to(device, non_blocking=True), mask)

    def pin_memory(self) -> "Tokens":
        mask = None if self.mask is None else self.mask.pin_memory()
        return Tokens(self.values.pin_memory(), self.coords.pin_memory(), mask)

    def split(self, examples: int) -> "list[Tokens]":
        """Pieces of at most so many examples."""
        parts = [() if part is None else part.split(examples) for part in self]
        return [Tokens(*piece) for piece in zip_longest(*parts)]

    def valid(self) -> torch.Tensor:
        """(B, L) bool, the mask, or all True."""
        return self.mask if self.mask is not None else self.coords.new_ones(self.coords.shape[:2], dtype=torch.bool)


@dataclass(frozen=True)
class StemSpec:
    """What the model must know of a modality's tokens to embed them.

    Attributes:
        values: P, values of a token, or the size of the vocabulary where `table` is set.
        axes: rows of each axis' position table.
        table: tokens are ids, embedded by a table.
    """

    values: int
    axes: tuple[int, ...]
    table: bool = False


class Modality(ABC):
    """Base of all modalities; one instance serves a whole run, in the workers too, so it must pickle.

    Class attributes:
        name: what recipes call it.
        stem: the embedding that it uses; modalities with the same stem share it and its `Config`.
        masked: its tokens carry a mask.
        reads_text: its raw value is a string, made from a column or a template; otherwise it is media: bytes, a file,
            or an array.
        extensions: of its files, lower case and with the dot, for commands that are given files only.
        decoders: the installed packages that read its raw values; results of an evaluation name their versions.
    """

    name: ClassVar[str]
    stem: ClassVar[str]
    masked: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    extensions: ClassVar[tuple[str, ...]] = ()
    decoders: ClassVar[tuple[str, ...]] = ()

    class Config(Strict):
        """Options of the stem, fixed for a run."""

    class View(Strict):
        """Options that may change from step to step."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def stem_spec(self) -> StemSpec:
        """What the model needs to embed this modality's tokens."""

    def values(self) -> int:
        """Values of one of this modality's tokens: the stem's, or a divisor of them where tokens count as repeated."""
        return self.stem_spec().values

    @abstractmethod
    def check(self, view: Any) -> None:
        """Raises ValueError, in one sentence that says what would do, if the view makes no whole token."""

    @abstractmethod
    def length(self, view: Any) -> int:
        """Tokens an example in training, after token dropping."""

    @abstractmethod
    def decode(self, raw: Any, views: list[Any], rng: np.random.Generator | None = None) -> np.ndarray:
        """Raw value (bytes, a path, or an array) to one array, no larger than the largest of `views` needs.

        Without `rng` it is the whole item, as far as memory allows. With `rng` it may be only the part that a random
        view of `views[0]` sees, so that a long file is not decoded whole for one training clip.

        Raises:
            BadMedia: it cannot be read; the message says why.
        """

    @abstractmethod
    def transform(self, item: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Decoded array to the shape that the view asks for: augmented at random with `rng`, deterministic without.

        In evaluation the result has one more leading axis: the clips whose embeddings are averaged (often one).
        """

    @abstractmethod
    def tokens(self, items: np.ndarray, view: Any, rngs: list[np.random.Generator] | None) -> Tokens:
        """A stack of transformed arrays (B, ...) to tokens; with `rngs`, one an example, tokens are dropped."""

    def encode_input(self, value: Any, view: Any) -> np.ndarray:
        """One input of `model.encode_<name>` (a path, bytes, an array) to its clips, ready for `tokens`."""
        return self.transform(self.decode(value, [view]), view, None)

    def knows(self, value: Any, view: Any) -> bool:
        """Whether anything of an input is told apart from nothing; what reads texts may know none of their words."""
        return True

    def show(self, value: Any, view: Any) -> str | bytes | np.ndarray:
        """A raw value as a person sees it beside others: a text, the bytes of a small WebP picture, or numbers that are
        drawn as curves, (N,) or (N, curves).

        Left alone, a modality that reads text shows it, and another the numbers of its first clip.

        Raises:
            BadMedia: it cannot be read.
        """
        return str(value) if self.reads_text else self.encode_input(value, view)[0]

    def from_tensor(self, batch: torch.Tensor) -> Tokens:
        """A batch that its user has prepared, on any device, to all of its tokens; differentiable where it is float.

        Raises:
            TypeError: this modality, or this kind of tensor, has no such form.
        """
        raise TypeError(f"{self.name} takes raw values, not a tensor")

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of an example, for encoders that are made for pictures.

        Raises:
            TypeError: this modality has no such form.
        """
        raise TypeError(f"{self.name} has no form of pictures")

    def whole(self, view: Any) -> "Modality":
        """This modality with one token for all that the view shows, its values in the order of `shape`; none is
        dropped. For encoders that cut patches themselves.

        Raises:
            TypeError: as `shape`.
        """
        raise TypeError(f"{self.name} has no form of pictures")

    def fit(self, corpus: Iterable[list[str]]) -> None:  # noqa: B027 (most have nothing to learn)
        """Learns from the texts of each training example before training, such as a tokenizer; asked of modalities that
        read text."""

    def state(self) -> dict[str, str]:
        """What `fit` learned, as {file name: text}, to be saved beside the weights."""
        return {}

    def load_state(self, state: dict[str, str]) -> None:  # noqa: B027 (as above)
        """Takes back what `state` gave."""
