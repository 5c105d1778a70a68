"""The store of decoded arrays: the same in memory and on disk, and never stale."""

import io
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common.modality import BadMedia
from openimp.common.schema import Strict
from openimp.data import store as store_module
from openimp.data.sources import open_source
from openimp.data.store import ITEMS_PER_FILE, DecodedStore, store_column
from openimp.recipe.tasks import Source
from tests.messages import refuses

# NumPy parses a file's header with `ast`, which in Python 3.11 may fail in several threads at once
# (python/cpython#106905).
ONE_AT_A_TIME = threading.Lock()


class Numbers:
    """What a store needs of a modality: it decodes arrays in .npy files, and cuts them to what the views ask for."""

    decoders = ()

    class Config(Strict):
        scale: int = 1

    class View(Strict):
        size: int = 8

    def __init__(self, scale: int = 1) -> None:
        self.config = self.Config(scale=scale)
        self.decoded = 0

    def decode(self, raw, views, rng=None) -> np.ndarray:
        self.decoded += 1
        try:
            with ONE_AT_A_TIME:
                array = np.load(io.BytesIO(raw) if isinstance(raw, bytes) else raw, allow_pickle=False)
        except ValueError:
            raise BadMedia("this is no array") from None
        return array[..., : max(view.size for view in views)] * np.asarray(self.config.scale, array.dtype)


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


def write_manifest(folder: Path) -> Path:
    """A manifest of ARRAYS and two files that cannot be read, as files beside it."""
    for i, array in enumerate(ARRAYS):
        (folder / f"{i}.npy").write_bytes(npy(array))
    (folder / "bad.npy").write_bytes(b"nonsense")
    names = [*(f"{i}.npy" for i in range(len(ARRAYS))), "bad.npy", "../outside.npy"]
    (folder / "m.csv").write_text("\n".join(["file", *names]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("arrays"))


def build(
    path: Path, modality: Numbers | None = None, cache: str = "disk", sizes=(8,), progress=None, **source
) -> DecodedStore:
    table = open_source("numbers", Source(path=str(path), **source))
    views = [Numbers.View(size=size) for size in sizes]
    return store_column(table, modality or Numbers(), "file", views, cache == "disk", progress)


def check(store: DecodedStore) -> None:
    assert store.items.num_rows == len(ARRAYS) + 2
    for i, expected in enumerate(ARRAYS):
        found = store[i]
        np.testing.assert_array_equal(found, expected, strict=True)
        assert found.flags.aligned
        assert not found.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            found[...] = 0
    # Not `refuses`, which knows nothing of other processes.
    for _ in range(2):
        with pytest.raises(BadMedia, match=r"^this is no array$"):
            store[len(ARRAYS)]
        with pytest.raises(BadMedia, match="leaves the folder"):
            store[len(ARRAYS) + 1]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_arrays_come_back(folder, cache):
    store = build(folder / "m.csv", cache=cache)
    check(store)
    check(pickle.loads(pickle.dumps(store)))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_file_that_several_rows_name_is_decoded_once(folder, cache):
    """As a picture with five captions in five rows."""
    (folder / "captions.csv").write_text("\n".join(["file", "0.npy", "bad.npy", "0.npy", "1.npy", "bad.npy", "0.npy"]))
    modality = Numbers()
    bars = []

    def progress(items, description):
        bars.append(len(items))
        return items

    store = build(folder / "captions.csv", modality, cache, progress=progress)
    assert (modality.decoded, bars) == (3, [3])
    for same in (store, pickle.loads(pickle.dumps(store))):
        for row, number in {0: 0, 2: 0, 3: 1, 5: 0}.items():
            np.testing.assert_array_equal(same[row], ARRAYS[number])
        for row in (1, 4):
            with pytest.raises(BadMedia, match=r"^this is no array$"):
                same[row]


def test_disk_is_read_again_although_the_data_has_moved_or_other_columns_have_changed(tmp_path):
    write_manifest(tmp_path)
    check(build(tmp_path / "m.csv"))
    shutil.copytree(tmp_path, tmp_path / "moved")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    changed = [f"{lines[0]},caption", *(f"{line},a caption" for line in lines[1:])]
    (tmp_path / "changed.csv").write_text("\n".join(changed))
    for name in ("m.csv", "moved/m.csv", "changed.csv"):
        modality = Numbers()
        store = build(tmp_path / name, modality)
        check(store)
        assert modality.decoded == 0
    assert len(pickle.dumps(store)) < 500


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"0.npy": npy(ARRAYS[0] + 1)}, {}),  # of the same size
        ({"m.csv": b"file\n1.npy\n0.npy\n"}, {}),
        ({}, {"sizes": (2, 8)}),
        ({}, {"sizes": (2,)}),
        ({}, {"scale": 2}),
        ({}, {"where": {"file": ["0.npy", "1.npy"]}}),
        ({}, {"version": "99.0"}),
        ({}, {"damage": True}),
    ],
)
def test_a_change_makes_it_anew(tmp_path, cache, changes, options, monkeypatch):
    write_manifest(tmp_path)
    build(tmp_path / "m.csv")
    if "version" in options:
        monkeypatch.setattr(store_module, "version", lambda name: options["version"])
    if "damage" in options:
        (file,) = cache.glob("decoded/*/rows.arrow")
        file.write_bytes(file.read_bytes()[:-10])
    for name, content in changes.items():
        (tmp_path / name).write_bytes(content)
    modality = Numbers(options.get("scale", 1))
    build_options = {"sizes": options.get("sizes", (8,)), "where": options.get("where", {})}
    store = build(tmp_path / "m.csv", modality, **build_options)
    assert modality.decoded > 0
    np.testing.assert_array_equal(store[0], build(tmp_path / "m.csv", modality, "memory", **build_options)[0])


