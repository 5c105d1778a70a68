"""A check, before anything takes long, that the media and texts of a source can be read at all."""

from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality
from openimp.common.protocols import Towered
from openimp.data.tables import Table
from openimp.data.templates import columns_of, fill
from openimp.recipe.inputs import Input

TRIED_ROWS = 50
"""Rows that are tried, evenly spaced, until one can be read."""


def require_readable(table: Table, modality: Modality, spec: Input, view: Any, error_prefix: str) -> None:
    """Tries rows until the media of one can be read. UserError if all that have media are unreadable.

    A wrong folder would otherwise be noticed when the task has its first step, or after training.
    """
    if modality.reads_text:
        _require_texts(table, spec, error_prefix)
    if modality.reads_text or isinstance(modality, Towered):
        return
    column = spec.columns[0]
    first_reason = ""
    for row in _tried_rows(table):
        (values,) = table.rows([row], [column])
        if values[column] is None:  # A row may lack a modality.
            continue
        try:
            modality.decode(table.media(values[column]), [view])
            return
        except BadMedia as error:
            first_reason = first_reason or f"{table.row_name(row)}: {error}"
    if first_reason:
        raise UserError(
            f"{error_prefix}: no {modality.name} of source {table.name} that was tried can be read; the first: "
            f"{first_reason}"
        )


def _require_texts(table: Table, spec: Input, error_prefix: str) -> None:
    """Raises UserError if a template reads a column of objects."""
    for row in table.rows(_tried_rows(table), columns_of(spec.columns)):
        try:
            fill(spec.columns, row)
        except BadMedia:
            continue
        except UserError as error:
            raise UserError(f"{error_prefix}: {error} (source {table.name})") from None


def _tried_rows(table: Table) -> list[int]:
    return np.linspace(0, len(table) - 1, min(TRIED_ROWS, len(table))).astype(int).tolist()
