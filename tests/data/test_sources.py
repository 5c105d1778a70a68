"""Sources on real files: every format, as tables and as streams, hostile paths, and what goes wrong."""

import datetime
import functools
import http.server
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.data import files, hub, parquet, tables, tars
from openimp.data.sources import open_source
from openimp.data.streams import Stream
from openimp.data.tables import Rows, Table, Unreadable
from openimp.recipe.tasks import Source


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPENIMP_CACHE", str(folder))
    return folder


def png(i: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (i % 256, 2 * i % 256, 3 * i % 256)).save(out, "PNG")
    return out.getvalue()


def colour(data: bytes | Path) -> int:
    """The number that `png` painted."""
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).getpixel((0, 0))[0]


def open_table(path: Path | str, **options) -> Table:
    table = open_source("x", Source(path=str(path), **options))
    assert isinstance(table, Table)
    return table


def open_stream(path: Path | str, seed: int = 3, **options) -> Stream:
    stream = open_source("x", Source(path=str(path), stream=True, **options), seed)
    assert isinstance(stream, Stream)
    return stream


def all_rows(table: Table) -> list[dict]:
    return table.rows(range(len(table)))


def first_rows(stream: Stream, count: int) -> list[dict]:
    return [row for _, row in stream.read(0, range(count))]


def in_order(path: Path | str, stream: bool, count: int) -> list[dict]:
    """The first rows of a source, as a table or as a stream that is not shuffled."""
    return first_rows(open_stream(path, window=1), count) if stream else open_table(path).rows(range(count))


def write_folder(root: Path) -> None:
    for i, name in enumerate(["cat/a.png", "cat/deep/b.png", "dog/c.png", "cat/.hidden.png", ".git/x.png"]):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))


def write_parquet(folder: Path, rows: int = 40, shards: int = 2) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    data = [
        {
            "picture": {"bytes": png(i), "path": None},
            "raw": png(i),
            "name": f"n{i}",
            "tags": ["a", f"t{i}"],
            "half": i % 2,
        }
        for i in range(rows)
    ]
    for shard, part in enumerate(np.array_split(np.arange(rows), shards)):
        table = pa.Table.from_pylist([data[i] for i in part])
        pq.write_table(table, folder / f"part-{shard}.parquet", row_group_size=7)
    return data


def add(tar: tarfile.TarFile, name: str, data: bytes, **header) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(file: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    return str(file)


def write_tars(folder: Path, rows: int = 40, kind: int = tarfile.PAX_FORMAT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(rows), 2)):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w", format=kind) as tar:
            add(tar, "notes", b"no extension, no column")
            add(tar, ".", b"", type=tarfile.DIRTYPE)
            for i in part:
                # The long name makes tarfile put a header of its own before the member.
                key = f"./a.b/{i:04}" if i % 5 else f"a.b/{'long' * 40}{i:04}"
                add(tar, f"{key}.PNG", png(i))
                add(tar, f"{key}.txt", f"n{i}".encode())
                add(tar, f"{key}.cls", str(i % 2).encode())
                add(tar, f"{key}.json", json.dumps({"caption": f"c{i}", "tags": ["x", f"t{i}"]}).encode())


# Tables


def test_folder(tmp_path):
    write_folder(tmp_path)
    table = open_source("pets", Source(path=str(tmp_path)))
    assert table.name == "pets"
    assert table.columns == ["file", "label", "name", "extension"]
    assert all_rows(table) == [
        {"file": "cat/a.png", "label": "cat", "name": "a", "extension": "png"},
        {"file": "cat/deep/b.png", "label": "cat", "name": "b", "extension": "png"},
        {"file": "dog/c.png", "label": "dog", "name": "c", "extension": "png"},
    ]
    assert table.row_name(2) == "dog/c.png"
    (tmp_path / "linked").symlink_to(tmp_path / "dog")
    for root in (tmp_path, tmp_path / "linked"):
        table = open_table(root)
        assert colour(table.media(table.column("file")[-1])) == 2


def test_texts_beside_files_are_their_captions_and_no_rows(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat/a.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "cat/deep/b.TXT").write_bytes(b"\xff")
    (tmp_path / "cat/alone.txt").write_text("beside no file", encoding="utf-8")
    before = open_table(tmp_path)
    assert before.column("file") == ["cat/a.png", "cat/alone.txt", "cat/deep/b.png", "dog/c.png"]
    text, alone, broken, missing = before.column("text")
    assert (text, alone, missing) == ("a cat", None, None)
    assert isinstance(broken, Unreadable)
    (tmp_path / "cat/a.txt").write_text("another cat", encoding="utf-8")
    assert open_table(tmp_path).fingerprint != before.fingerprint


def test_a_caption_that_leaves_the_folder_is_not_read(tmp_path):
    write_folder(tmp_path / "root")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (tmp_path / "root/cat/a.txt").symlink_to(tmp_path / "secret.txt")
    value = open_table(tmp_path / "root").column("text")[0]
    assert isinstance(value, Unreadable)
    assert "leaves the folder" in value.reason


def test_a_folder_without_subfolders_has_no_classes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("a picture", encoding="utf-8")
    assert all_rows(open_table(tmp_path)) == [{"file": "a.png", "name": "a", "extension": "png", "text": "a picture"}]


