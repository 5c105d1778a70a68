"""`Index`: answers queries over indexed media."""

import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from openimp.checkpoint.folder import find_model
from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia
from openimp.common.safe_files import refuse_links
from openimp.data.tables import Table
from openimp.data.trust import check_uses
from openimp.encoding.items import embed
from openimp.inference.model import Model, load
from openimp.search.folder import INDEX_FILES, Metadata, read_metadata
from openimp.search.media import file_state, row_media, source_table
from openimp.search.query import EncodedQuery, Hit, Like, Query, QueryPart
from openimp.search.spaces import Space, fingerprint, shared_space, towards_space
from openimp.search.table import SHOWN, Items, any_of, below, quoted


class Index:
    """An open index. Its methods may be called from any thread; calls that encode a query take turns.

    It shows the state of the index at the time when it was opened.

    Attributes:
        model: the model that embedded the items. It encodes queries.
        folder: where the index is.
    """

    def __init__(self, folder: Path, model: Model, about: Metadata, allow_sources: bool = False) -> None:
        self.folder, self.model = folder, model
        self._allow_sources = allow_sources
        self._about, self._items = about, Items(folder)
        self._sources: dict[str, Table] = {}
        self._encoding, self._reading = threading.Lock(), threading.Lock()

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of items by modality, without modalities that have none."""
        counts = {name: self._items.table.count_rows(f"modality = {quoted(name)}") for name in self._about.towards}
        return {name: count for name, count in counts.items() if count}

    @cached_property
    def folders(self) -> list[str]:
        """Useful values of `under`: the sources, and the folders directly below the common parent of all files."""
        sources, folders = self._items.places()
        top = os.path.commonpath(folders) if folders else ""
        names = {folder[len(top) :].strip(os.sep).split(os.sep)[0] for folder in folders} - {""}
        return [*sorted(sources), *sorted(os.path.join(top, name) for name in names)]

    def search(
        self,
        queries: str | QueryPart | Sequence[str | QueryPart],
        k: int = 20,
        modalities: Sequence[str] | None = None,
        under: str | Path | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Returns the `k` items that are closest to the weighted sum of the queries, the best first.

        Of a file that was cut into segments, only the best segment is returned, unless `under` is that file.

        Args:
            queries: one or several. A string is a text. Items that are part of the query are not returned.
            k: number of results at most.
            modalities: only items of these modalities. None: all that can be compared with the queries.
            under: only this file, files in this folder, or rows of the source of this name.
            min_score: only items with at least this cosine.

        Raises:
            UserError: a query cannot be read, or no item can be compared with it.
        """
        given = [queries] if isinstance(queries, str | QueryPart) else queries
        parts = [self.text_query(part) if isinstance(part, str) else part for part in given]
        if not parts:
            raise UserError("the query is empty: give a text or a file")
        for name in modalities or ():
            if name not in self.counts:
                raise UserError(f"{self.folder}: has no items of modality {name!r}{nearest(name, self.counts)}")
        where = [f"NOT {any_of('id', ids)}"] if (ids := [part.id for part in parts if isinstance(part, Like)]) else []
        if under is not None:
            where.append(self._below(under))
        found = []
        for space, names in self._spaces(modalities or self.counts).items():
            vector = self._sum(parts, space)
            if vector is not None:
                # Without a filter, LanceDB does not have to scan a column.
                only = [any_of("modality", names)] if set(names) != self.counts.keys() else []
                found.append(self._nearest(vector, k, " AND ".join([*where, *only]) or None, under))
        if not found:
            kinds = ", ".join(dict.fromkeys(part.modality for part in parts if not isinstance(part, Like)))
            items = ", ".join(modalities or self.counts)
            raise UserError(f"{kinds or 'the item'} and the items ({items}) share no space, so they cannot be compared")
        hits = sorted(chain.from_iterable(found), key=lambda hit: -hit.score)
        return [hit for hit in hits[:k] if min_score is None or hit.score >= min_score]

    def parts(self, paths: Iterable[str]) -> Counter[str]:
        """The number of items of each of these files or rows."""
        return Counter(row["path"] for row in self._items.rows(any_of("path", paths), ["path"]))

    def text_query(self, text: str, weight: float = 1.0) -> Query:
        """A part of a query that is a text. UserError if the model reads no texts."""
        for name, modality in self.model.modalities.items():
            if modality.reads_text:
                return Query(name, text, weight)
        raise UserError("the model reads no texts; search with a file")

    def hit(self, id: str) -> Hit:
        """An item by its id, with score 1. UserError if it is not indexed."""
        return _hit(self._row(id, SHOWN), 1.0)

    def read(self, id: str) -> bytes | Path:
        """The media of an indexed item: the bytes of a row, or a file that is unchanged since it was indexed.

        UserError if it is not indexed, is gone, or has changed. The file is whole, also if the item is a segment.
        """
        row = self._row(id, ["path", "state", "source", "row", "column"])
        if row["source"] is None:
            # Nobody who makes up an index knows the nanosecond in which another user's file was changed.
            if file_state(row["path"]) != row["state"]:
                raise UserError(f"{row['path']}: is gone or has changed since it was indexed; index it again")
            return Path(row["path"])
        with self._reading:
            name = row["source"]
            if name not in self._sources:
                if not self._allow_sources:
                    folder = find_model(self._about.model)
                    check_uses(Path(self._about.model), folder, self.model.recipe, [("the index", name)])
                self._sources[name] = source_table(self.model.recipe, name)
            if self._sources[name].fingerprint != row["state"]:
                raise UserError(f"source {name} has changed since it was indexed; index it again")
            try:
                media = row_media(self._sources[name], row["row"], row["column"])
            except BadMedia as error:
                raise UserError(f"{row['path']}: {error}") from None
        if isinstance(media, np.ndarray):
            raise UserError(f"{row['path']}: is a list of numbers, which has no media type")
        return media

    def modality_of(self, name: str) -> str:
        """The modality of a file by its extension. UserError if the model reads no such files."""
        ending = Path(name).suffix.lower()
        for modality, item in self.model.modalities.items():
            if ending in item.extensions:
                return modality
        kinds = ", ".join(self.model.modalities)
        raise UserError(f"{name}: unknown type of file; the model reads {kinds}")

    def vectors(self) -> pa.Table:
        """`id`, `modality` and fp16 `vector` of all items."""
        return self._items.table.search().select(["id", "modality", "vector"]).to_arrow()

    def sample(self, count: int, columns: Sequence[str]) -> pa.Table:
        """Some of these columns of at most `count` items, which are evenly spaced over the index."""
        total = self._items.table.count_rows()
        rows = np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
        return self._items.table.take_offsets(rows).select(list(columns)).to_arrow()

    def encode(self, query: Query) -> EncodedQuery:
        """Encodes a part of a query for all spaces that its modality is in. UserError if it cannot be read.

        The lock is not held while the file is decoded, so a slow file does not delay other queries.
        """
        model, name = self.model, query.modality
        modality, view = model.modalities[name], model.views[name]
        try:
            item = modality.encode_input(query.value, view)
        except BadMedia as error:
            raise UserError(f"cannot be read as {name}: {error}") from None
        towards = [other for other in model.modalities if model.imp.share_a_space(name, other)]
        if model.imp.config.space == "joint":
            towards = towards[:1]
        with self._encoding:
            vectors = {other: embed(model.imp, modality, view, [item], other, 64, model.precision) for other in towards}
        return EncodedQuery(name, {other: vector[0].cpu().numpy() for other, vector in vectors.items()}, query.weight)

    def _row(self, id: str, columns: list[str]) -> dict[str, Any]:
        rows = self._items.rows(f"id = {quoted(id)}", columns)
        if not rows:
            raise UserError(f"{self.folder}: has no item {id!r}")
        return rows[0]

    def _below(self, under: str | Path) -> str:
        """An SQL filter for `under`."""
        if str(under) in self.model.recipe.sources:
            return f"(source = {quoted(str(under))} OR {below(os.path.abspath(under))})"
        return f"(path = {quoted(str(under))} OR {below(os.path.abspath(under))})"

    def _spaces(self, names: Iterable[str]) -> dict[Space, list[str]]:
        """The spaces that the vectors of some modalities are in, with the modalities in each."""
        found: dict[Space, list[str]] = {}
        for name in names:
            found.setdefault(shared_space(self.model.imp, name, self._about.towards[name]), []).append(name)
        return found

    def _nearest(self, vector: np.ndarray, k: int, where: str | None, under: str | Path | None) -> list[Hit]:
        """The `k` hits that are closest to a vector (Z,), with only the best segment of each file.

        How many of the nearest items are other segments is not known before, so more are read until there are enough.
        """
        probes = None if self._about.ivf is None else self._about.ivf.probes
        count = k
        while True:
            rows = self._items.nearest(vector, count, where, probes)
            best: dict[str, Hit] = {}
            for row in rows:
                hit = _hit(row, 1 - row["_distance"])
                best.setdefault(hit.path if stands_for_file(hit, under) else hit.id, hit)
            if len(best) >= k or len(rows) < count:
                return list(best.values())[:k]
            count *= 4

    def _sum(self, parts: Sequence[QueryPart], space: Space) -> np.ndarray | None:
        """The weighted sum (Z,) of the parts of a query in a space, or None if a part has no vector there."""
        total = np.zeros(self.model.imp.config.embed_dim, np.float32)
        for part in parts:
            vector = self._vector(part, space)
            if vector is None:
                return None
            total += part.weight * vector
        if np.linalg.norm(total) < 1e-3:
            raise UserError("the queries cancel each other out")
        return total

    def _vector(self, part: QueryPart, space: Space) -> np.ndarray | None:
        """The unit vector (Z,) of a part of a query in a space, or None if it has none there."""
        if isinstance(part, Like):
            row = self._row(part.id, ["modality", "towards", "vector"])
            own = shared_space(self.model.imp, row["modality"], row["towards"])
            return np.asarray(row["vector"], np.float32) if own == space else None
        model = self.model
        if part.modality not in model.modalities:
            raise UserError(f"the model has no modality {part.modality!r}{nearest(part.modality, model.modalities)}")
        towards = towards_space(model.imp, part.modality, space, model.modalities)
        if towards is None:
            return None
        if isinstance(part, EncodedQuery):
            return part.vectors.get(towards)
        modality, view = model.modalities[part.modality], model.views[part.modality]
        if modality.reads_text and not (str(part.value).strip() and modality.knows(part.value, view)):
            raise UserError(f"{part.value!r} has no word that the model knows")
        with self._encoding:
            return model.encode(part.modality, part.value, normalize=True, towards=towards)[0].cpu().numpy()


