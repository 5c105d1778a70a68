"""The store of decoded arrays: the same in memory and on disk, and never stale."""

import io
import logging
import multiprocessing
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens
from openimp.common.schema import Strict
from openimp.data import store as store_module
from openimp.data.sources import open_source
from openimp.data.store import DecodedStore
from openimp.recipe.tasks import Source

# NumPy parses a file's header with `ast`, which in Python 3.11 may fail in several threads at once
# (python/cpython#106905).
ONE_AT_A_TIME = threading.Lock()


class Numbers(Modality):
    """Arrays in .npy files, cut to what the views ask for."""

    name = "numbers"
    stem = "numbers"

    class Config(Strict):
        scale: int = 1

    class View(Strict):
        size: int = 8

    def __init__(self, config) -> None:
        super().__init__(config)
        self.decoded = 0

    def stem_spec(self) -> StemSpec:
        return StemSpec(1, (8,))

    def check(self, view) -> None:
        pass

    def length(self, view) -> int:
        return view.size

    def decode(self, raw, views, rng=None) -> np.ndarray:
        self.decoded += 1
        try:
            with ONE_AT_A_TIME:
                array = np.load(io.BytesIO(raw) if isinstance(raw, bytes) else raw, allow_pickle=False)
        except ValueError:
            raise BadMedia("this is no array") from None
        return array[..., : max(view.size for view in views)] * np.asarray(self.config.scale, array.dtype)

    def transform(self, item, view, rng) -> np.ndarray:
        return item

    def tokens(self, items, view, rngs) -> Tokens:
        raise NotImplementedError


ARRAYS = [
    np.arange(15, dtype=np.uint8).reshape(1, 3, 5),  # an odd number of bytes
    np.arange(5, dtype=np.int16) - 2,
    np.linspace(0, 1, 7, dtype=np.float16)[None],
    np.zeros((0, 4), np.uint8),
    np.array([[1.5, np.inf]], np.float32),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENIMP_CACHE", str(folder))
    return folder


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write_manifest(folder: Path, repeat: int = 1) -> Path:
    """A manifest of ARRAYS and two files that cannot be read, as files beside it."""
    folder.mkdir(exist_ok=True)
    names = []
    for i, array in enumerate(ARRAYS * repeat):
        names.append(f"{i}.npy")
        (folder / names[-1]).write_bytes(npy(array))
    (folder / "bad.npy").write_bytes(b"nonsense")
    names += ["bad.npy", "../outside.npy"]
    (folder / "m.csv").write_text("\n".join(["file", *names]))
    return folder / "m.csv"


def open_manifest(folder: Path, **source):
    return open_source("numbers", Source(path=f"{folder}/m.csv", **source))


def numbers(scale: int = 1) -> Numbers:
    return Numbers(Numbers.Config(scale=scale))


def build(table, modality=None, where="disk", sizes=(8,), **options) -> DecodedStore:
    modality = modality or numbers()
    return DecodedStore.build(table, modality, "file", [Numbers.View(size=size) for size in sizes], where, **options)


def check(store: DecodedStore) -> None:
    assert store._rows.num_rows == len(ARRAYS) + 2
    for i, expected in enumerate(ARRAYS):
        found = store[i]
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
        assert found.flags.aligned
        assert not found.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0
    for _ in range(2):
        with pytest.raises(BadMedia, match=r"^this is no array$"):
            store[len(ARRAYS)]
        with pytest.raises(BadMedia, match="leaves the folder"):
            store[len(ARRAYS) + 1]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_arrays_come_back(tmp_path, where):
    write_manifest(tmp_path / "a")
    store = build(open_manifest(tmp_path / "a"), where=where)
    check(store)
    check(pickle.loads(pickle.dumps(store)))


def test_disk_is_read_again(tmp_path, cache):
    write_manifest(tmp_path / "a")
    check(build(open_manifest(tmp_path / "a")))
    modality = numbers()
    store = build(open_manifest(tmp_path / "a"), modality)
    check(store)
    assert modality.decoded == 0
    assert len(pickle.dumps(store)) < 500
    assert [path.name for path in cache.iterdir()] == ["decoded"]
    (tmp_path / "a").rename(tmp_path / "b")
    check(build(open_manifest(tmp_path / "b"), modality))
    assert modality.decoded == 0


def test_many_rows_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK", 16)
    data = [npy(np.full(3, i, np.int16)) for i in range(100)]
    pq.write_table(pa.table({"file": data}), tmp_path / "x.parquet")
    seen = []

    def progress(iterable, description):
        for item in iterable:
            seen.append((description, item))
            yield item

    store = build(open_source("x", Source(path=f"{tmp_path}/x.parquet")), where="memory", progress=progress)
    assert [int(store[i][0]) for i in range(100)] == list(range(100))
    assert seen == [("decoding x.file", row) for row in range(100)]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_nothing_can_be_decoded(tmp_path, where):
    (tmp_path / "m.csv").write_text("file\nnone.npy\n")
    store = build(open_manifest(tmp_path), where=where)
    with pytest.raises(BadMedia, match="No such file"):
        store[0]


def change_file(folder: Path) -> dict:
    (folder / "0.npy").write_bytes(npy(ARRAYS[0] + 1))  # of the same size
    return {}


def change_manifest(folder: Path) -> dict:
    (folder / "m.csv").write_text("file\n1.npy\n0.npy\n")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        change_file,
        change_manifest,
        lambda folder: {"sizes": (2, 8)},
        lambda folder: {"sizes": (2,)},
        lambda folder: {"modality": numbers(scale=2)},
        lambda folder: {"where": {"file": ["0.npy", "1.npy"]}},
    ],
)
def test_a_change_makes_it_anew(tmp_path, change):
    write_manifest(tmp_path / "a")
    build(open_manifest(tmp_path / "a"))
    options = change(tmp_path / "a")
    table = open_manifest(tmp_path / "a", where=options.pop("where", {}))
    modality = options.pop("modality", numbers())
    store = build(table, modality, **options)
    assert modality.decoded > 0
    fresh = build(table, numbers(modality.config.scale), "memory", **options)
    np.testing.assert_array_equal(store[0], fresh[0])


