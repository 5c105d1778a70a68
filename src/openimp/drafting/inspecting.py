"""Finds out, from a sample of its rows, which columns of a source hold media, texts and classes."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.common.folders import visible
from openimp.common.modality import BadMedia
from openimp.common.schema import checked
from openimp.data.files import inside
from openimp.data.folders import FolderTable
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.drafting.columns import Column, describe
from openimp.drafting.finding import KIND_OF, Candidate, shown
from openimp.drafting.probing import Kind, Probed, probe
from openimp.recipe.tasks import Source

PROBED_ROWS = 32
"""Rows that decide whether a column holds media; their media are probed."""
SAMPLED_ROWS = 10_000
"""Rows that decide whether a column holds texts or classes."""
MIN_SHARE_OF_KIND = 0.95
"""Share of a column's media that must be of one kind. The others would be bad examples in training."""
MAX_ROOTS = 20
"""Folders that are tried as the root of relative paths."""


@dataclass
class MediaColumn:
    """One kind of media in a column."""

    column: str
    kind: Kind
    sample: list[Probed]
    unreadable: float = 0.0  # share of the sample
    extensions: list[str] = field(default_factory=list)  # in a folder with other files, those of this kind


@dataclass
class Inspected:
    """A source, and what its columns hold."""

    candidate: Candidate
    source: dict[str, Any]  # as in the recipe; with a root if paths need one
    table: Table
    media: list[MediaColumn]
    columns: list[Column]
    files: frozenset[str]  # resolved folders of sampled files that paths in the rows name

    def using(self, use: str) -> list[Column]:
        """The columns with a use, those with a telling name first."""
        return sorted((column for column in self.columns if column.use == use), key=lambda column: not column.hinted)


def open_candidate(source: dict[str, Any], name: str = "data") -> Table:
    """Opens a source whose paths are relative to the current folder."""
    table = open_source(name, checked(Source, source, f"source {name}", Path.cwd()))
    assert isinstance(table, Table)
    return table


def inspect(candidate: Candidate) -> Inspected:
    """Opens a source and judges each of its columns.

    Raises:
        UserError: the source cannot be read.
    """
    source, table = dict(candidate.source), open_candidate(candidate.source)
    first = sample(table, table.columns, PROBED_ROWS)
    paths = [name for name, values in first.items() if not isinstance(table, FolderTable) and _are_paths(values)]
    named = [value for name in paths for value in first[name] if isinstance(value, str)]
    if "path" in source and (root := _root(table, candidate.below, named)):
        source["root"], table = root, open_candidate({**source, "root": root})
    media: list[MediaColumn] = []
    columns: list[Column] = []
    for name, values in first.items():
        if isinstance(table, FolderTable) and name == "file":
            media += _by_extension(table)
        elif name == "__key__" or (isinstance(table, FolderTable) and name == "extension"):
            continue
        elif name in paths or any(isinstance(value, bytes | dict) for value in values):
            found = _media(table, name, values)
            media += [found] if isinstance(found, MediaColumn) else []
            columns += [found] if isinstance(found, Column) else []
        else:
            is_stem = isinstance(table, FolderTable) and name == "name"
            column = describe(name, sample(table, [name], SAMPLED_ROWS)[name], is_stem)
            columns += [column] if column.use == "text" or not is_stem else []
    return Inspected(candidate, source, table, media, columns, _folders(table, named))


def with_root(source: dict[str, Any], columns: Sequence[str], below: str) -> dict[str, Any]:
    """A source, with the root of the paths in these columns if that is not its own folder; see `_root`."""
    try:
        table = open_candidate(source)
        table.require(columns)
    except UserError:  # Whoever uses it is told.
        return source
    values = sample(table, columns, PROBED_ROWS).values()
    root = _root(table, below, [value for some in values for value in some if isinstance(value, str)])
    return {**source, "root": root} if root else source


def sample(table: Table, columns: Sequence[str], count: int) -> dict[str, list[Any]]:
    """The values of columns in evenly spaced rows."""
    spaced = np.arange(min(count, len(table))) * len(table) // min(count, len(table))
    rows = table.rows(spaced.tolist(), columns)
    return {column: [row[column] for row in rows] for column in columns}


def _are_paths(values: Sequence[Any]) -> bool:
    """Whether most values are names of media files."""
    texts = [value for value in values if isinstance(value, str) and value]
    named = sum(Path(text).suffix.lower() in KIND_OF and "://" not in text for text in texts)
    return 2 * named > len(texts) and all(isinstance(value, str | None) for value in values)


