"""Lanes: the ranks and workers together read a stream once, and what a step sees does not depend on them."""

import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.local import LocalFileSystem

from openimp.data.files import BLOCK
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.loader import load_batches
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.recipe.schema import Recipe
from tests.batches import assert_same
from tests.little import write_tar
from tests.messages import refuses
from tests.recordings import picture_file

ROWS = 4
"""Rows of a shard."""
forked = pytest.mark.skipif(sys.platform != "linux", reason="only forked workers know the file system that counts")


def write_shards(folder: Path, kind: str, shards: int, big: bool = False) -> str:
    """Writes shards of pictures, and returns their pattern. If `big`, a row has more bytes than are read at once."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(shards):
        rows = []
        for i in range(ROWS):
            picture = PIL.Image.new("L", (16, 16), ROWS * shard + i).convert("RGB")
            row = {"png": picture_file(picture, "PNG"), "cls": i % 2}
            rows.append(row | {"bin": rng.bytes(BLOCK // 2 + 100)} if big else row)
        file = folder / f"{shard:02}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
        else:
            members = {f"{i}.{key}": value for i, row in enumerate(rows) for key, value in row.items()}
            write_tar(file, {name: b"%d" % value if "cls" in name else value for name, value in members.items()})
    return f"{folder}/*.{kind}"


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> str:
    """The pattern of 8 tars."""
    return write_shards(tmp_path_factory.mktemp("tars") / "data", "tar", 8)


# One task that classifies a stream's pictures, so that no tokenizer reads it first.
RECIPE = """
name: lanes
modalities: {vision: {patch: [2, 8, 8]}}
tasks:
  one:
    source: pictures
    inputs: {image: png}
    objectives: [{type: classification, label: cls, classes: [0, 1]}]
    views: [{image: {size: 16, jitter: 0.2, drop_tokens: 0.5}}]
"""


def recipe_of(path: str, batch_size: int = 16, steps: int = 8, workers: int = 0, **source: int) -> Recipe:
    data = yaml.safe_load(RECIPE)
    data["tasks"]["one"]["batch_size"] = batch_size
    sources = {"pictures": {"path": path, "stream": True, "window": 32, **source}}
    return Recipe.build({**data, "sources": sources, "train": {"steps": steps, "num_workers": workers}})


def opened(recipe: Recipe, ranks: int) -> list[StepBatches]:
    datas = [TaskData(recipe, recipe.make_modalities(), world_size=ranks) for _ in range(ranks)]
    return [StepBatches(data, rank) for rank, data in enumerate(datas)]


def read(data: list[StepBatches], first: int = 0, stop: int | None = None) -> list[LoadedBatch]:
    """The batches of all ranks together, by step."""
    return [LoadedBatch.merged(parts) for parts in zip(*(load_batches(of_rank, first, stop) for of_rank in data))]


class CountedFile(io.FileIO):
    """Appends a line to `log` for each read, also in other processes: the file, the first byte, and their number."""

    log: int

    def readinto(self, buffer) -> int:
        start = self.tell()
        size = super().readinto(buffer)
        os.write(self.log, f"{self.name}\t{start}\t{size}\n".encode())
        return size

    def read(self, size: int = -1) -> bytes:
        data = bytearray(os.fstat(self.fileno()).st_size - self.tell() if size < 0 else size)
        return bytes(data[: self.readinto(data)])


class Counted(LocalFileSystem):
    """counted:///folder/file is a local file whose reads are counted."""

    protocol = "counted"

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("counted://").strip("/")  # `datasets` drops the third slash.

    def unstrip_protocol(self, name):
        return f"counted://{self._strip_protocol(name)}"

    def _open(self, path, mode="rb", **options):
        return CountedFile(path)


class Reads:
    """The reads of counted files since `forget`, as (file, first byte, number of bytes)."""

    def __init__(self, log: Path) -> None:
        self._log = log
        fsspec.register_implementation("counted", Counted, clobber=True)
        CountedFile.log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_RDWR)

    def forget(self) -> None:
        os.truncate(self._log, 0)

    def __iter__(self):
        for line in self._log.read_text().splitlines():
            file, start, size = line.split("\t")
            yield file, int(start), int(size)

    def total(self) -> int:
        return sum(size for _, _, size in self)


@pytest.fixture
def reads(tmp_path) -> Reads:
    return Reads(tmp_path / "reads.log")


