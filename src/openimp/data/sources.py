"""Opens sources (folders, manifests, Parquet files, WebDataset tars and hub data sets) as tables or streams of rows."""

import csv
import json
import os
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openimp.common.errors import UserError, counted
from openimp.data import hub
from openimp.data.files import fingerprint, is_url, locate, stable_hash
from openimp.data.folders import open_folder
from openimp.data.streams import Shards, Stream
from openimp.data.tables import ArrowTable, Table
from openimp.data.tars import TarShards
from openimp.recipe.tasks import Source

FORMATS = {".csv": "manifest", ".json": "manifest", ".jsonl": "manifest", ".parquet": "parquet", ".tar": "webdataset"}
CHUNK = 10_000
"""Rows of a manifest that are converted to Arrow at once."""


def open_source(name: str, source: Source, seed: int = 0) -> Table | Stream:
    """Opens a source of the recipe, as a stream if it says so, else as a table of the rows that it selects.

    `seed` determines the order of a stream.
    """
    try:
        if source.stream:
            return _open_stream(name, source, seed)
        table = _open_table(name, source)
    except OSError as error:
        raise UserError(f"source {name}: {source.path or source.hub}: {error.strerror or error}") from None
    if not len(table):
        raise UserError(f"source {name} ({table.path}) has no rows")
    return table.filter(source.where).select(source.part).subsample(source.limit)


def _open_table(name: str, source: Source) -> Table:
    if source.hub:
        data, root = hub.load(name, source), hub.hub_root(source)
        return hub.as_table(name, source.hub, data, f"{source.hub}/{source.split}", root)
    path, kind = _path_and_format(name, source)
    if is_url(path) and kind != "parquet":
        hint = "; set stream: true" if kind == "webdataset" else ""
        raise UserError(f"source {name}: {path}: a {kind} source must be on disk to be read as a table{hint}")
    base, files = locate(name, path)
    root = Path(source.root) if source.root else base
    if kind == "folder":
        return open_folder(name, path, base)
    if kind == "manifest":
        return open_manifest(name, path, files, base, root)
    if kind == "parquet":
        return open_parquet(name, path, files, base, root)
    from openimp.data.tar_tables import TarTable  # It imports pyarrow, which only some sources need.

    return TarTable(name, path, files, base)


def _open_stream(name: str, source: Source, seed: int) -> Stream:
    shards: Shards
    where = dict(source.where)
    if source.hub:
        path, root = source.hub, hub.hub_root(source)
        shards = hub.HubShards(name, path, hub.load(name, source))
        revision = [source.revision] if source.revision else []
        content = partial(stable_hash, [path, source.config, source.split, where, len(shards), *revision])
    else:
        path, kind = _path_and_format(name, source)
        base, files = locate(name, path)
        root = Path(source.root) if source.root else base
        if kind == "webdataset":
            shards = TarShards(name, files)
        elif kind == "parquet":
            labels = [file.rsplit("/", 1)[-1] for file in files]
            shards = hub.HubShards(name, path, hub.load_parquet(name, path, files, streaming=True), labels)
        else:
            raise UserError(f"source {name}: {path}: a {kind} source cannot be streamed; remove stream")
        content = partial(stable_hash, [files, where]) if is_url(path) else partial(_streamed, base, files, where)
    return Stream(name, path, shards, root, source, seed, content)


def _streamed(base: Path, files: list[str], where: dict[str, Any]) -> str:
    return stable_hash([fingerprint(base, files), where])


def _path_and_format(name: str, source: Source) -> tuple[str, str]:
    """The source's path and its format: that of the recipe or, by default, of the path's extension."""
    path = source.path
    assert path is not None
    ending = Path(urlsplit(path).path if is_url(path) else path).suffix.lower()
    kind = source.format or ("folder" if os.path.isdir(path) else FORMATS.get(ending))
    if kind is None:
        if not ending or not is_url(path):
            locate(name, path)  # A path that does not exist is the likelier mistake.
        known = ", ".join(FORMATS)
        raise UserError(f"source {name}: {path}: unknown extension {ending!r}; known: {known}; for others set format")
    return path, kind