def test_rows_in_any_order_of_the_given_columns(tmp_path):
    data = write_parquet(tmp_path)
    (tmp_path / "part-1.parquet").rename(tmp_path / "part[1]?.parquet")
    table = open_table(tmp_path / "*.parquet")
    assert table.columns == list(data[0])
    assert table.rows([39, 0, 0, 21]) == [data[i] for i in (39, 0, 0, 21)]
    assert table.rows(np.array([5, 30]), ["half", "name"]) == [{"half": 1, "name": "n5"}, {"half": 0, "name": "n30"}]
    assert table.rows([3], []) == [{}]
    assert table.rows([]) == []
    assert table.column("tags") == [row["tags"] for row in data]
    assert table.row_name(3) == "part-0.parquet[3]"
    assert table.row_name(20) == "part[1]?.parquet[0]"
    stream = open_stream(tmp_path / "*.parquet")
    assert stream.columns == table.columns
    assert dict(stream.read(0, range(40))) == {table.row_name(i): row for i, row in enumerate(data)}
    table = open_table(tmp_path / "part[1]?.parquet")  # a name, not a pattern
    row = table.rows([7])[0]
    assert colour(table.media(row["picture"])) == 27
    assert table.media(row["raw"]) == png(27)


@pytest.mark.parametrize("damaged", [None, "*.arrow", "dataset_info.json"])
def test_only_unpacked_parquet_that_is_damaged_is_unpacked_again(damaged, tmp_path, cache):
    data = write_parquet(tmp_path, rows=8)
    open_table(tmp_path / "*.parquet")
    (file,) = cache.rglob(damaged or "*.arrow")
    before = file.stat()
    if damaged:
        file.write_bytes(file.read_bytes()[: before.st_size // 2])
    assert all_rows(open_table(tmp_path / "*.parquet")) == data
    assert file.stat().st_size == before.st_size
    assert (file.stat().st_mtime_ns == before.st_mtime_ns) is (damaged is None)


def test_class_numbers_become_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"label": ClassLabel(names=["cat", "dog"]), "n": Value("int64")})
    file = tmp_path / "x.parquet"
    Dataset.from_dict({"label": [1, 0, -1], "n": [0, 1, 2]}, features=features).to_parquet(file)
    for stream in (False, True):
        assert [row["label"] for row in in_order(file, stream, 3)] == ["dog", "cat", None]
    assert open_table(file, where={"label": "cat"}).column("n") == [1]


def test_csv_cells_are_text(tmp_path):
    text = '\ufefffile,name,note\na.png,007,"None, or\ntwo lines"\n\nb.png,NA,\nc.png\n'
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    table = open_table(tmp_path / "m.csv")
    assert all_rows(table) == [
        {"file": "a.png", "name": "007", "note": "None, or\ntwo lines"},
        {"file": "b.png", "name": "NA", "note": None},
        {"file": "c.png", "name": None, "note": None},
    ]
    assert table.row_name(1) == "m.csv[1]"


@pytest.mark.parametrize("form", ["lines.jsonl", "lines.json", "list.json"])
def test_json_manifest(tmp_path, form):
    rows = [{"file": "a.png", "n": 1}, {"file": "b.png", "tags": ["x", "y"], "date": "2020-01-01"}]
    text = json.dumps(rows) if form.startswith("list") else "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / form).write_text(text)
    assert all_rows(open_table(tmp_path / form)) == [
        {"file": "a.png", "n": 1, "tags": None, "date": None},
        {"file": "b.png", "n": None, "tags": ["x", "y"], "date": "2020-01-01"},
    ]


def test_several_manifests_and_chunks_are_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr("openimp.data.manifests.PYTHON_ROWS", 3)
    for part in range(2):
        lines = [json.dumps({"n": i, "x": None if i < 3 else "late"}) for i in range(5)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    table = open_table(tmp_path / "*.jsonl")
    assert table.column("n") == [0, 1, 2, 3, 4] * 2
    assert table.column("x") == [None, None, None, "late", "late"] * 2
    assert table.row_name(6) == "1.jsonl[1]"


def test_manifest_media_start_at_root(tmp_path):
    write_folder(tmp_path / "media")
    (tmp_path / "m.csv").write_text("file\ncat/a.png\n")
    assert colour(open_table(tmp_path / "m.csv", root=f"{tmp_path}/media").media("cat/a.png")) == 0
    beside = open_table(tmp_path / "m.csv")
    with pytest.raises(BadMedia, match=r"cat/a\.png: No such file"):
        beside.media("cat/a.png")
    assert colour(beside.media("media/dog/c.png")) == 2


def test_bundled(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "DEMO", tmp_path)
    write_parquet(tmp_path, rows=4, shards=1)
    assert len(open_table("openimp:part-0.parquet")) == 4
    fails(r"no bundled data 'part-1\.parquet'; did you mean 'part-0\.parquet'", path="openimp:part-1.parquet")
    fails("no bundled data", path="openimp:../secret.parquet")


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"half": 1}, [1, 3, 5, 7]),
        ({"half": "1", "name": ["n3", "n4", "n5"]}, [3, 5]),
        ({"tags": "t6"}, [6]),
    ],
)
def test_where(tmp_path, where, kept):
    data = write_parquet(tmp_path, rows=8)
    table = open_table(tmp_path / "*.parquet", where=where)
    assert all_rows(table) == [data[i] for i in kept]
    assert table.row_name(0) == f"part-{kept[0] // 4}.parquet[{kept[0] % 4}]"
    stream = open_stream(tmp_path / "*.parquet", where=where, lanes=1)
    assert sorted(row["name"] for row in first_rows(stream, len(kept))) == [data[i]["name"] for i in kept]


