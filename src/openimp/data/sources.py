"""Opens sources (folders, manifests, Parquet files, WebDataset tars and hub data sets) as tables or streams of rows."""

import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.common.names import is_url
from openimp.data import hub
from openimp.data.files import fingerprint, locate
from openimp.data.folders import open_folder
from openimp.data.manifests import read_manifests
from openimp.data.streams import Shards, Stream
from openimp.data.tables import Table
from openimp.data.tars import TarShards
from openimp.recipe.tasks import Source

FORMATS = {
    **dict.fromkeys((".csv", ".tsv", ".json", ".jsonl"), "manifest"),
    ".parquet": "parquet",
    ".tar": "webdataset",
}


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
    return table.keep_where(source.where).keep_part(source.part).keep_at_most(source.limit)


def _open_table(name: str, source: Source) -> Table:
    if source.hub:
        row_prefix = f"{source.hub}/{source.split}"
        return hub.as_table(name, source.hub, hub.load(name, source), row_prefix, hub.hub_root(source))
    path, file_format = _path_and_format(name, source)
    if is_url(path) and file_format in ("folder", "manifest"):
        raise UserError(f"source {name}: {path}: a {file_format} source must be on disk")
    base, files = locate(name, path)
    root = _root(source, base)
    if file_format == "webdataset":
        raise UserError(
            f"source {name}: {path}: tars are read only as a stream (stream: true in a recipe); convert them to "
            "Parquet, as docs/data.md shows"
        )
    if file_format == "folder":
        if source.root:
            raise UserError(f"source {name}: {path}: root is for paths in tables; remove it")
        return open_folder(name, path)
    content = partial(fingerprint, base, files)
    file_names = [Path(file).name for file in files]
    if file_format == "manifest":
        rows, rows_by_file = read_manifests(name, path, files)
        return Table(name, path, rows, content, root, files=[*zip(file_names, rows_by_file)])
    from openimp.data import parquet  # It imports `datasets`, which takes almost a second.

    if is_url(path):
        return hub.as_table(name, path, parquet.load(name, path, files, streaming=False), path, root)
    rows_by_file = [parquet.count_rows(name, file) for file in files]
    if not any(rows_by_file):
        raise UserError(f"source {name} ({path}) has no rows")
    data = parquet.load(name, path, files, streaming=False)
    texts = hub.class_texts(data.features)
    return Table(name, path, data.data, content, root, files=[*zip(file_names, rows_by_file)], text_functions=texts)


def _open_stream(name: str, source: Source, seed: int) -> Stream:
    shards: Shards
    where = source.where
    if source.hub:
        path = source.hub
        root: Path | None = hub.hub_root(source)
        shards = hub.HubShards(name, path, hub.load(name, source))
        revision = [source.revision] if source.revision else []
        content = partial(stable_hash, [path, source.config, source.split, where, len(shards), *revision])
    else:
        path, file_format = _path_and_format(name, source)
        base, files = locate(name, path)
        root = _root(source, base)
        if file_format == "webdataset":
            shards = TarShards(name, files)
        elif file_format == "parquet":
            from openimp.data import parquet

            file_names = [Path(file).name for file in files]
            shards = hub.HubShards(name, path, parquet.load(name, path, files, streaming=True), file_names)
        else:
            raise UserError(f"source {name}: {path}: a {file_format} source cannot be streamed; remove stream")
        content = partial(_shards_fingerprint, base, files, where)
    return Stream(name, path, shards, root, content, source=source, seed=seed)


def _root(source: Source, base: Path) -> Path | None:
    """The folder of the paths in a source. A table at a URL must not name files of the current folder."""
    if source.root:
        return Path(source.root)
    assert source.path is not None
    return None if is_url(source.path) else base


def _shards_fingerprint(base: Path, files: list[str], where: dict[str, Any]) -> str:
    """Hash of the shards and of the filter `where`. Of shards at URLs, only the names count."""
    return stable_hash([files if is_url(files[0]) else fingerprint(base, files, whole=False), where])


def _path_and_format(name: str, source: Source) -> tuple[str, str]:
    """The source's path, and its format: from the recipe or, by default, from the path's extension."""
    path = source.path
    assert path is not None
    extension = Path(urlsplit(path).path if is_url(path) else path).suffix.lower()
    file_format = source.format or ("folder" if os.path.isdir(path) else FORMATS.get(extension))
    if file_format is None:
        if not is_url(path):
            locate(name, path)  # The likelier mistake is a path that does not exist.
        known = ", ".join(FORMATS)
        raise UserError(
            f"source {name}: {path}: unknown extension {extension!r}; known: {known}; for others set format"
        )
    return path, file_format
