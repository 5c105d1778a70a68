"""Protocols that a modality may have besides `Modality`. A class has a protocol if it has its methods."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from openimp.common.modality import BadMedia, Modality, Tokens


@runtime_checkable
class Learned(Protocol):
    """A modality that learns from texts, for example a tokenizer. Training calls `fit`; checkpoints keep its state."""

    def fit(self, corpus: Iterable[list[str]]) -> None:
        """Learns from the texts of each training example. Training calls it if the modality reads texts."""

    def state(self) -> dict[str, str]:
        """What was learned, as {file name: text}; it is saved with the weights."""

    def load_state(self, state: Mapping[str, str]) -> None:
        """Restores what `state` returned."""


@runtime_checkable
class TextReader(Protocol):
    """A modality of texts, for `Model.tokenizer`, and for the warnings of inference and search."""

    def tokenize(self, texts: str | list[str], length: int | None = None) -> Tensor:
        """Converts texts to ids (B, length)."""

    def knows(self, value: Any, view: Any) -> bool:
        """Whether the model knows a word of a text. If not, the text's embedding is 0."""


def is_known(reader: Any, value: Any, view: Any) -> bool:
    """Whether a model knows a word of a text. True for items of modalities that read no text."""
    return not isinstance(reader, TextReader) or reader.knows(value, view)


@runtime_checkable
class PictureReader(Protocol):
    """A modality of pictures, for `Model.preprocess`."""

    def preprocess(self, picture: Any, view: Any) -> Tensor:
        """Converts a Pillow picture, or another input of `decode`, to a tensor for `TensorReader.from_tensor`."""


class TensorInput(NamedTuple):
    """What `TensorReader.from_tensor` takes in a view."""

    shape: tuple[int, ...]  # of one example
    dtype: torch.dtype
    preparation: str  # how a program without openimp makes the tensor, in a few sentences


@runtime_checkable
class TensorReader(Protocol):
    """A modality that takes prepared batches, for `Model.encode` and `openimp export`."""

    def from_tensor(self, batch: Tensor) -> Tokens:
        """Makes tokens of a prepared batch, on any device; differentiable if the batch is float.

        Raises:
            TypeError: the modality does not support this kind of tensor.
        """

    def tensor_input(self, view: Any) -> TensorInput:
        """Describes what `from_tensor` takes in a view."""


@runtime_checkable
class Pictured(Protocol):
    """A modality whose values can be drawn, for `openimp report` and the search page."""

    def thumbnail(self, value: Any, view: Any, side: int, segment: tuple[float, float] | None = None) -> bytes:
        """A WebP picture of a value, or of one of its `Segmented.segments`, for lists of results.

        Its sides have at most `side` pixels. BadMedia if the value cannot be read.
        """


@runtime_checkable
class Comparable(Protocol):
    """A modality whose values can be compared without an encoder, for the baseline of `openimp train DATA`."""

    raw_features_name: ClassVar[str]  # what `raw_features` returns, in the plural, such as "pixels"

    def raw_features(self, item: np.ndarray, view: Any) -> np.ndarray:
        """Features (n,) fp32 of a decoded array, of the same size for all items, around 0."""


@runtime_checkable
class Segmented(Protocol):
    """A modality of recordings, which `openimp index` cuts if they are long."""

    def segments(self, value: Any, view: Any) -> list[tuple[float, float]]:
        """The equal segments of a recording, as (start, end) in seconds; empty if it is encoded as a whole.

        BadMedia if the value cannot be read.
        """

    def encode_segment(self, value: Any, view: Any, start: float, end: float) -> np.ndarray:
        """Like `Modality.encode_input`, but for one of the `segments`."""


class Recorded(NamedTuple):
    """When and where something was recorded."""

    time: datetime | None = None  # local, without a time zone
    place: tuple[float, float] | None = None  # latitude and longitude in degrees


@runtime_checkable
class Dated(Protocol):
    """A modality whose files may tell when and where they were recorded, for `openimp index`."""

    def recorded(self, value: Any) -> Recorded:
        """What the header of a file tells, which is given by its path or bytes. BadMedia if it cannot be read."""


@runtime_checkable
class Towered(Protocol):
    """A modality with a tower: a frozen encoder, whose vectors of the training items are kept."""

    tower_packages: ClassVar[tuple[str, ...]]  # whose code computes the vectors, besides those of the modality's class
    tower_libraries: ClassVar[tuple[str, ...]]  # installed packages that do

    def embed_all(self, reads: Iterable[Callable[[], Any]], seeds: Iterable[int]) -> Iterator[np.ndarray | BadMedia]:
        """What `Modality.decode` returns for each item, in order, or why it cannot be read.

        `reads` return raw values, or raise BadMedia. `seeds` determine the random crops of the items.
        """

    def training_tokens(self, vectors: np.ndarray, view: Any, random_bytes: np.ndarray | None) -> Tokens:
        """The tokens of vectors (B, D) in training. `random_bytes` (B, D) are for the view's dropout, if it has any."""


@runtime_checkable
class Framed(Protocol):
    """A modality that can be seen as pictures, for studies that compare with open_clip (`study/two_towers.py`)."""

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        """Frames, height, width and channels of an example."""


def learned_files(modalities: Iterable[Modality]) -> dict[str, str]:
    """What the modalities learned, as {file name: text}."""
    learned = (modality.state() for modality in modalities if isinstance(modality, Learned))
    return {name: text for state in learned for name, text in state.items()}


def file_copies(modality: Any) -> dict[str, str]:
    """For each option of a `Learned` modality that names a file, the name of the file's copy in the model's folder.

    `state` returns the copy. The modality has these names in its attribute `file_copies`; most have none.
    """
    return getattr(modality, "file_copies", {})


def load_learned(modalities: Iterable[Modality], files: Mapping[str, str]) -> None:
    """Restores what the modalities learned from `learned_files`."""
    for modality in modalities:
        if isinstance(modality, Learned):
            modality.load_state(files)
