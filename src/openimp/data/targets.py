"""The classes in the columns of a source, and the sizes of targets."""

from collections.abc import Iterable, Mapping
from typing import Any

from openimp.common.errors import UserError, counted, nearest
from openimp.common.modality import Classes, Modalities
from openimp.common.objective import ClassColumn, TargetSizes
from openimp.common.schema import as_text
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable
from openimp.model.build import architecture_of
from openimp.recipe.schema import Recipe


def target_sizes(recipe: Recipe, modalities: Modalities, classes: Classes) -> TargetSizes:
    """What the shapes of a recipe's targets depend on. `classes` has those of each classification head."""
    numbers = {head: {value: i for i, value in enumerate(values)} for head, values in classes.items()}
    return TargetSizes(architecture_of(recipe.model).embed_dim(recipe.model, modalities), numbers)


def classes_of(source: Table | Stream, column: ClassColumn, where: str) -> list[Any]:
    """The classes of a column, in the order of its head's outputs. The rows of a table must have no others."""
    if isinstance(source, Stream):
        if column.classes is None:
            raise UserError(f"{where}: a streamed source is not read ahead, so name the classes of {column.name!r}")
        return list(column.classes)
    found = find_classes(source, column.name, source.column(column.name), column.has_lists, where)
    if column.classes is None:
        return sort_classes(found)
    index = {label: i for i, label in enumerate(column.classes)}
    for label, row in found.items():
        index_of(label, index, f"{_name(source, column.name, where)}: {source.row_name(row)}")
    return list(column.classes)


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
            labels = row_classes(value, lists)
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


def _name(source: Table, column: str, where: str) -> str:
    return f"{where}: column {column!r} of source {source.name}"


def row_classes(value: Any, lists: bool) -> list[Any]:
    """The classes of one row: one class or, with `lists`, any number. ValueError: the value is something else."""
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
