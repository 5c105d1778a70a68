"""Decides which rows of a source are trained on, and which are held out for evaluation."""

from collections import Counter
from typing import Any, NamedTuple

from openimp.common.errors import UserError
from openimp.data.tables import Table, Unreadable, item_key
from openimp.drafting.columns import PROBED_ROWS, TaskDraft, open_candidate, sample, with_root
from openimp.drafting.finding import ROLES, shown

MIN_ITEMS = 20
"""With fewer different items, none are held out, because a test on one or two rows says nothing."""
MIN_GROUPS = 5
"""With fewer groups, such as speakers, rows of one group may be both trained on and tested on."""
TEST_ROWS = 5000
"""Rows to hold out of a large source."""


class Split(NamedTuple):
    """How a source is divided into training and evaluation."""

    train: dict[str, Any]  # as in the recipe
    test: dict[str, Any] | None  # None: evaluation uses the rows of training
    rows: int  # of training
    test_rows: int
    why: str  # how the rows were divided, in one sentence
    item: str | None  # the column whose equal values mean the same item; None: each row is one
    classes: list[Any]  # of the label, in the rows of training
    trains_test_classes: bool  # all classes of the test rows are trained on


def split(task: TaskDraft) -> Split:
    """Divides the rows of a task: as the data itself does, or else by a hash of a column."""
    unused = ""
    if test := task.candidate.held_out:
        why = f"{shown(test.get('path') or test['split'])} holds the latter"
        given = _given_split(task, task.source, test, why)
        if isinstance(given, Split):
            return given
        unused = f"; {shown(test.get('path') or test['split'])} is not used: {given}"
    for column in task.by_use["split"]:
        values: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for value in sorted({str(value) for value in task.table.column(column)}):
            values.setdefault(ROLES.get(value.lower(), ""), []).append(value)
        held_out = values["val"] or values["test"]
        if values["train"] and held_out:
            why = f"column {shown(column)} says so"
            if values["val"] and values["test"]:
                why += "; its test rows are left for a last test"
            train, test = ({**task.source, "where": {column: chosen}} for chosen in (values["train"], held_out))
            given = _given_split(task, train, test, why)
            if isinstance(given, Split):
                return given
            unused = f"; the split in column {shown(column)} is not used: {given}"
    by_hash = _by_hash(task)
    return by_hash._replace(why=by_hash.why + unused)


def _given_split(task: TaskDraft, train: dict[str, Any], test: dict[str, Any], why: str) -> Split | str:
    """The split that the data itself has, or the reason why it cannot be used."""
    try:
        table = task.table if train is task.source else open_candidate(train)
        held_out = open_candidate(test)
        held_out.require(task.columns)
        test = with_root(test, held_out, sample(held_out, [task.media.name], PROBED_ROWS))
    except UserError as error:
        return str(error).removeprefix("source data: ")
    classes = _classes(table, task)
    test_classes = _classes(held_out, task)
    if None in test_classes:
        return "some of its rows have no class"
    item, _ = _items(task)
    return Split(train, test, len(table), len(held_out), why, item, list(classes), test_classes <= classes)


def _by_hash(task: TaskDraft) -> Split:
    rows = len(task.table)
    item, items = _items(task)
    labels = task.table.column(task.label.name) if task.label else []
    classes = _classes(task.table, task)
    if items < MIN_ITEMS:
        why = f"too few different values of {shown(item or 'rows')} to hold any out, so evaluation is no test"
        return Split(task.source, None, rows, 0, why, item, list(classes), True)
    groups = [name for name in task.by_use["group"] if len(set(_keys(task.table, name))) >= MIN_GROUPS]
    by = next(iter([*groups, *([item] if item else []), *task.by_use["path"]]), None)
    of = max(10, rows // TEST_ROWS)
    numbers = task.table.parts(of, by)
    sizes = Counter(numbers)
    part = min(sizes, key=lambda number: (abs(sizes[number] - rows / of), number))
    train, test = ({**task.source, "part": {"of": of, choice: [part], "by": by}} for choice in ("drop", "keep"))
    why = f"1 of {of} parts is held out" + (f"; rows with equal {shown(by)} stay together" if by else "")
    trained = {label for label, number in zip(labels, numbers) if number != part}
    return Split(train, test, rows - sizes[part], sizes[part], why, item, list(classes), classes <= trained)


def _items(task: TaskDraft) -> tuple[str | None, int]:
    """The column whose equal values mean the same item, and the number of items: of texts, those in the sample.

    It has paths if a path repeats, else it is the first text column. None: each row is an item.
    """
    for name in task.by_use["path"]:
        paths = _keys(task.table, name)
        if len(set(paths)) < len(paths):
            return name, len(set(paths))
    if task.text and task.text.items:
        return task.text.name, task.text.items
    return None, len(task.table)


def _keys(table: Table, column: str) -> list[str]:
    """The values of a column that are not empty, as `Table.parts` tells them apart."""
    return [key for value in table.column(column) if (key := item_key(value))]


def _classes(table: Table, task: TaskDraft) -> set[Any]:
    labels = table.column(task.label.name) if task.label else []
    return {label for label in labels if not isinstance(label, Unreadable)}