def test_where_knows_booleans(tmp_path):
    (tmp_path / "m.csv").write_text("n,valid\n1,true\n2,false\n")
    (tmp_path / "m.jsonl").write_text('{"n": 1, "valid": true}\n{"n": 2, "valid": false}')
    for name in ("m.csv", "m.jsonl"):
        assert [str(n) for n in open_table(tmp_path / name, where={"valid": False}).column("n")] == ["2"]


@pytest.mark.parametrize("by", [None, "text"])
def test_parts_divide_the_rows(tmp_path, by):
    def values(**part) -> list[str]:
        return open_table(tmp_path / "m.csv", part={"of": 4, "by": by, **part}).column("text")

    lines = [f"Text {i % 50}" if i % 2 else f"text  {i % 50}" for i in range(200)]
    (tmp_path / "m.csv").write_text("\n".join(["text", *lines]) + "\n", encoding="utf-8")
    parts = [values(keep=[i]) for i in range(4)]
    assert sorted(line for part in parts for line in part) == sorted(lines)
    assert all(20 < len(part) < 80 for part in parts)
    assert sorted(values(drop=[0, 2])) == sorted(parts[1] + parts[3])
    seen = [{" ".join(line.lower().split()) for line in part} for part in parts]
    assert (sum(map(len, seen)) == 50) is (by == "text")
    (tmp_path / "m.csv").write_text("\n".join(["text", *lines, "one more"]) + "\n", encoding="utf-8")
    assert all(set(part) <= set(values(keep=[i])) for i, part in enumerate(parts))


