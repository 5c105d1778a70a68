"""`Index`: answers queries over indexed media."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from openimp.inference.model import Model


@dataclass(frozen=True)
class Query:
    """A part of a query: a text, or an image, sound or clip as a file or as bytes."""

    modality: str
    value: str | bytes | Path
    weight: float = 1.0  # negative: subtracted


@dataclass(frozen=True)
class Like:
    """A part of a query: an indexed item, whose stored vector is used."""

    id: str
    weight: float = 1.0  # negative: "less like this"


@dataclass(frozen=True)
class Hit:
    """An indexed item: a picture, a sound, a clip, a segment of a long sound or clip, or a line of a text file."""

    id: str  # 32 hexadecimal digits; stays the same if the file is indexed again, but not if it is moved
    path: str  # absolute; SOURCE/ROW/COLUMN if the media is in a row of a source
    modality: str
    start: float | None  # of a segment, in seconds; None for an item that was not cut
    end: float | None
    text: str | None  # the line of a text file, or the text of the row that the media is from
    score: float  # cosine with the query


class Index:
    """An open index. Its methods may be called from any thread; calls that encode a query take turns.

    Attributes:
        model: the model that embedded the items. It encodes queries.
        folder: where the index is.
        counts: the number of items by modality.
        folders: the topmost folders and sources that tell items apart, for `under`.
    """

    model: Model
    folder: Path
    counts: dict[str, int]
    folders: list[str]

    def search(
        self,
        queries: str | Query | Like | Sequence[str | Query | Like],
        k: int = 20,
        modalities: Sequence[str] | None = None,
        under: str | Path | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Returns the `k` items that are closest to the weighted sum of the queries, the best first.

        Args:
            queries: one or several. A string is a text. Items that are part of the query are no results.
            k: number of results at most.
            modalities: only items of these. None: all that can be compared with the queries.
            under: only files in this folder, or rows of the source of this name.
            min_score: only items with at least this cosine.

        Raises:
            UserError: a query cannot be read, or no item can be compared with it.
        """
        raise NotImplementedError

    def hit(self, id: str) -> Hit:
        """An item by its id, with score 1. UserError if it is not indexed."""
        raise NotImplementedError

    def read(self, id: str) -> bytes | Path:
        """The media of an indexed item: the bytes of a row, or a file that is unchanged since it was indexed.

        UserError if it is not indexed, is gone, or has changed. The file is whole, also if the item is a segment.
        """
        raise NotImplementedError

    def modality_of(self, name: str) -> str:
        """The modality of a file by its extension. UserError if the model reads no such files."""
        raise NotImplementedError

    def vectors(self) -> pa.Table:
        """`id`, `modality` and fp16 `vector` of all items, for a map of them."""
        raise NotImplementedError


def open_index(path: str | Path, device: str | torch.device | None = None) -> Index:
    """Opens an index and loads the model that built it. UserError if there is none, or the model has other weights."""
    raise NotImplementedError
