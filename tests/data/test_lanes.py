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
import torch
from fsspec.implementations.local import LocalFileSystem

from openimp.common.errors import UserError
from openimp.data.files import BLOCK
from openimp.data.loader import load_batches
from openimp.data.step_batches import LoadedBatch, StepBatches
from openimp.data.streams import lane_count
from openimp.recipe.schema import Recipe

ROWS = 4
"""Rows of a shard."""


def png(level: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (level, level, level)).save(out, "PNG")
    return out.getvalue()


def rows_of(shards: int) -> list[list[dict[str, bytes]]]:
    """Shards of rows, whose members add up to more than the blocks in which files are read."""
    rng = np.random.default_rng(0)
    size = BLOCK // 2 + 100
    return [
        [{"png": png(ROWS * shard + i), "cls": b"%d" % (i % 2), "bin": rng.bytes(size)} for i in range(ROWS)]
        for shard in range(shards)
    ]


def write_tars(folder: Path, shards: int, big: bool = False) -> Path:
    for shard, rows in enumerate(rows_of(shards)):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for i, row in enumerate(rows):
                for ending, content in row.items() if big else [*row.items()][:2]:
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write_parquet(folder: Path, shards: int) -> Path:
    for shard, rows in enumerate(rows_of(shards)):
        table = pa.Table.from_pylist([{**row, "cls": int(row["cls"])} for row in rows])
        pq.write_table(table, folder / f"{shard:02}.parquet", row_group_size=2)
    return folder


def recipe_of(path: str, *changes: str, batch_size: int = 16, steps: int = 8) -> Recipe:
    """One task that classifies a stream's pictures, so that no tokenizer reads it first."""
    task = {
        "source": "pictures",
        "inputs": {"image": "png"},
        "objectives": [{"type": "classification", "label": "cls", "classes": [0, 1]}],
        "batch_size": batch_size,
        "views": [{"image": {"size": 16, "jitter": 0.2, "drop_tokens": 0.5}}],
    }
    data = {
        "name": "lanes",
        "modalities": {"vision": {"patch": [2, 8, 8]}},
        "sources": {"pictures": {"path": path, "stream": True, "window": 32}},
        "tasks": {"one": task},
        "train": {"steps": steps, "num_workers": 0},
    }
    for change in changes:
        key, value = change.split("=")
        section, *names, last = key.split(".")
        place = data[section]
        for name in names:
            place = place[name]
        place[last] = int(value)
    return Recipe.build(data)


def opened(recipe: Recipe, ranks: int) -> list[StepBatches]:
    return [StepBatches(recipe, recipe.make_modalities(), rank=rank, world_size=ranks) for rank in range(ranks)]


def read(recipe: Recipe, ranks: int, cursors: dict | None = None, first: int = 0, stop: int | None = None):
    """The batches of all ranks together, by step."""
    data = opened(recipe, ranks)
    for of_rank in data if cursors else []:
        of_rank.load_cursors(cursors)
    return [LoadedBatch.merged(parts) for parts in zip(*(load_batches(of_rank, first, stop) for of_rank in data))]


