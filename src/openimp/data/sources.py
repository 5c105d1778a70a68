"""Opens sources (folders, manifests, Parquet files, WebDataset tars and hub data sets) as tables or streams of rows."""

import os
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.data import hub
from openimp.data.files import fingerprint, is_url, locate
from openimp.data.folders import open_folder
from openimp.data.streams import Shards, Stream
from openimp.data.tables import Table
from openimp.data.tars import TarShards
from openimp.recipe.tasks import Source

FORMATS = {".csv": "manifest", ".json": "manifest", ".jsonl": "manifest", ".parquet": "parquet", ".tar": "webdataset"}


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
    if is_url(path) and kind not in ("parquet", "webdataset"):
        raise UserError(f"source {name}: {path}: a {kind} source must be on disk")
    base, files = locate(name, path)
    if kind == "webdataset":
        raise UserError(
            f"source {name}: {path}: tars are read as a stream: set stream: true, or convert them to Parquet, which "
            "docs/data.md shows"
        )
    root = Path(source.root) if source.root else base
    if kind == "folder":
        return open_folder(name, path, base)
    if kind == "manifest":
        from openimp.data.manifests import open_manifest

        return open_manifest(name, path, files, base, root)
    return open_parquet(name, path, files, base, root)


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


def open_parquet(name: str, path: str, files: list[str], base: Path, root: Path) -> Table:
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
    return Table(name, path, data.data, content, root, counts, hub.class_names(data.features))