def _root(table: Table, below: str, paths: list[str]) -> str | None:
    """The folder to which the paths are relative, if it is not the file's own: a folder beside the file, or its parent
    if that is in the folder `below` that the user named. Data must not reach other folders.

    None: the file's own folder, or none of these.
    """
    base = table.root
    if base is None or not paths or any(_exists(base, path) for path in paths):
        return None
    beside = [base / entry.name for entry in visible(base) if entry.is_dir()][:MAX_ROOTS]
    parent = (base / "..").resolve()
    above = [parent] if below and parent.is_relative_to(Path(below).resolve()) else []
    for root in (*beside, *above):
        if any(_exists(root, path) for path in paths):
            root = root.resolve()
            return str(root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root)
    return None


def _exists(root: Path, path: str) -> bool:
    try:
        return inside(root, path).is_file()
    except BadMedia:
        return False


def _folders(table: Table, paths: list[str]) -> frozenset[str]:
    """All folders in which the files lie, resolved."""
    root = table.root
    if root is None:
        return frozenset()
    files = [inside(root, path) for path in paths if _exists(root, path)]
    return frozenset(str(parent) for file in files for parent in file.parents)


def _probe_all(table: Table, values: Sequence[Any]) -> tuple[list[Probed], Counter[str]]:
    """The readable values probed, and the reasons why others are not readable. Missing values do not count."""
    found, reasons = [], Counter[str]()
    for value in values:
        if value in (None, "", b"", []):
            continue
        try:
            found.append(probe(table.media(value)))
        except BadMedia as error:
            reasons[str(error)] += 1
    return found, reasons


def _media(table: Table, name: str, values: Sequence[Any]) -> MediaColumn | Column:
    if any(isinstance(value, dict) and not value.keys() & {"bytes", "path"} for value in values):
        return Column(name, "none", "it holds objects, neither media nor texts")
    found, reasons = _probe_all(table, values)
    if not found:
        why = reasons.most_common(1)[0][0] if reasons else "it is empty"
        return Column(name, "none", f"none of its files can be read: {shown(why, limit=200)}")
    ((kind, count),) = Counter(each.kind for each in found).most_common(1)
    if count < MIN_SHARE_OF_KIND * len(found):
        kinds = " and ".join(sorted({each.kind for each in found}))
        return Column(name, "none", f"it mixes {kinds}; write one table for each")
    unreadable = (len(values) - count) / len(values)  # Rows without a value count.
    return MediaColumn(name, kind, [each for each in found if each.kind == kind], unreadable)


def _by_extension(table: FolderTable) -> list[MediaColumn]:
    """The kinds of media in a folder. If it holds several, or other files, each lists its `extensions`."""
    extensions = table.column("extension")
    rows = defaultdict(list)
    for row, extension in enumerate(extensions):
        rows[extension].append(row)
    probed: dict[str, list[Probed]] = {}
    broken = Counter[str]()
    for extension, numbers in rows.items():
        chosen = numbers[:: max(1, len(numbers) // PROBED_ROWS)][:PROBED_ROWS] if f".{extension}" in KIND_OF else []
        found, reasons = _probe_all(table, [row["file"] for row in table.rows(chosen, ["file"])])
        broken[extension] = reasons.total()
        if found:
            probed[extension] = found
    by_kind = defaultdict(list)
    for extension, found in probed.items():
        by_kind[Counter(each.kind for each in found).most_common(1)[0][0]].append(extension)
    media = []
    for kind, own in by_kind.items():
        examples = [each for extension in own for each in probed[extension] if each.kind == kind]
        bad = sum(broken[extension] for extension in own)
        only = sorted(own) if len(rows) > len(own) else []
        media.append(MediaColumn("file", kind, examples, bad / (bad + len(examples)), only))
    return media


def loose_files(data: Inspected) -> Counter[str]:
    """The number of media files beside the subfolders of a folder with one per class, by extension."""
    table = data.table
    if not isinstance(table, FolderTable) or table.root is None or "label" not in table.columns:
        return Counter()
    endings = (os.path.splitext(entry.name)[1].lower() for entry in visible(table.root) if entry.is_file())
    return Counter(ending for ending in endings if ending in KIND_OF)


def unreadable(error: UserError | OSError) -> str:
    """The text of an error in one line, without the placeholder name of the source."""
    text = re.sub(r"^source data \((.+?)\):? ", r"\1: ", str(error))
    return shown(text.removeprefix("source data: ").removeprefix("source data "), limit=400)
