"""Finds out, by the names of columns and a sample of rows, which columns hold media, texts and classes."""

import errno
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from openimp.common.errors import UserError, counted
from openimp.common.folders import subfolders
from openimp.common.modality import BadMedia
from openimp.common.names import is_url
from openimp.common.schema import as_text, checked
from openimp.data.files import folder_of_pattern, inside
from openimp.data.sources import open_source
from openimp.data.tables import Table, Unreadable, item_key
from openimp.drafting.finding import KIND_OF, Candidate, shown
from openimp.drafting.probing import Kind, MediaInfo, probe
from openimp.recipe.tasks import Source

NAMES = {
    "split": ["split", "subset", "set"],
    "group": ["group", "speaker", "client", "patient", "subject", "session", "artist", "singer", "user", "recording"],
    "class": ["label", "labels", "class", "classes", "cls", "category", "categories", "species", "genre"],
    "text": ["caption", "captions", "text", "texts", "txt", "description", "descriptions", "sentence", "sentences",
             "transcript", "transcription", "utterance", "prompt", "alt", "title", "name", "keywords", "tags"],
}  # fmt: skip
"""Words in the name of a column that tell its use.

If words of several uses occur, the first use in this list counts. Within a use, columns with an earlier word are
preferred.
"""
NOT_IN_TEMPLATES = re.compile(r"[{}*]|^\s|\s$")
"""Finds what a template cannot have in the name of a column."""
PROBED_ROWS = 32
"""Rows that decide which columns hold media. The headers of their files are read."""
SAMPLED_ROWS = 10_000
"""Rows whose texts are read."""
MAX_WITHOUT_TEXT = 0.1
"""Largest share of rows without a text with which a text column is used, if a class column could be used instead."""
ROWS_PER_CLASS = 2
"""Fewest rows per class, on average."""
ROWS_PER_NAME = 10
"""Fewest rows per distinct text, on average, for texts to count as names of classes."""
MAX_LENGTH = 1000
"""Characters of a text that are inspected."""
MAX_NAME = 100
"""Most characters of a value that may be the name of a file."""
MAX_ROOTS = 20
"""Folders beside a table that are tried as the root of its paths."""


class MediaColumn(NamedTuple):
    """A column of media of one kind."""

    name: str
    kind: Kind
    sample: list[MediaInfo]
    bad: float  # share of the sample that is not readable, or of another kind
    problem: str  # why a value of the sample cannot be used; empty if all can


class TextColumn(NamedTuple):
    """A column whose values are texts, lists of texts, or names of classes."""

    name: str
    sample: list[str]  # texts of sampled rows
    distinct: int  # distinct values in the sample; 0 if the texts are the names of classes
    bad: float  # share of the sampled rows without a text
    has_lists: bool  # some rows have several texts
    others: tuple[str, ...] = ()  # more columns of texts, such as caption_1 and caption_2 beside caption_0


class LabelColumn(NamedTuple):
    """A column with one class per row."""

    name: str
    classes: list[Any]
    are_numbers: bool  # so no text can be made of them


class TaskDraft(NamedTuple):
    """A task for one kind of media of a source."""

    candidate: Candidate
    source: dict[str, Any]  # as in the recipe, before rows are held out; with a root if paths need one
    table: Table
    media: MediaColumn
    text: TextColumn | None
    label: LabelColumn | None
    by_use: dict[str, list[str]]  # the names of columns; see `NAMES`. "path": those with names of media files

    @property
    def columns(self) -> list[str]:
        """The columns that the task reads."""
        return [column.name for column in (self.media, self.text, self.label) if column]


