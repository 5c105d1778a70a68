"""The cache: an entry is made once, again if it is damaged, and removed if nobody uses it."""

import os
import re
import time
from pathlib import Path

import pytest
from filelock import FileLock

from openimp.common.cache import UNUSED_DAYS, cached
from openimp.common.errors import UserError
from openimp.data.hub import quiet
from tests.read_only import run_read_only

DAY = 24 * 3600


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "numbers"


def number(key: str, written: list[str], content: str = "7") -> int:
    def write(folder: Path) -> None:
        written.append(key)
        (folder / "n").write_text(content)

    return cached("numbers", key, lambda folder: int((folder / "n").read_text()), write)


def test_an_entry_is_made_once_and_again_if_it_is_damaged(cache):
    written: list[str] = []
    assert [number("a", written), number("a", written)] == [7, 7]
    assert written == ["a"]
    (cache / "a" / "n").write_text("seven")
    assert number("a", written) == 7
    (cache / "a" / "n").unlink()
    (cache / ".a.0123456789abcdef.tmp").mkdir()  # A process that was killed has left it.
    assert number("a", written) == 7
    assert written == ["a"] * 3
    assert sorted(path.name for path in cache.iterdir()) == ["a", "a.lock"]


def test_what_cannot_be_made_leaves_nothing(cache):
    def write(folder: Path) -> None:
        (folder / "n").write_text("1")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cached("numbers", "a", lambda folder: 1, write)
    assert [path.name for path in cache.iterdir()] == ["a.lock"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["plain", "by datasets"])
def test_a_full_disk_is_the_caches_and_not_the_sources(cache, is_wrapped):
    def write(folder: Path) -> None:
        try:
            Path("/dev/full").write_text("1")
        except OSError as error:
            if is_wrapped:
                raise RuntimeError("An error occurred while generating the dataset") from error
            raise

    reason = "openimp's cache cannot be written: No space left on device"
    told = f"{cache.parent}: {reason}; make room, or set OPENIMP_CACHE to another folder"
    with pytest.raises(UserError, match=f"^{re.escape(told)}$"), quiet("birds", "birds.parquet"):
        cached("numbers", "a", lambda folder: 1, write)


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    """For example, that of a user without a home folder."""
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "home" / "cache"))
    with pytest.raises(UserError, match=r"home.cache: openimp's cache cannot be written: "):
        number("a", [])


def test_entries_that_nothing_has_read_for_long_are_removed_unless_another_process_uses_them(cache):
    written: list[str] = []
    keys = ("old", "locked", "read")
    for key in keys:
        number(key, written)
    for key in keys:
        long_ago = time.time() - (UNUSED_DAYS + 1) * DAY
        os.utime(cache / key, (long_ago, long_ago))
    with FileLock(cache / "locked.lock"):
        number("read", written)
        number("new", written)
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == ["locked", "new", "read"]
    assert written == ["old", "locked", "read", "new"]


READ_ONLY = """
from openimp.common.cache import cached
from openimp.common.errors import UserError
def number(key):
    return cached("numbers", key, lambda folder: (folder / "n").read_text(), lambda folder: None)
print(number("a"))
try:
    number("b")
except UserError as error:
    print(error)
"""


def test_a_read_only_cache_is_read(cache):
    """As on a cluster's shared disk, or in a container. What it lacks is an error."""
    number("a", [])
    for _ in range(2):
        printed = run_read_only(cache.parent, READ_ONLY).splitlines()
        assert printed[0] == "7"
        assert "openimp's cache cannot be written: Read-only file system" in printed[1]
        (cache / "a.lock").unlink(missing_ok=True)  # As in a copy of the cache.
