"""Targets: what objectives read from a row besides its inputs, namely its classes and its item."""

import hashlib
from typing import Any

import torch

from openimp.common.errors import UserError, nearest
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable
from openimp.recipe.tasks import Classification, Task


def classes_of(source: Table | Stream, objective: Classification, where: str) -> list[Any]:
    """The classes of a classification, in the order of its head's outputs."""
    if objective.classes is not None:
        return list(objective.classes)
    if isinstance(source, Stream):
        raise UserError(f"{where}: a streamed source is not read ahead, so name the classes of {objective.label!r}")
    column = f"{where}: column {objective.label!r} of {source.name}"
    rows = [value for value in source.column(objective.label) if not isinstance(value, Unreadable)]
    values = [item for value in rows for item in _classes(value, objective, column)]
    missing = sum(value is None for value in values)
    if missing:
        raise UserError(f"{column} has {missing} rows without a class")
    return sorted(set(values), key=lambda value: (str(type(value)), value))


def _classes(value: Any, objective: Classification, where: str) -> list[Any]:
    """The classes of a row: one for softmax; for sigmoid a list, and none where the column is empty.

    Raises:
        UserError: a list for softmax, or no list for sigmoid.
    """
    if objective.loss == "sigmoid" and value is None:
        return []
    found = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (objective.loss == "sigmoid") or any(isinstance(item, list | dict) for item in found):
        wanted = "a list of classes" if objective.loss == "sigmoid" else "one class"
        raise UserError(f"{where}: loss {objective.loss} needs {wanted} a row, found {value!r:.60}")
    return found


def target_columns(task: Task) -> set[str]:
    """The columns that a task's objectives read."""
    columns = (o.label if isinstance(o, Classification) else o.same for o in task.objectives)
    return {column for column in columns if column}


def labels_of(values: list[Any], index: dict[Any, int], objective: Classification, where: str) -> torch.Tensor:
    """The classes of a batch by their `index`: (B,) int64 for softmax, marks (B, classes) float for sigmoid.

    Raises:
        UserError: a class that is none of the index, or not as many a row as the loss needs.
    """
    try:
        places = [[index[item] for item in _classes(value, objective, where)] for value in values]
        if objective.loss == "softmax":
            return torch.tensor(places)[:, 0]
        hot = torch.zeros(len(values), len(index))
        for i, row in enumerate(places):
            hot[i, row] = 1
        return hot
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where}: {error.args[0]!r} is not among its classes{nearest(str(error.args[0]), index)}"
        ) from None


def item_id(value: Any, row: int) -> int:
    """A 64-bit id that rows with equal values share. A row without a value gets its own id."""
    if value in (None, "", []):
        value = ("row", row)
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