def test_where_comes_before_part_and_limit_after_it(tmp_path):
    """The rows have no value to divide them by, so their numbers do."""
    (tmp_path / "m.csv").write_text("n,odd,text\n" + "".join(f"{i},{i % 2},\n" for i in range(100)), encoding="utf-8")
    odd = {"where": {"odd": 1}}
    parts = [open_table(tmp_path / "m.csv", **odd, part={"of": 2, "keep": [i], "by": "text"}) for i in range(2)]
    assert sorted(int(n) for part in parts for n in part.column("n")) == [*range(1, 100, 2)]
    assert 10 < len(parts[0]) < 40
    whole = open_table(tmp_path / "m.csv", **odd)
    for limit in (1, 3, 50, 100):
        some = open_table(tmp_path / "m.csv", **odd, limit=limit)
        kept = min(limit, 50)
        assert some.column("n") == [str(1 + 2 * (i * 50 // kept)) for i in range(kept)]
        assert (some.fingerprint == whole.fingerprint) == (kept == 50)


def test_where_asks_python_about_distinct_values_only(tmp_path, monkeypatch):
    """Of a column with few values in a million rows, or about none at all if the column holds texts."""
    rows = 3000
    columns = {
        "text": [None if i % 7 == 0 else f"split {i % 5}" for i in range(rows)],
        "float": [None if i % 7 == 0 else (i % 5) / 2 for i in range(rows)],
        "date": [datetime.date(2020, 1, 1 + i % 5) for i in range(rows)],
        "list": [[f"tag {i % 5}", None, "x"][: i % 4] if i % 7 else None for i in range(rows)],
        "struct": [{"split": i % 5} for i in range(rows)],
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=700)
    asked = []
    really = tables.matches
    monkeypatch.setattr(tables, "matches", lambda cell, wanted: (asked.append(cell), really(cell, wanted))[1])
    wanted = {
        "text": ["split 1", "split 2"],
        "float": "0.5",
        "date": "2020-01-02",
        "list": "tag 3",
        "struct": "{'split': 3}",
    }
    most_asked = {"text": 0, "float": 6, "date": 5, "list": 0, "struct": rows}
    for column, value in wanted.items():
        asked.clear()
        table = open_table(tmp_path / "x.parquet", where={column: value})
        expected = [i for i, cell in enumerate(columns[column]) if really(cell, value)]
        assert [table.row_name(i) for i in range(len(table))] == [f"x.parquet[{i}]" for i in expected]
        assert len(asked) <= most_asked[column], column


# Fingerprints and workers


def make_source(kind: str, folder: Path) -> Source:
    """A table of each kind in a folder."""
    if kind == "folder":
        write_folder(folder)
        return Source(path=str(folder))
    if kind == "parquet":
        write_parquet(folder)
        return Source(path=f"{folder}/*.parquet")
    folder.mkdir()
    (folder / "m.csv").write_text("file,label\n" + "".join(f"{i}.png,{i}\n" for i in range(9)))
    return Source(path=f"{folder}/m.csv")


KINDS = {"folder": "cat/a.png", "manifest": "m.csv", "parquet": "part-1.parquet"}
"""The kinds of tables, with a file of `make_source`."""


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_survives_moving_and_sees_changes(tmp_path, kind):
    source = make_source(kind, tmp_path / "a")
    before = open_source("x", source).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = source.model_copy(update={"path": source.path.replace(f"{tmp_path}/a", f"{tmp_path}/b")})
    changed = tmp_path / "b" / KINDS[kind]
    os.utime(changed, (1, 1))
    assert open_source("x", moved).fingerprint == before
    if kind == "parquet":
        write_parquet(tmp_path / "b", rows=41)
    else:
        changed.write_bytes(changed.read_bytes() + b"9.png,9\n")
    assert open_source("x", moved).fingerprint != before


def test_fingerprint_knows_what_is_kept(tmp_path):
    write_parquet(tmp_path)
    prints = {
        open_source("p", Source(path=f"{tmp_path}/*.parquet", where=where, stream=stream)).fingerprint
        for where in ({}, {"half": 0}, {"half": 1})
        for stream in (False, True)
    }
    assert len(prints) == 6


def test_digest_of_a_large_file_sees_both_ends(tmp_path):
    size = 5 << 20
    seen = set()
    for content in (bytes(size), b"1" + bytes(size - 1), bytes(size - 1) + b"1", bytes(size + 1)):
        (tmp_path / "large").write_bytes(content)
        seen.add(files.digest(tmp_path / "large"))
    assert len(seen) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_workers_have_the_table(tmp_path, kind):
    """As a small pickle."""
    table = open_source("x", make_source(kind, tmp_path / "a"))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(table.rows, [[1, 2]] * 2) == [table.rows([1, 2])] * 2
    pickled = pickle.dumps(table)
    assert len(pickled) < 20_000
    copy = pickle.loads(pickled)
    assert all_rows(copy) == all_rows(table)
    assert copy.fingerprint == table.fingerprint


# Streams

NAMES = {"parquet": "name", "webdataset": "txt"}
"""The column with the names of the rows that `write_shards` writes, by format."""


def write_shards(kind: str, folder: Path, rows: int = 40, **options) -> Stream:
    """A stream of two shards with the rows n0, n1, ..."""
    (write_parquet if kind == "parquet" else write_tars)(folder, rows)
    return open_stream(f"{folder}/*", format=kind, **{"window": 8, **options})


def names(stream: Stream, kind: str, start: int, count: int) -> list[str]:
    rows = stream.read(start // stream.lanes * stream.lanes, range(start, start + count), [NAMES[kind]])
    return [row[NAMES[kind]] for _, row in rows]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("window", [8, 9, 1, 64, 40])
def test_a_lane_gives_each_row_once_an_epoch(tmp_path, kind, window):
    """Shards come in another order in each epoch, and rows are shuffled in windows."""
    stream = write_shards(kind, tmp_path, window=window, lanes=1)
    shards = [[f"n{i}" for i in range(start, start + 20)] for start in (0, 20)]
    read = names(stream, kind, 0, 240)
    first_shards = set()
    for start in range(0, 240, 40):
        part = read[start : start + 40]
        orders = [
            order
            for order in (shards[0] + shards[1], shards[1] + shards[0])
            if all(sorted(part[i : i + window]) == sorted(order[i : i + window]) for i in range(0, 40, window))
        ]
        assert orders, "rows have left their window"
        assert (part != orders[0]) == (window > 1)
        first_shards.add(orders[0][0])
    assert len(first_shards) == 2 or window >= 40
    if window > 1:
        assert read[:40] != read[40:80]
        other = open_stream(f"{tmp_path}/*", seed=4, format=kind, window=window, lanes=1)
        assert read != names(other, kind, 0, 240)


@pytest.mark.parametrize(("kind", "column"), [("parquet", "half"), ("webdataset", "cls")])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("window", [7, 8])
def test_a_stream_resumes_exactly_any_number_of_times(tmp_path, kind, column, filtered, window):
    options = {"window": window, "where": {column: 1} if filtered else {}}
    whole = names(write_shards(kind, tmp_path, **options), kind, 0, 150)
    cursors = {}
    for start in range(0, 150, 6):
        stream = open_stream(f"{tmp_path}/*", format=kind, **options)
        if cursors:
            stream.load_cursors(json.loads(json.dumps(cursors)))
        assert names(stream, kind, start, 6) == whole[start : start + 6]
        cursors = stream.cursors()
        assert all(cursor["position"] <= start // 2 for cursor in cursors.values())
    # Before its cursors a stream has to begin anew.
    assert names(stream, kind, 1, 3) == whole[1:4]
    with pytest.raises(UserError, match="the checkpoint was saved with other lanes"):
        stream.load_cursors({"0": cursors["0"]})


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars(tmp_path, kind):
    """With an empty one among them."""
    write_tars(tmp_path, kind=kind)
    write_tar(tmp_path / "shard-0005.tar", {})
    stream = open_stream(tmp_path / "*.tar", lanes=1)
    assert stream.columns == ["__key__", "png", "txt", "cls", "json.caption", "json.tags"]
    found = dict(stream.read(0, range(40)))
    row = found["shard-001.tar[a.b/0021]"]
    assert colour(stream.media(row.pop("png"))) == 21
    tags = ["x", "t21"]
    assert row == {"__key__": "a.b/0021", "txt": "n21", "cls": 1, "json.caption": "c21", "json.tags": tags}
    assert {row["txt"] for row in found.values()} == {f"n{i}" for i in range(40)}


def test_tars_are_no_table(tmp_path):
    write_tars(tmp_path)
    fails("tars are read as a stream: set stream: true, or convert them to Parquet", path=f"{tmp_path}/*.tar")
    fails("no such file or folder", path=f"{tmp_path}/none-*.tar")


@pytest.fixture
def url(tmp_path):
    """The URL of the folder, served over HTTP."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("kind", "file"), [("parquet", "part-0.parquet"), ("webdataset", "shard-000.tar")])
def test_stream_from_a_url(tmp_path, url, kind, file):
    local = write_shards(kind, tmp_path)
    assert sorted(names(open_stream(f"{url}/{file}"), kind, 0, 20)) == sorted(f"n{i}" for i in range(20))
    many = open_stream(f"{url}/*{Path(file).suffix}", window=8)
    assert names(many, kind, 0, 40) == names(local, kind, 0, 40)
    fails("nothing there matches", path=f"{url}/none-*{Path(file).suffix}", stream=True)


def test_table_from_a_url(tmp_path, url):
    data = write_parquet(tmp_path)
    table = open_table(f"{url}/part-1.parquet")
    assert table.rows([3]) == [data[23]]
    assert table.row_name(3) == f"{url}/part-1.parquet[3]"
    fails("must be on disk", path=f"{url}/rows.csv")


def test_local_files_need_no_network_and_no_other_cache(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    for kind in KINDS:
        open_source("x", make_source(kind, tmp_path / kind)).rows([0])
    for kind in NAMES:
        write_shards(kind, tmp_path / "shards" / kind).read(0, [0])
    assert asked == []
    assert not (tmp_path / "home").exists()


# Hub data sets: `datasets` reads a folder laid out like one in the same way


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("stream", [False, True])
def test_hub(tmp_path, hub_cache, stream):
    data = write_parquet(tmp_path / "data" / "train", shards=1)
    write_parquet(tmp_path / "data" / "test", rows=4)
    options = {"hub": str(tmp_path), "stream": stream}
    source = open_source("h", Source(**options, **({"window": 1} if stream else {})))
    assert (first_rows(source, 40) if stream else all_rows(source)) == data
    name = source.read(0, [3])[0][0] if stream else source.row_name(3)
    assert name == (f"{tmp_path}#0[3]" if stream else f"{tmp_path}/train[3]")
    assert open_source("h", Source(**options, split="test")).fingerprint != source.fingerprint
    fails("cannot be read: .*valid", **options, split="valid")


@pytest.mark.parametrize("stream", [False, True])
def test_hub_media_are_not_decoded(tmp_path, hub_cache, stream):
    for i, name in enumerate(["cat/a.png", "dog/b.png"]):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(png(i))
    options = {"hub": str(tmp_path), "stream": stream, **({"window": 1} if stream else {})}
    source = open_source("h", Source(**options))
    rows = first_rows(source, 2) if stream else all_rows(source)
    media, label = source.columns
    assert [row[label] for row in rows] == ["cat", "dog"]
    assert [colour(source.media(row[media])) for row in rows] == [0, 1]
    with pytest.raises(BadMedia, match="leaves the folder"):
        open_source("h", Source(**options, root=str(tmp_path / "train" / "dog"))).media(rows[0][media])


def test_paths_of_a_hub_data_set_stay_in_its_own_folder(tmp_path, monkeypatch):
    """The rest of the hub's cache holds the user's token, and data sets that may be private."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    blob = tmp_path / "hub" / "datasets--them--birds" / "blobs" / "0"
    picture = blob.parents[1] / "snapshots" / "0" / "a.png"
    secret = tmp_path / "hub" / "datasets--us--secret" / "b.png"
    for file in (blob, picture, secret):
        file.parent.mkdir(parents=True)
    blob.write_bytes(png(3))
    picture.symlink_to("../../blobs/0")
    secret.write_bytes(png(4))
    (tmp_path / "token").write_text("hf_secret")
    rows = Rows("h", "them/birds", ["image"], hub.hub_root(Source(hub="them/birds")), str)
    assert colour(rows.media(str(picture))) == 3
    for path in (secret, "../datasets--us--secret/b.png", tmp_path / "token", "../../token"):
        with pytest.raises(BadMedia, match="leaves the folder"):
            rows.media({"bytes": None, "path": str(path)})


@pytest.mark.parametrize("stream", [False, True])
def test_the_revision_of_a_hub_data_set_is_what_is_loaded(tmp_path, hub_cache, monkeypatch, stream):
    import datasets

    load, asked = datasets.load_dataset, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k["revision"]) or load(*a, **k))
    write_parquet(tmp_path / "train", rows=4)
    for revision in (None, "v1"):
        open_source("h", Source(hub=str(tmp_path), revision=revision, stream=stream))
    assert asked == [None, "v1"]


@pytest.mark.parametrize("stream", [False, True])
def test_hub_that_cannot_be_reached(monkeypatch, stream):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("openimp/nothing cannot be read: ", hub="openimp/nothing", stream=stream)


def test_datasets_is_left_as_it_was(tmp_path):
    import datasets

    logger = logging.getLogger("datasets")
    write_parquet(tmp_path)
    logger.setLevel(logging.INFO)
    try:
        datasets.enable_progress_bars()
        open_stream(tmp_path / "*.parquet")
        assert (logger.level, datasets.are_progress_bars_disabled()) == (logging.INFO, False)
    finally:
        logger.setLevel(logging.NOTSET)


# What is hostile


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.png", "leaves the folder"),
        ("{tmp}/secret.png", "leaves the folder"),
        ("link.png", "leaves the folder"),
        ("linked/secret.png", "leaves the folder"),
        ("cat", "not a regular file"),
        ("pipe.png", "not a regular file"),
        ("none.png", "No such file"),
        ("nul\0.png", "null"),
        ("x" * 5000, "too long"),
        ("loop.png", "symbolic links"),
        ("https://example.com/a.png", "No such file"),
        ("", "empty"),
    ],
)
def test_paths_stay_inside(tmp_path, path, message):
    root = tmp_path / "root"
    write_folder(root)
    (tmp_path / "secret.png").write_bytes(png(0))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "cat/a.png")
    os.mkfifo(root / "pipe.png")
    (root / "m.jsonl").write_text(json.dumps({"file": path.format(tmp=tmp_path)}))
    table = open_table(root / "m.jsonl")
    with pytest.raises(BadMedia, match=message):
        table.media(table.column("file")[0])
    assert colour(table.media("inner.png")) == 0
    assert colour(table.media(f"{root}/dog/../cat/a.png")) == 0


