"""`Index`: answers queries over indexed media."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime
from functools import cached_property, partial
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
import pyarrow as pa
import torch

from openimp.common.errors import UserError, nearest
from openimp.common.modality import BadMedia
from openimp.common.names import has_scheme
from openimp.common.protocols import is_known
from openimp.common.safe_files import has_state, refuse_links
from openimp.data.tables import Table
from openimp.data.trust import check_uses
from openimp.encoding.engine import ItemEncoder
from openimp.encoding.find import find_model
from openimp.inference.model import Model, load
from openimp.search.damage import damaged_value
from openimp.search.folder import INDEX_FILES, METADATA, Metadata, built_with, own_index, read_metadata
from openimp.search.media import media_state, row_media, source_table
from openimp.search.media_folders import is_below, recorded_folders
from openimp.search.parts import nfc
from openimp.search.query import By, EncodedQuery, Hit, Like, Query, QueryPart, Space, Words
from openimp.search.ranking import Spread, by_excess, merged, paths_of, result_key, stands_for_file, unit_vector
from openimp.search.table import IndexChanged, Items, any_of, as_matrix, below, between, chunks, quoted

T = TypeVar("T")

RANKED = 500
"""Items in each ranking before rankings are merged, unless `k` is larger. So up to this `k`, the order of the results
does not depend on `k`."""
SAMPLE = 1000
"""Maximum number of a group's items from which its `Spread` is computed."""
OUT_OF_DATE = "index it again, then open the index again"
"""What to do if an item is not as it was indexed. An open index shows items as they were when it was opened."""


class Wanted(NamedTuple):
    """What a search looks for."""

    groups: Sequence[tuple[Sequence[str], np.ndarray]]  # modalities that are ranked together, with the query's vector
    words: Words | None  # to look for in the texts of items
    filters: Sequence[str]  # in SQL, all of which an item must pass
    k: int  # maximum number of results
    under: str | Path | None  # see `Index.search`


