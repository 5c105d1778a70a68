import os
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import openimp
from openimp.inference.embed import embed
from tests.messages import refuses


@pytest.fixture
def folder(media_folder, tmp_path):
    """The media in a subfolder, two unreadable files, and a file of an unknown type."""
    top = tmp_path / "in"
    shutil.copytree(media_folder, top / "deep")
    (top / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    (top / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    (top / "notes.docx").write_bytes(b"PK")
    return top


@pytest.mark.slow
def test_a_folder_becomes_a_table_of_unit_vectors(tiny_model_folder, folder, tmp_path, capsys):
    done = embed(tiny_model_folder, [folder], tmp_path / "new" / "out.parquet", batch_size=2)
    table = pq.read_table(done.out)
    assert table.column_names == ["path", "modality", "towards", "embedding"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
    rows = table.to_pylist()
    assert sorted(row["path"] for row in rows) == sorted(map(str, (folder / "deep").iterdir()))
    towards = {"image": "text", "video": "text", "audio": "text", "text": "image"}
    model = openimp.load(tiny_model_folder)
    for row in rows:
        assert row["towards"] == towards[row["modality"]]
        path = Path(row["path"])
        value = path.read_text(encoding="utf-8") if row["modality"] == "text" else path
        alone = model.encode(row["modality"], value, normalize=True)[0].cpu()
        # Up to the rounding of bf16, which is used if it is faster.
        assert torch.dot(alone, torch.tensor(row["embedding"])) > 0.999
    assert np.linalg.norm([row["embedding"] for row in rows], axis=1) == pytest.approx(1, abs=1e-5)
    assert done.rows == {"image": 3, "video": 3, "audio": 3, "text": 3}
    broken = [str(folder / f"broken.{end}") for end in ("png", "txt")]
    assert [skipped.split(": ")[0] for skipped in done.skipped] == broken
    assert list(done.unknown.values()) == [1]
    assert "skipped files in folders, of other kinds than are read: ." in str(done)
    printed = capsys.readouterr().out
    for part in ("12 embeddings (3 image, 3 text, 3 video, 3 audio)", "2 files could not be read", broken[0]):
        assert part in printed


class BreaksOff(SimpleHTTPRequestHandler):
    """A server that does not send all of 1.png."""

    def do_GET(self):
        if self.path != "/1.png":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"\x89PNG")

    def log_message(self, *_):
        pass


def test_a_download_that_breaks_off_costs_one_row(tiny_model_folder, media_folder, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(BreaksOff, directory=media_folder))
    Thread(target=server.serve_forever, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.server_port}/{name}" for name in ("0.png", "1.png")]
    done = embed(tiny_model_folder, urls, tmp_path / "out.parquet")
    server.shutdown()
    assert done.rows == {"image": 1}
    (skipped,) = done.skipped
    assert skipped.startswith(f"{urls[1]}: cannot be read: ")


def test_a_text_without_a_known_word_has_no_vector(tiny_model_folder, media_folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    done = embed(tiny_model_folder, [tmp_path / "empty.txt", media_folder / "0.txt"], tmp_path / "out.parquet")
    assert done.rows == {"text": 1}
    assert done.skipped == [f"{tmp_path / 'empty.txt'}: has no word that the model knows"]


def test_a_text_file_that_is_huge_is_skipped(tiny_model_folder, media_folder, tmp_path):
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2**40)  # A sparse file, which takes no space on the disk.
    done = embed(tiny_model_folder, [tmp_path / "huge.txt", media_folder / "0.txt"], tmp_path / "out.parquet")
    assert done.rows == {"text": 1}
    assert "is larger than 67,108,864 bytes" in done.skipped[0]


def test_a_file_whose_name_is_not_utf8_is_skipped_and_named(tiny_model_folder, media_folder, tmp_path, capsys):
    for file in ("0.png", "0.txt"):
        shutil.copy(media_folder / file, tmp_path / file)
        shutil.copy(media_folder / file, os.fsencode(tmp_path) + b"/\xff" + os.fsencode(file))
    done = embed(tiny_model_folder, [tmp_path], tmp_path / "out.parquet")
    assert done.rows == {"image": 1, "text": 1}
    assert sorted(pq.read_table(done.out)["path"].to_pylist()) == [str(tmp_path / name) for name in ("0.png", "0.txt")]
    told = [f"{tmp_path}/\\udcff0.{end}: its name is not UTF-8, so the table cannot hold it" for end in ("png", "txt")]
    assert done.skipped == told
    assert told[0] in capsys.readouterr().out


def test_the_modality_can_be_given_if_the_extension_is_unknown(tiny_model_folder, media_folder, tmp_path):
    nameless = tmp_path / "picture"
    shutil.copy(media_folder / "0.png", nameless)
    with refuses():
        embed(tiny_model_folder, [nameless], tmp_path / "out.parquet")
    done = embed(tiny_model_folder, [nameless], tmp_path / "out.parquet", modality="image")
    assert done.rows == {"image": 1}


@pytest.mark.parametrize(
    ("files", "options"),
    [
        (["missing.png"], {}),
        (["empty"], {}),
        ([], {}),
        (["bad.png"], {}),
        (["bad.png"], {"modality": "picture"}),
        (["bad.png"], {"towards": "video"}),
        (["nothing://x"], {}),
        (["bad.png"], {"out": "empty.parquet"}),
        (["bad.png"], {"out": "v.csv"}),
    ],
)
def test_bad_input_is_reported_and_the_old_table_stays(tiny_model_folder, tmp_path, monkeypatch, files, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.parquet").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "out.parquet").write_bytes(b"old")
    with refuses():
        embed(tiny_model_folder, files, **{"out": "out.parquet"} | options)
    assert (tmp_path / "out.parquet").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.png", "empty", "empty.parquet", "out.parquet"]
