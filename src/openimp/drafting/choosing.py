"""Chooses the tasks of a source: which columns are paired with which."""

from dataclasses import dataclass
from typing import Any

from openimp.common.errors import by_extension
from openimp.data.folders import FolderTable
from openimp.drafting.columns import Column
from openimp.drafting.finding import shown
from openimp.drafting.inspecting import Inspected, MediaColumn, loose_files
from openimp.drafting.splitting import Split, UsedColumns, split, without_missing

MAX_TEXTS = 3
"""Most text columns of a task."""
TEMPLATES = {"image": "a photo of a {%s}", "video": "a video of {%s}", "audio": "the sound of {%s}"}
"""Texts that are made from the name of a class, if there is no text column. %s is the column."""


@dataclass
class TaskDraft:
    """A task that is being drafted."""

    data: Inspected
    media: list[MediaColumn]  # one; or two kinds, which are compared with each other because there is no text
    texts: list[Column]
    label: Column | None
    split: Split

    @property
    def templates(self) -> list[str]:
        """The text input of the task, as columns or templates; empty if it has none."""
        if self.texts:
            return [f"{{{column.name}*}}" if column.short else column.name for column in self.texts]
        named = self.label is not None and not self.label.numeric and len(self.media) == 1
        return [TEMPLATES[self.media[0].kind] % self.label.name] if self.label and named else []

    def sampled_texts(self) -> list[tuple[str, ...]]:
        """The texts of sampled rows, as `templates` makes them."""
        if self.texts or not self.label or not self.templates:
            rows = ((column.short, row) for column in self.texts for row in column.texts)
            return [(", ".join(row),) if is_short else row for is_short, row in rows]
        (template,), field = self.templates, f"{{{self.label.name}}}"
        return [tuple(template.replace(field, text) for text in row) for row in self.label.texts]

    @property
    def prompt(self) -> str:
        """The text of a class, with {} in place of its name, for a task that makes its texts from classes."""
        return TEMPLATES[self.media[0].kind] % ""

    @property
    def same(self) -> str | None:
        """The column whose equal values mean the same item."""
        return self.label.name if self.label and not self.texts else self.split.same

    @property
    def bad(self) -> float:
        """Share of the rows that probably cannot be read, or have no text."""
        missing = min((column.missing for column in self.texts), default=0.0)
        return max(missing, *(media.unreadable for media in self.media))


def choose(data: Inspected) -> tuple[list[TaskDraft], list[str]]:
    """The tasks of a source, and one line for each column that is not used, with the reason."""
    notes = [f"{shown(column.name)}: {column.why}" for column in data.columns if column.why]
    media = list({each.kind: each for each in reversed(data.media)}.values())[::-1]
    notes += [f"{shown(each.column)}: another column has {each.kind} too" for each in data.media if each not in media]
    if loose := loose_files(data):
        notes.append(f"files beside the subfolders, which are the classes: {by_extension(loose)}")
    texts, labels = data.using("text"), sorted(data.using("label"), key=lambda c: (not c.hinted, -c.distinct))
    notes += [f"{shown(column.name)}: {MAX_TEXTS} other columns have texts" for column in texts[MAX_TEXTS:]]
    texts, where = texts[:MAX_TEXTS], dict[str, Any]()
    label: Column | None = None
    for column in labels:
        if label:
            notes.append(f"{shown(column.name)}: {shown(label.name)} has the classes")
            continue
        where, why = without_missing(data, column)
        if why:
            notes.append(f"{shown(column.name)}: {why}")
        else:
            label = column
    if not media:
        return [], [*notes, "no column holds media"]
    if texts or label:
        groups = [[each] for each in media]
    elif len(media) > 1 and not any(each.extensions for each in media):
        groups = [media[:2]]
    else:
        if not isinstance(data.table, FolderTable):
            return [], [*notes, f"{_named(media)}, but no column of texts or classes says what is in it"]
        kinds = " and ".join(each.kind for each in media)
        ways = (
            "subfolders, one for each of several classes; captions (a.txt beside a.jpg); or a table of files and texts"
        )
        return [], [*notes, f"no text or class says what is in its {kinds} files; add {ways}"]
    found = []
    for group in groups:
        only = {"extension": group[0].extensions} if group[0].extensions else {}
        used = UsedColumns([each.column for each in group], texts, label)
        divided = split(data, used, {**only, **where})
        found.append(TaskDraft(data, group, texts, label, divided))
    return found, notes


def _named(media: list[MediaColumn]) -> str:
    return ", ".join(f"{shown(each.column)} has {each.kind}" for each in media)