def open_index(path: str | Path, device: str | torch.device | None = None, allow_sources: bool = False) -> Index:
    """Opens an index for search, and loads the model that built it.

    Args:
        path: the folder of the index.
        device: where queries are encoded; see `openimp.load`.
        allow_sources: whether `Index.read` may read any source that the recipe names if the model was not trained here.

    Raises:
        UserError: there is no index, or its model is gone or has other weights now.
    """
    folder = Path(path)
    refuse_links(folder, INDEX_FILES)
    about = read_metadata(folder)
    if about is None:
        what = "is not an index" if folder.exists() else "no such index"
        raise UserError(f"{folder}: {what}; openimp index makes one")
    try:
        model = load(about.model, device)
    except UserError as error:
        raise UserError(f"{folder}: its model cannot be opened: {error}") from None
    if fingerprint(model) != about.fingerprint:
        raise UserError(
            f"{folder}: was built with other weights or views than {about.model} has now; build a new index"
        )
    return Index(folder, model, about, allow_sources)


def stands_for_file(hit: Hit, under: str | Path | None) -> bool:
    """Whether a hit is the best segment of its file, which stands for all of them: not if `under` is that file."""
    return hit.start is not None and (under is None or hit.path not in (str(under), os.path.abspath(under)))


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(**{name: row[name] for name in SHOWN}, score=score)