def test_lists_of_numbers_are_arrays(tmp_path):
    pq.write_table(pa.table({"x": [[[1, 2], [3, 4]]]}), tmp_path / "x.parquet")
    table = open_table(tmp_path / "x.parquet")
    np.testing.assert_array_equal(table.media(table.column("x")[0]), [[1, 2], [3, 4]])
    for value in (3, 1.5, [], ["a.png"], [[1], [1, 2]], {"x": 1}, True, b"", None):
        with pytest.raises(BadMedia):
            table.media(value)


def test_class_folders_that_are_links_are_not_listed(tmp_path):
    write_folder(tmp_path / "root")
    (tmp_path / "private" / "letters").mkdir(parents=True)
    (tmp_path / "private" / "letters" / "to-her.txt").write_text("x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "private")
    assert set(open_table(tmp_path / "root").column("label")) == {"cat", "dog"}


def test_the_current_folder_has_the_paths_of_any_other(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_source("here", Source(path=".")).column("file") == open_table(tmp_path).column("file")


def test_hostile_members(tmp_path):
    hostile = {
        "../up.png": {},
        "/etc/abs.png": {},
        "a/../../mid.png": {},
        "sym.png": {"type": tarfile.SYMTYPE, "linkname": "../secret.png"},
        "hard.png": {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
        "dev.png": {"type": tarfile.CHRTYPE},
        "fifo.png": {"type": tarfile.FIFOTYPE},
    }
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "good.png", png(9))
        for name, header in hostile.items():
            add(tar, name, b"" if header else png(1), **header)
    stream = open_stream(tmp_path / "x.tar", window=1)
    good, *refused = first_rows(stream, 1 + len(hostile))
    assert colour(stream.media(good["png"])) == 9
    for row in refused:
        with pytest.raises(BadMedia, match=r"leaves the folder|not a regular file"):
            stream.media(row["png"])


def forged(kind: bytes, size: int, body: bytes = b"") -> bytes:
    """The header of a member, and what follows it."""
    header = tarfile.TarInfo("3.png")
    header.type = kind
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT) + body


def pax(record: str) -> bytes:
    """A header that says more of the member behind it. `record` begins with its own length."""
    return forged(tarfile.XHDTYPE, len(record), record.encode().ljust(tarfile.BLOCKSIZE, b"\0"))


@pytest.mark.parametrize(
    ("headers", "good", "told"),
    [
        (forged(tarfile.REGTYPE, 2**40), 2, ""),
        (forged(tarfile.XHDTYPE, 2**40), 1, ""),
        (forged(tarfile.GNUTYPE_LONGNAME, 2**40), 1, ""),
        (3000 * pax("12 path=abc\n"), 1, "maximum recursion depth"),
        (pax("20 GNU.sparse.map=x\n"), 1, "invalid literal for int"),
        (pax("14 size=-1536\n"), 1, "3.png ends before it begins"),
        (pax(f"32 size={10**22}\n"), 2, "int"),
    ],
    ids=["a file", "more of a file", "a name", "chained", "no number", "negative", "huge"],
)
def test_a_header_that_claims_a_terabyte_or_leads_astray(tmp_path, headers, good, told):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "1.png", png(1))
        add(tar, "2.png", png(2))
        tar.fileobj.write(headers)
        tar.offset += len(headers)
        add(tar, "3.png", png(3))
    stream = open_stream(tmp_path / "x.tar", window=1)
    *rows, rest = first_rows(stream, good + 1)
    assert [colour(stream.media(row["png"])) for row in rows] == [1, 2][:good]
    with pytest.raises(BadMedia, match=f"not a readable tar from here on: .*{told}"):
        stream.media(rest["png"])


