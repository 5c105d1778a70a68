"""Keeps decoded arrays in memory or on disk, so that they are decoded only once.

On disk, they are in openimp's cache, in files of `ITEMS_PER_FILE` items. If decoding is stopped, the next run goes on.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openimp.common.cache import cached, is_cached, stable_hash
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import Progress
from openimp.common.protocols import Towered, learned_files
from openimp.common.threads import core_count, map_ahead
from openimp.common.versions import library_version, source_hash
from openimp.data.tables import Table

LAYOUT = 3
"""Version of the file format. Files of another version are not read but written again."""
SCHEMA = pa.schema(
    [("data", pa.large_binary()), ("shape", pa.list_(pa.int64())), ("dtype", pa.string()), ("error", pa.string())]
)
"""Columns of a store. A row that could be decoded has the first three, another row only `error`."""
ALIGN = 8
"""The bytes of each array are padded to a multiple of this number, so that the next array is aligned."""
KIND = "decoded"
"""Folder in openimp's cache."""
ROWS_FILE = "rows.arrow"
ITEMS_PER_FILE = 4096
"""Items per file. After a stop, at most this many items are decoded again."""
CHUNK = 256
"""Maximum number of arrays that are written together."""
BATCH_BYTES = 2**26
"""Once arrays have this many bytes together, they are written, even if they are fewer than `CHUNK`."""

MAX_THREADS = 16
"""Maximum number of threads that decode. About twice as many items are in memory."""
Decoded = np.ndarray | BadMedia
"""What an item was decoded to: an array, or the reason why it cannot be read."""