def assert_same(ours: list[LoadedBatch], theirs: list[LoadedBatch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a.visit, a.names, a.bad, a.digest, a.batch.rows) == (b.visit, b.names, b.bad, b.digest, b.batch.rows)
        assert a.cursors == b.cursors
        assert torch.equal(a.batch.targets[0]["label"], b.batch.targets[0]["label"])
        for ours_, theirs_ in zip(a.batch.tokens["image"], b.batch.tokens["image"]):
            assert ours_ is None or torch.equal(ours_, theirs_)


class CountedFile(io.FileIO):
    """Appends a line to `log` for each read, also in other processes: the file, and the bytes from .. to."""

    log: int

    def _count(self, size: int) -> None:
        end = self.tell()
        os.write(self.log, f"{self.name}\t{end - size}\t{end}\n".encode())

    def readinto(self, buffer) -> int:
        size = super().readinto(buffer)
        self._count(size)
        return size

    def read(self, size=-1) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data


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
    """What was read of the files in a folder since `forget`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        CountedFile.log = os.open(log, os.O_CREAT | os.O_APPEND | os.O_RDWR)

    def forget(self) -> None:
        os.truncate(self._log, 0)

    def ranges(self) -> dict[str, list[tuple[int, int]]]:
        """By file, the (first byte, end) of each read, in the order of the bytes."""
        found: dict[str, list[tuple[int, int]]] = {}
        for line in self._log.read_text().splitlines():
            file, start, end = line.split("\t")
            found.setdefault(file, []).append((int(start), int(end)))
        return {file: sorted(ranges) for file, ranges in found.items()}

    def total(self) -> int:
        lines = (line.split("\t") for line in self._log.read_text().splitlines())
        return sum(int(end) - int(start) for _, start, end in lines)


@pytest.fixture
def reads(tmp_path) -> Reads:
    fsspec.register_implementation("counted", Counted, clobber=True)
    return Reads(tmp_path / "reads.log")


CONFIGURATIONS = [(ranks, workers) for ranks in (1, 2, 4) for workers in (1, 3)]


@pytest.mark.skipif(sys.platform != "linux", reason="only forked workers know the file system that counts")
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_ranks_and_workers_read_a_stream_once(tmp_path, reads, kind):
    """In an epoch of 8 lanes, also where 4 ranks have 2 lanes each for 3 workers. The samples are the same."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_tars(folder, 8, big=True) if kind == "tar" else write_parquet(folder, 8)
    sizes = {str(file): file.stat().st_size for file in folder.iterdir()}
    path = f"counted://{folder}/*.{kind}"
    alone = read(recipe_of(path, "sources.pictures.lanes=8", batch_size=8, steps=4), 1)
    assert sorted(name for item in alone for name in item.names) == sorted(
        f"{Path(file).name}[{i}]" for file in sizes for i in range(ROWS)
    )
    for ranks, workers in CONFIGURATIONS:
        # Prefetching must not begin the next epoch.
        changes = ["sources.pictures.lanes=8", f"train.num_workers={workers}"]
        data = opened(recipe_of(path, *changes, batch_size=8, steps=4), ranks)
        reads.forget()
        loaded = [LoadedBatch.merged(parts) for parts in zip(*(load_batches(of_rank, 0) for of_rank in data))]
        assert_same(loaded, alone)
        for file, ranges in reads.ranges().items():
            # A tar ends with empty blocks, of which two are read. pyarrow reads 64 KiB at the end for the footer.
            stop = sizes[file] - (20 * 512 if kind == "tar" else 2**16 + 512)
            times_read = Counter[int]()  # +1 where a read begins, -1 where it ends, except at the file's two ends
            for start, end in ranges:
                times_read[min(max(start, 2048), stop)] += 1
                times_read[min(max(end, 2048), stop)] -= 1
            changes = {place: change for place, change in times_read.items() if change}
            # Before version 25, pyarrow read the beginning of the second column's pages several times.
            if kind == "tar" or int(pa.__version__.split(".")[0]) >= 25:
                assert changes == {2048: 1, stop: -1}, (ranks, workers)
        assert reads.ranges().keys() == sizes.keys()
        if kind == "tar":
            assert 0 <= sum(sizes.values()) - reads.total() <= 8 * tarfile.RECORDSIZE
        else:
            assert reads.total() <= sum(sizes.values()) + 8 * 2**16


@pytest.mark.skipif(sys.platform != "linux", reason="only forked workers know the file system that counts")
def test_each_of_64_ranks_reads_a_64th_of_the_bytes(tmp_path, reads):
    folder = tmp_path / "data"
    folder.mkdir()
    write_tars(folder, 64)
    recipe = recipe_of(f"counted://{folder}/*.tar", batch_size=128, steps=2)
    alone, size = read(recipe, 1), sum(file.stat().st_size for file in folder.iterdir())
    parts = []
    for data in opened(recipe, 64):
        reads.forget()
        parts.append([*load_batches(data, 0)])
        assert reads.total() == size / 64
    assert_same([LoadedBatch.merged(step) for step in zip(*parts)], alone)


def test_a_stream_resumes_with_other_ranks_and_workers(tmp_path):
    """In the middle of windows and in later epochs, from cursors that went through JSON."""
    path = f"{write_tars(tmp_path, 8)}/*.tar"
    recipe = recipe_of(path, "sources.pictures.lanes=8", "sources.pictures.window=24", batch_size=16, steps=12)
    alone = read(recipe, 1)
    cursors, done = {}, 0
    for stop, ranks, workers in ((1, 2, 0), (4, 1, 3), (5, 4, 0), (9, 8, 0), (12, 2, 2)):
        changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"num_workers": workers})})
        loaded = read(changed, ranks, json.loads(json.dumps(cursors)), done, stop)
        assert_same(loaded, alone[done:stop])
        cursors, done = {"one": loaded[-1].cursors}, stop
    assert min(cursor["epoch"] for cursor in cursors["one"].values()) > 3


