"""Templates: how a text is written from the columns of a row.

A string without braces is a column. In a template `{x}` stands for one value of column x, `{x*}` for several of a list,
joined by commas, and `{{` and `}}` for braces.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.data.tables import Unreadable


class Part(NamedTuple):
    """A piece of a template: literal text, or the values of a column.

    Attributes:
        text: the literal, or the column's name.
        values: "" for a literal, "one" or "all" for a column.
    """

    text: str
    values: str


def columns_of(columns: list[str]) -> list[str]:
    """The columns that a list of columns and templates reads, each once, in the order of first use.

    Raises:
        UserError: a template is malformed.
    """
    return list(dict.fromkeys(part.text for template in columns for part in _parse(template) if part.values))


def fill(columns: list[str], row: dict[str, Any], rng: np.random.Generator | None = None) -> str:
    """Writes the text of a row.

    Args:
        columns: columns and templates, see `recipe.Input.column`.
        row: values by column; a list is several values, and anything but text is written as Python writes it.
        rng: draws one of `columns`, one value for each `{x}`, and for each `{x*}` all values half of the time, else a
            random part of them, in random order. Without it the first of `columns`, the first value, and all in order.

    A template with a column that is empty in this row gives way to the next.

    Raises:
        BadMedia: every template has a column that is empty in this row.
        UserError: a template is malformed.
    """
    order = range(len(columns)) if rng is None else rng.permutation(len(columns))
    empty: list[str] = []
    for i in order:
        parts = _parse(columns[i])
        values = {part.text: _values(row, part.text) for part in parts if part.values}
        missing = [column for column, found in values.items() if not found]
        if not missing:
            return _write(parts, values, partial(_draw_one, rng), partial(_draw_some, rng))
        empty += [column for column in missing if column not in empty]
    raise BadMedia(f"no text in column {', '.join(empty)}")


def all_texts(columns: list[str], rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """What a tokenizer learns from, row by row: every template in each value of its columns; empty ones are left out.

    Raises:
        UserError: a template is malformed.
    """
    for row in rows:
        texts = []
        for template in columns:
            parts = _parse(template)
            try:
                values = {part.text: _values(row, part.text) for part in parts if part.values}
            except BadMedia:
                continue
            if all(values.values()):
                turns = max((len(values[part.text]) for part in parts if part.values == "one"), default=1)
                for turn in range(turns):
                    texts.append(_write(parts, values, partial(_in_turn, turn), list))
        if texts:
            yield texts


def _write(
    parts: Iterable[Part],
    values: dict[str, list[str]],
    one: Callable[[list[str]], str],
    some: Callable[[list[str]], list[str]],
) -> str:
    """Puts the parts together; `one` and `some` choose among the values of a column."""
    written = []
    for text, kind in parts:
        if kind == "one":
            text = one(values[text])
        elif kind == "all":
            text = ", ".join(some(values[text]))
        written.append(text)
    return "".join(written)


def _in_turn(turn: int, values: list[str]) -> str:
    return values[turn % len(values)]


def _draw_one(rng: np.random.Generator | None, values: list[str]) -> str:
    return values[0] if rng is None or len(values) == 1 else values[int(rng.integers(len(values)))]


def _draw_some(rng: np.random.Generator | None, values: list[str]) -> list[str]:
    if rng is None:
        return values
    count = len(values) if rng.random() < 0.5 else int(rng.integers(1, len(values) + 1))
    return [values[i] for i in rng.permutation(len(values))[:count]]


def _values(row: dict[str, Any], column: str) -> list[str]:
    """The non-empty values of a column as text."""
    cell = row.get(column)
    texts = (_text(value, column) for value in (cell if isinstance(cell, list | tuple) else [cell]))
    return [text for text in texts if text]


def _text(value: Any, column: str) -> str:
    if isinstance(value, Unreadable):
        raise BadMedia(value.reason)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadMedia(f"column {column} holds bytes that are no UTF-8 text") from None
    return "" if value is None else str(value).strip()


@cache
def _parse(template: str) -> tuple[Part, ...]:
    """The parts of a template; a string without braces is one column."""
    if not re.search(r"[{}]", template):
        return (Part(template, "one"),)
    parts = []
    for escaped, column, star, literal, wrong in re.findall(
        r"(\{\{|\}\})|\{([^{}*]+)(\*?)\}|([^{}]+)|([{}])", template
    ):
        if wrong or (column and column != column.strip()):
            raise UserError(f"template {template!r}: expected {{column}}, {{column*}}, or {{{{ and }}}} for braces")
        parts.append(Part(column, "all" if star else "one") if column else Part(escaped[:1] or literal, ""))
    if not any(part.values for part in parts):
        raise UserError(f"template {template!r} reads no column; write one as {{column}}")
    return tuple(parts)