class Index:
    """An open index. Its methods may be called from any thread; calls that encode a query take turns.

    It shows the items as they were when it was opened. An update keeps older versions of the table for an hour; once
    this version is removed, the newest is shown.

    Attributes:
        model: the model that embedded the items. It encodes queries.
        folder: where the index is.
    """

    def __init__(
        self, folder: Path, model: Model, metadata: Metadata, allow_sources: bool, media: Iterable[str | Path] = ()
    ) -> None:
        self.folder = folder
        self.model = model
        self._metadata = metadata
        self._items = Items(folder)
        self._allow_sources = allow_sources
        self._media_folders = recorded_folders(metadata.id) | {os.path.realpath(path) for path in media}
        self._sources: dict[str, Table] = {}
        self._samples: dict[tuple[str, ...], np.ndarray] = {}  # vectors of items, by modalities
        self._encoding_lock = threading.Lock()
        self._sources_lock = threading.RLock()  # `read` holds it while it calls `_source`.

    @cached_property
    def counts(self) -> dict[str, int]:
        """The number of items by modality, without modalities that have none."""
        names = self._metadata.towards
        counts = self._from_table(lambda items: {name: items.count(f"modality = {quoted(name)}") for name in names})
        return {name: count for name, count in counts.items() if count}

    @property
    def has_words(self) -> bool:
        """Whether items are found by the words of their texts.

        False if the first update was interrupted, and for indexes of older versions, which must be made anew.
        """
        return self._items.has_words

    @property
    def has_dates(self) -> bool:
        """Whether any item has a date. Indexes of older versions have none."""
        return self._from_table(lambda items: items.has_dates)

    @cached_property
    def folders(self) -> list[str]:
        """Useful values of `under`: the sources, and the folders directly below the common parent of all files."""
        sources, folders = self._from_table(_sources_and_folders)
        parent = os.path.commonpath(folders) if folders else ""
        children = {os.path.relpath(folder, parent).split(os.sep)[0] for folder in folders} - {"."}
        return [*sorted(sources), *(os.path.join(parent, child) for child in sorted(children))]

    def search(
        self,
        queries: str | QueryPart | Iterable[str | QueryPart],
        k: int = 20,
        modalities: str | Sequence[str] | None = None,
        under: str | Path | None = None,
        min_score: float | None = None,
        by: By = "both",
        since: str | date | None = None,
        until: str | date | None = None,
    ) -> list[Hit]:
        """Returns the `k` best items.

        By meaning, items are ranked by their cosine with the weighted sum of the queries. By words, items are ranked
        twice by the BM25 of their texts (captions, names, lines): those with any word of the query's texts, and those
        with all words. The rankings are merged: an item gets the sum of its 1 / (60 + rank).

        Cosines are compared between modalities with one projection head, such as image and video. Items of groups with
        different heads are ranked by how far their cosines are above the others of their group (`Spread`). Of a file
        that was cut into segments, only the best segment is returned, unless `under` is that file.

        Args:
            queries: one part of the query or several. A string is a text. The item of a `Like` is not returned.
            k: maximum number of results.
            modalities: only items of this modality, or of these. None: all that can be compared with the queries.
            under: only this file, files in this folder, or rows of the source of this name.
            min_score: only items with at least this cosine. Items that have none, which only words find, are left out.
            by: "both", "meaning" or "words". A query that has anything but texts is always ranked by meaning. An item
                with any word of a text of negative weight is not found by words.
            since, until: only items of this day and later, or this day and earlier, such as "2026-05-31". Media
                inside of tables have a date only if their header has one.

        Raises:
            UserError: a query cannot be read, no item can be compared with it, neither the model nor an item has a word
                of it, `since` or `until` is not a day, `since` is after `until`, or no item has a date.
        """
        parts = _query_parts(queries)
        under = under and os.path.expanduser(under)
        if by not in get_args(By):
            raise UserError(f"by must be {' or '.join(get_args(By))}, found {by!r}")
        if k < 1:
            raise UserError(f"k must be at least 1, found {k}")
        modalities = [modalities] if isinstance(modalities, str) else modalities
        filters = self._filters(modalities, under, since, until)
        if likes := [part.id for part in parts if isinstance(part, Like)]:
            filters.append(f"NOT {any_of('id', likes)}")
        encoded = self._encode_all(parts)
        words = self._words(encoded, by)
        model_knows_a_word = any(part.vectors for part in encoded)
        unknown_texts = [part.text for part in encoded if not part.vectors]
        if words is None and unknown_texts:
            raise UserError(f"{unknown_texts[0]!r:.100} has no word that the model knows; try other words")
        comparable = []  # groups of modalities, each with the query's vector in their space
        for names in self.groups(modalities or self.counts):
            vector = unit_vector(encoded, self._space(names[0]))
            if vector is not None:
                comparable.append((names, vector))
        if words is None and not comparable:
            kinds = ", ".join(dict.fromkeys(part.modality for part in encoded))
            items = ", ".join(modalities or self.counts)
            raise UserError(f"{kinds} and the items ({items}) share no space, so they cannot be compared")
        wanted = Wanted(comparable, words, filters, k, under)
        table = self._items
        hits = self._ranked(wanted, by)
        if self._items is not table:  # It was opened again meanwhile, so that some hits may be of the older version.
            hits = self._ranked(wanted, by)
        if words is not None and by == "both" and not hits and not model_knows_a_word:
            raise UserError(f"{words.wanted!r:.100} has no word that the model knows, and no item has its words")
        if min_score is not None:
            hits = [hit for hit in hits if hit.score is not None and hit.score >= min_score]
        return hits[:k]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """The modalities in groups that are ranked together: their cosines with a query can be compared.

        The modalities of a group share a projection head, as image and video do unless `model.share_heads` is false.
        """
        groups: dict[tuple[str, Space], list[str]] = {}
        for name in dict.fromkeys(names):
            head = self.model.imp.head_name(name, self._metadata.towards[name])
            groups.setdefault((head, self._space(name)), []).append(name)
        return list(groups.values())

    def text_query(self, text: str, weight: float = 1.0) -> Query:
        """A part of a query that is a text. UserError if the model reads no texts."""
        for name, modality in self.model.modalities.items():
            if modality.reads_text:
                return Query(name, text, weight)
        raise UserError("the model reads no texts; search with a file")

    def hits(self, ids: Iterable[str]) -> dict[str, Hit]:
        """Items by their ids. Ids that are not indexed are left out."""
        wanted = list(ids)
        return {
            row["id"]: self._hit(row)
            for row in self._from_table(lambda items: items.rows("id", wanted, items.hit_columns))
        }

    def hit(self, id: str) -> Hit:
        """An item by its id. UserError if it is not indexed."""
        hit = self.hits([id]).get(id)
        if hit is None:
            raise UserError(f"{self.folder}: has no item {id!r}")
        return hit

    def check(self, hit: Hit) -> None:
        """UserError if the media of an item are gone, have changed since they were indexed, or may not be read."""
        if hit.source is None or hit.row is None:
            # First, so that an index from somebody else does not even learn which files there are.
            if not is_below(hit.path, self._media_folders):
                raise UserError(
                    f"{hit.path}: is not shown, because it is in no folder that you indexed here or named with --media"
                )
            if os.path.exists(hit.path) and not os.path.isfile(hit.path):
                raise UserError(f"{hit.path}: is not a file")
            if not has_state(hit.path, media_state(hit.state)):
                raise UserError(f"{hit.path}: is gone or has changed since it was indexed; {OUT_OF_DATE}")
        elif self._source(hit.source).whole_fingerprint != hit.state:
            raise UserError(f"source {hit.source} has changed since it was indexed; {OUT_OF_DATE}")

    def read(self, id: str) -> bytes | Path:
        """The media of an indexed item: the bytes of a row, or a file that is unchanged since it was indexed.

        UserError if it is not indexed, is gone, or has changed. Of a segment, this is the whole file.
        """
        hit = self.hit(id)
        self.check(hit)
        if hit.source is None or hit.row is None:
            return Path(hit.path)
        try:
            with self._sources_lock:
                source = self._source(hit.source)
                if hit.row >= len(source) or hit.column not in source.columns:
                    raise UserError(f"{self.folder}: damaged: source {hit.source} has no {hit.path}; make a new index")
                media = row_media(source, hit.row, hit.column)
        except BadMedia as error:
            raise UserError(f"{hit.path}: {error}") from None
        if isinstance(media, np.ndarray):
            raise UserError(f"{hit.path}: is a list of numbers, which has no media type")
        return media

    @property
    def shows_no_files(self) -> bool:
        """Whether the index has files, but no folder is known from which they may be read."""
        return not self._media_folders and self.count() > self._from_table(lambda items: items.count("row IS NOT NULL"))

    def vectors(self) -> pa.Table:
        """`id`, `modality` and fp16 `vector` of all items; null if the model knows no word of an item."""
        return self._from_table(Items.vectors)

    def count(
        self,
        modalities: str | Sequence[str] | None = None,
        under: str | Path | None = None,
        since: str | date | None = None,
        until: str | date | None = None,
    ) -> int:
        """The number of items that match the filters; see `search`."""
        where = " AND ".join(self._filters(modalities, under, since, until)) or None
        return self._from_table(lambda items: items.count(where))

    def sample(
        self,
        count: int,
        modalities: str | Sequence[str] | None = None,
        under: str | Path | None = None,
        since: str | date | None = None,
        until: str | date | None = None,
    ) -> list[Hit]:
        """At most `count` items, evenly spaced among those that match the filters; see `search`."""
        where = " AND ".join(self._filters(modalities, under, since, until)) or None
        rows = self._from_table(lambda items: items.sample(count, where, items.hit_columns)).to_pylist()
        return [self._hit(row) for row in rows]

    def encode(self, query: Query) -> EncodedQuery:
        """Encodes a part of a query, for all spaces that its modality is in.

        UserError if it cannot be read, or is a file of a modality that is in no space. A text has no vectors if the
        model knows no word of it, or if texts are in no space. The words of items may still be compared with it.
        """
        model = self.model
        name = query.modality
        value = query.value
        if name not in model.modalities:
            raise UserError(f"the model has no modality {name!r}{nearest(name, model.modalities)}")
        modality = model.modalities[name]
        encoder = ItemEncoder(model.imp, modality, model.checked_view(name), towards=None, precision=model.precision)
        text = str(value) if modality.reads_text else None
        if text is not None and not text.strip():
            raise UserError("the text to search for is empty")
        comparable = [other for other in model.modalities if model.imp.share_a_space(name, other)]
        if text is None and not comparable:
            raise UserError(f"no task trains {name} together with another modality, so it cannot be searched with")
        if not is_known(modality, value, encoder.view):
            return EncodedQuery(name, {}, query.weight, text)
        try:
            clips = encoder.read(value)
        except BadMedia as error:
            file = "" if isinstance(value, bytes) else f"{value}: "
            raise UserError(f"{file}cannot be read as {name}: {error}") from None
        modality_by_space = {self._space(name, other): other for other in comparable}
        with self._encoding_lock:  # Not while the file is decoded, so that a slow file does not delay other queries.
            vectors = encoder.encode_item(clips, modality_by_space.values())
        vector_by_space = {space: vector.cpu().numpy() for space, vector in zip(modality_by_space, vectors)}
        return EncodedQuery(name, vector_by_space, query.weight, text)

    def _hit(self, row: dict[str, Any]) -> Hit:
        """The hit of a row. UserError if the row is damaged."""
        if problem := damaged_value(row, self._metadata.towards):
            raise UserError(f"{self.folder}: damaged: item {row['id']!r:.50} has {problem}; make a new index")
        return Hit(**row)

    def _words(self, encoded: Sequence[EncodedQuery], by: By) -> Words | None:
        """The words to look for in the texts of items.

        None if `by` is "meaning", if no text has a positive weight, if the index has no words, or if the query has
        anything but texts: words cannot say what to change in a picture.
        """
        if by == "words" and not self.has_words:
            raise UserError(f"{self.folder}: has no words; run openimp index again or make a new index")
        wanted = " ".join(part.text for part in encoded if part.text and part.weight > 0)
        unwanted = " ".join(part.text for part in encoded if part.text and part.weight < 0)
        if by != "meaning" and self.has_words and wanted and all(part.text for part in encoded):
            return Words(nfc(wanted), nfc(unwanted))
        return None

    def _encode_all(self, parts: Sequence[str | QueryPart]) -> list[EncodedQuery]:
        """Encodes the parts. A `Like` gets the stored vector of its item, or the item's text if it has no vector."""
        likes = [part.id for part in parts if isinstance(part, Like)]
        columns = ["id", "modality", "text", "vector"]
        stored = {row["id"]: row for row in self._from_table(lambda items: items.rows("id", likes, columns))}
        encoded = []
        for part in parts:
            if isinstance(part, str):
                encoded.append(self.encode(self.text_query(part)))
            elif isinstance(part, Query):
                encoded.append(self.encode(part))
            elif isinstance(part, EncodedQuery):
                encoded.append(part)
            elif part.id in stored:
                encoded.append(self._encoded_item(part, stored[part.id]))
            else:
                raise UserError(f"{self.folder}: has no item {part.id!r}")
        return encoded

    def _encoded_item(self, like: Like, item: dict[str, Any]) -> EncodedQuery:
        name = item["modality"]
        if item["vector"] is None:
            return EncodedQuery(name, {}, like.weight, item["text"])
        vector = np.asarray(item["vector"], np.float32)
        if not np.isfinite(vector).all():
            raise UserError(f"{self.folder}: damaged: item {like.id} has a vector that is not finite; make a new index")
        return EncodedQuery(name, {self._space(name): vector}, like.weight)

    def _space(self, name: str, other: str | None = None) -> Space:
        """The space in which the modality `name` is compared with `other`.

        By default, `other` is the modality for which the items in the index were projected.
        """
        embedder = self.model.imp
        other = other or self._metadata.towards[name]
        if embedder.config.space == "joint":
            return frozenset()  # All modalities are in the same space.
        return frozenset([embedder.head_name(name, other), embedder.head_name(other, name)])

    def _source(self, name: str) -> Table:
        """A source of the recipe, opened when it is first needed."""
        with self._sources_lock:
            if name not in self._sources:
                if name not in self.model.recipe.sources:
                    raise UserError(f"{self.folder}: damaged: the model's recipe has no source {name!r:.50}")
                if not self._allow_sources:
                    # Only a model that was trained here may name paths outside of its folder.
                    folder = find_model(self._metadata.model)
                    check_uses(Path(self._metadata.model), folder, self.model.recipe, [("the index", name)])
                self._sources[name] = source_table(self.model.recipe, name)
            return self._sources[name]

    def _from_table(self, function: Callable[[Items], T]) -> T:
        """Calls a function with the table. If the table's version was removed, calls it with the newest version."""
        try:
            return function(self._items)
        except IndexChanged:
            metadata = read_metadata(self.folder)
            if metadata is None or metadata.fingerprint != self._metadata.fingerprint:
                raise  # The model would not fit.
            self._items = Items(self.folder)
            self._samples.clear()
            for name in ("counts", "folders"):
                self.__dict__.pop(name, None)
            return function(self._items)

    def _filters(
        self,
        modalities: str | Sequence[str] | None,
        under: str | Path | None,
        since: str | date | None,
        until: str | date | None,
    ) -> list[str]:
        """SQL filters; see `search` for the arguments."""
        modalities = [modalities] if isinstance(modalities, str) else modalities
        for name in modalities or ():
            if name not in self.counts:
                raise UserError(f"{self.folder}: has no items of modality {name!r}{nearest(name, self.counts)}")
        first_day = _day("since", since)
        last_day = _day("until", until)
        if first_day and last_day and first_day > last_day:
            raise UserError(f"since {first_day} is after until {last_day}")
        filters = [any_of("modality", modalities)] if modalities else []
        if under is not None:
            under = os.path.expanduser(under)
            name = quoted(str(under))  # of a source, or a path
            filters.append(f"(source = {name} OR path = {name} OR {below(os.path.abspath(under))})")
        if first_day or last_day:
            if not self.has_dates:
                raise UserError(f"{self.folder}: no item has a date; older versions of openimp stored no dates")
            filters.append(between(first_day, last_day))
        return filters

    def _ranked(self, wanted: Wanted, by: By) -> list[Hit]:
        """The items that are found, the best first."""
        words = wanted.words
        # There are no words if the query has anything but texts.
        rankings = [self._by_meaning(wanted)] if by != "words" or words is None else []
        if words is not None:
            # Two rankings, so that an item with all words comes before one that is only near in meaning.
            rankings += [self._by_words(wanted, words, all_words) for all_words in (False, True)]
        return merged(rankings, wanted.under)

    def _by_meaning(self, wanted: Wanted) -> list[Hit]:
        """The items that are closest to the query, of all groups that can be compared with it."""
        hits_and_spreads = []
        for names, vector in wanted.groups:
            # Without a filter, LanceDB does not have to scan a column.
            filters = [any_of("modality", names)] if len(names) < len(self.counts) else []
            hits = self._nearest(wanted, vector, [*wanted.filters, *filters])
            if len(wanted.groups) == 1:
                return hits
            if hits:
                hits_and_spreads.append((hits, self._spread(names, vector)))
        return by_excess(hits_and_spreads)

    def _spread(self, names: Sequence[str], vector: np.ndarray) -> Spread:
        """Mean and variance of the cosines of a vector (Z,) with a sample of the items of some modalities."""
        key = tuple(names)
        if key not in self._samples:
            sample = self._from_table(lambda items: items.sample(SAMPLE, any_of("modality", names), ["vector"]))
            vectors = as_matrix(sample["vector"])
            self._samples[key] = vectors[np.isfinite(vectors).all(1)]
        cosines = self._samples[key] @ vector
        if not len(cosines):  # The model knows no word of the texts in the sample.
            return Spread(0.0, 0.0, 1)
        return Spread(float(cosines.mean()), float(cosines.var()), sum(self.counts[name] for name in names))

    def _by_words(self, wanted: Wanted, words: Words, all_words: bool) -> list[Hit]:
        """The items that have any or all of the words of the query."""
        # All segments of a file have its caption, so words are looked up in the first one.
        first_segments = "(start IS NULL OR part = 0)"
        if wanted.under is not None:
            first_segments = f"({first_segments} OR {any_of('path', paths_of(wanted.under))})"
        find = partial(
            Items.with_words,
            words=words,
            all_words=all_words,
            vectors={name: vector for names, vector in wanted.groups for name in names},
            k=max(wanted.k, RANKED),
            where=" AND ".join([*wanted.filters, first_segments]),
        )
        return [self._hit({**row, "found_by": "words"}) for row in self._from_table(find)]

    def _nearest(self, wanted: Wanted, vector: np.ndarray, filters: Sequence[str]) -> list[Hit]:
        """The items that are closest to a vector (Z,), as many as a ranking has. Of each file, only the best segment.

        Several of the best items may be segments of the same file, so more are read until there are enough, each time
        without the files whose best segment is known.
        """
        needed = wanted.k if wanted.words is None else max(wanted.k, RANKED)
        count = needed
        best_hits: dict[str, Hit] = {}
        while True:
            known_files = [hit.path for hit in best_hits.values() if stands_for_file(hit, wanted.under)]
            where = [*filters, *(f"NOT {any_of('path', paths)}" for paths in chunks(known_files))]
            rows = self._from_table(partial(Items.nearest, vector=vector, k=count, where=" AND ".join(where) or None))
            for row in rows:
                distance = row.pop("_distance")
                score = None if distance is None or not isfinite(distance) else 1 - distance
                hit = self._hit({**row, "score": score, "found_by": "meaning"})
                best_hits.setdefault(result_key(hit, wanted.under), hit)
            if len(best_hits) >= needed or len(rows) < count:
                return list(best_hits.values())
            count *= 4


