"""Sources on real files: every format, as tables and as streams, hostile paths, and what goes wrong."""

import csv
import datetime
import functools
import hashlib
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
import soundfile
from PIL import Image

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.data import files, hub, parquet, tables, tar_tables, tars
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


def wav(i: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.full(50, i / 100), 8000, format="WAV")
    return out.getvalue()


def colour(data: bytes | Path) -> int:
    """The number that `png` painted."""
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data).getpixel((0, 0))[0]


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
            "sound": wav(i),
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


def write_tars(folder: Path, rows: int = 40, shards: int = 2, kind: int = tarfile.PAX_FORMAT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(rows), shards)):
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
    assert isinstance(table, Table)
    assert table.name == "pets"
    assert table.columns == ["file", "label", "name", "extension"]
    assert table.rows(range(len(table))) == [
        {"file": "cat/a.png", "label": "cat", "name": "a", "extension": "png"},
        {"file": "cat/deep/b.png", "label": "cat", "name": "b", "extension": "png"},
        {"file": "dog/c.png", "label": "dog", "name": "c", "extension": "png"},
    ]
    assert table.row_name(2) == "dog/c.png"
    assert colour(table.media(table.column("file")[2])) == 2


def test_texts_beside_files_are_their_captions_and_no_rows(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat/a.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    (tmp_path / "cat/deep/b.TXT").write_bytes(b"\xff")
    (tmp_path / "cat/alone.txt").write_text("beside no file", encoding="utf-8")
    before = open_source("pets", Source(path=str(tmp_path)))
    assert before.column("file") == ["cat/a.png", "cat/alone.txt", "cat/deep/b.png", "dog/c.png"]
    text, alone, broken, missing = before.column("text")
    assert (text, alone, missing) == ("a cat", None, None)
    assert isinstance(broken, Unreadable)
    (tmp_path / "cat/a.txt").write_text("another cat", encoding="utf-8")
    assert open_source("pets", Source(path=str(tmp_path))).fingerprint != before.fingerprint


def test_a_caption_that_leaves_the_folder_is_not_read(tmp_path):
    write_folder(tmp_path / "root")
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    (tmp_path / "root/cat/a.txt").symlink_to(tmp_path / "secret.txt")
    (value, *_) = open_source("pets", Source(path=f"{tmp_path}/root")).column("text")
    assert isinstance(value, Unreadable)
    assert "leaves the folder" in value.reason


def test_a_folder_without_subfolders_has_no_classes(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("a picture", encoding="utf-8")
    table = open_source("flat", Source(path=str(tmp_path)))
    assert table.rows([0]) == [{"file": "a.png", "name": "a", "extension": "png", "text": "a picture"}]


def test_rows_in_any_order_of_the_given_columns(tmp_path):
    data = write_parquet(tmp_path)
    table = open_source("p", Source(path=f"{tmp_path}/*.parquet"))
    assert table.columns == list(data[0])
    assert table.rows([39, 0, 0, 21]) == [data[i] for i in (39, 0, 0, 21)]
    assert table.rows(np.array([5, 30]), ["half", "name"]) == [{"half": 1, "name": "n5"}, {"half": 0, "name": "n30"}]
    assert table.rows([3], []) == [{}]
    assert table.rows([]) == []
    assert table.column("tags") == [row["tags"] for row in data]
    assert table.row_name(3) == "part-0.parquet[3]"
    assert table.row_name(20) == "part-1.parquet[0]"


def test_parquet_media(tmp_path):
    write_parquet(tmp_path)
    (tmp_path / "part-1.parquet").rename(tmp_path / "part[1]?.parquet")  # a name, not a pattern
    table = open_source("p", Source(path=f"{tmp_path}/part[1]?.parquet"))
    row = table.rows([7])[0]
    assert colour(table.media(row["picture"])) == 27
    assert table.media(row["sound"]) == wav(27)


@pytest.mark.parametrize("damaged", ["*.arrow", "dataset_info.json"])
def test_unpacked_parquet_that_is_damaged_is_unpacked_again(damaged, tmp_path, cache):
    data = write_parquet(tmp_path, rows=8)

    def all_rows() -> list[dict]:
        return open_source("p", Source(path=f"{tmp_path}/*.parquet")).rows(range(8))

    assert all_rows() == data
    (file,) = cache.rglob(damaged)
    written, size = file.stat().st_mtime_ns, file.stat().st_size
    assert all_rows() == data
    assert file.stat().st_mtime_ns == written, "what fits is not written again"
    file.write_bytes(file.read_bytes()[: size // 2])
    assert all_rows() == data
    assert [found.stat().st_size for found in cache.rglob(damaged)] == [size]


def test_class_numbers_become_their_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"label": ClassLabel(names=["cat", "dog"]), "n": Value("int64")})
    Dataset.from_dict({"label": [1, 0, -1], "n": [0, 1, 2]}, features=features).to_parquet(tmp_path / "x.parquet")
    assert open_source("x", Source(path=f"{tmp_path}/x.parquet")).column("label") == ["dog", "cat", None]
    stream = open_source("x", Source(path=f"{tmp_path}/x.parquet", stream=True, window=1))
    assert [row["label"] for row in first_rows(stream, 3)] == ["dog", "cat", None]
    table = open_source("x", Source(path=f"{tmp_path}/x.parquet", where={"label": "cat"}))
    assert table.column("n") == [1]


def test_csv_cells_are_text(tmp_path):
    text = '\ufefffile,name,note\na.png,007,"None, or\ntwo lines"\n\nb.png,NA,\nc.png\n'
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    table = open_source("m", Source(path=f"{tmp_path}/m.csv"))
    assert table.rows(range(3)) == [
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
    table = open_source("m", Source(path=f"{tmp_path}/{form}"))
    assert table.rows([0, 1]) == [
        {"file": "a.png", "n": 1, "tags": None, "date": None},
        {"file": "b.png", "n": None, "tags": ["x", "y"], "date": "2020-01-01"},
    ]


def test_several_manifests_and_chunks_are_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr("openimp.data.manifests.PYTHON_ROWS", 3)
    for part in range(2):
        lines = [json.dumps({"n": i, "x": None if i < 3 else "late"}) for i in range(5)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    table = open_source("m", Source(path=f"{tmp_path}/*.jsonl"))
    assert table.column("n") == [0, 1, 2, 3, 4] * 2
    assert table.column("x") == [None, None, None, "late", "late"] * 2
    assert table.row_name(6) == "1.jsonl[1]"


def test_manifest_media_start_at_root(tmp_path):
    write_folder(tmp_path / "media")
    (tmp_path / "m.csv").write_text("file\ncat/a.png\n")
    table = open_source("m", Source(path=f"{tmp_path}/m.csv", root=f"{tmp_path}/media"))
    assert colour(table.media("cat/a.png")) == 0
    beside = open_source("m", Source(path=f"{tmp_path}/m.csv"))
    with pytest.raises(BadMedia, match=r"cat/a\.png: No such file"):
        beside.media("cat/a.png")
    assert colour(beside.media("media/dog/c.png")) == 2


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset(tmp_path, kind):
    write_tars(tmp_path, kind=kind)
    table = open_source("w", Source(path=f"{tmp_path}/*.tar"))
    assert len(table) == 40
    assert table.columns == ["__key__", "png", "txt", "cls", "json.caption", "json.tags"]
    rows = table.rows([33, 2, 20])
    assert [colour(table.media(row["png"])) for row in rows] == [33, 2, 20]
    assert [row["txt"] for row in rows] == ["n33", "n2", "n20"]
    assert [row["cls"] for row in rows] == [1, 0, 0]
    assert [row["json.tags"] for row in rows] == [["x", "t33"], ["x", "t2"], ["x", "t20"]]
    assert table.column("json.caption") == [f"c{i}" for i in range(40)]
    assert table.row_name(21) == "shard-001.tar[a.b/0021]"


def test_tar_examples_may_lack_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "1.jpg", b"1")
        add(tar, "2.txt", b"two")
        add(tar, "2.json", b'{"a": 1}')
        add(tar, "3.txt", b"\xff")
        add(tar, "3.json", b"{]")
        add(tar, "3.seg.png", b"3")
    table = open_source("x", Source(path=f"{tmp_path}/x.tar"))
    assert table.columns == ["__key__", "jpg", "txt", "json.a", "seg.png"]
    assert table.rows([0, 1]) == [
        {"__key__": "1", "jpg": b"1", "txt": None, "json.a": None, "seg.png": None},
        {"__key__": "2", "jpg": None, "txt": "two", "json.a": 1, "seg.png": None},
    ]
    with pytest.raises(BadMedia, match="empty"):
        table.media(None)
    for column in ("txt", "json.a"):
        with pytest.raises(BadMedia, match="cannot be read"):
            table.media(table.column(column)[2])


def test_bundled(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "DEMO", tmp_path)
    write_parquet(tmp_path, rows=4, shards=1)
    assert len(open_source("demo", Source(path="openimp:part-0.parquet"))) == 4
    with pytest.raises(UserError, match=r"no bundled data 'part-1\.parquet'; did you mean 'part-0\.parquet'"):
        open_source("demo", Source(path="openimp:part-1.parquet"))
    with pytest.raises(UserError, match="no bundled data"):
        open_source("demo", Source(path="openimp:../secret.parquet"))


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"half": 1}, [1, 3, 5, 7]),
        ({"half": "1", "name": ["n3", "n4", "n5"]}, [3, 5]),
        ({"tags": "t6"}, [6]),
        ({"name": "n7"}, [7]),
    ],
)
def test_where(tmp_path, where, kept):
    data = write_parquet(tmp_path, rows=8)
    source = Source(path=f"{tmp_path}/*.parquet", where=where)
    table = open_source("p", source)
    assert table.rows(range(len(table))) == [data[i] for i in kept]
    assert table.row_name(0) == f"part-{kept[0] // 4}.parquet[{kept[0] % 4}]"
    stream = open_source("p", source.model_copy(update={"stream": True, "lanes": 1}))
    assert sorted(row["name"] for row in first_rows(stream, len(kept))) == [data[i]["name"] for i in kept]