def inspect(
    candidate: Candidate, chosen_text: str | None, chosen_label: str | None
) -> tuple[list[TaskDraft], list[str]]:
    """The tasks of a source, one for each kind of media, and notes on what is not used.

    `chosen_text` and `chosen_label` are the columns to use. By default, the names of the columns tell.

    Raises:
        UserError: the source cannot be read, lacks a chosen column, or has nothing to train on.
    """
    chosen = [name for name in (chosen_text, chosen_label) if name]
    source, table, first_rows = _open_with_root(candidate, chosen)
    notes: list[str] = []
    media = _media_columns(table, first_rows, notes)
    plain_columns = [name for name, values in first_rows.items() if not _are_media(values)]
    if candidate.kind:  # The other columns of a folder are parts of the paths of its files.
        plain_columns = [name for name in plain_columns if name in ("text", "label")]
    by_use = _by_use(plain_columns)
    by_use["path"] = [name for name, values in first_rows.items() if _are_paths(values)]
    texts = _text_columns(table, [chosen_text] if chosen_text else by_use["text"], notes)
    if chosen_text and not texts:
        raise UserError("; ".join([f"--text {shown(chosen_text)}: the column holds no texts", *notes]))
    # The chosen texts are the classes only if no other column is.
    class_columns = [name for name in by_use["class"] if name != chosen_text] or by_use["class"]
    min_rows_per_class = dict.fromkeys([chosen_label] if chosen_label else class_columns, ROWS_PER_CLASS)
    if not chosen:
        # Texts that repeat often are the names of classes.
        repeated = (
            text.name for text in texts if ROWS_PER_NAME * text.distinct <= len(text.sample) and not text.has_lists
        )
        min_rows_per_class |= dict.fromkeys(repeated, ROWS_PER_NAME)
    label = _class_column(table, min_rows_per_class, notes, is_chosen=chosen_label is not None)
    if chosen_label and label is None:
        raise UserError(f"--label: {'; '.join(notes)}")
    # A column in `min_rows_per_class` may hold classes, so its texts are not used.
    usable_texts = [text for text in texts if text.name not in min_rows_per_class]
    text = next(iter(usable_texts), None)
    if text and not chosen_text:
        text = text._replace(others=_numbered_alike(text.name, [other.name for other in usable_texts]))
    if text and text.bad > MAX_WITHOUT_TEXT and not chosen_text and label and not label.are_numbers:
        notes.append(
            f"{shown(text.name)}: {text.bad:.0%} of the rows have none, so the classes are the texts; "
            f"openimp init --text {shown(text.name)} trains on the others only"
        )
        plain_columns = [name for name in plain_columns if name != text.name]
        text = None
    if not media:
        notes += _why_no_media(candidate, table, first_rows)
        raise UserError("; ".join([*notes, _what_to_add(candidate, media, plain_columns)]))
    if not (text or label):
        notes_explain = notes and (by_use["text"] or by_use["class"])
        if not notes_explain:
            notes.append(_what_to_add(candidate, media, plain_columns))
        raise UserError("; ".join(notes))
    if text is None and label and not label.are_numbers:
        text = _names_of_classes(label)
    tasks = [
        TaskDraft(candidate, source, table, media=column, text=text, label=label, by_use=by_use) for column in media
    ]
    used_columns = {*tasks[0].columns, *(text.others if text else ()), *by_use["split"], *by_use["group"], "__key__"}
    # Columns without a name, such as the index of a table from pandas, are not listed.
    if unused := [name for name in plain_columns if name and name not in used_columns]:
        notes.append(f"columns {_listed(unused)}")
    return tasks, notes


def _open_with_root(candidate: Candidate, chosen: list[str]) -> tuple[dict[str, Any], Table, dict[str, list[Any]]]:
    """A source with its `root` (see `with_root`), its table, and the values of its first rows.

    UserError if a column of `chosen` is missing or has a name that recipes cannot use.
    """
    table = open_candidate(candidate.source)
    table.require(chosen)
    for name in chosen:
        if NOT_IN_TEMPLATES.search(name):
            raise UserError(f"{shown(name)}: rename the column; one with braces, * or outer spaces cannot be used")
    first_rows = sample(table, table.columns, PROBED_ROWS)
    source = with_root(candidate.source, table, first_rows, candidate.folder)
    if source is not candidate.source:
        table = open_candidate(source)
    return source, table, first_rows


def _names_of_classes(label: LabelColumn) -> TextColumn:
    """The names of classes as the texts of a task."""
    names = [as_text(name)[:MAX_LENGTH] for name in label.classes]
    # Each name twice: `sizing` takes words for tokens if they occur in several texts, and a class has several rows.
    return TextColumn(label.name, [*names, *names], 0, 0.0, False)


def _why_no_media(candidate: Candidate, table: Table, first_rows: dict[str, list[Any]]) -> list[str]:
    """Columns of a table without media that may be meant to name some, and what is wrong with them."""
    reasons = []
    if not candidate.kind and (column := _names_without_extension(table, first_rows)):
        reasons.append(f"{shown(column)} has names of files without their extension; add it, as in cat.jpg")
    if columns := [name for name, values in first_rows.items() if _are_urls(values)]:
        reasons.append(f"{shown(columns[0])} has URLs; download the files, and name them in this column")
    return reasons


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


