"""What is cached is keyed by all that went into it: the bytes of the data, and the code that decodes them."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openimp.common import versions
from openimp.common.cache import stable_hash
from openimp.common.versions import source_hash
from openimp.data import store as store_module
from openimp.data.sources import open_source
from openimp.data.store import decoding_key, store_column
from openimp.recipe.registry import modality_class
from openimp.recipe.tasks import Source
from tests.little import png
from tests.messages import refuses
from tests.read_only import run_read_only

MODALITY = """
import numpy as np
class Bytes:
    decoders = ()
    class config:
        model_dump_json = staticmethod(lambda: "{}")
    def decode(self, raw, views, rng=None):
        content = raw if isinstance(raw, bytes) else raw.read_bytes()
        return np.frombuffer(content, np.uint8)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def modality(tmp_path, monkeypatch):
    """The module of a modality of another package."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "of_bytes.py").write_text(MODALITY)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield importlib.import_module("of_bytes")
    del sys.modules["of_bytes"]


def change(file: Path, content: bytes) -> None:
    """Changes a file, but neither its size nor its time."""
    before = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def opened(path: Path):
    return open_source("data", Source(path=str(path)))


def decoded(path: Path, modality) -> list[bytes]:
    table = opened(path)
    store = store_column(table, modality.Bytes(), "file", [], on_disk=True)
    return [store[row].tobytes() for row in range(len(table))]


MIDDLE = [bytes(10_000) + middle + bytes(10_000) for middle in (b"a", b"b")]


def test_a_file_that_changed_only_in_the_middle_is_decoded_again(tmp_path, modality):
    before, after = MIDDLE
    file = tmp_path / "data" / "cat" / "0.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(before)
    os.utime(file, (1e9, 1e9))
    assert decoded(tmp_path / "data", modality) == [before]
    change(file, after)
    assert decoded(tmp_path / "data", modality) == [after]


def test_rows_of_a_large_file_that_changed_only_in_the_middle_are_decoded_again(tmp_path, modality, monkeypatch):
    """A resumed run compares a part of large files; cached data must not."""
    monkeypatch.setattr("openimp.data.files.COMPARED_BYTES", 2**12)
    rows = [MIDDLE[0], MIDDLE[0], MIDDLE[0]]
    for changed in (rows, [MIDDLE[0], MIDDLE[1], MIDDLE[0]]):
        pq.write_table(pa.table({"file": changed}), tmp_path / "x.parquet", compression="none", use_dictionary=False)
        assert decoded(tmp_path / "x.parquet", modality) == changed


READ = """
import sys
sys.path.insert(0, "PACKAGES")
import of_bytes
from openimp.data.sources import open_source
from openimp.data.store import store_column
from openimp.recipe.tasks import Source
store = store_column(open_source("data", Source(path="DATA")), of_bytes.Bytes(), "file", [], on_disk=True)
print(store[0].tobytes() == bytes(10_000) + b"a" + bytes(10_000))
"""


def test_a_read_only_cache_is_used(tmp_path, modality):
    """Both what `datasets` has unpacked, and what was decoded."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"file": MIDDLE[:1]}), file)
    os.utime(file, (1e9, 1e9))
    decoded(file, modality)
    code = READ.replace("PACKAGES", str(tmp_path / "packages")).replace("DATA", str(file))
    assert run_read_only(tmp_path / "cache", code) == "True\n"


def test_a_file_that_changes_while_it_is_decoded_is_not_cached_as_it_was_before(tmp_path, modality, monkeypatch):
    before, after = MIDDLE
    file = tmp_path / "data" / "0.bin"
    file.parent.mkdir()
    file.write_bytes(before)
    real = modality.Bytes.decode

    def changing(self, raw, views, rng=None):
        change(file, after)
        return real(self, raw, views, rng)

    with monkeypatch.context() as patch:
        patch.setattr(modality.Bytes, "decode", changing)
        with refuses():
            decoded(tmp_path / "data", modality)
    change(file, before)
    assert decoded(tmp_path / "data", modality) == [before]


def test_the_code_and_the_libraries_that_decode_are_in_the_key(tmp_path, modality, monkeypatch):
    def key() -> str:
        source_hash.cache_clear()  # As in another process.
        return stable_hash(decoding_key(modality.Bytes(), []))

    keys = {key()}
    (tmp_path / "packages" / "of_bytes.py").write_text(MODALITY + "# mended")
    keys.add(key())
    monkeypatch.setattr(store_module, "library_version", lambda name: "99.0")
    keys.add(key())
    assert len(keys) == 3


def test_the_files_of_openimp_that_decode_pictures_are_in_the_key(tmp_path, monkeypatch):
    """Also those that the module of the class imports."""
    package = Path(versions.__file__).parents[1]
    image = modality_class("image")
    keys = set()
    for file in ("", "modalities/image.py", "modalities/media.py", "modalities/vision.py", "common/modality.py"):
        source_hash.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(versions, "sha256", lambda path, file=file: str(path == package / file))
            keys.add(stable_hash(decoding_key(image(image.Config()), [])))
    source_hash.cache_clear()
    assert len(keys) == 5
    libraries = dict(decoding_key(image(image.Config()), [])[5])
    assert libraries.keys() == {"numpy", "pillow"}
    assert libraries["numpy"] == np.__version__


def test_a_caption_of_the_same_length_changes_the_fingerprint_of_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(png(0))
    caption = tmp_path / "data" / "0.txt"
    caption.write_text("a cat")
    before = opened(tmp_path / "data")
    assert before.fingerprint
    assert before.whole_fingerprint
    change(caption, b"a dog")
    after = opened(tmp_path / "data")
    assert after.fingerprint != before.fingerprint
    assert after.whole_fingerprint != before.whole_fingerprint


def test_a_resumed_run_reads_a_share_of_each_of_many_large_files(tmp_path, monkeypatch):
    """It sees a change at the ends and in the blocks between, and reads no file that is the same as before."""
    monkeypatch.setattr("openimp.data.tables.COMPARED_BYTES", 2**14)
    (tmp_path / "m.csv").write_text("file\na.bin\nb.bin\n")
    contents = {bytes(2**15), b"1" + bytes(2**15 - 1), bytes(2**15 - 1) + b"1", bytes(2**15 + 1)}
    (tmp_path / "b.bin").write_bytes(b"small")
    prints = set()
    for content in contents:
        (tmp_path / "a.bin").write_bytes(content)
        prints.add(opened(tmp_path / "m.csv").fingerprint_with_files(["file"]))
    assert len(prints) == len(contents)
    (tmp_path / "b.bin").write_bytes(b"SMALL")
    assert opened(tmp_path / "m.csv").fingerprint_with_files(["file"]) not in prints
