"""Templates: how a text is written from the columns of a row.

A string without braces is a column. In a template, `{x}` is replaced with one value of column x, `{x*}` with several
values joined by commas, and `{{` and `}}` with braces.
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
    """A piece of a template."""

    text: str  # literal text, or the name of a column
    values: str  # "" for literal text; "one" or "all" for one value or all values of a column


def columns_of(templates: list[str]) -> list[str]:
    """The columns that templates read, without duplicates, in the order of first use."""
    return list(dict.fromkeys(part.text for template in templates for part in _parse(template) if part.values))


def fill(templates: list[str], row: dict[str, Any], rng: np.random.Generator | None = None) -> str:
    """Writes the text of a row, in which a list holds several values of a column.

    If a template reads a column that is empty in this row, the next template is tried. If there is none left, that is
    BadMedia.

    `rng` draws the order of the templates, one value for each `{x}`, and for each `{x*}` all values or, half of the
    time, a random subset, in random order. Without it, templates and values are used in their order.
    """
    empty: dict[str, None] = {}
    for i in range(len(templates)) if rng is None else rng.permutation(len(templates)):
        parts = _parse(templates[i])
        values = _values(parts, row)
        if all(values.values()):
            return _write(parts, values, partial(_draw_one, rng), partial(_draw_some, rng))
        empty |= dict.fromkeys(column for column, texts in values.items() if not texts)
    raise BadMedia(f"no text in column {', '.join(empty)}")


def all_texts(templates: list[str], rows: Iterable[dict[str, Any]]) -> Iterator[list[str]]:
    """The texts of each row that a tokenizer is trained on: every template with every value of its columns."""
    for row in rows:
        texts = []
        for parts in map(_parse, templates):
            try:
                values = _values(parts, row)
            except BadMedia:
                continue
            if all(values.values()):
                turns = max((len(values[part.text]) for part in parts if part.values == "one"), default=1)
                texts += [_write(parts, values, partial(_in_turn, turn), list) for turn in range(turns)]
        if texts:
            yield texts


def _write(
    parts: Iterable[Part],
    values: dict[str, list[str]],
    one: Callable[[list[str]], str],
    some: Callable[[list[str]], list[str]],
) -> str:
    """Joins the parts; `one` and `some` choose among the values of a column."""
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


def _values(parts: Iterable[Part], row: dict[str, Any]) -> dict[str, list[str]]:
    """The non-empty values, as text, of each column that a template reads."""
    found = {}
    for column in (part.text for part in parts if part.values):
        cell = row.get(column)
        texts = (_text(value, column) for value in (cell if isinstance(cell, list | tuple) else [cell]))
        found[column] = [text for text in texts if text]
    return found


def _text(value: Any, column: str) -> str:
    if isinstance(value, Unreadable):
        raise BadMedia(value.reason)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadMedia(f"column {column} holds bytes that are not UTF-8 text") from None
    return "" if value is None else str(value).strip()


@cache
def _parse(template: str) -> tuple[Part, ...]:
    """The parts of a template."""
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