def _query_parts(queries: str | QueryPart | Iterable[str | QueryPart]) -> list[str | QueryPart]:
    """One part or several as a list. UserError if there is none, or if one is something else."""
    # A path is a mistake that the error below explains.
    parts = [queries] if isinstance(queries, str | QueryPart | Path) else list(queries)
    if not parts:
        raise UserError("the query is empty: give a text or a file")
    for part in parts:
        if not isinstance(part, str | QueryPart):
            raise UserError(f'expected a text, or a file as in Query("image", "cat.png"), found {part!r:.100}')
    return parts


def _day(name: str, value: str | date | None) -> date | None:
    """A day; None if there is none. UserError if it is something else."""
    if isinstance(value, datetime):
        value = value.date()
    try:
        return date.fromisoformat(str(value)) if value else None
    except ValueError:
        raise UserError(f"{name} {value}: expected a day, such as 2026-05-31") from None


def _sources_and_folders(items: Items) -> tuple[set[str], set[str]]:
    """The sources of items, and the folders of items that have no source."""
    sources = set()
    folders = set()
    for path, source in items.columns("path", "source"):
        if source:
            sources.add(source)
        elif path is not None and os.path.isabs(path):  # Of a damaged row, `Index.hits` tells.
            folders.add(os.path.dirname(path))
    return sources, folders