def test_a_member_above_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    large, fits = in_order(write_tar(tmp_path / "x.tar", {"1.npy": bytes(5001), "2.npy": bytes(5000)}), True, 2)
    assert large["npy"] == Unreadable("1.npy claims 5001 bytes; 5000 may be read")
    assert len(fits["npy"]) == 5000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bomb", ["runs", "dictionary"])
def test_a_parquet_file_that_unpacks_to_far_more_than_it_has(tmp_path, cache, stream, bomb, monkeypatch):
    """Equal numbers, which are stored as a run, and one long text in all rows, which is stored once."""
    rows = 10**6 if bomb == "runs" else 1000
    values = pa.array(np.zeros(rows, np.int32)) if bomb == "runs" else pa.array(["x" * 10**6])
    column = values if bomb == "runs" else pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), values)
    pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 100_000
    before = pa.default_memory_pool().max_memory()
    monkeypatch.setattr(parquet, "MIN_LIMIT", 2**18)
    with pytest.raises(UserError, match=r"unpacks to more than [0-9,]+ bytes, .* split it into smaller ones"):
        in_order(tmp_path / "x.parquet", stream, rows)
    assert pa.default_memory_pool().max_memory() - before < 300e6
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 2**26


@pytest.mark.parametrize("stream", [False, True])
def test_ordinary_parquet_files_are_unpacked_in_large_batches(tmp_path, stream, monkeypatch):
    """Also if their texts share a dictionary, and if a row group is larger than a batch may be."""
    rows = 60_000
    captions = [f"a picture of {i % 5000} things, taken on day {i}" + " and more" * 30 for i in range(rows)]
    columns = {"file": [f"{i}.jpg" for i in range(rows)], "caption": captions, "tags": [["red", "blue"]] * rows}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=rows)
    monkeypatch.setattr(parquet, "WORST_BATCH_BYTES", 2**23)  # as 128 MiB for a row group of a million rows
    batches = []
    of_file = parquet._batches
    monkeypatch.setattr(parquet, "_batches", lambda *a: (batches.append(len(b)) or b for b in of_file(*a)))
    assert len(in_order(tmp_path / "x.parquet", stream, rows)) == rows
    assert sum(batches) >= 5000 * len(batches)  # A stream reads ahead, into its second epoch.


