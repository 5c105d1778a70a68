"""Decides which rows of a source are trained on, and which are held out for evaluation."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from openimp.common.errors import UserError
from openimp.data.tables import Table, Unreadable, item_content, item_id, item_key
from openimp.drafting.columns import PROBED_ROWS, TaskDraft, open_candidate, sample, with_root
from openimp.drafting.finding import ROLES, shown

MIN_ITEMS = 20
"""With fewer different items, none are held out, because a test on one or two rows says nothing. The held-out part
has about this many items or more, but at most a fifth of all items."""
MIN_GROUPS = 5
"""With fewer groups, such as speakers, rows of one group may be both trained on and tested on."""
COMPARED_ROWS = 100
"""The media of this many first rows are compared. Tables of captions often repeat a picture in consecutive rows."""
MAX_COMPARED_BYTES = 4e9
"""Most bytes of media by which rows are divided."""
TEST_ROWS = 5000
"""Rows to hold out of a large source."""


class Split(NamedTuple):
    """How a source is divided into training and evaluation."""

    train: dict[str, Any]  # as in the recipe
    test: dict[str, Any] | None  # None: evaluation uses the rows of training
    rows: int  # of training
    test_rows: int
    why: str  # how the rows were divided, in one sentence
    item: str | None  # see `_item_column`; None: each row is an item
    classes: list[Any]  # of the label, in the rows of training
    trains_test_classes: bool  # all classes of the test rows are trained on


def split_task(task: TaskDraft) -> Split:
    """Divides the rows of a task: as the data itself does, or else by a hash."""
    unused = ""
    if test := task.candidate.held_out:
        place = shown(test.get("path") or test["split"])
        try:
            return _given_split(task, task.source, test, f"{place} holds the latter")
        except UserError as error:
            unused = f"; {place} is not used: {str(error).removeprefix('source data: ')}"
    for column in task.by_use["split"]:
        values_by_role = defaultdict(list)
        for value in sorted({"" if value is None else str(value) for value in task.table.column(column)}):
            values_by_role[ROLES.get(value.lower(), "")].append(value)
        held_out = values_by_role["val"] or values_by_role["test"]
        if not values_by_role["train"] or not held_out:
            continue
        why = f"column {shown(column)} says so"
        if values_by_role["val"] and values_by_role["test"]:
            why += "; its test rows are left for a last test"
        if others := values_by_role[""]:
            why += f"; rows with {', '.join(shown(other) or 'nothing' for other in others[:3])} are not used"
        train = {**task.source, "where": {column: values_by_role["train"]}}
        test = {**task.source, "where": {column: held_out}}
        try:
            return _given_split(task, train, test, why)
        except UserError as error:
            unused = f"; the split in column {shown(column)} is not used: {str(error).removeprefix('source data: ')}"
    by_hash = _by_hash(task)
    return by_hash._replace(why=by_hash.why + unused)


def _given_split(task: TaskDraft, train: dict[str, Any], test: dict[str, Any], why: str) -> Split:
    """The split that the data itself has. UserError if it cannot be used."""
    table = task.table if train is task.source else open_candidate(train)
    held_out = open_candidate(test)
    held_out.require(task.columns)
    test = with_root(test, held_out, sample(held_out, [task.media.name], PROBED_ROWS), task.candidate.folder)
    classes = _classes(table, task)
    test_classes = _classes(held_out, task)
    if None in test_classes:
        raise UserError("some of its rows have no class")
    return Split(
        train,
        test,
        rows=len(table),
        test_rows=len(held_out),
        why=why,
        item=_item_column(task),
        classes=list(classes),
        trains_test_classes=test_classes <= classes,
    )


def _by_hash(task: TaskDraft) -> Split:
    rows = len(task.table)
    item = _item_column(task)
    classes = _classes(task.table, task)
    whole = Split(
        train=task.source,
        test=None,
        rows=rows,
        test_rows=0,
        why=f"too few different values of {shown(item or 'rows')} to hold any out, so evaluation is no test",
        item=item,
        classes=list(classes),
        trains_test_classes=True,
    )
    groups = [name for name in task.by_use["group"] if len(set(_keys(task.table, name))) >= MIN_GROUPS]
    by = next(iter([*groups, *([item] if item else []), *task.by_use["path"]]), None)
    items = _count_items(task, item)
    parts = max(5, min(items // MIN_ITEMS, max(10, rows // TEST_ROWS)))
    part_of_row = task.table.parts(parts, by)
    sizes = Counter(part_of_row)
    if items < MIN_ITEMS or len(sizes) < 2:
        return whole
    labels = task.table.column(task.label.name) if task.label else []
    classes_of_part = defaultdict(set)
    for label, part in zip(labels, part_of_row):
        classes_of_part[part].add(label)

    def order(part: int) -> tuple[bool, int, float, int]:
        """Sorts the part to hold out first: at most twice the mean size, the most classes, nearest to the mean size."""
        size = sizes[part]
        return size > 2 * rows / parts, -len(classes_of_part[part]), abs(size - rows / parts), part

    held_out = min(sizes, key=order)
    together = {"by": by} if by else {}
    return whole._replace(
        train={**task.source, "part": {"of": parts, "drop": [held_out], **together}},
        test={**task.source, "part": {"of": parts, "keep": [held_out], **together}},
        rows=rows - sizes[held_out],
        test_rows=sizes[held_out],
        why=f"1 of {parts} parts is held out" + (f"; rows with equal {shown(by)} stay together" if by else ""),
        trains_test_classes=classes <= set().union(*(classes_of_part[part] for part in sizes if part != held_out)),
    )


def _item_column(task: TaskDraft) -> str | None:
    """The column that tells the item of a row: rows with equal values have the same item. None: each row is an item.

    It is the column of paths if a path repeats, the column of media if a picture or sound repeats among the first rows,
    or else the text column. Media of more than `MAX_COMPARED_BYTES` are not compared: every start would read them.
    """
    for name in task.by_use["path"]:
        paths = _keys(task.table, name)
        if len(set(paths)) < len(paths):
            return name
    media = task.media.name
    if media not in task.by_use["path"]:
        first_rows = range(min(COMPARED_ROWS, len(task.table)))
        contents = [item_content(cells[media]) for cells in task.table.iterate([media], first_rows)]
        present = [content for content in contents if content]
        estimated_bytes = sum(map(len, present)) * len(task.table) / max(1, len(contents))
        if len(set(present)) < len(present) and estimated_bytes <= MAX_COMPARED_BYTES:
            return media
    return task.text.name if task.text and task.text.distinct else None


def _count_items(task: TaskDraft, column: str | None) -> int:
    """The number of items, see `_item_column`; of texts, those in the sample."""
    if column is None:
        return len(task.table)
    if task.text and column == task.text.name:
        return task.text.distinct
    return len({item_id(cells[column], row) for row, cells in enumerate(task.table.iterate([column]))})


def _keys(table: Table, column: str) -> list[str]:
    """The values of a column that are not empty, as `Table.parts` tells them apart."""
    return [key for value in table.column(column) if (key := item_key(value))]


def _classes(table: Table, task: TaskDraft) -> set[Any]:
    labels = table.column(task.label.name) if task.label else []
    return {label for label in labels if not isinstance(label, Unreadable)}