def test_a_change_of_embedded_data_makes_it_anew(tmp_path):
    for i in range(2):
        pq.write_table(pa.table({"file": [npy(np.full(3, i, np.int16))]}), tmp_path / "x.parquet")
        assert build(open_source("x", Source(path=f"{tmp_path}/x.parquet")))[0].tolist() == [i] * 3


def test_another_version_makes_it_anew(tmp_path, monkeypatch):
    write_manifest(tmp_path / "a")
    table = open_manifest(tmp_path / "a")
    build(table)
    monkeypatch.setattr(store_module, "version", lambda name: "99.0")
    modality = numbers()
    check(build(table, modality))
    assert modality.decoded > 0


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def overwrite(file: Path) -> None:
    file.write_text("[]")


@pytest.mark.parametrize("damage", [truncate, Path.unlink, overwrite])
def test_damage_is_mended(tmp_path, cache, damage, caplog):
    write_manifest(tmp_path / "a")
    table = open_manifest(tmp_path / "a")
    build(table)
    (file,) = cache.glob("decoded/*/rows.arrow")
    damage(file)
    modality = numbers()
    with caplog.at_level(logging.INFO):
        check(build(table, modality))
    assert modality.decoded > 0
    assert "is made again" in caplog.text


def forge(file: Path, table: pa.Table) -> None:
    """Replaces a store, as whoever can write to the cache would."""
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def set_first(table: pa.Table, column: str, value) -> pa.Table:
    values = [value, *table[column].to_pylist()[1:]]
    return table.set_column(
        table.column_names.index(column),
        table.schema.field(column),
        pa.array([*values], table.schema.field(column).type),
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: set_first(table, "dtype", "|O8"), "type object, which is not a number"),
        (lambda table: set_first(table, "dtype", "|V4"), "not a number"),
        (lambda table: set_first(table, "dtype", "<M8[s]"), "not a number"),
        (lambda table: set_first(table, "dtype", "nonsense"), "not understood"),
        (lambda table: table.drop_columns("shape"), "columns are not those of a store"),
        (lambda table: table.rename_columns(["shape", "data", "dtype", "error"]), "columns are not those of a store"),
    ],
)
def test_a_forged_store_is_refused_and_written_again(tmp_path, cache, change, told, caplog):
    write_manifest(tmp_path / "a")
    store = build(open_manifest(tmp_path / "a"))
    (file,) = cache.glob("decoded/*/rows.arrow")
    forge(file, change(pa.ipc.open_file(file.read_bytes()).read_all()))
    with pytest.raises((ValueError, TypeError), match=told):  # as a worker opens it
        pickle.loads(pickle.dumps(store))
    with caplog.at_level(logging.INFO):
        check(build(open_manifest(tmp_path / "a")))
    assert "is made again" in caplog.text