def test_a_long_value_in_a_dictionary_makes_batches_small(tmp_path, monkeypatch):
    """Wherever the value is: in a column, a struct or a list, and also if it is of a fixed length."""
    monkeypatch.setattr(parquet, "WORST_BATCH_BYTES", 2**23)
    rows = 2000
    long = b"x" * 2**16
    columns = {
        "plain": pa.array([long] * rows),
        "fixed": pa.array([long] * rows, pa.binary(len(long))),
        "struct": pa.array([{"bytes": long}] * rows),
        "list": pa.array([[long]] * rows),
    }
    for name, column in columns.items():
        pq.write_table(pa.table({"x": column}), tmp_path / "x.parquet", compression="zstd", row_group_size=rows)
        with (tmp_path / "x.parquet").open("rb") as file:
            first_batch = next(parquet._batches(file, None))
        assert first_batch.nbytes <= parquet.WORST_BATCH_BYTES, name


def test_millions_of_equal_labels_are_no_bomb(tmp_path):
    rows = 2 * 10**7
    labels = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["cat"]))
    pq.write_table(pa.table({"label": labels}), tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 200_000
    with (tmp_path / "x.parquet").open("rb") as file:
        assert sum(len(table) for table in parquet._tables("x.parquet", file, None)) == rows


# What goes wrong


def fails(match: str, **source) -> None:
    with pytest.raises(UserError, match=match) as error:
        open_source("mine", Source(**source))
    assert "\n" not in str(error.value)
    assert "mine" in str(error.value)


def test_what_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "x.zip").write_bytes(b"")
    for name, message in {
        "none": "no such file or folder",
        "none.zip": "no such file or folder",
        "none.parquet": "no such file or folder",
        "pipe.jsonl": "is not a regular file",
        "*.jsonl": "is not a regular file",
        "x.zip": r"unknown extension '\.zip'; known: \.csv",
    }.items():
        fails(message, path=f"{tmp_path}/{name}")
    fails("no such file or folder", path=f"{tmp_path}/*.tar", stream=True)
    fails("is not a folder", path=f"{tmp_path}/x.zip", format="folder")


