"""Manifests: what Arrow reads is what Python's readers read, and large ones are read once."""

import csv
import io
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openimp.data import manifests
from openimp.data.manifests import PYTHON_ROWS
from openimp.data.sources import open_source
from openimp.recipe.tasks import Source
from tests.messages import refuses

CELLS = st.text(st.sampled_from(["a", "7", "0", " ", ",", '"', "\n", "\r", "é", "N", ";"]), max_size=6)


def opened(path):
    return open_source("rows", Source(path=str(path)))


def by_python(file: str) -> list[dict]:
    """The rows of a CSV file as Python reads them."""
    return manifests._without_empty_end(manifests._to_arrow(manifests._csv_rows(file, manifests._Csv()))).to_pylist()


@settings(deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
@example([("007", "None"), ("2020-01-01", "nan"), ("", '"')], "\n")
def test_csv_files_that_python_writes_are_read_alike(tmp_path_factory, rows, line_end):
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([("file", "caption"), *rows])
    file.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
    expected = [{"file": a or None, "caption": b or None} for a, b in rows]
    while expected and not any(expected[-1].values()):
        expected.pop()
    assert manifests._read_csv(str(file)).to_pylist() == by_python(str(file))
    if "\r" not in "".join(map("".join, rows)):  # The module does not quote it.
        assert manifests._read_csv(str(file)).to_pylist() == expected


@settings(deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=3).map(",".join), min_size=1, max_size=4).map("\n".join))
def test_any_other_csv_file_is_read_alike_or_refused_alike(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("csv") / "x.csv"
    file.write_bytes(("file,caption\n" + text).encode())
    try:
        expected = by_python(str(file))
    except ValueError:
        return  # Arrow may read more, for example a cell that is longer than Python's limit.
    assert manifests._without_empty_end(manifests._parsed_csv(str(file), manifests._Csv())).to_pylist() == expected


def test_a_quote_that_would_swallow_rows_is_named(tmp_path):
    file = tmp_path / "x.csv"
    for stray in (['b.png,"a dog', "c.png,a cat"], ['b.png,"a dog', 'c.png,"a cat']):
        file.write_text("\n".join(["file,caption", 'a.png,"two\nlines, and a ""quote"""', *stray, "d.png,a cow", ""]))
        with refuses(ValueError):
            manifests._read_csv(str(file))
    rows = ['a.png,"two\nlines"', 'b.png,"Hello" world', 'c.png,a 5" pipe', 'd.png,"three\n\nlines" ', 'e.png,"a\nb"']
    file.write_text("\n".join(["file,caption", *rows, ""]))
    expected = ["two\nlines", "Hello world", 'a 5" pipe', "three\n\nlines ", "a\nb"]
    assert manifests._read_csv(str(file))["caption"].to_pylist() == expected


def test_tables_that_pandas_separates_by_tabs_are_read_as_written(tmp_path):
    """It writes cells with quotes or line breaks in quotes. Other programs write tabs and plain texts."""
    file = tmp_path / "x.tsv"
    written = [["a.png", 'a "red" car\nat night'], ["b.png", '"No," she said'], ["c.png", None]]
    pd.DataFrame(written, columns=["file", "caption"]).to_csv(file, sep="\t", index=False)
    assert manifests._read_csv(str(file), "\t").to_pydict() == {
        "file": ["a.png", "b.png", "c.png"],
        "caption": ['a "red" car\nat night', '"No," she said', None],
    }


def test_spaces_after_the_commas_of_a_table_typed_by_hand_do_not_count(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text('file, caption, class\na.png, "a cat, asleep", cat\nb.png, two  dogs, dog \n')
    assert manifests._read_csv(str(file)).to_pylist() == [
        {"file": "a.png", "caption": "a cat, asleep", "class": "cat"},
        {"file": "b.png", "caption": "two  dogs", "class": "dog "},
    ]
    file.write_text('file,"caption, in English"\na.png, a cat\n')
    assert manifests._read_csv(str(file)).to_pylist() == [{"file": "a.png", "caption, in English": " a cat"}]


def test_what_spreadsheets_leave_beside_and_below_a_table_is_no_data(tmp_path):
    for ending in ("", "\nlong," + "x" * 200_000):
        text = f"file,class,,\na.png,cat,,\n,,,\nb.png,dog,,{ending}\n,,,\n,,,\n"
        (tmp_path / "x.csv").write_text(text)
        table = manifests._read_csv(str(tmp_path / "x.csv"))
        assert table.column_names == ["file", "class"]
        assert table["file"].to_pylist()[:3] == ["a.png", None, "b.png"], "rows keep their numbers"
        assert len(table) == (4 if ending else 3)
    (tmp_path / "y.csv").write_text("file,class\na.png,cat\n,\n,\n")
    assert manifests._read_csv(str(tmp_path / "y.csv")).to_pylist() == [{"file": "a.png", "class": "cat"}]


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", ["b"]), (2021, "2021"), ({"a": 1}, "a"), (True, 1)],
    ids=["list", "number", "object", "bool"],
)
def test_values_of_different_kinds_are_told(tmp_path, one, other):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"caption": value}) for value in (None, one, other)))
    with refuses():
        manifests.read_manifests("mine", "x.jsonl", [str(tmp_path / "x.jsonl")])


def test_python_reads_only_the_beginning_of_large_manifests(tmp_path, monkeypatch):
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(1), loads(text))[1])
    file = tmp_path / "x.jsonl"
    rows = [
        {"id": f"{i:07}", "date": "2020-01-01", "n": i, "tags": ["a"], "box": {"x": 1}} for i in range(2 * PYTHON_ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened(file).rows([0, len(rows) - 1]) == [rows[0], rows[-1]]
    assert len(parsed) == PYTHON_ROWS


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("last", [{"id": 2.5}, {"id": 1, "later": "column"}, {"id": None}])
def test_rows_unlike_the_first_ones_are_read_by_python(tmp_path, ending, last):
    lines = ['{"id": 1}'] * PYTHON_ROWS + [json.dumps(last)]
    file = tmp_path / f"x.{ending}"
    file.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    table = opened(file)
    assert len(table) == len(lines)
    row = table.rows([PYTHON_ROWS])[0]
    assert {column: row[column] for column in last} == last


@pytest.mark.parametrize("line", [b'{"id": "a"}', b'{"id": 1, "text": "\xff"}', b'{"id": 1,'])
def test_errors_after_the_first_rows_name_the_line(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"id": 1, "text": "a"}\n' * PYTHON_ROWS + line + b"\n")
    with refuses():
        opened(file)


def test_large_manifests_are_read_once(tmp_path, monkeypatch):
    def entries() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("manifests/*/rows.arrow")}

    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path))
    monkeypatch.setattr(manifests, "CACHED_BYTES", 1000)
    rows = 500
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text("id\n" + "\n".join(f"{name}{i}" for i in range(rows)))
    first = opened(tmp_path / "*.csv")
    written = entries()
    table = opened(tmp_path / "*.csv")
    assert entries() == written
    assert len(written) == 1
    assert table.column("id") == first.column("id") == [f"{name}{i}" for name in "ab" for i in range(rows)]
    before = (tmp_path / "b.csv").stat()
    (tmp_path / "b.csv").write_bytes((tmp_path / "b.csv").read_bytes().replace(b"b0", b"B0"))  # of the same size
    os.utime(tmp_path / "b.csv", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert opened(tmp_path / "*.csv").rows([rows], ["id"]) == [{"id": "B0"}]