def test_offsets_that_leave_the_file_are_refused(tmp_path, cache):
    write_manifest(tmp_path / "a")
    store = build(open_manifest(tmp_path / "a"))
    (file,) = cache.glob("decoded/*/rows.arrow")
    offsets = np.frombuffer(store._rows["data"].chunk(0).buffers()[1], np.int64)[: len(ARRAYS) + 3].tobytes()
    data = file.read_bytes()
    assert data.count(offsets) == 1
    for forged in (2**40, -64):
        file.write_bytes(data.replace(offsets, offsets[:-8] + np.int64(forged).tobytes()))
        with pytest.raises(ValueError, match="offset"):
            pickle.loads(pickle.dumps(store))


@pytest.mark.parametrize(
    ("dtype", "shape"), [("|u1", [1, 3, 10**6]), ("|u1", [2**32, 2**32, 5]), ("|u1", [-2]), ("<f8", [1, 3, 100])]
)
def test_a_shape_that_asks_for_more_bytes_than_there_are_is_refused(tmp_path, cache, dtype, shape):
    write_manifest(tmp_path / "a")
    build(open_manifest(tmp_path / "a"))
    (file,) = cache.glob("decoded/*/rows.arrow")
    table = pa.ipc.open_file(file.read_bytes()).read_all()
    forge(file, set_first(set_first(table, "dtype", dtype), "shape", shape))
    store = build(open_manifest(tmp_path / "a"))
    with pytest.raises((ValueError, TypeError), match=r"too small|too big|maximum|negative"):
        store[0]


def test_the_cache_is_the_users_alone(tmp_path, cache):
    write_manifest(tmp_path / "a")
    build(open_manifest(tmp_path / "a"))
    for folder in (cache, cache / "decoded"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_left_is_no_store(tmp_path, cache):
    write_manifest(tmp_path / "a")
    table = open_manifest(tmp_path / "a")
    build(table)
    (file,) = cache.glob("decoded/*/rows.arrow")
    draft = file.parent.with_name(f".{file.parent.name}.tmp")
    file.parent.rename(draft)
    (draft / file.name).write_bytes(b"half")
    check(build(table))
    assert not draft.exists()


def test_a_failure_leaves_nothing(tmp_path, cache):
    write_manifest(tmp_path / "a")
    table = open_manifest(tmp_path / "a")

    class Broken(Numbers):
        def decode(self, raw, views, rng=None):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        build(table, Broken(Numbers.Config()))
    assert not list(cache.glob("decoded/*/rows.arrow"))
    check(build(table))


def test_objects_are_refused(tmp_path):
    write_manifest(tmp_path / "a")

    class Objects(Numbers):
        def decode(self, raw, views, rng=None):
            return np.array([object()])

    with pytest.raises(TypeError, match="must hold numbers"):
        build(open_manifest(tmp_path / "a"), Objects(Numbers.Config()))


class Slow(Numbers):
    def decode(self, raw, views, rng=None):
        time.sleep(0.01)
        return super().decode(raw, views)


def build_slowly(folder: Path, queue) -> None:
    modality = Slow(Numbers.Config())
    store = build(open_manifest(folder), modality)
    queue.put((modality.decoded, [store[i].tolist() for i in range(len(ARRAYS))]))


def test_two_processes_at_once(tmp_path):
    write_manifest(tmp_path / "a")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=build_slowly, args=(tmp_path / "a", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(decoded > 0 for decoded, _ in results) == [False, False, True]
    assert all(arrays == [array.tolist() for array in ARRAYS] for _, arrays in results)


def test_a_forked_worker_shares_it(tmp_path):
    write_manifest(tmp_path / "a")
    for where in ("memory", "disk"):
        store = build(open_manifest(tmp_path / "a"), where=where)
        context = multiprocessing.get_context("fork")
        worker = context.Process(target=check, args=(store,))
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0
