"""Finds out, by the names of columns and a sample of rows, which columns hold media, texts and classes."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openimp.common.errors import UserError
from openimp.common.folders import subfolders
from openimp.common.modality import BadMedia
from openimp.common.schema import as_text, checked
from openimp.common.texts import text_key
from openimp.data.files import inside
from openimp.data.sources import open_source
from openimp.data.tables import Table, Unreadable
from openimp.drafting.finding import KIND_OF, Candidate, shown
from openimp.drafting.probing import Kind, Probed, probe
from openimp.recipe.tasks import Source

NAMES = {
    "split": ["split", "subset", "set"],
    "group": ["group", "speaker", "patient", "subject", "session", "artist", "user", "recording"],
    "class": ["label", "labels", "class", "classes", "cls", "category", "categories", "species", "genre"],
    "text": ["caption", "captions", "text", "texts", "txt", "description", "descriptions", "sentence", "sentences",
             "transcript", "transcription", "utterance", "prompt", "alt", "title", "name", "keywords", "tags"],
}  # fmt: skip
"""Words in the name of a column that tell its use; the first use counts. The best texts come first."""
MAX_TEXTS = 3
"""Most text columns of a task."""
PROMPTS = {"image": "a photo of a {}", "video": "a video of {}", "audio": "the sound of {}"}
"""Texts that are made from the name of a class, if there is no text column."""
PROBED_ROWS = 32
"""Rows that decide which columns hold media. The headers of their files are read."""
SAMPLED_ROWS = 10_000
"""Rows whose texts are read."""
ROWS_PER_CLASS = 2
"""Fewest rows per class, on average."""
ROWS_PER_NAME = 10
"""Rows per different text, on average, from which on texts are the names of classes."""
MAX_LENGTH = 1000
"""Characters of a text that are inspected."""
MAX_ROOTS = 20
"""Folders beside a table that are tried as the root of its paths."""


class MediaColumn(NamedTuple):
    """A column of media of one kind."""

    name: str
    kind: Kind
    sample: list[Probed]
    bad: float  # share of the sample that is not readable, or of another kind


class TextColumn(NamedTuple):
    """A column of texts, or of lists of texts."""

    name: str
    template: str  # the input that reads it
    sample: list[tuple[str, ...]]  # the texts of each sampled row that has any
    bad: float  # share of the sampled rows without a text

    def sampled_texts(self) -> list[str]:
        """Texts that the template makes."""
        if self.template.endswith("*}"):
            return [", ".join(row) for row in self.sample]
        return [text for row in self.sample for text in row]


class ClassColumn(NamedTuple):
    """A column with one class per row."""

    name: str
    classes: list[Any]
    are_numbers: bool  # so no text can be made of them


class TaskDraft(NamedTuple):
    """A task for one kind of media of a source. Without texts and classes, it pairs two kinds."""

    candidate: Candidate
    source: dict[str, Any]  # as in the recipe, before rows are held out; with a root if paths need one
    table: Table
    media: list[MediaColumn]
    texts: list[TextColumn]
    label: ClassColumn | None
    prompt: str  # the text of a class, with {} in place of its name, if `texts` is made from the classes; else ""
    by_use: dict[str, list[str]]  # the names of columns; see `NAMES`. "path": those with names of media files


def inspect(
    candidate: Candidate, chosen_texts: Sequence[str] = (), chosen_label: str | None = None
) -> tuple[list[TaskDraft], list[str]]:
    """The tasks of a source, one for each kind of media, and notes on what is not used.

    `chosen_texts` and `chosen_label` are the columns to use. By default, the names of the columns tell.

    Raises:
        UserError: the source cannot be read, lacks a chosen column, or has nothing to train on.
    """
    table = open_candidate(candidate.source)
    chosen = [*chosen_texts, *([chosen_label] if chosen_label else [])]
    table.require(chosen)
    first_rows = sample(table, table.columns, PROBED_ROWS)
    source = with_root(candidate.source, table, first_rows)
    table = open_candidate(source)
    notes: list[str] = []
    media = _media_columns(table, first_rows, notes)
    ignored = {"__key__", "file", "extension"} | ({"name"} - {*chosen} if candidate.kind else set())
    others = [name for name, values in first_rows.items() if name not in ignored and not _are_media(values)]
    if not media:
        raise UserError("; ".join([*notes, f"no column holds media; the columns are {_listed(table.columns)}"]))
    by_use = _by_use(others)
    by_use["path"] = [name for name, values in first_rows.items() if _are_paths(values)]
    texts, class_names = _text_columns(table, chosen_texts or by_use["text"])
    if chosen:
        texts += class_names
        class_names = []
    minimum = dict.fromkeys([chosen_label] if chosen_label else by_use["class"], ROWS_PER_CLASS)
    minimum |= {column.name: ROWS_PER_NAME for column in class_names}
    label = _class_column(table, minimum, notes)
    if not texts and not label and (candidate.kind or len(media) == 1):
        raise UserError("; ".join([*notes, _what_to_add(candidate, media, others)]))
    used = {*(column.name for column in texts[:MAX_TEXTS]), label and label.name, *by_use["split"], *by_use["group"]}
    if unused := [name for name in others if name not in used]:
        notes.append(f"columns {_listed(unused)}")
    tasks = []
    for group in [[column] for column in media] if texts or label else [media[:2]]:
        prompt = PROMPTS[group[0].kind] if label and not texts and not label.are_numbers else ""
        from_classes = [_from_classes(label, prompt)] if label and prompt else []
        task_texts = texts[:MAX_TEXTS] or from_classes
        tasks.append(TaskDraft(candidate, source, table, group, task_texts, label, prompt, by_use))
    return tasks, notes


def _from_classes(label: ClassColumn, prompt: str) -> TextColumn:
    """Texts made of classes. The sample has each twice, because a class has several rows."""
    texts = [(prompt.format(as_text(name)[:MAX_LENGTH]),) for name in label.classes]
    return TextColumn(label.name, prompt.format(f"{{{label.name}}}"), [*texts, *texts], 0.0)


def open_candidate(source: dict[str, Any]) -> Table:
    """Opens a source whose paths are relative to the current folder."""
    table = open_source("data", checked(Source, source, "source data", Path.cwd()))
    assert isinstance(table, Table)
    return table


def sample(table: Table, columns: Sequence[str], count: int) -> dict[str, list[Any]]:
    """The values of columns in evenly spaced rows."""
    count = min(count, len(table))
    rows = table.rows([row * len(table) // count for row in range(count)], columns)
    return {column: [row[column] for row in rows] for column in columns}


def with_root(source: dict[str, Any], table: Table, first_rows: dict[str, list[Any]]) -> dict[str, Any]:
    """A source, with the folder beside its table where the paths in the rows start, if they do not start at its own."""
    paths = [
        value for values in first_rows.values() if _are_paths(values) for value in values if isinstance(value, str)
    ]
    if "path" not in source or table.root is None or any(_exists(table.root, path) for path in paths):
        return source
    for folder in subfolders(table.root)[:MAX_ROOTS]:
        if any(_exists(table.root / folder, path) for path in paths):
            return {**source, "root": str(Path(source["path"]).parent / folder)}
    return source


def _exists(root: Path, path: str) -> bool:
    try:
        return inside(root, path).is_file()
    except BadMedia:
        return False


def _are_paths(values: Sequence[Any]) -> bool:
    """Whether most values are names of media files. A URL is none."""
    endings = [Path(value).suffix.lower() for value in values if isinstance(value, str) and "://" not in value]
    return 2 * sum(ending in KIND_OF for ending in endings) > len(values)


def _are_media(values: Sequence[Any]) -> bool:
    """Whether values are bytes, `{bytes, path}` or names of media files."""
    are_objects = any(isinstance(value, dict) and value.keys() & {"bytes", "path"} for value in values)
    return are_objects or any(isinstance(value, bytes) for value in values) or _are_paths(values)


def _media_columns(table: Table, first_rows: dict[str, list[Any]], notes: list[str]) -> list[MediaColumn]:
    """The first column of each kind of media. Notes tell why others are not used."""
    columns: dict[str, MediaColumn] = {}
    for name, values in first_rows.items():
        if not _are_media(values):
            continue
        probed: list[Probed] = []
        why = "it mixes kinds of media"
        for value in values:
            try:
                probed.append(probe(table.media(value)))
            except BadMedia as error:
                why = str(error)
        kind = Counter(media.kind for media in probed).most_common(1)[0][0] if probed else "image"
        of_kind = [media for media in probed if media.kind == kind]
        if 2 * len(of_kind) <= len(values):
            notes.append(f"{shown(name)}: most of its files cannot be used: {shown(why, limit=200)}")
        elif kind in columns:
            notes.append(f"{shown(name)}: {shown(columns[kind].name)} has {kind} too")
        else:
            columns[kind] = MediaColumn(name, kind, of_kind, 1 - len(of_kind) / len(values))
    return list(columns.values())


def _by_use(names: Sequence[str]) -> dict[str, list[str]]:
    """The columns of each use, the best name first. A template cannot name columns with braces, * or outer spaces."""
    left = {name: re.split(r"[^a-z0-9]+", name.lower()) for name in names if not re.search(r"[{}*]|^\s|\s$", name)}
    by_use: dict[str, list[str]] = {}
    for use, known in NAMES.items():
        by_use[use] = [name for word in known for name, words in left.items() if word in words]
        left = {name: words for name, words in left.items() if name not in by_use[use]}
    return {use: list(dict.fromkeys(columns)) for use, columns in by_use.items()}


def _text_columns(table: Table, names: Sequence[str]) -> tuple[list[TextColumn], list[TextColumn]]:
    """The columns with texts, and those whose texts repeat so often that they are names of classes."""
    texts: list[TextColumn] = []
    class_names: list[TextColumn] = []
    for name, values in sample(table, names, SAMPLED_ROWS).items():
        present = [value for value in values if value and not isinstance(value, Unreadable)]
        rows = [tuple(value if isinstance(value, list) else [value]) for value in present]
        if all(not isinstance(text, str) or _is_number(text) for row in rows for text in row):
            continue
        rows = [tuple(" ".join(as_text(text)[:MAX_LENGTH].split()) for text in row) for row in rows]
        are_lists = isinstance(present[0], list)
        are_keywords = are_lists and re.search("keywords|tags", name.lower())
        column = TextColumn(name, f"{{{name}*}}" if are_keywords else name, rows, 1 - len(rows) / len(values))
        repeats = not are_lists and ROWS_PER_NAME * len({text_key(row[0]) for row in rows}) <= len(rows)
        (class_names if repeats else texts).append(column)
    return texts, class_names


def _class_column(table: Table, minimum: dict[str, int], notes: list[str]) -> ClassColumn | None:
    """The first column that has classes, preferably with names. `minimum` has the fewest rows per class of each."""
    columns = []
    for name, rows_per_class in minimum.items():
        values = [value for value in table.column(name) if not isinstance(value, Unreadable)]
        are_classes = all(isinstance(value, str | int) and value != "" for value in values)
        classes = list(dict.fromkeys(values)) if are_classes else []
        if 2 <= len(classes) <= len(values) / rows_per_class:
            columns.append(ClassColumn(name, classes, all(_is_number(as_text(value)) for value in classes)))
        else:
            notes.append(
                f"{shown(name)}: expected a class (a text or a whole number) in every row, at least two classes, and "
                f"{rows_per_class} rows per class"
            )
    return min(columns, key=lambda column: column.are_numbers, default=None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _what_to_add(candidate: Candidate, media: list[MediaColumn], others: list[str]) -> str:
    """What a source without texts and classes needs."""
    if candidate.kind:
        return (
            f"no text or class says what is in its {candidate.kind} files; add subfolders, one for each of several "
            "classes; captions (a.txt beside a.jpg); or a table of files and texts"
        )
    return (
        f"{shown(media[0].name)} has {media[0].kind}, but no other column ({_listed(others)}) has a name like "
        f"{', '.join(NAMES['text'][:3])} or {', '.join(NAMES['class'][:2])} (docs/init.md has all); name one with "
        "--text COLUMN or --label COLUMN"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:20])) or "none"