def open_manifest(name: str, path: str, files: list[str], base: Path, root: Path) -> ArrowTable:
    """CSV files, or JSON Lines or JSON lists of objects; columns that hold paths start at `root`.

    The cells of a CSV file are text, and an empty one is missing. Read by hand, for `datasets` guesses the type of a
    column from some of its rows: "007" becomes 7, a caption "None" is lost, and what looks like a date becomes one.
    """
    import pyarrow as pa

    parts: list[Any] = []
    counts: list[tuple[str, int]] = []
    for file in files:
        before = sum(part.num_rows for part in parts)
        rows = read_csv(file) if Path(file).suffix.lower() == ".csv" else read_json(file)
        try:
            while chunk := list(islice(rows, CHUNK)):
                parts.append(_to_arrow(chunk))
        except UnicodeDecodeError:
            raise UserError(f"source {name}: {file}: is not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"source {name}: {file}: {error}") from None
        counts.append((Path(file).name, sum(part.num_rows for part in parts) - before))
    if not parts:
        raise UserError(f"source {name} ({path}) has no rows")
    try:
        data = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"source {name}: {path}: a column mixes types: {error}") from None
    return ArrowTable(name, path, data, partial(fingerprint, base, files), root, counts)


def read_csv(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header; any other file is a ValueError.

    Its message names the line. A row that spans several lines has the first one's number.
    """
    with open(file, encoding="utf-8-sig", newline="") as handle:  # -sig: Excel puts a byte order mark first
        lines = csv.reader(handle)
        try:
            header = next(lines, [])
            if len(header) == 1 and re.search("[;\t|]", header[0]):
                raise ValueError(f"the header {header[0]!r} has no comma; write the columns separated by commas")
            if len(set(header)) < len(header):
                raise ValueError(f"the header names a column twice: {', '.join(header)}")
            end = lines.line_num
            for cells in lines:
                line, end = end + 1, lines.line_num
                if len(cells) > len(header):
                    raise ValueError(f"line {line} has {counted(len(cells), 'cell')}, the header {len(header)}")
                if cells:
                    yield dict.fromkeys(header) | {column: cell or None for column, cell in zip(header, cells)}
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from None


def read_json(file: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, or of a file with one object per line; any other file is a ValueError.

    Its message names the line or the item. A list that is nested too deeply is a RecursionError.
    """
    with open(file, encoding="utf-8-sig") as handle:
        is_list = handle.read(1) == "["
        handle.seek(0)
        for number, row in enumerate(json.load(handle) if is_list else handle, 1):
            if not is_list and not row.strip():
                continue
            try:
                found = row if is_list else json.loads(row.rstrip())
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
            except RecursionError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(found, dict):
                raise ValueError(f"{'item' if is_list else 'line'} {number} is not a JSON object")
            yield found


def _to_arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    arrays = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        try:
            arrays[column] = pa.array([row.get(column) for row in rows])
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"column {column!r} mixes types: {error}") from None
    return pa.table(arrays)


def open_parquet(name: str, path: str, files: list[str], base: Path, root: Path) -> ArrowTable:
    """Opens Parquet files, which `datasets` unpacks once into a memory-mapped Arrow file in openimp's cache folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if is_url(path):
        return hub.as_table(name, path, hub.load_parquet(name, path, files, streaming=False), path, root)
    counts: list[tuple[str, int]] = []
    for file in files:
        try:
            counts.append((Path(file).name, pq.read_metadata(file).num_rows))
        except pa.ArrowException as error:
            raise UserError(f"source {name}: {file} is not a readable Parquet file: {hub.first_line(error)}") from None
    if not sum(rows for _, rows in counts):
        raise UserError(f"source {name} ({path}) has no rows")
    data = hub.load_parquet(name, path, files, streaming=False)
    content = partial(fingerprint, base, files)
    return ArrowTable(name, path, data.data, content, root, counts, hub.class_names(data.features))
