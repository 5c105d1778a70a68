"""Targets: the classes of a row, its vectors to distill, and which rows are the same item, as a task's objectives read
them from columns."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from openimp.common.errors import UserError, counted, nearest
from openimp.common.modality import BadMedia
from openimp.common.schema import as_text
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable, item_key, number_array
from openimp.recipe.tasks import Classification, Contrastive, Distill, Task


def classes_of(source: Table | Stream, objective: Classification, where: str) -> list[Any]:
    """The classes of an objective, in the order of its head's outputs. The rows of a table must have no others."""
    if isinstance(source, Stream):
        if objective.classes is None:
            raise UserError(f"{where}: a streamed source is not read ahead, so name the classes of {objective.label!r}")
        return list(objective.classes)
    values = source.column(objective.label)
    found = find_classes(source, objective.label, values, objective.loss == "sigmoid", where)
    if objective.classes is None:
        return sort_classes(found)
    index = {label: i for i, label in enumerate(objective.classes)}
    for label, row in found.items():
        index_of(label, index, f"{_name(source, objective.label, where)}: {source.row_name(row)}")
    return list(objective.classes)


def find_classes(table: Table, column: str, values: list[Any], lists: bool, where: str) -> dict[Any, int]:
    """The classes in a column with these values, each with the first row that has it. Unreadable rows are skipped.

    With `lists`, each row has a list of classes, or nothing; else each row must have one class. NaN counts as none.
    Messages begin with `where`.
    """
    found: dict[Any, int] = {}
    missing = []
    for row, value in enumerate(values):
        if isinstance(value, Unreadable):
            continue
        try:
            labels = _row_classes(value, lists)
        except ValueError as error:
            raise UserError(f"{_name(table, column, where)}: {table.row_name(row)}: {error}") from None
        for label in labels:
            if label is None or label != label:
                missing.append(row)
            else:
                found.setdefault(label, row)
    if missing:
        first = f"{table.row_name(missing[0])} has {values[missing[0]]!r:.60}"
        raise UserError(
            f"{_name(table, column, where)} has {counted(len(missing), 'row')} without a class (the first, {first}); "
            "leave them out with where"
        )
    return found


def sort_classes(classes: Iterable[Any]) -> list[Any]:
    """Sorts classes as a head's outputs are sorted if the recipe does not list them: by type, then by value."""
    return sorted(classes, key=lambda label: (str(type(label)), label))


def target_columns(task: Task) -> set[str]:
    """The columns that a task's objectives read."""
    found: set[str | None] = set()
    for objective in task.objectives:
        match objective:
            case Classification():
                found.add(objective.label)
            case Contrastive():
                found.add(objective.same)
            case Distill():
                found.add(objective.to)
    return {column for column in found if column}


def labels_of(values: list[Any], index: Mapping[Any, int], objective: Classification, where: str) -> torch.Tensor:
    """The targets of a batch: (B,) int64 class indices for loss softmax, or (B, K) float zeros and ones for sigmoid.

    `values` has the label of each example, and `index` the index of each class. Messages begin with `where`.
    """
    lists = objective.loss == "sigmoid"
    try:
        indices = [[index_of(label, index, where) for label in _row_classes(value, lists)] for value in values]
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not lists:
        return torch.tensor(indices)[:, 0]
    target_BK = torch.zeros(len(values), len(index))
    for target_K, row in zip(target_BK, indices):
        target_K[row] = 1
    return target_BK


def unit_vector(value: Any, size: int, column: str) -> np.ndarray:
    """(Z,) fp32, the vector in a cell of a column, scaled to length 1; BadMedia if there is none of this size."""
    try:
        vector = number_array(value).astype(np.float64) if isinstance(value, list) else np.empty(0)
    except BadMedia as error:
        raise BadMedia(f"column {column!r}: {error}") from None
    if vector.shape != (size,):
        found = f"a list of shape {[*vector.shape]}" if isinstance(value, list) else f"{value!r:.60}"
        raise BadMedia(f"column {column!r}: expected a list of {size} numbers (the model's embed_dim), found {found}")
    length = np.linalg.norm(vector)
    if not (np.isfinite(length) and length > 0):
        raise BadMedia(f"column {column!r}: a vector of length {length:g} has no direction")
    return (vector / length).astype(np.float32)


def item_id(value: Any, row: int) -> int:
    """A hash that rows of the same item share, see `item_key`. A row without a value is an item of its own."""
    key = value if isinstance(value, bytes) else (item_key(value) or "").encode()  # Media and vectors have no case.
    content = key or f"\nrow {row}".encode()  # No text's key has a line break.
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _name(source: Table, column: str, where: str) -> str:
    return f"{where}: column {column!r} of source {source.name}"


def _row_classes(value: Any, lists: bool) -> list[Any]:
    """The classes of one row. Raises ValueError if the value is not of the form that is expected."""
    if lists and value is None:
        return []
    labels = value if isinstance(value, list) else [value]
    if isinstance(value, list) != lists or any(isinstance(label, list | dict) for label in labels):
        raise ValueError(f"expected {'a list of classes' if lists else 'one class'}, found {value!r:.60}")
    return labels


def index_of(label: Any, index: Mapping[Any, int], where: str) -> int:
    """The index of a class. If it has none, the message begins with `where`."""
    if label in index:
        return index[label]
    same_text = [known for known in index if as_text(known) == as_text(label)]
    hint = f", but {same_text[0]!r} is" if same_text else nearest(str(label), map(str, index))
    raise UserError(f"{where}: {label!r} is not among the classes{hint}")