def with_root(
    source: dict[str, Any], table: Table, first_rows: dict[str, list[Any]], named_folder: str
) -> dict[str, Any]:
    """The source; if the paths in its rows do not start at the table's folder, with the folder where they start.

    Tries the table's folder and its subfolders and, if the user named a folder, that folder and its subfolders.
    """
    path = os.path.expanduser(source.get("path", ""))
    if table.root is None or not path or os.path.isdir(path):
        return source
    columns = [values for values in first_rows.values() if _are_paths(values)]
    paths = [value for values in columns for value in values if isinstance(value, str)]
    own_folder = folder_of_pattern(path)
    roots = _with_subfolders(own_folder)
    if named_folder:
        roots += _with_subfolders(Path(named_folder))
    files_in = {root: sum(_exists(root, file) for file in paths) for root in roots}
    best = [root for root in roots if files_in[root] == max(files_in.values())]
    if own_folder in best:
        return source
    # The same names may be in several folders: train.csv then names the files in train/.
    words = re.split(r"\W+|_", Path(path).stem.lower())
    root = next((root for root in best if root.name.lower() in words), best[0])
    return {**source, "root": str(root)}


def _exists(root: Path, path: str) -> bool:
    try:
        inside(root, path)
    except BadMedia:
        return False
    return True


def _are_paths(values: Sequence[Any]) -> bool:
    """Whether most values are names of media files. URLs do not count."""
    endings = [Path(value).suffix.lower() for value in values if isinstance(value, str) and "://" not in value]
    return 2 * sum(ending in KIND_OF for ending in endings) > len(values)


def _are_urls(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and is_url(value) for value in values)


def _are_media(values: Sequence[Any]) -> bool:
    """Whether values are bytes, `{bytes, path}` or names of media files."""
    has_bytes = any(
        isinstance(value, bytes) or (isinstance(value, dict) and value.keys() & {"bytes", "path"}) for value in values
    )
    return has_bytes or _are_paths(values)


def _with_subfolders(folder: Path) -> list[Path]:
    """A folder and the first folders in it, where the paths in a table may start."""
    return [folder, *(folder / name for name in subfolders(folder)[:MAX_ROOTS])]


def _names_without_extension(table: Table, first_rows: dict[str, list[Any]]) -> str | None:
    """The first column whose first value is the name of a media file near the table, without its extension."""
    roots = [] if table.root is None else _with_subfolders(table.root)
    for column, values in first_rows.items():
        stem = str(values[0])
        may_be_name = isinstance(values[0], str | int) and 0 < len(stem) < MAX_NAME
        if may_be_name and any((root / f"{stem}{ending}").is_file() for root in roots for ending in KIND_OF):
            return column
    return None


def _media_columns(table: Table, first_rows: dict[str, list[Any]], notes: list[str]) -> list[MediaColumn]:
    """The first column of each kind of media. Notes tell why others are not used."""
    columns: dict[str, MediaColumn] = {}
    for name, values in first_rows.items():
        if not _are_media(values):
            continue
        probed = []
        problem = ""
        for value in values:
            try:
                probed.append(probe(table.media(value)))
            except BadMedia as error:
                problem = problem or str(error)
        kind = Counter(media.kind for media in probed).most_common(1)[0][0] if probed else "image"
        of_kind = [media for media in probed if media.kind == kind]
        if len(of_kind) < len(probed):
            problem = problem or "it mixes kinds of media"
        if 2 * len(of_kind) <= len(values):
            if os.strerror(errno.ENOENT) in problem or "leaves the folder" in problem:
                problem += "; if the files are in another folder, name a folder above both, or move the table there"
            notes.append(f"{shown(name)}: most of its files cannot be used: {shown(problem, limit=500)}")
        elif kind in columns:
            notes.append(f"{shown(name)}: {shown(columns[kind].name)} has {kind} too")
        else:
            columns[kind] = MediaColumn(name, kind, of_kind, 1 - len(of_kind) / len(values), problem)
    return list(columns.values())


def _by_use(names: Sequence[str]) -> dict[str, list[str]]:
    """The columns of each use, the best name first. A template cannot name columns with braces, * or outer spaces."""
    words_of = {name: re.split(r"[^a-z0-9]+", name.lower()) for name in names if not NOT_IN_TEMPLATES.search(name)}
    by_use = {}
    for use, words in NAMES.items():
        by_use[use] = list(dict.fromkeys(name for word in words for name in words_of if word in words_of[name]))
        for name in by_use[use]:
            del words_of[name]
    return by_use


