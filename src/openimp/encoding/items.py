"""Reads items of one modality from the rows of a source, and checks that modalities can be compared."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import Progress
from openimp.common.safe_files import sha256
from openimp.data.tables import Table
from openimp.data.templates import columns_of, fill
from openimp.model.embedder import Embedder
from openimp.recipe.inputs import Input

Raw = str | bytes | Path | np.ndarray
"""A value that a modality decodes."""


def require_columns(table: Table, modality: Modality, spec: Input, error_prefix: str) -> None:
    """Raises UserError if the source lacks a column that an input reads."""
    table.require(_columns(modality, spec), error_prefix)


def require_pair(model: Embedder, a: str, b: str, error_prefix: str) -> None:
    """Raises UserError if two modalities share no space, because the model was not trained to compare them."""
    if not model.share_a_space(a, b):
        trained = ", ".join("-".join(pair) for pair in model.pairs) or "none"
        raise UserError(
            f"{error_prefix}: no task trains {a} and {b} together, so they cannot be compared; trained pairs: {trained}"
        )


def raw_value(table: Table, modality: Modality, spec: Input, row: int) -> Raw:
    """The value of one input in a row, before it is decoded; BadMedia if it cannot be read."""
    (values,) = table.rows([row], _columns(modality, spec))
    return _value(table, modality, spec, values)


def raw_values(
    table: Table, modality: Modality, spec: Input, rows: Sequence[int], progress: Progress | None
) -> Iterator[tuple[str, Raw | BadMedia]]:
    """Yields (key, value) of each row. Equal values have the same key. A value that cannot be read is a BadMedia."""
    all_values = table.iterate(_columns(modality, spec), rows)
    tracked_rows = progress(rows, modality.name) if progress else rows
    for row, values in zip(tracked_rows, all_values):
        try:
            value = _value(table, modality, spec, values)
            yield _key(value), value
        except BadMedia as error:
            yield f"row:{row}", error


def _columns(modality: Modality, spec: Input) -> list[str]:
    """The columns that evaluation and search read: all columns of a text's templates, or the first column of media."""
    return columns_of(spec.columns) if modality.reads_text else spec.columns[:1]


def _value(table: Table, modality: Modality, spec: Input, row: dict[str, Any]) -> Raw:
    if modality.reads_text:
        return fill(spec.columns, row)
    return table.media(row[spec.columns[0]])


def _key(value: Raw) -> str:
    if isinstance(value, str):
        return "text:" + value
    if isinstance(value, np.ndarray):
        return f"sha256:{value.shape}{value.dtype}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return "sha256:" + hashlib.sha256(value).hexdigest()
    try:
        return "sha256:" + sha256(value)
    except OSError as error:
        raise BadMedia(f"{value}: {error.strerror or error}") from None
