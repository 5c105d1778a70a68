"""Checks of an index that may be damaged, or made by somebody else: columns of its table, and rows of results."""

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

import pyarrow as pa

REQUIRED = ("id", "path", "state", "modality", "part", "parts")
"""Columns that have a value in each row of a result."""


def damaged_column(found: pa.Schema, expected: pa.Schema) -> str:
    """What is wrong with the columns of a table; empty if nothing is. Older versions stored fewer columns."""
    for field in expected:
        if field.name not in found.names:
            if field.name in (*REQUIRED, "sha256", "vector", "start", "end", "text", "source", "row"):
                return f"there is no column {field.name}"
            continue
        kind = found.field(field.name).type
        is_vector = pa.types.is_fixed_size_list(field.type)
        if not (pa.types.is_fixed_size_list(kind) if is_vector else kind.equals(field.type)):
            return f"column {field.name} has the type {kind}"
    return ""


def damaged_value(row: Mapping[str, Any], modalities: Collection[str]) -> str:
    """What is wrong with a row of a result; empty if nothing is."""
    for name in REQUIRED:
        if row.get(name) is None:
            return f"no {name}"
    if row["modality"] not in modalities:
        return f"the unknown modality {row['modality']!r:.50}"
    if "\0" in row["path"]:
        return "a path with a null character"
    start, end = row["start"], row["end"]
    if (start is None) != (end is None):
        return "only one of start and end"
    # More seconds than a thousand years have.
    if start is not None and not 0 <= start <= end < 2**35:
        return f"the times {start} to {end}"
    for name in ("part", "parts", "row"):
        if (row[name] or 0) < 0:
            return f"the {name} {row[name]}"
    for name in ("latitude", "longitude"):
        if not isfinite(row.get(name) or 0):
            return f"the {name} {row[name]}"
    return ""
