"""Digests of files: remembered while a file is unchanged, by all processes, and without a cache, too."""

import os
import sqlite3
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from openimp.common import digests as digests_module
from openimp.common.digests import UNREADABLE, digests

OLD = 10**18
"""A modification time in nanoseconds, years ago."""


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests" / "digests.sqlite"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read, in order."""
    names: list[str] = []
    real = digests_module._read

    def recording(file):
        names.append(Path(file.path).name)
        return real(file)

    monkeypatch.setattr(digests_module, "_read", recording)
    return names


def write(file: Path, content: bytes, mtime_ns: int = OLD) -> Path:
    file.write_bytes(content)
    os.utime(file, ns=(mtime_ns, mtime_ns))
    return file


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(tmp_path, read):
    files = [write(tmp_path / name, name.encode()) for name in "abc"]
    expected = [sha256(name.encode()).hexdigest() for name in "abc"]
    assert digests([*files, files[0], tmp_path / "none"]) == [*expected, expected[0], UNREADABLE]
    assert digests(reversed(files)) == expected[::-1]
    assert sorted(read) == ["a", "b", "c"]
    write(files[1], b"B")  # Neither its size nor its modification time are new.
    assert digests(files)[1] == sha256(b"B").hexdigest()
    assert read[3:] == ["b"]


def test_a_file_that_was_modified_just_now_is_read_each_time(tmp_path, read):
    """The next change may be in the same tick of the clock of the file system."""
    file = tmp_path / "a"
    file.write_bytes(b"a")
    assert digests([file]) == digests([file])
    assert read == ["a", "a"]


def test_a_large_file_counts_with_blocks_of_it_or_as_a_whole(tmp_path):
    size = 5 << 20
    changed = [bytes(size), b"1" + bytes(size - 1), bytes(size - 1) + b"1", bytes(size + 1)]
    middle = bytes(3 * 2**16) + b"1" + bytes(size - 3 * 2**16 - 1)
    seen = [
        (*digests([file], most=2**18), *digests([file]))
        for content in (*changed, middle)
        for file in [write(tmp_path / "large", content)]
    ]
    assert len({parts for parts, _ in seen}) == 4
    assert len({whole for _, whole in seen}) == 5
    assert digests([tmp_path / "large"], most=size) == digests([tmp_path / "large"])


def test_processes_share_the_memory(tmp_path, read):
    files = [write(tmp_path / str(number), str(number).encode()) for number in range(600)]
    code = "import sys; from openimp.common.digests import digests; print(hash(tuple(digests(sys.argv[1:]))))"
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-c", code, *map(str, files)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(4)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert not any(process.returncode for process in processes)
    assert digests(files) == [sha256(str(number).encode()).hexdigest() for number in range(600)]
    assert not read


def test_a_memory_that_cannot_be_used_costs_only_time(tmp_path, memory, monkeypatch, read):
    file = write(tmp_path / "a", b"a")
    digests([file])
    memory.write_bytes(b"no database" * 1000)
    for _ in range(3):  # It is damaged, then removed, then used again.
        assert digests([file]) == [sha256(b"a").hexdigest()]
    assert read == ["a", "a"]
    with sqlite3.connect(memory, isolation_level=None) as other:
        monkeypatch.setattr(digests_module, "WAIT", 0)
        other.execute("BEGIN EXCLUSIVE")
        assert digests([file]) == [sha256(b"a").hexdigest()]
    other.close()
    monkeypatch.setenv("OPENIMP_CACHE", str(file / "cache"))
    assert digests([file]) == [sha256(b"a").hexdigest()]


def test_old_digests_are_forgotten(tmp_path, memory, read):
    a, b = (write(tmp_path / name, name.encode()) for name in "ab")
    digests([a])
    with sqlite3.connect(memory) as database:
        database.execute("UPDATE digests SET day = day - 61")
    database.close()
    digests([b])
    digests([a, b])
    assert read == ["a", "b", "a"]