def test_damaged_offsets_make_it_anew(folder, cache):
    """NumPy would read other memory."""
    store = build(folder / "m.csv")
    (file,) = cache.glob("decoded/*/rows.arrow")
    offsets = np.frombuffer(store.items["data"].chunk(0).buffers()[1], np.int64)[: len(ARRAYS) + 3].tobytes()
    content = file.read_bytes()
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:-8] + np.int64(2**40).tobytes()))
    modality = Numbers()
    check(build(folder / "m.csv", modality))
    assert modality.decoded > 0


def test_a_changed_file_that_a_struct_names_makes_it_anew(tmp_path):
    """As `datasets` writes media that are not embedded."""
    (tmp_path / "0.npy").write_bytes(npy(ARRAYS[0]))
    cells = [{"bytes": None, "path": "0.npy"}, {"bytes": npy(ARRAYS[1]), "path": None}]
    pq.write_table(pa.table({"file": cells}), tmp_path / "x.parquet")
    build(tmp_path / "x.parquet")
    (tmp_path / "0.npy").write_bytes(npy(ARRAYS[0] + 1))
    np.testing.assert_array_equal(build(tmp_path / "x.parquet")[0], ARRAYS[0] + 1)


def test_of_several_that_need_the_same_store_one_decodes(folder):
    modalities = [Numbers() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        for store in pool.map(lambda modality: build(folder / "m.csv", modality), modalities):
            check(store)
    assert sorted(modality.decoded for modality in modalities) == [0, 0, len(ARRAYS) + 1]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_nothing_can_be_decoded(tmp_path, cache):
    (tmp_path / "m.csv").write_text("file\nnone.npy\n")
    store = build(tmp_path / "m.csv", cache=cache)
    with refuses(BadMedia):
        store[0]


def test_decoding_that_was_stopped_goes_on(tmp_path):
    """With one bar, which counts what is left."""
    rows = ITEMS_PER_FILE + 4
    pq.write_table(pa.table({"file": [npy(np.array([row])) for row in range(rows)]}), tmp_path / "x.parquet")
    bars = []

    def progress(items, description):
        bars.append((len(items), description))
        yield from items[: ITEMS_PER_FILE + 2]
        if len(items) == rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x.parquet", progress=progress)
    modality = Numbers()
    store = build(tmp_path / "x.parquet", modality, progress=progress)
    assert modality.decoded == 4
    assert [int(store[row][0]) for row in range(0, rows, 1365)] == [*range(0, rows, 1365)]
    assert bars == [(rows, "decoding numbers.file"), (4, "decoding numbers.file")]