@forked
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_ranks_and_workers_read_a_stream_once(tmp_path, reads, kind):
    """In an epoch of 8 lanes, also where 4 ranks have 2 lanes each for 3 workers. The samples are the same."""
    path = f"counted://{write_shards(tmp_path / 'data', kind, 8, big=True)}"
    sizes = {str(file): file.stat().st_size for file in (tmp_path / "data").iterdir()}
    alone = read(opened(recipe_of(path, 8, 4, lanes=8), 1))
    assert sorted(name for item in alone for name in item.names) == sorted(
        f"{Path(file).name}[{i}]" for file in sizes for i in range(ROWS)
    )
    for ranks in (1, 2, 4):
        for workers in (1, 3):
            # Prefetching must not begin the next epoch.
            data = opened(recipe_of(path, 8, 4, workers, lanes=8), ranks)
            reads.forget()
            assert_same(read(data), alone)
            assert {file for file, _, _ in reads} == sizes.keys()
            if kind == "tar":  # It ends with empty blocks, of which two are read.
                assert 0 <= sum(sizes.values()) - reads.total() <= 8 * tarfile.RECORDSIZE
            else:  # pyarrow reads 64 KiB at the end for the footer.
                assert reads.total() <= sum(sizes.values()) + 8 * 2**16


@pytest.mark.slow
def test_a_stream_resumes_with_other_ranks_and_workers(eight):
    """In the middle of windows and in later epochs, from cursors that went through JSON."""
    options = {"path": eight, "lanes": 8, "window": 24, "steps": 12}
    alone = read(opened(recipe_of(**options), 1))
    cursors = {}
    done = 0
    for stop, ranks, workers in ((1, 2, 0), (4, 1, 3), (5, 4, 0), (9, 8, 0), (12, 2, 2)):
        data = opened(recipe_of(**options, workers=workers), ranks)
        for of_rank in data if cursors else []:
            of_rank.data.load_cursors(json.loads(json.dumps(cursors)))
        loaded = read(data, done, stop)
        assert_same(loaded, alone[done:stop])
        cursors = {"one": loaded[-1].cursors}
        done = stop
    assert min(cursor["epoch"] for cursor in cursors["one"].values()) > 3


def test_resuming_reads_nothing_that_came_before(tmp_path, reads):
    recipe = recipe_of(f"counted://{write_shards(tmp_path / 'data', 'tar', 4, big=True)}", batch_size=4, window=4)
    alone = read(opened(recipe, 1))
    (batches,) = opened(recipe, 1)
    batches.data.load_cursors({"one": alone[1].cursors})
    reads.forget()
    assert_same([*load_batches(batches, 2, 3)], alone[2:3])
    size = (tmp_path / "data/00.tar").stat().st_size
    assert all(start > size // 8 for _, start, _ in reads)


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_lanes_share_lanes(tmp_path):
    path = write_shards(tmp_path / "data", "tar", 2)
    alone = read(opened(recipe_of(path, 12), 1))
    for ranks, workers in ((3, 2), (4, 0), (12, 0)):
        assert_same(read(opened(recipe_of(path, 12, workers=workers), ranks)), alone)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_bad_row_is_replaced_by_the_next_of_its_lane(tmp_path, ranks):
    """Whatever the ranks and workers, also if all of a rank's rows are bad."""
    path = write_shards(tmp_path / "data", "tar", 4)
    bad = {f"{shard:02}.tar[{i}]" for shard, i in ((0, 0), (0, 1), (2, 3))}
    for name in bad:
        file = tmp_path / "data" / name[:6]
        content = bytearray(file.read_bytes())
        start = content.index(f"{name[7]}.png".encode()) + tarfile.BLOCKSIZE
        content[start : start + 3] = b"bad"
        file.write_bytes(content)
    alone = read(opened(recipe_of(path, 4), 1))
    assert {name for item in alone for name, reason in item.bad if reason} == bad
    counts = Counter(name for item in alone[:4] for name in item.names)
    assert not bad & counts.keys()
    assert sum(counts.values()) == 16
    for workers in (0, 3):
        assert_same(read(opened(recipe_of(path, 4, workers=workers), ranks)), alone)


def test_a_batch_size_that_the_lanes_do_not_divide_is_refused(eight):
    with refuses():
        opened(recipe_of(eight, 20), 1)
