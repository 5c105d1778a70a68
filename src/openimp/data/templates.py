"""Templates: how a text is written from the columns of a row.

A string without braces is a column. In a template, `{x}` is replaced with one value of column x, `{x*}` with several
values joined by commas, and `{{` and `}}` with braces.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.schema import as_text
from openimp.data.tables import Unreadable


class Piece(NamedTuple):
    """A piece of a template."""

    text: str  # literal text, or the name of a column
    values: str  # "" for literal text; "one" or "all" for one value or all values of a column


def columns_of(templates: list[str]) -> list[str]:
    """The columns that templates read, without duplicates, in the order of first use."""
    return list(dict.fromkeys(piece.text for template in templates for piece in _parse(template) if piece.values))


def fill(templates: list[str], row: dict[str, Any], rng: np.random.Generator | None = None) -> str:
    """Writes the text of a row, in which a list holds several values of a column.

    If a template reads a column that is empty in this row, the next template is tried. If there is none left, that is
    BadMedia.

    `rng` draws the order of the templates, one value for each `{x}`, and for each `{x*}` all values or, half of the
    time, a random subset, in random order. Without it, templates and values are used in their order.
    """
    empty_columns: dict[str, None] = {}
    order = range(len(templates)) if rng is None else rng.permutation(len(templates))
    for i in order:
        pieces = _parse(templates[i])
        values = _values(pieces, row)
        if all(values.values()):
            return _write(pieces, values, rng)
        empty_columns |= dict.fromkeys(column for column, texts in values.items() if not texts)
    raise BadMedia(f"no text in column {', '.join(empty_columns)}")


def all_texts(templates: list[str], rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """The texts of each row that a tokenizer is trained on: every template with every value of its columns."""
    for row in rows:
        texts = []
        for pieces in map(_parse, templates):
            try:
                values = _values(pieces, row)
            except BadMedia:
                continue
            if all(values.values()):
                turns = max((len(values[piece.text]) for piece in pieces if piece.values == "one"), default=1)
                texts += [_write(pieces, values, turn=turn) for turn in range(turns)]
        if texts:
            yield texts


def draw_text(templates: list[str], row: dict[str, Any], rng: np.random.Generator) -> str:
    """One of the row's `all_texts`, which are few, at random. BadMedia if it has none."""
    texts = next(all_texts(templates, [row]), None)
    return fill(templates, row) if texts is None else texts[int(rng.integers(len(texts)))]


def _write(
    pieces: Iterable[Piece], values: dict[str, list[str]], rng: np.random.Generator | None = None, turn: int = 0
) -> str:
    """Joins the pieces with values that `rng` draws. Without it, `{x}` is value number `turn`; `{x*}` is all values."""
    texts = []
    for text, kind in pieces:
        options = values.get(text, [])
        if kind == "one":
            number = turn % len(options) if rng is None or len(options) == 1 else int(rng.integers(len(options)))
            text = options[number]
        elif kind == "all":
            if rng is not None:
                count = len(options) if rng.random() < 0.5 else int(rng.integers(1, len(options) + 1))
                options = [options[i] for i in rng.permutation(len(options))[:count]]
            text = ", ".join(options)
        texts.append(text)
    return "".join(texts)


def _values(pieces: Iterable[Piece], row: dict[str, Any]) -> dict[str, list[str]]:
    """The non-empty values, as text, of each column that a template reads."""
    texts_by_column = {}
    for column in (piece.text for piece in pieces if piece.values):
        cell = row.get(column)
        values = cell if isinstance(cell, list | tuple) else [cell]
        texts = [_text(value, column) for value in values]
        texts_by_column[column] = [text for text in texts if text]
    return texts_by_column


def _text(value: Any, column: str) -> str:
    if isinstance(value, Unreadable):
        raise BadMedia(value.reason)
    if isinstance(value, dict | list):
        kind = "objects" if isinstance(value, dict) else "lists of lists"
        raise UserError(f"column {column} holds {kind}, not texts")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadMedia(f"column {column} holds bytes that are not UTF-8 text") from None
    is_missing = value is None or value != value  # pandas writes NaN
    return "" if is_missing else as_text(value).strip()


@cache
def _parse(template: str) -> tuple[Piece, ...]:
    """The pieces of a template."""
    if not re.search(r"[{}]", template):
        return (Piece(template, "one"),)
    pieces = []
    syntax = r"(\{\{|\}\})|\{([^{}*]+)(\*?)\}|([^{}]+)|([{}])"
    for escaped, column, star, literal, stray_brace in re.findall(syntax, template):
        if stray_brace or (column and column != column.strip()):
            raise UserError(f"template {template!r}: expected {{column}}, {{column*}}, or {{{{ and }}}} for braces")
        if column:
            pieces.append(Piece(column, "all" if star else "one"))
        else:
            pieces.append(Piece(escaped[:1] or literal, ""))
    if not any(piece.values for piece in pieces):
        raise UserError(f"template {template!r} reads no column; write one as {{column}}")
    return tuple(pieces)