@pytest.mark.parametrize(("limit", "kept"), [(1, [1]), (3, [1, 3, 5]), (4, [1, 3, 5, 7]), (100, [1, 3, 5, 7])])
def test_limit_keeps_evenly_spaced_rows_of_those_that_where_keeps(tmp_path, limit, kept):
    data = write_parquet(tmp_path, rows=8)
    source = Source(path=f"{tmp_path}/*.parquet", where={"half": 1}, limit=limit)
    table = open_source("p", source)
    assert table.rows(range(len(table))) == [data[i] for i in kept]
    whole = open_source("p", source.model_copy(update={"limit": None}))
    assert (table.fingerprint == whole.fingerprint) == (len(kept) == 4)


@pytest.mark.parametrize("by", [None, "text"])
def test_parts_divide_the_rows(tmp_path, by):
    def values(**part):
        return open_source("m", Source(path=f"{tmp_path}/m.csv", part={"of": 4, "by": by, **part})).column("text")

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


def test_rows_without_a_value_are_divided_by_their_number(tmp_path):
    (tmp_path / "m.csv").write_text("name,text\n" + "".join(f"{i},\n" for i in range(100)), encoding="utf-8")
    part = {"of": 2, "keep": [0], "by": "text"}
    assert 20 < len(open_source("m", Source(path=f"{tmp_path}/m.csv", part=part))) < 80