def test_folders_that_are_no_source(tmp_path):
    fails("has no subfolders and no files", path=str(tmp_path))
    (tmp_path / "cat").mkdir()
    fails("has no rows", path=str(tmp_path))
    fails("a folder source cannot be streamed", path=str(tmp_path), stream=True)
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(png(0))
    fails(r"the name of 'cat/\\udcff\.png' is not UTF-8; rename it", path=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": {"of": 4}}, "exactly one of keep and drop"),
        ({"part": {"of": 4, "keep": [0], "drop": [1]}}, "exactly one of keep and drop"),
        ({"part": {"of": 4, "keep": [4]}}, "there is no part 4"),
        ({"stream": True, "part": {"of": 2, "keep": [0]}}, "a streamed source has no parts"),
        ({"stream": True, "limit": 3}, "a streamed source has no limit"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Source(path="m.csv", **options)


def test_corrupt_files(tmp_path):
    write_parquet(tmp_path / "good", shards=1)
    write_tars(tmp_path / "good", rows=2)
    picture = (tmp_path / "good/shard-000.tar").read_bytes().index(b"\x89PNG")
    for file, cut, streams in (("part-0.parquet", -100, (False, True)), ("shard-000.tar", picture + 20, (True,))):
        path = tmp_path / file
        for content in (os.urandom(2000), b"", (tmp_path / "good" / file).read_bytes()[:cut]):
            path.write_bytes(content)
            for stream in streams:
                fails(f"{file}.* (cannot be read|readable|no rows)" if content else file, path=str(path), stream=stream)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", os.urandom(3000), "x.csv: is not UTF-8 text"),
        ("x.csv", b"", "has no rows"),
        ("x.csv", b"a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ("x.csv", b'a,b\n\n"1\n1",2\n\n"1\n1",2,3\n', "line 6 has 3 cells, the header 2"),
        ("x.csv", b"a,b\n\n1\n" + b"x" * 200_000, "line 4: field larger than field limit"),
        ("x.csv", b"a,a\n1,2\n", "names a column twice"),
        ("x.csv", b"file;n\na.png;1,5\n", "x.csv: the header 'file;n' has no comma"),
        ("x.jsonl", b'{"a": 1}\n\n \n{"a": nonsense}\n', "x.jsonl: line 4, column 7: Expecting value"),
        ("x.jsonl", b'\xef\xbb\xbf{"a": 1\n', "x.jsonl: line 1, column 8: Expecting ',' delimiter"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ("x.jsonl", b'{"a": 1}\n{"a": "b"}\n', "column 'a' mixes types"),
        ("x.jsonl", b'\n{"a": ' + b"[" * 200_000, "x.jsonl: line 2: maximum recursion depth"),
        ("x.json", b"[" * 200_000, "x.json: maximum recursion depth"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b'[{"a": 1},\n 1]', "item 2 is not a JSON object"),
        ("x.json", b'[{"a": 1},\n nonsense]', "x.json: Expecting value: line 2 column 2"),
    ],
)
def test_corrupt_manifests(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    fails(message, path=f"{tmp_path}/{name}")


@pytest.mark.parametrize("stream", [False, True])
def test_no_rows_and_no_columns(tmp_path, stream):
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    fails("has no rows", path=f"{tmp_path}/x.parquet", stream=stream)
    if stream:
        fails("has no rows", path=write_tar(tmp_path / "x.tar", {}), stream=True)
    write_parquet(tmp_path / "p")
    path = f"{tmp_path}/p/*.parquet"
    message = r"sources\.mine\.where: .*has no column 'hafl'; did you mean 'half'"
    fails(message, path=path, where={"hafl": 1}, stream=stream)
    none = "has no rows that where" if stream else r"no row has half = \[2\]; it holds 0, 1"
    fails(none, path=path, where={"half": [2]}, stream=stream)
    source = open_source("w", Source(path=path, stream=stream))
    source.require(["picture", "half"])
    with pytest.raises(UserError, match=r"tasks\.t: source w \(.*\) has no column 'hafl'; did you mean 'half'"):
        source.require(["name", "hafl"], "tasks.t")


def test_examples_of_a_tar_that_are_not_whole(tmp_path):
    members = {"1.jpg": b"1", "2.txt": b"two", "2.json": b'{"a": 1}', "2.jpg": b"2", "3.txt": b"\xff"}
    members |= {"3.json": b"{]", "4.jpg": b"4", "4.JPG": b"4"}
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0", "0.json": b'{"a": 1}', "0.txt": b"zero", **members})
    stream = open_stream(path, window=1)
    assert stream.columns == ["__key__", "jpg", "json.a", "txt"]
    _, one, two, three, four = first_rows(stream, 5)
    assert one == {"__key__": "1", "jpg": b"1", "json.a": None, "txt": None}
    assert two == {"__key__": "2", "jpg": b"2", "json.a": 1, "txt": "two"}
    assert four["jpg"] == Unreadable("example 4 has two members .jpg")
    for value, message in ((one["txt"], "empty"), (three["txt"], "cannot be read"), (three["json.a"], "empty")):
        with pytest.raises(BadMedia, match=message):
            stream.media(value)


@pytest.mark.parametrize("broken", [b"{broken", b"[" * 200_000], ids=["cut", "deep"])
def test_a_first_json_that_is_broken(tmp_path, broken):
    """The columns are those of the next one, and the rest of its example is as good as any other."""
    members = {}
    for i in range(5):
        members |= {f"{i}.png": png(i), f"{i}.json": b'{"caption": "c"}' if i else broken}
    stream = open_stream(write_tar(tmp_path / "x.tar", members), window=1)
    assert stream.columns == ["__key__", "png", "json.caption"]
    rows = first_rows(stream, 5)
    assert [row["json.caption"] for row in rows[1:]] == ["c"] * 4
    assert [colour(stream.media(row["png"])) for row in rows] == list(range(5))
    with pytest.raises(BadMedia):
        stream.media(rows[0]["json.caption"])
    only = open_stream(write_tar(tmp_path / "y.tar", {"0.json": broken}), window=1)
    assert only.columns == ["__key__", "json"]
    assert isinstance(first_rows(only, 1)[0]["json"], Unreadable)


@pytest.mark.parametrize(("place", "kept"), [(30, 7), (-400, 6), (-512, 6)])
def test_a_tar_that_is_cut_off(tmp_path, place, kept):
    """What was read before stays, the rest is one bad row, then comes the next tar.

    Cut in a picture of example 7 that leaves 0 to 6. Cut in or before its first header, which could be one of example
    6, it leaves 0 to 5.
    """
    write_tars(tmp_path, rows=20)
    file = tmp_path / "shard-000.tar"
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"./a.b/0007.PNG") + place + 512])
    stream = open_stream(tmp_path / "*.tar", where={"cls": [0, 1]}, lanes=1)
    count = kept + 1 + 10
    found = dict(stream.read(0, range(count)))
    rest = found.pop("shard-000.tar[the rest]")
    assert {row["txt"] for row in found.values()} == {f"n{i}" for i in (*range(kept), *range(10, 20))}
    with pytest.raises(BadMedia, match="not a readable tar from here on"):
        stream.media(rest["png"])
    assert stream.cursors()["0"]["epoch"] == 0
    assert len(names(stream, "webdataset", count, count)) == count


def test_a_name_that_is_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a\udcff.png", png(1))
    (row,) = in_order(tmp_path / "x.tar", True, 1)
    assert row["__key__"] == "a\\xff"
    assert colour(row["png"]) == 1
