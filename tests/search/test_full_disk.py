"""An index on a disk that is full: no row is lost, and the same command completes it once there is room.

The test starts this very file, which updates an index while the system refuses all bytes of a file beyond a limit.
"""

import resource
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import PIL.Image
import pytest

from openimp.common.errors import UserError
from openimp.search import build_index
from openimp.search.table import Items
from tests.processes import run

pytest.importorskip("lancedb")
Rows = dict[str, list[dict]]


def rows_by_path(index: Path) -> Rows:
    rows: Rows = defaultdict(list)
    for row in Items(index).table.to_arrow().sort_by("id").to_pylist():
        rows[row["path"]].append(row)
    return dict(rows)


def change(folder: Path) -> None:
    """Changes each kind of file: others have more lines, fewer lines, other pixels, or cannot be read any more."""
    for i in range(2):
        PIL.Image.new("RGB", (40, 40), (9, 99 + i, 199)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"no picture any more")
    (folder / "shorter.txt").write_text("noise", encoding="utf-8")
    (folder / "longer.txt").write_text("noise\na red square\na green circle", encoding="utf-8")
    shutil.copy(folder / "1.png", folder / "new.png")


@pytest.mark.slow
def test_a_full_disk_costs_no_row_and_the_same_command_completes_the_index(tiny_model_folder, media_folder, tmp_path):
    folder = Path(shutil.copytree(media_folder, tmp_path / "media"))
    (folder / "shorter.txt").write_text("a red square\na green circle\nnoise", encoding="utf-8")
    (folder / "longer.txt").write_text("a green circle", encoding="utf-8")
    index = tmp_path / "x.index"
    build_index(tiny_model_folder, folder, index)
    old = rows_by_path(index)
    change(folder)
    build_index(tiny_model_folder, folder, tmp_path / "whole.index")
    new = rows_by_path(tmp_path / "whole.index")
    messages = set()
    for limit in (0, *(2**exponent for exponent in range(9, 30))):
        done = run(__file__, limit, tiny_model_folder, folder, index)
        if done.returncode == 0:
            break
        assert done.returncode == 2, done.stderr
        messages.add(done.stderr.partition(";")[0])
        stored = rows_by_path(index)
        for path in old.keys() | new.keys():
            texts = [row["text"] for row in stored.get(path, [])]
            of_old_and_new = [[row["text"] for row in rows.get(path, [])] for rows in (old, new)]
            assert texts in of_old_and_new, f"{path} with a limit of {limit:,} bytes"
    assert "the index cannot be written" in messages
    stored = rows_by_path(index)
    assert stored.keys() == new.keys()
    for path, rows in new.items():
        for row, other in zip(stored[path], rows, strict=True):
            assert row.pop("vector") == pytest.approx(other.pop("vector"), abs=5e-3)
            del row["state"], other["state"]  # It tells that a file was new when the index was made.
            assert row == other


if __name__ == "__main__":
    limit, *arguments = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        build_index(*arguments)
    except (UserError, OSError) as error:  # index.json is written first, by Python.
        print(error, file=sys.stderr)
        sys.exit(2)