def test_resuming_reads_nothing_that_came_before(tmp_path, reads):
    folder = tmp_path / "data"
    folder.mkdir()
    recipe = recipe_of(f"counted://{write_tars(folder, 4, big=True)}/*.tar", "sources.pictures.window=4", batch_size=4)
    alone = read(recipe, 1)
    (data,) = opened(recipe, 1)
    data.load_cursors({"one": alone[1].cursors})
    reads.forget()
    assert_same([*load_batches(data, 2, 3)], alone[2:3])
    half = max(file.stat().st_size for file in folder.iterdir()) // 2
    assert all(ranges[0][0] > half // 4 for ranges in reads.ranges().values())


def test_ranks_that_do_not_divide_the_lanes_share_lanes(tmp_path):
    path = f"{write_tars(tmp_path, 2)}/*.tar"
    alone = read(recipe_of(path, batch_size=12), 1)
    for ranks, workers in ((3, 2), (4, 0), (12, 0)):
        assert_same(read(recipe_of(path, f"train.num_workers={workers}", batch_size=12), ranks), alone)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_bad_row_is_replaced_by_the_next_of_its_lane(tmp_path, ranks):
    """Whatever the ranks and workers, also if all of a rank's rows are bad."""
    folder = write_tars(tmp_path, 4)
    bad = {f"{shard:02}.tar[{i}]" for shard, i in ((0, 0), (0, 1), (2, 3))}
    for name in bad:
        shard, i = name[:2], name[7]
        content = (folder / f"{shard}.tar").read_bytes()
        place = content.index(f"{i}.png".encode()) + 512
        (folder / f"{shard}.tar").write_bytes(content[:place] + b"bad" + content[place + 3 :])
    path = f"{folder}/*.tar"
    alone = read(recipe_of(path, batch_size=4), 1)
    assert {name for item in alone for name, _ in item.bad} == bad
    assert all(reason for item in alone for _, reason in item.bad)
    counts = Counter(name for item in alone[:4] for name in item.names)
    assert not bad & counts.keys()
    assert sum(counts.values()) == 16
    for workers in (0, 3):
        assert_same(read(recipe_of(path, f"train.num_workers={workers}", batch_size=4), ranks), alone)


def test_a_lane_in_which_nothing_can_be_read_ends_the_run(tmp_path):
    folder = write_tars(tmp_path, 1)
    content = (folder / "00.tar").read_bytes()
    (folder / "00.tar").write_bytes(content.replace(b"\x89PNG", b"NONE"))
    with pytest.raises(UserError, match=r"tasks\.one: 4 examples in a row could not be read in step 0; first: 00\.tar"):
        read(recipe_of(f"{folder}/*.tar", batch_size=4), 1)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "valid"), [(20, 1, "16 or 24"), (6, 1, "8"), (20, 2, "16 or 24"), (36, 12, "24 or 48")]
)
def test_batch_sizes_that_the_lanes_do_not_divide_are_refused(tmp_path, batch_size, ranks, valid):
    path = f"{write_tars(tmp_path, 8)}/*.tar"
    message = (
        f"tasks.one: batch_size {batch_size} is not a multiple of the 8 lanes of stream pictures; use {valid}, or set "
        "sources.pictures.lanes"
    )
    with pytest.raises(UserError) as error:
        opened(recipe_of(path, batch_size=batch_size), ranks)
    assert str(error.value) == message


def test_fewer_shards_than_lanes():
    found = [lane_count(64, shards) for shards in (1, 2, 3, 7, 8, 63, 64, 1000)]
    assert found == [1, 2, 2, 4, 8, 32, 64, 64]
    assert [lane_count(60, shards) for shards in (3, 11, 59, 60)] == [3, 10, 30, 60]
