"""The table of items of an index, in LanceDB.

A write to the table is atomic and contains whole files only. So after a kill, the table alone shows what is left to do.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import date, timedelta
from functools import cached_property, lru_cache
from itertools import chain, islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from openimp.common.errors import UserError, one_line
from openimp.search.damage import damaged_column
from openimp.search.query import Hit, Words

ITEMS = "items"
HIT_COLUMNS = [field.name for field in fields(Hit) if field.name not in ("score", "found_by")]
"""Columns of the table that make a `Hit`."""
BATCH = 8192
"""Rows that are read into memory at once."""
APPROXIMATE_ROWS = 50_000
"""Number of vectors from which on they have an index."""
IN_MEMORY_BYTES = 2**26
"""Without an index of vectors, all are kept in memory if they fit into this. For each query, LanceDB would read and
decode all of them, which takes ten times as long as comparing them."""
KEPT_FILTERS = 16
"""Filters whose matching rows are remembered. Most queries have the same ones, by modality."""
SEARCHED_PARTITIONS = 40
"""A query is compared with the vectors of this many nearest partitions. LanceDB makes a partition per 4,096 rows."""
REFINE_FACTOR = 2
"""After a search in quantized vectors, `REFINE_FACTOR` * k rows are compared by their exact vectors for k results."""
MAX_TIED = 50_000
"""Most rows that are read because the relevance of their words is equal."""
KEEP_VERSIONS = timedelta(hours=1)
"""How long a version of the table is kept, for processes that read it."""
ACCENTS = 200
"""Least combining class, in Unicode, of the accents of Latin, Greek and Cyrillic letters."""
# fmt: off
STOP_WORDS = [
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
]
# fmt: on
"""Words that do not count. LanceDB's own list for `TOKENIZER` has those of all languages, among them "dog"."""
TOKENIZER = "icu/split"
"""What LanceDB divides texts with. ICU knows where words end in Chinese, Japanese and Thai."""
NOT_WRITTEN = "the index cannot be written; make room, and run openimp index again, which does the rest"
FILE_END = {".lance": b"LANC", ".arrow": b"ARROW1"}
"""Last bytes of a complete file with rows or an index, and of one with the numbers of deleted rows, by ending."""
FILTER_VALUES = 500
"""Maximum number of values in one SQL filter."""


class Stored(NamedTuple):
    """The stored values of a file, or of the media in a row of a source."""

    sha256: str
    modality: str
    state: str
    source: str | None


def schema(size: int) -> pa.Schema:
    """The columns of the table: those of `Hit`, the hash of the media, the `folded` text, and unit vectors with `size`
    features, null for items that only words can find."""
    texts = ("id", "path", "sha256", "state", "modality", "text", "folded", "media_type", "source", "column", "date")
    columns = dict.fromkeys(texts, pa.string())
    columns |= dict.fromkeys(("part", "parts", "row"), pa.int64())
    columns |= dict.fromkeys(("start", "end", "latitude", "longitude"), pa.float64())
    return pa.schema(columns | {"vector": pa.list_(pa.float16(), size)})


@contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # For example, the disk is full.
        raise UserError(f"{NOT_WRITTEN}: {one_line(error)}") from None