def open_index(
    path: str | Path,
    device: str | torch.device | None = None,
    allow_sources: bool = False,
    media: str | Path | Iterable[str | Path] = (),
) -> Index:
    """Opens an index for search, and loads the model that built it.

    Args:
        path: the folder of the index, or a run (or `openimp:base`) after `openimp index RUN`.
        device: where queries are encoded; see `openimp.load`.
        allow_sources: whether `Index.read` may read any source that the recipe names if the model was not trained here.
        media: a folder or several, whose files `Index.read` may read, besides those that you indexed on this machine.

    Raises:
        UserError: there is no index, or its model is gone or has other weights now.
    """
    path = os.path.expanduser(path)
    folder = own_index(path) or Path(path)
    if not (folder / METADATA).exists():
        if folder != Path(path):
            raise UserError(f"{path}: its data is not indexed yet: openimp index {path}")
        reason = "is not an index" if folder.exists() else "no such index"
        raise UserError(f"{folder}: {reason}; openimp index makes one")
    refuse_links(folder, INDEX_FILES)
    metadata = read_metadata(folder)
    assert metadata is not None
    run = folder.parent
    if not has_scheme(metadata.model) and own_index(str(run)) == folder:  # The run may have moved with its index.
        metadata = metadata.model_copy(update={"model": str(run)})
    try:
        model = load(metadata.model, device)
    except UserError as error:
        advice = f"if it has moved, openimp index NEW_NAME DATA --out {folder} remembers the new name"
        raise UserError(f"{folder}: its model cannot be opened: {error}; {advice}") from None
    if not {*metadata.towards, *metadata.towards.values()} <= model.modalities.keys():
        raise UserError(f"{folder / METADATA}: damaged: towards names a modality that {metadata.model} does not have")
    if not built_with(metadata, model):
        advice = "build a new index" if folder == Path(path) else f"openimp index {path} replaces it"
        raise UserError(
            f"{folder}: was built with other weights, options or views than {metadata.model} has now; {advice}"
        )
    return Index(folder, model, metadata, allow_sources, [media] if isinstance(media, str | Path) else media)