@dataclass(frozen=True)
class DecodedStore:
    """Decoded arrays, of a table's column or of other items: `store[row]`, read-only.

    They are an Arrow table, which processes share: forked workers inherit it, and a file is memory-mapped. A store on
    disk pickles its paths instead of its arrays.
    """

    items: pa.Table  # with the columns of `SCHEMA`
    files: Sequence[Path] = ()  # with the parts of `items`, in order, if the store is on disk
    item_of_row: np.ndarray | None = None  # for each row, the number of its item; None: row i is item i

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded array of a row, or BadMedia as when it was decoded."""
        item = row if self.item_of_row is None else int(self.item_of_row[row])
        data, shape, dtype, error = (column[item] for column in self.items.columns)
        if error.is_valid:
            raise BadMedia(error.as_py())
        array = np.ndarray(shape.as_py(), dtype.as_py(), data.as_buffer())
        array.flags.writeable = False
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        if self.files:
            return _reopened, (self.files, self.item_of_row)
        return DecodedStore, (self.items, (), self.item_of_row)


class EmbeddedTexts:
    """The vectors of the texts that a tower or a teacher embeds before the training: `texts[text]`.

    Attributes:
        store: the vectors.
        number: that of each text in the store, in this order.
    """

    def __init__(self, modality: Towered, texts: Iterable[str], progress: Progress | None) -> None:
        distinct = list(dict.fromkeys(texts))

        def embed(numbers: range) -> Iterator[Decoded]:
            return modality.embed_all((partial(str, distinct[number]) for number in numbers), repeat(0))

        self.store = store_on_disk(decoding_key(modality, []), distinct, embed, "embedding texts", progress)
        self.number = {text: number for number, text in enumerate(distinct)}

    def __getitem__(self, text: str) -> np.ndarray:
        """The vectors (crops, features) of a text. BadMedia if it could not be embedded."""
        return self.store[self.number[text]]


def store_column(
    table: Table,
    modality: Modality,
    column: str,
    views: list[Any],
    on_disk: bool = False,
    progress: Progress | None = None,
) -> DecodedStore:
    """Decodes the media in a table's column. A tower embeds them, and its vectors are always kept on disk.

    A file that several rows name, with a caption each, is decoded once. `views` are all views that read the column:
    arrays are no larger than the largest of them needs.
    """
    is_tower = isinstance(modality, Towered)
    paths = table.path_of_rows(column)
    item_of_media: dict[str | int, int] = {}  # by path, or by row if the table itself holds the media
    item_of_row = np.array(
        [item_of_media.setdefault(path or row, len(item_of_media)) for row, path in enumerate(paths)]
    )
    rows = np.unique(item_of_row, return_index=True)[1].tolist()  # the first row of each item

    states: list[Any] = []

    def decode(items: range) -> Iterator[Decoded]:
        cells_of_rows = table.iterate([column], rows[items.start : items.stop])
        reads = (partial(table.media, cells[column]) for cells in cells_of_rows)
        if isinstance(modality, Towered):
            seeds = (int(stable_hash([state]), 16) for state in states[items.start : items.stop])
            yield from modality.embed_all(reads, seeds)
        else:  # In threads, because decoders release Python's global lock.
            yield from map_ahead(partial(_decode, modality, views), reads, threads=min(MAX_THREADS, core_count()))

    def decode_unchanged(items: range) -> Iterator[Decoded]:
        yield from decode(items)
        part = slice(items.start, items.stop)
        if _content_states(table, column, rows[part], paths) != states[part]:
            raise UserError(
                f"source {table.name}: files in column {column!r} changed while they were decoded; run it again"
            )

    description = f"{'embedding' if is_tower else 'decoding'} {table.name}.{column}"
    if on_disk or is_tower:
        states = _content_states(table, column, rows, paths, progress)
        key = decoding_key(modality, [] if is_tower else views)  # A tower reads items in its own view.
        store = store_on_disk(key, states, decode_unchanged, description, progress)
    else:
        items = range(len(rows))
        progress_bar = progress(items, description) if progress else items
        decoded = (array for _, array in zip(progress_bar, decode(items)))
        store = DecodedStore(pa.Table.from_batches(_batches(decoded), SCHEMA))
    return replace(store, item_of_row=item_of_row)


def _decode(modality: Modality, views: list[Any], read: Callable[[], Any]) -> Decoded:
    try:
        return modality.decode(read(), views)
    except BadMedia as error:
        return error


def store_on_disk(
    decoding: list[Any],
    states: list[Any],
    decode: Callable[[range], Iterator[Decoded]],
    description: str,
    progress: Progress | None,
) -> DecodedStore:
    """Decodes items, except those that an earlier run has decoded.

    Of several processes that need the same items, one decodes them and the others wait.

    Args:
        decoding: what determines how an item is decoded, besides its state.
        states: a value for each item that changes with it.
        decode: yields what the items in a range of their numbers are decoded to.
        description: what is shown with the progress.
    """
    items = range(len(states))
    parts = [items[start : start + ITEMS_PER_FILE] for start in items[::ITEMS_PER_FILE]]
    key_of = {part: stable_hash([*decoding, *states[part.start : part.stop]]) for part in parts}
    missing = sum(len(part) for part, key in key_of.items() if not is_cached(KIND, key))
    ticks = iter(progress(range(missing), description) if progress and missing else range(missing))

    def read(folder: Path) -> Path:
        _read_part(folder / ROWS_FILE)
        return folder / ROWS_FILE

    def write(folder: Path, part: range) -> None:
        # One tick per item. `repeat`, because a damaged file is written again without ticks.
        decoded = (array for array, _ in zip(decode(part), chain(ticks, repeat(None))))
        with pa.ipc.new_file(folder / ROWS_FILE, SCHEMA) as writer:
            for batch in _batches(decoded):
                writer.write_batch(batch)

    files = [cached(KIND, key, read, partial(write, part=part)) for part, key in key_of.items()]
    for _ in ticks:  # Another process may have decoded the others.
        pass
    return _reopened(files)


def _reopened(files: Sequence[Path], item_of_row: np.ndarray | None = None) -> DecodedStore:
    """Opens a store on disk, from the files of its parts."""
    items = pa.concat_tables(map(_read_part, files)) if files else SCHEMA.empty_table()
    return DecodedStore(items, files, item_of_row)


def _read_part(file: Path) -> pa.Table:
    """Opens a file of a store. Raises OSError or ValueError if it is damaged."""
    rows = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    rows.validate(full=True)  # Otherwise, damaged offsets would make NumPy read other memory.
    return rows


def _batches(decoded: Iterable[Decoded]) -> Iterator[pa.RecordBatch]:
    """The rows of arrays, in batches of at most `CHUNK` arrays and about `BATCH_BYTES`: a clip may have 40 MB."""
    batch: list[dict[str, Any]] = []
    batch_bytes = 0
    for item in decoded:
        if isinstance(item, BadMedia):
            batch.append({"error": str(item)})
        else:
            data = item.tobytes() + bytes(-item.nbytes % ALIGN)
            batch.append({"data": data, "shape": item.shape, "dtype": item.dtype.str})
            batch_bytes += len(data)
        if len(batch) == CHUNK or batch_bytes >= BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(batch, SCHEMA)
            batch = []
            batch_bytes = 0
    if batch:
        yield pa.RecordBatch.from_pylist(batch, SCHEMA)


def decoding_key(modality: Any, views: list[Any]) -> list[Any]:
    """What decides how a modality decodes items: its code, its options, what it learned, and the views."""
    modality_class = type(modality)
    code = [LAYOUT, version("openimp"), modality_class.__module__, modality_class.__qualname__, *_code(modality)]
    learned = sorted(learned_files([modality]).items())
    return [*code, modality.config.model_dump_json(), learned, sorted({view.model_dump_json() for view in views})]


def _code(modality: Any) -> list[Any]:
    """Hashes of the packages that define the classes of a modality, and the versions of the libraries that decode."""
    modules = {base.__module__ for base in type(modality).__mro__}
    modules = {module for module in modules if module.partition(".")[0] not in sys.stdlib_module_names}
    libraries = {"numpy", *modality.decoders}
    if isinstance(modality, Towered):
        modules |= {*modality.tower_packages}
        libraries |= {*modality.tower_libraries}
    versions = [(library, library_version(library)) for library in sorted(libraries)]
    return [sorted(map(source_hash, modules)), versions]


def _content_states(
    table: Table, column: str, rows: Sequence[int], paths: Sequence[str | None], progress: Progress | None = None
) -> list[Any]:
    """For each of the rows, a value that changes if the media in it change. `paths`: by row, of their files.

    If there is a path, the row's other columns do not count, so that a corrected caption does not decode the media
    again.
    """
    files = [path for row in rows if (path := paths[row])]
    file_digests = iter(table.file_digests(files, progress=progress, description=f"reading {table.name}.{column}"))
    return [
        (path, next(file_digests)) if (path := paths[row]) else (table.whole_fingerprint, column, row) for row in rows
    ]
