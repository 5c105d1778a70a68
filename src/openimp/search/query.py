"""Queries and results of a search."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

By = Literal["both", "meaning", "words"]
"""How a text finds items: by the vectors, by the words of the texts that items have, or by both."""
Space = frozenset[str]
"""A space of vectors that can be compared, identified by the names of its two heads; empty for a joint space."""


@dataclass(frozen=True)
class Query:
    """A part of a query: a text, or an image, sound or clip as a file or as bytes."""

    modality: str
    value: str | bytes | Path
    weight: float = 1.0  # negative: subtracted


@dataclass(frozen=True)
class Like:
    """A part of a query: an indexed item ("more like this"). Its stored vector is used."""

    id: str
    weight: float = 1.0  # negative: "less like this"


@dataclass(frozen=True)
class EncodedQuery:
    """A part of a query that `Index.encode` has encoded, for several searches."""

    modality: str
    vectors: dict[Space, np.ndarray]  # unit vectors (Z,); empty for a text without a word that the model knows
    weight: float = 1.0  # negative: subtracted
    text: str | None = None  # None for media, and for items with a vector


class Words(NamedTuple):
    """Texts with words to look for in the texts of items."""

    wanted: str
    unwanted: str  # items with any of these words are not found by words; may be empty


QueryPart = Query | Like | EncodedQuery


@dataclass(frozen=True)
class Hit:
    """An indexed item: a picture, a sound, a clip, a segment of a long sound or clip, or a line of a text file."""

    id: str  # 32 hexadecimal digits; stays the same if the file is indexed again, but not if it is moved
    path: str  # absolute; SOURCE/ROW/COLUMN if the media is in a row of a source
    part: int  # number of the segment or line in its file, from 0
    parts: int  # number of items of its file
    modality: str
    start: float | None  # of a segment, in seconds; None for an item that was not cut
    end: float | None
    text: str | None  # the line of a text file, or the caption or the text of the row that belongs to the media
    media_type: str | None  # by the first bytes of the file; None for a text or a list of numbers
    source: str | None  # of the recipe, that names or contains the media; None for a file in a folder that was given
    row: int | None  # number of that row
    column: str | None
    state: str  # of the media when they were indexed; see `Media.state`
    date: str | None = None  # local time of the recording or, if unknown, of the last change: 2026-05-31T18:30:00
    latitude: float | None = None  # of the place where it was recorded, in degrees
    longitude: float | None = None
    score: float | None = None  # cosine with the query; None if it has none, and outside of a search
    found_by: By | None = None  # the rankings that it is in; None outside of a search