def _text_columns(table: Table, names: Sequence[str], notes: list[str]) -> list[TextColumn]:
    columns = []
    for name, values in sample(table, names, SAMPLED_ROWS).items():
        if unreadable := [value for value in values if isinstance(value, Unreadable)]:
            count = f"{len(unreadable):,} of {counted(len(values), 'row')}"
            notes.append(f"{shown(name)}: {count} cannot be read: {shown(unreadable[0].reason, limit=500)}")
        texts_of_rows = [_items(value) for value in values]
        present = [value for value, texts_of_row in zip(values, texts_of_rows) if texts_of_row]
        texts = [text for texts_of_row in texts_of_rows for text in texts_of_row]
        if all(isinstance(text, str) for text in texts) and not all(map(_is_number, texts)):
            distinct = len({item_key(value) for value in present})
            texts = [" ".join(text[:MAX_LENGTH].split()) for text in texts]
            has_lists = any(isinstance(value, list) for value in present)
            columns.append(TextColumn(name, texts, distinct, 1 - len(present) / len(values), has_lists))
        elif any(isinstance(text, dict) for text in texts):
            notes.append(f"{shown(name)}: holds objects with keys, not texts; make each key a column of its own")
    return columns


def _numbered_alike(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """The other names that differ from a name only in the number at its end."""

    def common_part(name: str) -> str:
        return re.sub(r"\d+$", "", name)

    return tuple(other for other in names if other != name and common_part(other) == common_part(name))


def _items(value: Any) -> list[Any]:
    """The values in a cell that are not empty: those of its list, or the cell itself."""
    if isinstance(value, Unreadable):
        return []
    items = value if isinstance(value, list) else [value]
    return [item for item in items if item is not None and item != ""]


def _class_column(
    table: Table, min_rows_per_class: dict[str, int], notes: list[str], is_chosen: bool
) -> LabelColumn | None:
    """The first column that has classes, preferably with names.

    `min_rows_per_class` has the fewest rows per class, on average, for each column to look at. If the user chose the
    column (`is_chosen`), texts of digits are names too.
    """
    columns = []
    for name, rows_per_class in min_rows_per_class.items():
        cells = table.column(name)
        values = [value for value in cells if not isinstance(value, Unreadable)]
        are_classes = all(isinstance(value, str | int) and value != "" for value in values)
        classes = list(dict.fromkeys(values)) if are_classes else []
        if 2 <= len(classes) <= len(values) / rows_per_class:
            are_names = is_chosen and all(isinstance(value, str) for value in classes)
            are_numbers = not are_names and all(
                isinstance(value, bool) or _is_number(as_text(value)) for value in classes
            )
            columns.append(LabelColumn(name, classes, are_numbers))
        else:
            notes.append(f"{shown(name)}: {_why_no_classes(cells, rows_per_class)}")
    return min(columns, key=lambda column: column.are_numbers, default=None)


def _why_no_classes(cells: list[Any], rows_per_class: int) -> str:
    """Why the cells of a column are no classes."""
    if any(isinstance(cell, list) for cell in cells):
        return "has lists; for rows of several classes, write the task yourself, with loss: sigmoid (docs/data.md)"
    empty_rows = [row for row, cell in enumerate(cells, 1) if cell is None or cell == ""]
    if 0 < len(empty_rows) < len(cells) / 2:
        count = f"{len(empty_rows):,} of {counted(len(cells), 'row')}"
        return f"{count} without a class, the first: row {empty_rows[0]}; give it a class, or remove the row"
    return (
        f"expected a class (a text, a whole number, or true or false) in every row, at least two classes, and "
        f"{rows_per_class} rows per class"
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _what_to_add(candidate: Candidate, media: list[MediaColumn], others: list[str]) -> str:
    """What a source lacks."""
    if candidate.kind:
        return (
            f"no text or class says what is in its {candidate.kind} files; add subfolders, one for each of several "
            "classes; captions (a.txt beside a.jpg); or a table of files and texts. If the names of the files begin "
            "with their class, as in cat.12.jpg, use --label prefix"
        )
    if not media:
        return f"no column holds media; the others are {_listed(others)}"
    if Path(media[0].name).suffix.lower() in KIND_OF:
        return f"its first line looks like a row ({shown(media[0].name)}); write a line with names of columns above it"
    return (
        f"{shown(media[0].name)} has {media[0].kind}, but no other column ({_listed(others)}) has texts or classes and "
        f"a name like {', '.join(NAMES['text'][:3])} or {', '.join(NAMES['class'][:2])} (docs/init.md has all); name "
        "one with openimp init --text COLUMN or --label COLUMN"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:20])) or "none"
