"""Decides which rows of a source are trained on, and which are held out for evaluation."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from openimp.common.errors import UserError
from openimp.common.schema import as_text
from openimp.data.folders import FolderTable
from openimp.data.tables import CHUNK, Table, Unreadable, item_key
from openimp.drafting.columns import Column, split_values
from openimp.drafting.finding import shown
from openimp.drafting.inspecting import Inspected, open_candidate, with_root

GROUPS = re.compile(r"(?<![a-z0-9])(group|speaker|patient|subject|session|artist|user|recording|scene)(?![a-z0-9])")
"""Names of columns that group rows. Rows of one group must not be both trained on and tested on."""
MIN_ITEMS = 20
"""With fewer different items, none are held out, because a test on one or two rows says nothing."""
MIN_GROUPS = 5
"""With fewer groups, such as speakers, rows of one group may be both trained on and tested on."""
TEST_ROWS = 5000
"""Rows to hold out of a large source."""
MAX_LISTED_CLASSES = 50
"""Most classes that `where` lists, to select the rows that have one."""


@dataclass
class Split:
    """How a source is divided into training and evaluation."""

    train: dict[str, Any]  # as in the recipe
    test: dict[str, Any] | None  # None: evaluation uses the rows of training
    rows: int  # of training
    test_rows: int
    why: str  # how the rows were divided, in one sentence
    same: str | None  # column whose equal values mean the same item
    classes: list[Any]  # of the label, in the rows of training
    trains_test_classes: bool  # all classes of the test rows are trained on


@dataclass(frozen=True)
class UsedColumns:
    """The columns that a task reads."""

    media: list[str]
    texts: list[Column]
    label: Column | None

    @property
    def all(self) -> list[str]:
        return [*self.media, *(column.name for column in self.texts), *([self.label.name] if self.label else [])]

    @property
    def items(self) -> list[str]:
        """The columns in which equal values mean the same item. Equal keywords do not."""
        return [*self.media, *(column.name for column in self.texts if not column.short)]


def split(data: Inspected, used: UsedColumns, where: dict[str, Any]) -> Split:
    """Divides the rows that match `where`: as the data itself does, or else by a hash."""
    only = {"where": where} if where else {}
    source = {**data.source, **only}
    if held_out := data.candidate.held_out:
        test = with_root({**held_out, **only}, used.media, data.candidate.below)
        if found := _given_split(source, test, used, f"{shown(held_out['path'])} holds the latter"):
            return found
    if columns := data.using("split"):
        name = columns[0].name
        training, testing, rest = split_values(data.table.column(name))
        values = [each if len(each) > 1 else each[0] for each in (training, testing)]
        train, test = ({**source, "where": {**where, name: value}} for value in values)
        why = f"column {shown(name)} says so"
        if rest:
            why += f"; its {shown(' and '.join(rest))} rows are left for a last test"
        if found := _given_split(train, test, used, why):
            return found
    return _by_hash(data, source, used)


def _given_split(train: dict[str, Any], test: dict[str, Any], used: UsedColumns, why: str) -> Split | None:
    """The split that the data itself has; None if its test rows cannot be read."""
    try:
        table, held_out = open_candidate(train), open_candidate(test)
        held_out.require(used.all)
    except UserError:
        return None
    same = _repeated(table, used)
    classes = _classes(table, used.label)
    known = set(_classes(held_out, used.label)) <= set(classes)
    return Split(train, test, len(table), len(held_out), why, same, classes, known)


def _by_hash(data: Inspected, source: dict[str, Any], used: UsedColumns) -> Split:
    table = open_candidate(source)
    same = _repeated(table, used)
    by, groups = _groups(data, table, used)
    classes = _classes(table, used.label)
    if groups == 0:
        few = f"too few different values of {shown(by)}" if by else "too few"
        why = f"{few} to hold any out, so evaluation only shows whether training works"
        return Split(source, None, len(table), 0, why, same, classes, True)
    of = 10 if len(table) <= 20_000 else max(20, -(-len(table) // TEST_ROWS))
    numbers = table.parts(of, by)
    labels = table.column(used.label.name) if used.label else [None] * len(table)
    part, knows = _fair_part(numbers, of, labels)
    options: dict[str, Any] = {"by": by} if by else {}
    train, test = ({**source, "part": {"of": of, choice: [part], **options}} for choice in ("drop", "keep"))
    why = f"1 of {of} parts is held out for evaluation"
    if by and groups < len(table):
        why += f"; rows with equal {shown(by)} stay together"
    held_out = numbers.count(part)
    return Split(train, test, len(table) - held_out, held_out, why, same, classes, knows)


def _fair_part(numbers: list[int], of: int, labels: list[Any]) -> tuple[int, bool]:
    """The part to hold out: one of about average size, whose classes the other parts have too, if there is one.

    Also returns whether the other parts have all classes of that part.
    """
    sizes, average = Counter(numbers), len(numbers) / of
    in_all = Counter(map(as_text, labels))

    def knows(part: int) -> bool:
        held_out = Counter(as_text(label) for label, number in zip(labels, numbers) if number == part)
        return all(in_all[label] > count for label, count in held_out.items())

    near = sorted(sizes, key=lambda part: (abs(sizes[part] - average), part))[:10]
    fair = [part for part in near if average / 2 <= sizes[part] <= 2 * average]
    part = next((part for part in fair if knows(part)), near[0])
    return part, knows(part)


def _repeated(table: Table, used: UsedColumns) -> str | None:
    """A column in which several rows have the same file or the same text; None if there is none."""
    for name in used.items:
        count = _distinct(table, name)
        if count is not None and count < len(table):
            return name
    return None


def _distinct(table: Table, name: str) -> int | None:
    """The number of different values of a column, where each row without one counts. None: it holds bytes."""
    first = table.rows(range(min(100, len(table))), [name])
    if any(isinstance(row[name], bytes | dict) for row in first):
        return None
    found, missing = set[int](), 0
    for start in range(0, len(table), CHUNK):
        rows = table.rows(range(start, min(start + CHUNK, len(table))), [name])
        keys = [item_key(row[name]) for row in rows]
        found |= {hash(key) for key in keys if key is not None}
        missing += keys.count(None)
    return len(found) + missing


def _groups(data: Inspected, table: Table, used: UsedColumns) -> tuple[str | None, int]:
    """The column by which rows are grouped, and the number of groups. Rows of one group are all held out, or none is.

    None: each row is a group. The number is 0 if there are too few groups to hold any out.
    """
    if len(table) < MIN_ITEMS:
        return None, 0
    groups = [column.name for column in data.columns if GROUPS.search(column.name.lower())]
    # Other tasks may read the same rows with other media. If their media repeat too, the rows are divided as there, so
    # that a text which is held out here is not trained on there.
    items = dict.fromkeys([*used.media, *(media.column for media in data.media), *used.items])
    for name in [*groups, *items]:
        count = _distinct(table, name)
        if count is None or count == len(table):
            continue
        if count >= (MIN_GROUPS if name in groups else MIN_ITEMS):
            return name, count
        if name in used.media:
            return name, 0
    unique = ["file"] if isinstance(table, FolderTable) else [name for name in ("__key__",) if name in table.columns]
    unique += [media.column for media in data.media if _distinct(table, media.column) == len(table)]
    return (unique[0] if unique else None), len(table)


def _classes(table: Table, label: Column | None) -> list[Any]:
    values = table.column(label.name) if label else []
    return list(dict.fromkeys(value for value in values if not isinstance(value, Unreadable)))


def without_missing(data: Inspected, label: Column) -> tuple[dict[str, Any], str]:
    """The `where` that selects the rows with a class, and the reason if the column cannot be a label (otherwise "")."""
    values = [value for value in data.table.column(label.name) if not isinstance(value, Unreadable)]
    if any(isinstance(value, list | dict | float | bool) for value in values):
        return {}, "its classes are neither all texts nor all whole numbers"
    present = sorted({value for value in values if value not in (None, "") and str(value).strip()}, key=as_text)
    if len({type(value) for value in present}) > 1:
        return {}, "its classes are neither all texts nor all whole numbers"
    if len(present) < 2:
        return {}, "it has fewer than two classes"
    classes = set(present)
    if all(value in classes for value in values):
        return {}, ""
    if len(present) > MAX_LISTED_CLASSES:
        return {}, f"some rows have no class, and {len(present):,} classes are too many to list in where"
    return {label.name: present}, ""