def test_where_comes_before_part_and_limit_after_it(tmp_path):
    (tmp_path / "m.csv").write_text("n,even\n" + "".join(f"{i},{i % 2 == 0}\n" for i in range(100)), encoding="utf-8")
    options = {"where": {"even": "True"}, "part": {"of": 2, "keep": [0]}}
    some = open_source("m", Source(path=f"{tmp_path}/m.csv", **options))
    assert set(some.column("even")) == {"True"}
    assert len(open_source("m", Source(path=f"{tmp_path}/m.csv", **options, limit=5))) == 5


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"of": 4}, "exactly one of keep and drop"),
        ({"of": 4, "keep": [0], "drop": [1]}, "exactly one of keep and drop"),
        ({"of": 4, "keep": [4]}, "there is no part 4"),
    ],
)
def test_parts_that_cannot_be(part, message):
    with pytest.raises(ValueError, match=message):
        Source(path="m.csv", part=part)


def test_where_asks_python_about_distinct_values_only(tmp_path, monkeypatch):
    """Of a column with few values in a million rows, or about none at all if the column holds texts."""
    rows = 3000
    columns = {
        "text": [None if i % 7 == 0 else f"split {i % 5}" for i in range(rows)],
        "number": [i % 5 for i in range(rows)],
        "float": [None if i % 7 == 0 else (i % 5) / 2 for i in range(rows)],
        "bool": [i % 5 == 0 for i in range(rows)],
        "date": [datetime.date(2020, 1, 1 + i % 5) for i in range(rows)],
        "list": [[f"tag {i % 5}", None, "x"][: i % 4] if i % 7 else None for i in range(rows)],
        "lists": [[[i % 5]] for i in range(rows)],
        "struct": [{"split": i % 5} for i in range(rows)],
        "all": ["same"] * rows,
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=700)
    asked = []
    really = tables.matches
    monkeypatch.setattr(tables, "matches", lambda cell, wanted: (asked.append(cell), really(cell, wanted))[1])
    for column, wanted, most_asked in [
        ("text", "split 3", 0),
        ("text", ["split 1", "split 2"], 0),
        ("number", 3, 5),
        ("number", "3", 5),
        ("float", "0.5", 6),
        ("bool", True, 2),
        ("date", "2020-01-02", 5),
        ("list", "tag 3", 0),
        ("lists", "[3]", rows),
        ("struct", "{'split': 3}", rows),
    ]:
        asked.clear()
        where = {"all": "same", column: wanted}
        table = open_source("x", Source(path=f"{tmp_path}/x.parquet", where=where))
        expected = [i for i, cell in enumerate(columns[column]) if really(cell, wanted)]
        assert [table.row_name(i) for i in range(len(table))] == [f"x.parquet[{i}]" for i in expected]
        assert len(asked) <= most_asked, column


def test_where_knows_booleans(tmp_path):
    (tmp_path / "m.csv").write_text("n,valid\n1,true\n2,false\n")
    (tmp_path / "m.jsonl").write_text('{"n": 1, "valid": true}\n{"n": 2, "valid": false}')
    for name in ("m.csv", "m.jsonl"):
        table = open_source("m", Source(path=f"{tmp_path}/{name}", where={"valid": False}))
        assert [str(n) for n in table.column("n")] == ["2"]


# Fingerprints


def make_source(kind: str, folder: Path) -> Source:
    """A source of each kind in a folder."""
    if kind == "folder":
        write_folder(folder)
        return Source(path=str(folder))
    if kind == "manifest":
        folder.mkdir()
        (folder / "m.csv").write_text("file,label\n" + "".join(f"{i}.png,{i}\n" for i in range(9)))
        return Source(path=f"{folder}/m.csv")
    if kind == "parquet":
        write_parquet(folder)
        return Source(path=f"{folder}/*.parquet")
    write_tars(folder)
    return Source(path=f"{folder}/*.tar")


