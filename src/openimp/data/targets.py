"""The classes in the columns of a source, and the sizes of targets."""

from collections.abc import Iterable, Mapping
from typing import Any

from openimp.common.errors import UserError, counted, nearest
from openimp.common.modality import Classes
from openimp.common.objective import ClassColumn, TargetSizes
from openimp.common.schema import as_text
from openimp.data.streams import Stream
from openimp.data.tables import Table, Unreadable
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task


def target_sizes(recipe: Recipe, classes: Classes) -> TargetSizes:
    """The sizes on which the shapes of a recipe's targets depend. `classes` has the classes of each head."""
    class_indices = {head: {label: i for i, label in enumerate(labels)} for head, labels in classes.items()}
    return TargetSizes(recipe.model.embed_dim, class_indices)


def target_columns(task: Task) -> set[str]:
    """The columns that the objectives of a task read."""
    return {column for objective in task.objectives for column in objective.columns()}


def classes_of(source: Table | Stream, column: ClassColumn, error_prefix: str) -> list[Any]:
    """The classes of a column, in the order of its head's outputs. The rows of a table must have no others."""
    if isinstance(source, Stream):
        if column.classes is None:
            raise UserError(
                f"{error_prefix}: a streamed source is not read ahead, so name the classes of {column.name!r}"
            )
        return list(column.classes)
    row_by_class = find_classes(source, column.name, source.column(column.name), column.has_lists, error_prefix)
    column_prefix = _column_prefix(source, column.name, error_prefix)
    if column.classes is None:
        return sort_classes(row_by_class)
    index = {label: i for i, label in enumerate(column.classes)}
    for label, row in row_by_class.items():
        index_of(label, index, f"{column_prefix}: {source.row_name(row)}")
    return list(column.classes)


def find_classes(table: Table, column: str, values: list[Any], has_lists: bool, error_prefix: str) -> dict[Any, int]:
    """The classes in a column with these values, each with the first row that has it. Unreadable rows are skipped.

    With `has_lists`, each row has a list of classes, or nothing; else each row must have one class. NaN counts as none.
    """
    column_prefix = _column_prefix(table, column, error_prefix)
    row_by_class: dict[Any, int] = {}
    rows_without_class = []
    for row, value in enumerate(values):
        if isinstance(value, Unreadable):
            continue
        try:
            labels = row_classes(value, has_lists)
        except ValueError as error:
            raise UserError(f"{column_prefix}: {table.row_name(row)}: {error}") from None
        for label in labels:
            if label is None or label != label:
                rows_without_class.append(row)
            else:
                row_by_class.setdefault(label, row)
    if rows_without_class:
        row = rows_without_class[0]
        raise UserError(
            f"{column_prefix} has {counted(len(rows_without_class), 'row')} without a class (the first, "
            f"{table.row_name(row)} has {values[row]!r:.60}); leave them out with where: {{{column}: {{not: null}}}}"
        )
    return row_by_class


def sort_classes(classes: Iterable[Any]) -> list[Any]:
    """Sorts classes as a head's outputs are sorted if the recipe does not list them: by type, then by value."""
    return sorted(classes, key=lambda label: (str(type(label)), label))


def _column_prefix(source: Table, column: str, error_prefix: str) -> str:
    return f"{error_prefix}: column {column!r} of source {source.name}"


def row_classes(value: Any, has_lists: bool) -> list[Any]:
    """The classes of one row: one class or, with `has_lists`, any number. ValueError: the value is something else."""
    if has_lists and value is None:
        return []
    labels = value if isinstance(value, list) else [value]
    # A checkpoint stores classes as JSON, and compares them later.
    are_classes = all(label is None or isinstance(label, str | int | float) for label in labels)
    if isinstance(value, list) != has_lists or not are_classes:
        raise ValueError(f"expected {'a list of classes' if has_lists else 'one class'}, found {value!r:.60}")
    return labels


def index_of(label: Any, index: Mapping[Any, int], error_prefix: str, remedy: str | None = None) -> int:
    """The index of a class. UserError if it has none, with the `remedy`. None: it names the nearest class."""
    if label in index:
        return index[label]
    same_text = [known for known in index if as_text(known) == as_text(label)]
    hint = f"; {remedy}" if remedy else nearest(str(label), map(str, index))
    if same_text:
        hint = f", but {same_text[0]!r} is"
    raise UserError(f"{error_prefix}: {label!r} is not among the classes{hint}")