class Items:
    """The table of an index. A caller of `replace`, `remove` or `compact` must hold `folder.locked`."""

    def __init__(self, folder: Path, size: int | None = None) -> None:
        """Opens the table. With `size`, the number of features, creates it if it does not exist."""
        database = import_lancedb().connect(folder)
        self._folder = folder / f"{ITEMS}.lance"
        # If the process was killed while it created the table, the folder exists, but no version of the table.
        exists = any((self._folder / "_versions").glob("*.manifest"))
        try:
            if exists:
                self.table = database.open_table(ITEMS)
            elif size is not None:
                with _write_errors():
                    self.table = database.create_table(ITEMS, schema=schema(size))
            if exists and (problem := damaged_column(self.table.schema, schema(1))):
                raise UserError(f"{folder}: damaged: {problem}; make a new index")
            if size is None and not (exists and self.table.count_rows()):
                raise UserError(f"{folder}: holds no items yet; run openimp index again")
            # Whether the words of the items' texts have an index. Older versions built none. Read now: once this
            # version of the table is removed, LanceDB tells of no index.
            self.has_words = "folded" in self.indexed()
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{folder}: damaged: {one_line(error)}") from None
        self._places = lru_cache(maxsize=KEPT_FILTERS)(self._find_places)

    @cached_property
    def approximate(self) -> bool:
        """Whether a query is compared with the vectors of the nearest partitions only."""
        return "vector" in self.indexed()

    def indexed(self) -> set[str]:
        """The columns that have an index."""
        return {column for index in self.table.list_indices() for column in index.columns}

    def count(self, where: str | None) -> int:
        """The number of rows that match an SQL filter, or of all."""
        with _read_errors():
            return int(self.table.count_rows(where))

    @cached_property
    def has_dates(self) -> bool:
        """Whether any item has a date. Older versions stored none."""
        return "date" in self.table.schema.names and self.count("date IS NOT NULL") > 0

    @cached_property
    def hit_columns(self) -> list[str]:
        """The columns that make a `Hit`."""
        return [name for name in HIT_COLUMNS if name in self.table.schema.names]

    def columns(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """The values of some columns in each row."""
        with _read_errors():
            for batch in self.table.search().select(list(names)).to_batches(batch_size=BATCH):
                yield from zip(*(batch[name].to_pylist() for name in names))

    def vectors(self) -> pa.Table:
        """`id`, `modality` and `vector` of all rows."""
        with _read_errors():
            return self.table.search().select(["id", "modality", "vector"]).to_arrow()

    def stored(self) -> dict[str, Stored]:
        """All files and rows of sources, by path."""
        if self.count("path IS NULL OR sha256 IS NULL OR modality IS NULL OR state IS NULL"):
            folder = self._folder.parent
            raise UserError(f"{folder}: damaged: an item has no path, hash, modality or state; make a new index")
        return {path: Stored(*values) for path, *values in self.columns("path", *Stored._fields)}

    def sample(self, count: int, where: str | None, columns: list[str]) -> pa.Table:
        """At most `count` rows, evenly spaced among those that match an SQL filter."""
        with _read_errors():
            if where is None:  # Faster than reading all ids.
                taken = self.table.take_offsets(_evenly_spaced(count, self.table.count_rows()))
            else:
                query = self.table.search().where(where).select(["_rowid"]).with_row_id(True)
                row_ids = query.to_arrow()["_rowid"].to_numpy()
                taken = self.table.take_row_ids(row_ids[_evenly_spaced(count, len(row_ids))].tolist())
            return taken.select(columns).to_arrow()

    def nearest(self, vector: np.ndarray, k: int, where: str | None = None) -> list[dict[str, Any]]:
        """The `k` rows with the highest cosine, without their vectors; `_distance` is 1 - cosine.

        Args:
            vector: (Z,), of any length.
            k: maximum number of rows.
            where: only rows that match this SQL filter.
        """
        if not self.approximate and self.count(None) * len(vector) * 4 <= IN_MEMORY_BYTES:
            return self._nearest_in_memory(vector, k, where)
        query = self.table.search(vector).distance_type("cosine").limit(k).select([*self.hit_columns, "_distance"])
        if where:
            query = query.where(where)
        with _read_errors():
            if self.approximate:
                rows = query.nprobes(SEARCHED_PARTITIONS).refine_factor(REFINE_FACTOR).to_list()
                # The nearest partitions may have fewer than k matching rows, for example only texts if pictures are
                # wanted. Then all vectors are compared.
                if len(rows) == k:
                    return rows
            return query.bypass_vector_index().to_list()

    def _nearest_in_memory(self, vector: np.ndarray, k: int, where: str | None) -> list[dict[str, Any]]:
        """`nearest`, compared with all vectors in memory."""
        row_ids, vectors = self._vectors_in_memory
        with _read_errors():
            places = np.arange(len(row_ids)) if where is None else self._places(where)
        distances = 1 - (vectors @ (vector / np.linalg.norm(vector)))[places]
        if len(places) > k:
            nearest = np.argpartition(distances, k)[:k]
            places, distances = places[nearest], distances[nearest]
        distance_of = dict(zip(row_ids[places].tolist(), distances.tolist()))
        with _read_errors():
            taken = self.table.take_row_ids(list(distance_of)).select(self.hit_columns).with_row_id()
            rows = taken.to_list()
        for row in rows:
            row["_distance"] = distance_of[row.pop("_rowid")]
        return sorted(rows, key=lambda row: row["_distance"])

    @cached_property
    def _vectors_in_memory(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids (N,) of all rows with a vector, in order, and their unit vectors (N, Z) fp32."""
        with _read_errors():
            rows = self.table.search().where("vector IS NOT NULL").select(["vector"]).with_row_id(True).to_arrow()
        row_ids = rows["_rowid"].to_numpy()
        order = np.argsort(row_ids)
        vectors = as_matrix(rows["vector"])[order]
        return row_ids[order], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _find_places(self, where: str) -> np.ndarray:
        """The places of the rows that match an SQL filter among `_vectors_in_memory`."""
        matching = self.table.search().where(where).select(["_rowid"]).with_row_id(True).to_arrow()["_rowid"]
        return np.flatnonzero(np.isin(self._vectors_in_memory[0], matching.to_numpy()))

    def with_words(
        self, words: Words, all_words: bool, vectors: Mapping[str, np.ndarray], k: int, where: str
    ) -> list[dict[str, Any]]:
        """At most `k` rows, the best by BM25 first, each with its cosine with the unit vector (Z,) that `vectors` has
        for its modality as `score`; None if either vector is missing.

        Their texts have a wanted word or, if `all_words`, all wanted words, and no unwanted word. Rows with equal BM25
        are ordered by their cosine.

        Words are compared without case, accents and endings such as the plural's. English stop words, such as `the`, do
        not count.
        """
        lance = import_lancedb().query
        operator = lance.FullTextOperator.AND if all_words else lance.FullTextOperator.OR
        match = lance.MatchQuery(folded(words.wanted), "folded", operator=operator)
        if words.unwanted:
            unwanted = lance.MatchQuery(folded(words.unwanted), "folded")
            match = lance.BooleanQuery([(lance.Occur.MUST, match), (lance.Occur.MUST_NOT, unwanted)])
        # LanceDB cuts ties anywhere, as those of the texts of a class. So if row k + 1 ties with row k, more are read.
        for limit in (k + 1, max(k + 1, MAX_TIED)):
            query = self.table.search(match, query_type="fts").where(where).limit(limit)
            query = query.select([*self.hit_columns, "vector", "_score"])
            with _read_errors():
                hits = query.to_arrow()
            bm25 = np.array(hits["_score"], np.float32)
            if len(bm25) <= k or bm25[-1] < bm25[k - 1]:
                break
        cosines = self._cosines(hits, vectors)
        ranked = np.lexsort((-np.nan_to_num(cosines, nan=0.0), -bm25))[:k]
        rows = hits.drop_columns(["vector", "_score"]).take(ranked).to_pylist()
        for row, cosine in zip(rows, cosines[ranked].tolist()):
            row["score"] = cosine if isfinite(cosine) else None
        return rows

    def _cosines(self, hits: pa.Table, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The cosine of each row with the vector of its modality; NaN if one of them is missing."""
        cosines = np.full(len(hits), np.nan, np.float32)
        is_known = hits["vector"].is_valid().to_numpy()
        modalities = np.array(hits["modality"].to_pylist())[is_known]
        stored = as_matrix(hits["vector"])
        known_cosines = np.full(len(stored), np.nan, np.float32)
        for name, vector in vectors.items():
            known_cosines[modalities == name] = stored[modalities == name] @ vector
        cosines[is_known] = known_cosines
        return cosines

    def rows(self, column: str, values: Iterable[str], columns: list[str]) -> list[dict[str, Any]]:
        """The rows with one of these values in a column; vectors are lists of floats."""
        rows = []
        with _read_errors():
            for chunk in chunks(values):
                rows += self.table.search().where(any_of(column, chunk)).select(columns).to_list()
        return rows

    def replace(self, paths: Iterable[str], rows: list[dict[str, Any]]) -> None:
        """Replaces all rows of some paths, and adds rows of other paths, which have none yet.

        If it fails or is killed, each path has either its old rows or its new ones.
        """
        rows_by_path = defaultdict(list)
        for row in rows:
            values = {"vector": to_fp16(row["vector"]), "folded": folded(row.get("text") or "")}
            rows_by_path[row.get("path")].append(row | values)
        for chunk in chunks(paths):
            new_rows = [row for path in chunk for row in rows_by_path.pop(path, ())]
            if not new_rows:
                self.remove(chunk)
                continue
            merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            old_ids = {row["id"] for row in self.rows("path", chunk, ["id"])}
            if not old_ids <= {row["id"] for row in new_rows}:  # Only then, because it reads the whole table.
                merge = merge.when_not_matched_by_source_delete(any_of("path", chunk))
            with self._writing():
                # Items that only words can find have no vector, which `merge_insert` otherwise takes for an error.
                merge.execute(self._as_table(new_rows), on_bad_vectors="null")
        if added := [*chain.from_iterable(rows_by_path.values())]:
            with self._writing():
                self.table.add(self._as_table(added))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A write to the table, which is undone if a file of it is incomplete.

        If the system refuses the last bytes of a file, LanceDB may report no error, and use the file nevertheless.
        """
        version = self.table.version
        files = self._files()
        with _write_errors():
            try:
                yield
            finally:  # Also after an error: `optimize` may read again what it has just written.
                if not all(map(_is_complete, self._files() - files)):
                    if self.table.version != version:
                        self.table.restore(version)
                    raise OSError("a file is incomplete")

    def _files(self) -> set[str]:
        """The files with rows, with the numbers of deleted rows, and with indexes."""
        folders = (self._folder / "data", self._folder / "_deletions", *self._folder.glob("_indices/*"))
        return {file.path for folder in folders if folder.is_dir() for file in os.scandir(folder)}

    def _as_table(self, rows: list[dict[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist(rows, self.table.schema)

    def remove(self, paths: Iterable[str]) -> None:
        """Removes all rows of some paths."""
        for chunk in chunks(paths):
            with self._writing():
                self.table.delete(any_of("path", chunk))

    def compact(self) -> None:
        """Merges the small files that many writes leave, builds the indexes or adds new rows to them, and removes
        versions that are more than `KEEP_VERSIONS` old. An open `Index` that reads such a version then opens the
        newest.
        """
        from lancedb.index import FTS, BTree, IvfSq

        with self._writing():
            indexed = self.indexed()
            for column in ("id", "path", "sha256"):  # Without an index, each look-up of items or files scans the table.
                if column not in indexed:
                    self.table.create_index(column, config=BTree())
            if "folded" not in indexed and "folded" in self.table.schema.names:  # Older versions have no such column.
                words = FTS(base_tokenizer=TOKENIZER, custom_stop_words=STOP_WORDS)
                self.table.create_index("folded", config=words)
            if "vector" not in indexed and self.count("vector IS NOT NULL") >= APPROXIMATE_ROWS:
                self.table.create_index("vector", config=IvfSq(distance_type="cosine"))
            self.table.optimize(cleanup_older_than=KEEP_VERSIONS)


class IndexChanged(UserError):
    """The version of the table that was opened is gone, or the table is damaged."""


@contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # For example, a writer has removed a version that was opened long ago.
        advice = "the index has changed since it was opened, or is damaged; open it again"
        raise IndexChanged(f"{advice}: {one_line(error)}") from None


def _is_complete(file: str) -> bool:
    end = FILE_END.get(os.path.splitext(file)[1], b"")
    with open(file, "rb") as stream:
        stream.seek(max(0, os.path.getsize(file) - len(end)))
        return stream.read() == end


def folded(text: str) -> str:
    """A text without case and accents. LanceDB removes accents only after endings: "résumé" would not be "resume"."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    # Marks of lower classes make other letters in Indic scripts, Japanese, Arabic and others.
    bare = "".join(char for char in decomposed if unicodedata.combining(char) < ACCENTS)
    return unicodedata.normalize("NFC", bare)


def to_fp16(vector: Any) -> np.ndarray | None:
    return None if vector is None else np.asarray(vector, np.float16)


def as_matrix(vectors: pa.ChunkedArray) -> np.ndarray:
    """The vectors (N, Z) fp32 of a column that are not null."""
    values = vectors.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(-1, vectors.type.list_size)


def any_of(column: str, values: Iterable[str]) -> str:
    """An SQL filter: the column has one of these values."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def between(since: date | None, until: date | None) -> str:
    """An SQL filter: the date is not before the day `since` and not after the day `until`."""
    conditions = ["date IS NOT NULL"]
    if since is not None:
        conditions.append(f"date >= {quoted(since.isoformat())}")
    if until is not None:  # Dates are texts such as 2026-05-31T18:30:00, and ~ follows all of their characters.
        conditions.append(f"date <= {quoted(f'{until.isoformat()}~')}")
    return " AND ".join(conditions)


def below(folder: str) -> str:
    """An SQL filter: the path is this one or lies below it."""
    return f"(path = {quoted(folder)} OR starts_with(path, {quoted(os.path.join(folder, ''))}))"


def quoted(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def chunks(values: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, FILTER_VALUES)):
        yield chunk


def import_lancedb() -> Any:
    """The module; UserError if it is not installed."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # It warns about partitions that it divides.
    try:
        import lancedb
    except ImportError:
        raise UserError("search needs LanceDB: pip install 'openimp[search]'") from None
    return lancedb


def _evenly_spaced(count: int, total: int) -> list[int]:
    """At most `count` evenly spaced numbers below `total`."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()