KINDS = ["folder", "manifest", "parquet", "webdataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_survives_moving_and_sees_changes(tmp_path, kind):
    source = make_source(kind, tmp_path / "a")
    before = open_source("x", source).fingerprint
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = source.model_copy(update={"path": source.path.replace(f"{tmp_path}/a", f"{tmp_path}/b")})
    os.utime(next(file for file in (tmp_path / "b").rglob("*") if file.is_file()), (1, 1))
    assert open_source("x", moved).fingerprint == before
    changed = {
        "folder": "cat/a.png",
        "manifest": "m.csv",
        "parquet": "part-1.parquet",
        "webdataset": "shard-001.tar",
    }[kind]
    if kind == "folder":
        (tmp_path / "b" / changed).write_bytes(b"other")
    elif kind == "parquet":
        write_parquet(tmp_path / "b", rows=41)
    else:
        data = bytearray((tmp_path / "b" / changed).read_bytes())
        data[data.index(b"8" if kind == "manifest" else b"n21")] += 1
        (tmp_path / "b" / changed).write_bytes(data)
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
    file = tmp_path / "large"
    data = bytearray(5 << 20)
    seen = set()
    for change in (None, 0, len(data) - 1):
        if change is not None:
            data[change] ^= 1
        file.write_bytes(data)
        seen.add(files.digest(file))
    file.write_bytes(data + b"\0")
    seen.add(files.digest(file))
    assert len(seen) == 4


# Workers


def answer(table: Table, queue) -> None:
    rows = table.rows([1, 2])
    queue.put([table.row_name(1), rows, table.fingerprint])


@pytest.mark.parametrize("kind", KINDS)
def test_forked_workers(tmp_path, kind):
    table = open_source("x", make_source(kind, tmp_path / "a"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=answer, args=(table, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    expected = [table.row_name(1), table.rows([1, 2]), table.fingerprint]
    assert [queue.get(timeout=20) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("kind", KINDS)
def test_pickle(tmp_path, kind):
    table = open_source("x", make_source(kind, tmp_path / "a"))
    data = pickle.dumps(table)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    assert copy.rows(range(len(table))) == table.rows(range(len(table)))
    assert copy.fingerprint == table.fingerprint


def test_spawned_worker(tmp_path):
    table = open_source("x", make_source("parquet", tmp_path / "a"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(table.rows, ([1, 2],)) == table.rows([1, 2])


# Streams


def open_stream(kind: str, folder: Path, rows: int = 40, seed: int = 3, **options) -> Stream:
    if kind == "parquet":
        write_parquet(folder, rows)
    else:
        write_tars(folder, rows)
    stream = open_source("s", Source(path=f"{folder}/*", format=kind, stream=True, **{"window": 8, **options}), seed)
    assert isinstance(stream, Stream)
    return stream


def first_rows(stream: Stream, count: int) -> list[dict]:
    return [row for _, row in stream.read(0, range(count))]


def names(stream: Stream, kind: str, start: int, count: int) -> list[str]:
    column = {"parquet": "name", "webdataset": "txt"}[kind]
    rows = stream.read(start // stream.lanes * stream.lanes, range(start, start + count), [column])
    return [row[column] for _, row in rows]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize(("rows", "window"), [(40, 8), (40, 9), (40, 1), (40, 64), (40, 40)])
def test_a_lane_gives_each_row_once_an_epoch(tmp_path, kind, rows, window):
    """Shards come in another order in each epoch, and rows are shuffled in windows."""
    stream = open_stream(kind, tmp_path, rows, window=window, lanes=1)
    shards = [[f"n{i}" for i in range(start, start + rows // 2)] for start in (0, rows // 2)]
    read, orders = names(stream, kind, 0, 6 * rows), []
    for epoch in range(6):
        part = read[epoch * rows : (epoch + 1) * rows]
        assert sorted(part) == sorted(shards[0] + shards[1])
        for order in (shards[0] + shards[1], shards[1] + shards[0]):
            windows = range(0, rows, window)
            if all(sorted(part[i : i + window]) == sorted(order[i : i + window]) for i in windows):
                orders.append(order)
                assert (part != order) == (window > 1)
                break
        else:
            raise AssertionError("rows have left their window")
    if window < rows:
        assert len({order[0] for order in orders}) == 2
    if window > 1:
        assert read[:rows] != read[rows : 2 * rows]
        assert read != names(open_stream(kind, tmp_path, rows, 4, window=window, lanes=1), kind, 0, 6 * rows)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_lanes_read_different_shards_of_an_epoch(tmp_path, kind):
    stream = open_stream(kind, tmp_path, window=16)
    assert stream.lanes == 2
    read = names(stream, kind, 0, 200)
    for epoch in range(5):
        lanes = [{int(name[1:]) // 20 for name in read[40 * epoch + lane : 40 * epoch + 40 : 2]} for lane in range(2)]
        assert lanes in ([{0}, {1}], [{1}, {0}])
        assert len(set(read[40 * epoch : 40 * epoch + 40])) == 40
    assert len({read[40 * epoch] in {f"n{i}" for i in range(20)} for epoch in range(5)}) == 2


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_stream_does_not_depend_on_how_it_is_read(tmp_path, kind):
    stream = open_stream(kind, tmp_path)
    whole = names(stream, kind, 0, 100)
    copies = [pickle.loads(pickle.dumps(stream)) for _ in range(3)]
    for batch in range(20):
        # Batches dealt out to readers, each of which skips what the others read.
        assert names(copies[batch % 3], kind, 5 * batch, 5) == whole[5 * batch : 5 * batch + 5]
    assert names(stream, kind, 2, 5) == whole[2:7]
    assert names(stream, kind, 77, 20) == whole[77:97]
    assert names(stream, kind, 76, 2) == whole[76:78]
    assert names(stream, kind, 0, 9) == whole[:9]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("where", [{}, {"odd": 1}])
@pytest.mark.parametrize("window", [7, 8])
def test_a_stream_resumes_exactly_any_number_of_times(tmp_path, kind, where, window):
    if where:
        where = {{"parquet": "half", "webdataset": "cls"}[kind]: 1}
    stream = open_stream(kind, tmp_path, window=window, where=where)
    whole = names(stream, kind, 0, 150)
    cursors = {}
    for start in range(0, 150, 6):
        stream = open_stream(kind, tmp_path, window=window, where=where)
        if cursors:
            stream.load_cursors(json.loads(json.dumps(cursors)))
        assert names(stream, kind, start, 6) == whole[start : start + 6]
        cursors = stream.cursors()
        assert all(cursor["position"] <= start // 2 for cursor in cursors.values())
    # Before its cursors a stream has to begin anew.
    assert names(stream, kind, 1, 3) == whole[1:4]
    with pytest.raises(UserError, match="the checkpoint was saved with other lanes"):
        stream.load_cursors({"0": cursors["0"]})


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_stream_rows_are_those_of_the_table(tmp_path, kind):
    stream = open_stream(kind, tmp_path, window=1, lanes=1)
    table = open_source("t", Source(path=f"{tmp_path}/*", format=kind))
    assert stream.columns == table.columns
    found = dict(stream.read(0, range(40)))
    assert [found[table.row_name(i)] for i in range(40)] == table.rows(range(40))
    assert isinstance(stream.media(first_rows(stream, 1)[0]["picture" if kind == "parquet" else "png"]), bytes)


def test_empty_tar_between_others(tmp_path):
    write_tars(tmp_path)
    with tarfile.open(tmp_path / "shard-0005.tar", "w"):
        pass
    stream = open_source("s", Source(path=f"{tmp_path}/*.tar", stream=True, lanes=1))
    assert len(set(names(stream, "webdataset", 0, 40))) == 40


@pytest.fixture(params=["file", "http"])
def url(tmp_path, request):
    """The URL of a folder on disk, and of the same folder served over HTTP."""
    if request.param == "file":
        yield tmp_path.as_uri()
        return

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_stream_from_a_url(tmp_path, url, kind):
    local = open_stream(kind, tmp_path)
    file = "part-0.parquet" if kind == "parquet" else "shard-000.tar"
    stream = open_source("s", Source(path=f"{url}/{file}", stream=True))
    assert sorted(names(stream, kind, 0, 20)) == sorted(f"n{i}" for i in range(20))
    many = open_source("s", Source(path=f"{url}/*{Path(file).suffix}", stream=True, window=8), 3)
    assert names(many, kind, 0, 40) == names(local, kind, 0, 40)
    with pytest.raises(UserError, match="nothing there matches"):
        open_source("s", Source(path=f"{url}/none-*{Path(file).suffix}", stream=True))


def test_table_from_a_url(tmp_path, url):
    data = write_parquet(tmp_path)
    table = open_source("s", Source(path=f"{url}/part-1.parquet"))
    assert table.rows([3]) == [data[23]]
    assert table.row_name(3) == f"{url}/part-1.parquet[3]"
    with pytest.raises(UserError, match="must be on disk to be read as a table; set stream: true"):
        open_source("s", Source(path=f"{url}/shard.tar"))


def test_local_files_need_no_network_and_no_other_cache(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    for kind in KINDS:
        source = make_source(kind, tmp_path / kind)
        open_source("x", source).rows([0])
        if kind in ("parquet", "webdataset"):
            open_source("x", source.model_copy(update={"stream": True})).read(0, [0])
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
    source = open_source("h", Source(hub=str(tmp_path), stream=stream, **({"window": 1} if stream else {})))
    rows = first_rows(source, 40) if isinstance(source, Stream) else source.rows(range(40))
    assert rows == data
    name = source.read(0, [3])[0][0] if stream else source.row_name(3)
    assert name == (f"{tmp_path}#0[3]" if stream else f"{tmp_path}/train[3]")
    assert len(source.fingerprint) == 32
    test = open_source("h", Source(hub=str(tmp_path), split="test", stream=stream))
    assert test.fingerprint != source.fingerprint
    fails("cannot be read: .*valid", hub=str(tmp_path), split="valid", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_hub_media_are_not_decoded(tmp_path, hub_cache, stream):
    for i, name in enumerate(["cat/a.png", "dog/b.png"]):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(png(i))
    options = {"hub": str(tmp_path), "stream": stream, **({"window": 1} if stream else {})}
    source = open_source("h", Source(**options, root=str(tmp_path)))
    rows = first_rows(source, 2) if isinstance(source, Stream) else source.rows([0, 1])
    media, label = source.columns
    assert [row[label] for row in rows] == ["cat", "dog"]
    assert [colour(source.media(row[media])) for row in rows] == [0, 1]
    assert colour(open_source("h", Source(**options)).media(rows[0][media])) == 0
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


# What is hostile


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../secret.png", "leaves the folder"),
        ("cat/../../secret.png", "leaves the folder"),
        ("{tmp}/secret.png", "leaves the folder"),
        ("/etc/passwd", "leaves the folder"),
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
    table = open_source("m", Source(path=f"{root}/m.jsonl"))
    with pytest.raises(BadMedia, match=message):
        table.media(table.column("file")[0])
    assert colour(table.media("inner.png")) == 0
    assert colour(table.media(f"{root}/dog/../cat/a.png")) == 0


def test_lists_of_numbers_are_arrays(tmp_path):
    pq.write_table(pa.table({"x": [[[1, 2], [3, 4]]]}), tmp_path / "x.parquet")
    table = open_source("x", Source(path=f"{tmp_path}/x.parquet"))
    np.testing.assert_array_equal(table.media(table.column("x")[0]), [[1, 2], [3, 4]])


def test_a_linked_root_is_fine(tmp_path):
    write_folder(tmp_path / "real")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    table = open_source("f", Source(path=f"{tmp_path}/root"))
    assert colour(table.media("dog/c.png")) == 2


@pytest.mark.parametrize("value", [3, 1.5, [], ["a.png"], [[1], [1, 2]], {"x": 1}, True, b"", None])
def test_no_media(tmp_path, value):
    write_folder(tmp_path)
    with pytest.raises(BadMedia):
        open_source("f", Source(path=str(tmp_path))).media(value)


def in_order(path: str, stream: bool, count: int) -> tuple[list[dict], Table | Stream]:
    """The first rows of a source, as a table or as a stream that is not shuffled."""
    source = open_source("x", Source(path=path, stream=True, window=1) if stream else Source(path=path))
    return (first_rows(source, count) if isinstance(source, Stream) else source.rows(range(count))), source


@pytest.mark.parametrize("stream", [False, True])
def test_hostile_members(tmp_path, stream):
    (tmp_path / "secret.png").write_bytes(png(1))
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
    rows, source = in_order(f"{tmp_path}/x.tar", stream, 8)
    assert colour(source.media(rows[0]["png"])) == 9
    for row in rows[1:]:
        with pytest.raises(BadMedia, match=r"leaves the folder|not a regular file"):
            source.media(row["png"])
    assert len(rows) == 1 + len(hostile)


# What goes wrong


def fails(match: str, **source) -> None:
    with pytest.raises(UserError, match=match) as error:
        open_source("mine", Source(**source))
    assert "\n" not in str(error.value)
    assert "mine" in str(error.value)


def test_nothing_there(tmp_path):
    fails("no such file or folder", path=f"{tmp_path}/none.parquet")
    os.mkfifo(tmp_path / "pipe.jsonl")
    fails("is not a regular file", path=f"{tmp_path}/pipe.jsonl")
    fails("is not a regular file", path=f"{tmp_path}/*.jsonl")
    fails("no such file or folder", path=f"{tmp_path}/*.tar", stream=True)
    fails("no such file or folder", path=f"{tmp_path}/none")
    fails("no such file or folder", path=f"{tmp_path}/none.zip")


def test_format_that_is_not_known(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"")
    fails(r"unknown extension '\.zip'; known: \.csv", path=f"{tmp_path}/x.zip")
    fails("is not a folder", path=f"{tmp_path}/x.zip", format="folder")


def test_folder_without_classes(tmp_path):
    fails("has no subfolders and no files", path=str(tmp_path))
    (tmp_path / "cat").mkdir()
    fails("has no rows", path=str(tmp_path))


def test_class_folders_that_are_links_are_not_listed(tmp_path):
    write_folder(tmp_path / "root")
    (tmp_path / "private" / "letters").mkdir(parents=True)
    (tmp_path / "private" / "letters" / "to-her.txt").write_text("x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "private")
    table = open_source("f", Source(path=f"{tmp_path}/root"))
    assert set(table.column("label")) == {"cat", "dog"}


def test_a_folder_with_a_name_that_is_no_utf8(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat" / os.fsdecode(b"\xff.png")).write_bytes(png(0))
    fails(r"the name of 'cat/\\udcff\.png' is not UTF-8; rename it", path=str(tmp_path))


def test_what_cannot_be_streamed(tmp_path):
    write_folder(tmp_path)
    fails("a folder source cannot be streamed", path=str(tmp_path), stream=True)
    with pytest.raises(ValueError, match="a streamed source has no parts"):
        Source(path=f"{tmp_path}/*.tar", stream=True, part={"of": 2, "keep": [0]})
    with pytest.raises(ValueError, match="a streamed source has no limit"):
        Source(path=f"{tmp_path}/*.tar", stream=True, limit=3)


@pytest.mark.parametrize("stream", [False, True])
def test_corrupt_files(tmp_path, stream):
    for name in ("x.parquet", "x.tar"):
        (tmp_path / name).write_bytes(os.urandom(2000))
        fails(f"x{name[1:]}.* (cannot be read|readable)", path=f"{tmp_path}/{name}", stream=stream)
        (tmp_path / name).write_bytes(b"")
        fails(f"x{name[1:]}", path=f"{tmp_path}/{name}", stream=stream)
    write_parquet(tmp_path / "p", shards=1)
    write_tars(tmp_path / "t", rows=2, shards=1)
    for file in (tmp_path / "p/part-0.parquet", tmp_path / "t/shard-000.tar"):
        data = file.read_bytes()
        file.write_bytes(data[: 700 if file.suffix == ".tar" else -100])
        if file.suffix == ".tar":
            file.write_bytes(data[: data.index(b"\x89PNG") + 20])
        fails(file.name, path=str(file), stream=stream)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", os.urandom(3000), "x.csv: is not UTF-8 text"),
        ("x.csv", b"", "has no rows"),
        ("x.csv", b"a,b\n", "has no rows"),
        ("x.csv", b"a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ("x.csv", b'a,b\n\n"1\n1",2\n\n"1\n1",2,3\n', "line 6 has 3 cells, the header 2"),
        ("x.csv", b"a,b\n\n1\n" + b"x" * 200_000, "line 4: field larger than field limit"),
        ("x.csv", b"a,a\n1,2\n", "names a column twice"),
        ("x.csv", b"file;n\na.png;1,5\n", "x.csv: the header 'file;n' has no comma"),
        ("x.jsonl", b'{"a": 1}\n\n \n{"a": nonsense}\n', "x.jsonl: line 4, column 7: Expecting value"),
        ("x.jsonl", b'\xef\xbb\xbf{"a": 1\n', "x.jsonl: line 1, column 8: Expecting ',' delimiter"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl: is not UTF-8 text"),
        ("x.jsonl", b'{"a": 1}\n{"a": "b"}\n', "column 'a' mixes types"),
        ("x.jsonl", b'\n{"a": ' + b"[" * 200_000, "x.jsonl: line 2: maximum recursion depth"),
        ("x.json", b"[" * 200_000, "x.json: maximum recursion depth"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b'[{"a": 1},\n 1]', "item 2 is not a JSON object"),
        ("x.json", b'[{"a": 1},\n nonsense]', "x.json: Expecting value: line 2 column 2"),
        ("x.json", b"\xff\xfe\x00", "x.json: is not UTF-8 text"),
    ],
)
def test_corrupt_manifests(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    fails(message, path=f"{tmp_path}/{name}")


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
        in_order(f"{tmp_path}/x.parquet", stream, rows)
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
    assert len(in_order(f"{tmp_path}/x.parquet", stream, rows)[0]) == rows
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


def test_chunks_of_different_types(tmp_path, monkeypatch):
    monkeypatch.setattr("openimp.data.manifests.PYTHON_ROWS", 1)
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ["b"]}')
    fails("mixes types", path=f"{tmp_path}/x.jsonl")


@pytest.mark.parametrize("stream", [False, True])
def test_no_rows(tmp_path, stream):
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "x.parquet")
    fails("has no rows", path=f"{tmp_path}/x.parquet", stream=stream)
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    fails("has no rows", path=f"{tmp_path}/x.tar", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_where_that_cannot_be(tmp_path, stream):
    write_parquet(tmp_path)
    path = f"{tmp_path}/*.parquet"
    message = r"sources\.mine\.where: .*has no column 'hafl'; did you mean 'half'"
    fails(message, path=path, where={"hafl": 1}, stream=stream)
    fails("no row|no rows that where", path=path, where={"half": 2}, stream=stream)
    if not stream:
        fails(r"no row has half = \[2\]; it holds 0, 1", path=path, where={"half": [2]})


@pytest.mark.parametrize("stream", [False, True])
def test_require(tmp_path, stream):
    write_tars(tmp_path)
    source = open_source("w", Source(path=f"{tmp_path}/*.tar", stream=stream))
    source.require(["png", "json.caption"])
    with pytest.raises(UserError, match=r"tasks\.t: source w \(.*\) has no column 'pgn'; did you mean 'png'"):
        source.require(["txt", "pgn"], "tasks.t")


def test_duplicate_members(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "1.jpg", b"1")
        add(tar, "1.JPG", b"1")
        add(tar, "2.jpg", b"2")
    one, two = open_source("x", Source(path=f"{tmp_path}/x.tar")).rows([0, 1])
    assert one["jpg"] == Unreadable("example 1 has two members .jpg")
    assert two["jpg"] == b"2"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", [{}, {"cls": [0, 1]}])
@pytest.mark.parametrize(("place", "kept"), [(30, 7), (-400, 6), (-512, 6)])
def test_a_tar_that_is_cut_off(tmp_path, stream, where, place, kept):
    """What was read before stays, the rest is one bad row, then comes the next tar.

    Cut in a picture of example 7 that leaves 0 to 6. Cut in or before its first header, which could be one of example
    6, it leaves 0 to 5.
    """
    write_tars(tmp_path, rows=20, shards=2)
    file = tmp_path / "shard-000.tar"
    data = file.read_bytes()
    file.write_bytes(data[: data.index(b"./a.b/0007.PNG") + place + 512])
    source = open_source("x", Source(path=f"{tmp_path}/*.tar", stream=stream, where=where, lanes=1 if stream else 64))
    count = kept + 1 + 10
    rows = first_rows(source, count) if stream else source.rows(range(len(source)))
    rows.sort(key=lambda row: str(row["txt"]))
    assert [row["txt"] for row in rows[1:]] == sorted(f"n{i}" for i in (*range(kept), *range(10, 20)))
    with pytest.raises(BadMedia, match="not a readable tar from here on"):
        source.media(rows[0]["png"])
    places = [name for name, _ in source.read(0, range(count))] if stream else map(source.row_name, range(count))
    assert [*places].count("shard-000.tar[the rest]") == 1
    if stream:
        assert source.cursors()["0"]["epoch"] == 0
        assert len(names(source, "webdataset", count, count)) == count


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_a_terabyte(tmp_path, stream, kind):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "1.png", png(1))
        add(tar, "2.png", png(2))
        forged = tarfile.TarInfo("3.png")
        forged.size, forged.type = 2**40, kind
        tar.fileobj.write(forged.tobuf(tarfile.GNU_FORMAT))
    (good, *_, bad), source = in_order(f"{tmp_path}/x.tar", stream, 3 if kind == tarfile.REGTYPE else 2)
    assert colour(good["png"]) == 1
    with pytest.raises(BadMedia, match="not a readable tar from here on"):
        source.media(bad["png"])


def pax(**records: str) -> bytes:
    """A pax header, which says more of the member behind it."""
    lines = [f"{key.replace('_', '.')}={value}\n" for key, value in records.items()]
    body = b"".join(f"{len(line) + 3} {line}".encode() for line in lines)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body.ljust(tarfile.BLOCKSIZE, b"\0")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("headers", "left", "told"),
    [
        (3000 * pax(path="abc"), 1, "maximum recursion depth"),
        (pax(GNU_sparse_map="x"), 1, "invalid literal for int"),
        (pax(size="-1536"), 1, "3.png ends before it begins"),
        (pax(size=str(10**22)), 2, "int"),
    ],
    ids=["chained", "no number", "negative", "huge"],
)
def test_headers_that_lead_astray(tmp_path, stream, headers, left, told):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "1.png", png(1))
        add(tar, "2.png", png(2))
        tar.fileobj.write(headers)
        tar.offset += len(headers)
        add(tar, "3.png", png(3))
    (*good, bad), source = in_order(f"{tmp_path}/x.tar", stream, left + 1)
    assert [colour(row["png"]) for row in good] == [1, 2][:left]
    with pytest.raises(BadMedia, match=f"not a readable tar from here on: .*{told}"):
        source.media(bad["png"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", [b"{broken", b"[" * 200_000], ids=["cut", "deep"])
def test_a_first_json_that_is_broken(tmp_path, stream, broken):
    """The columns are those of the next one, and the rest of its example is as good as any other."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(5):
            add(tar, f"{i}.png", png(i))
            add(tar, f"{i}.json", b'{"caption": "c"}' if i else broken)
    rows, source = in_order(f"{tmp_path}/x.tar", stream, 5)
    assert source.columns == ["__key__", "png", "json.caption"]
    assert [row["json.caption"] for row in rows[1:]] == ["c"] * 4
    assert [colour(source.media(row["png"])) for row in rows] == list(range(5))
    with pytest.raises(BadMedia):
        source.media(rows[0]["json.caption"])


@pytest.mark.parametrize("stream", [False, True])
def test_json_that_is_broken_everywhere(tmp_path, stream):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.json", b"{broken")
    rows, source = in_order(f"{tmp_path}/x.tar", stream, 3)
    assert source.columns == ["__key__", "json"]
    assert isinstance(rows[0]["json"], Unreadable)


@pytest.mark.parametrize(
    ("members", "refused"), [(tar_tables.MAX_EXTENSIONS, False), (tar_tables.MAX_EXTENSIONS + 1, True)]
)
def test_an_extension_for_each_member(tmp_path, members, refused):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(members):
            add(tar, f"a{i}.v{i}.jpg", b"x")
    if refused:
        fails(r"x\.tar: more than 256 extensions, such as \.v255\.jpg, \.v256\.jpg; ", path=f"{tmp_path}/x.tar")
    else:
        assert len(open_source("x", Source(path=f"{tmp_path}/x.tar")).columns) == 1 + members


@pytest.mark.parametrize("stream", [False, True])
def test_a_member_above_the_limit(tmp_path, stream, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 5000)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for key, size in ("1", 5001), ("2", 5000):
            add(tar, f"{key}.npy", bytes(size))
    (large, fits), _ = in_order(f"{tmp_path}/x.tar", stream, 2)
    assert large["npy"] == Unreadable("1.npy claims 5001 bytes; 5000 may be read")
    assert len(fits["npy"]) == 5000


def test_datasets_is_left_as_it_was(tmp_path):
    import datasets

    logger, levels = logging.getLogger("datasets"), []
    write_parquet(tmp_path)
    logger.setLevel(logging.INFO)
    try:
        datasets.enable_progress_bars()
        for bars in (False, True):
            with hub.quiet("x", "x", bars):
                levels.append((logger.level, datasets.are_progress_bars_disabled()))
        open_stream("parquet", tmp_path)
        assert levels == [(logging.CRITICAL, True), (logging.CRITICAL, False)]
        assert (logger.level, datasets.are_progress_bars_disabled()) == (logging.INFO, False)
    finally:
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("stream", [False, True])
def test_hub_that_cannot_be_reached(monkeypatch, tmp_path, stream):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("openimp/nothing cannot be read: ", hub="openimp/nothing", stream=stream)


def test_manifest_of_the_csv_module(tmp_path):
    rows = [{"file": "a.png", "text": 'say "hi", twice'}, {"file": "b.png", "text": "é\r\nñ"}]
    with open(tmp_path / "m.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, ["file", "text"])
        writer.writeheader()
        writer.writerows(rows)
    assert open_source("m", Source(path=f"{tmp_path}/m.csv")).rows([0, 1]) == rows


def test_the_index_of_a_tar_is_kept_as_long_as_the_tar_stays(tmp_path, cache):
    write_tars(tmp_path, rows=8, shards=1)
    file = tmp_path / "shard-000.tar"
    source = Source(path=str(file))
    expected = open_source("x", source).rows(range(8))
    (index,) = (cache / "tars").iterdir()
    content, about = bytearray(file.read_bytes()), file.stat()
    place = content.index(b"./a.b/0003.PNG")
    content[place : place + 14] = b"./a.b/000X.PNG"
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert open_source("x", source).rows(range(8)) == expected, "the headers are not read again"
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    assert isinstance(open_source("x", source).column("txt")[-1], Unreadable), "its checksum is wrong now"
    assert len([*(cache / "tars").iterdir()]) == 2
    assert index.exists()


@pytest.mark.parametrize("harm", ["pickle", "cut off", "a flipped bit", "other columns", "leads out", "skips", "null"])
def test_an_index_that_was_tampered_with_is_made_again(tmp_path, cache, harm):
    write_tars(tmp_path, rows=8, shards=1)
    source = Source(path=f"{tmp_path}/*.tar")
    expected = open_source("x", source).rows(range(8))
    (file,) = (cache / "tars").iterdir()
    content, index = file.read_bytes(), tar_tables.tar_index(str(tmp_path / "shard-000.tar"))

    def stored(table: pa.Table) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        return hashlib.sha256(data).digest() + data

    def changed(column: str, value: object, schema: pa.Schema = tar_tables.SCHEMA) -> bytes:
        return stored(pa.Table.from_pylist([*index.to_pylist()[:-1], {**index.to_pylist()[-1], column: value}], schema))

    assert stored(index) == content
    nullable = pa.schema([field.with_nullable(True) for field in tar_tables.SCHEMA])
    file.write_bytes(
        {
            "pickle": pickle.dumps(tmp_path),
            "cut off": content[: len(content) // 2],
            "a flipped bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            "other columns": stored(index.drop_columns("problem")),
            "leads out": changed("offset", (tmp_path / "shard-000.tar").stat().st_size),
            "skips": changed("example", 2**40),
            "null": changed("key", None, nullable),
        }[harm]
    )
    assert open_source("x", source).rows(range(8)) == expected
    assert file.read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_an_index_that_others_could_have_written_is_not_used(tmp_path, cache):
    write_tars(tmp_path, rows=8, shards=1)
    (cache / "tars").mkdir()
    (cache / "tars").chmod(0o777)
    assert len(open_source("x", Source(path=f"{tmp_path}/*.tar")).rows(range(8))) == 8
    assert not [*(cache / "tars").iterdir()]


def test_a_name_that_is_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a\udcff.png", png(1))
    for stream in (False, True):
        (row,), _ = in_order(f"{tmp_path}/x.tar", stream, 1)
        assert row["__key__"] == "a\\xff"
        assert colour(row["png"]) == 1
