"""Manifests: what Arrow reads is what Python's readers read, and large ones are read once."""

import csv
import io
import json
import os
import pickle

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openimp.common.errors import UserError
from openimp.data import manifests
from openimp.data.sources import open_source
from openimp.recipe.tasks import Source

CELLS = st.text(st.sampled_from(["a", "7", "0", " ", ",", '"', "\n", "\r", "é", "N", ";"]), max_size=6)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENIMP_CACHE", str(folder))
    return folder


def opened(path):
    return open_source("rows", Source(path=str(path)))


def table_of(file: str, rows) -> pa.Table:
    return manifests._to_arrow(rows(file))


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
@example([("007", "None"), ("2020-01-01", "nan"), ("", '"')], "\n")
def test_csv_files_that_python_writes_are_read_alike(tmp_path_factory, rows, line_end):
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([("file", "caption"), *rows])
    file.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    expected = [{"file": a or None, "caption": b or None} for a, b in rows]
    assert manifests._read_csv(str(file)).to_pylist() == list(manifests._csv_rows(str(file)))
    if "\r" not in "".join(map("".join, rows)):  # The module does not quote it.
        assert manifests._read_csv(str(file)).to_pylist() == expected


@given(st.lists(st.lists(CELLS, min_size=1, max_size=3).map(",".join), min_size=1, max_size=4).map("\n".join))
def test_any_other_csv_file_is_read_alike_or_refused_alike(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    file.write_bytes(("file,caption\n" + text).encode())
    try:
        expected = table_of(str(file), manifests._csv_rows).to_pylist()
    except ValueError:
        return  # Arrow may read more, for example a cell that is longer than Python's limit.
    assert manifests._read_csv(str(file)).to_pylist() == expected


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_python_reads_only_the_beginning_of_large_manifests(tmp_path, monkeypatch, ending):
    rows = 3 * manifests.PYTHON_ROWS
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(1), loads(text))[1])
    csv_rows = manifests._csv_rows
    monkeypatch.setattr(manifests, "_csv_rows", lambda file: (parsed.append(1) or row for row in csv_rows(file)))
    file = tmp_path / f"x.{ending}"
    if ending == "csv":
        file.write_text("id,caption\n" + "".join(f"{i:07},2020-01-01\n" for i in range(rows)))
    else:
        lines = (
            {"id": f"{i:07}", "caption": "2020-01-01", "n": i, "tags": ["a"], "box": {"x": 1}} for i in range(rows)
        )
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = opened(file)
    assert len(table) == rows
    last = table.rows([rows - 1])[0]
    assert (last["id"], last["caption"]) == (f"{rows - 1:07}", "2020-01-01")
    assert len(parsed) == (0 if ending == "csv" else manifests.PYTHON_ROWS)


@pytest.mark.parametrize(
    ("last", "value"),
    [
        ({"id": 2.5}, 2.5),
        ({"id": 1, "later": "column"}, 1),
        ({"id": None}, None),
    ],
)
def test_rows_unlike_the_first_ones_are_read_by_python(tmp_path, monkeypatch, last, value):
    monkeypatch.setattr(manifests, "PYTHON_ROWS", 2)
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [{"id": 1}, {"id": 2}, {"id": 3}, last]))
    row = opened(file).rows([3])[0]
    assert row["id"] == value
    assert row.get("later") == last.get("later")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "a"}', "mixes types"),
        (b'{"id": 1, "text": "\xff"}', "is not UTF-8 text"),
        (b'{"id": 1,', "line 4, column 10: Expecting property name"),
    ],
)
def test_errors_after_the_first_rows_name_the_line(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(manifests, "PYTHON_ROWS", 2)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": 1, "text": "a"}\n' * 3 + line + b"\n")
    with pytest.raises(UserError, match=message):
        opened(file)


def test_large_manifests_are_read_once(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(manifests, "CACHED_BYTES", 100)
    reads = []
    read_all = manifests._read_all
    monkeypatch.setattr(manifests, "_read_all", lambda *a: (reads.append(1), read_all(*a))[1])
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("id\n" + "".join(f"{name}{i}\n" for i in range(50)))
    tables = [opened(tmp_path / "*.csv") for _ in range(2)]
    assert len(reads) == 1
    assert [table.row_name(60) for table in tables] == ["b.csv[10]"] * 2
    assert tables[0].column("id") == tables[1].column("id") == [f"{name}{i}" for name in "ab" for i in range(50)]
    assert tables[0].fingerprint == tables[1].fingerprint
    assert len(pickle.dumps(tables[1])) < 2000
    assert pickle.loads(pickle.dumps(tables[1])).rows([60]) == [{"id": "b10"}]

    before = os.stat(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("id\n" + "".join(f"B{i}\n" for i in range(50)))  # of the same size
    os.utime(tmp_path / "b.csv", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert opened(tmp_path / "*.csv").rows([60]) == [{"id": "B10"}]
    assert len(reads) == 2

    for file in cache.rglob("*.arrow"):
        file.write_bytes(b"damaged")
    assert opened(tmp_path / "*.csv").rows([60]) == [{"id": "B10"}]
    assert len(reads) == 3
