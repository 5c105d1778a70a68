"""`openimp embed --join`: rows keep their columns and media, and get a column of vectors."""

import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import openimp
from openimp.data.sources import open_source
from openimp.inference.join import embed_rows
from openimp.recipe.tasks import Source
from tests.messages import refuses


def test_embedded_media_and_class_names_are_kept_and_unreadable_rows_have_no_vector(
    tiny_model_folder, media_folder, tmp_path, capsys
):
    pictures = [(media_folder / f"{i}.png").read_bytes() for i in range(3)]
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"]), "half": datasets.Value("float16")}
    )
    kinds, halves = [1, 0, 1, 0], [0.5, None, 2.0, 3.0]
    images = [{"bytes": each, "path": None} for each in [*pictures, b"no picture"]]
    rows = datasets.Dataset.from_dict({"image": images, "kind": kinds, "half": halves}, features)
    rows.to_parquet(tmp_path / "rows.parquet")
    source, out = f"{{path: {tmp_path / 'rows.parquet'}, limit: 4}}", tmp_path / "joined.parquet"
    bad = embed_rows(tiny_model_folder, source, out, "image", "image", "vector", batch_size=2)
    assert [row.split(":")[0] for row in bad] == ["rows.parquet[3]"]
    printed = capsys.readouterr().out
    assert "3 embeddings of 32 numbers in column 'vector'\n1 row could not be read:\n  rows.parquet[3]: " in printed
    table = open_source("joined", Source(path=str(out)))
    assert table.columns == ["image", "kind", "half", "vector"]
    found = table.rows(range(4))
    assert [row["kind"] for row in found] == ["b", "a", "b", "a"]
    assert [row["half"] for row in found] == halves
    assert [table.media(row["image"]) for row in found] == [*pictures, b"no picture"]
    expected = openimp.load(tiny_model_folder).encode_image(pictures, normalize=True)
    np.testing.assert_allclose([row["vector"] for row in found[:3]], expected.cpu(), atol=0.02)  # bf16, if it is faster
    assert found[3]["vector"] is None
    # The file can get another column, and replace itself.
    embed_rows(tiny_model_folder, str(out), out, "text", "a {kind}", "said")
    assert pq.read_schema(out).names == ["image", "kind", "half", "vector", "said"]
    assert pq.read_schema(out).field("half").type == pa.float16()


def test_paths_stay_valid_and_captions_are_read(tiny_model_folder, media_folder, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("0.png", "0.txt", "1.png"):
        shutil.copy(media_folder / name, folder)
    embed_rows(tiny_model_folder, str(folder), folder / "all.parquet", "image", "file")
    assert "as a source" not in capsys.readouterr().out, "the folder of the file is that of the pictures"
    table = open_source("joined", Source(path=str(folder / "all.parquet")))
    first, second = table.rows(range(2))
    assert (first["text"], second["text"]) == ((media_folder / "0.txt").read_text(), None)
    assert table.media(second["file"]) == folder / "1.png"
    assert len(first["embedding"]) == 32


def test_what_cannot_be_joined_is_refused_and_leaves_no_file(tiny_model_folder, media_folder, tmp_path):
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        tar.add(media_folder / "0.png", "0.png")
    with refuses():
        embed_rows(tiny_model_folder, str(tmp_path / "rows.tar"), tmp_path / "out.parquet", "image", "png")
    (tmp_path / "rows.csv").write_text("file\nmissing.png\n../outside.png\n")
    with refuses():
        embed_rows(tiny_model_folder, str(tmp_path / "rows.csv"), tmp_path / "out.parquet", "imgae", None)
    with refuses():
        embed_rows(tiny_model_folder, str(tmp_path / "rows.csv"), tmp_path / "out.parquet", "image", "file")
    rows = [json.dumps({"file": str(media_folder / "0.png"), "meta": {}})]
    (media_folder / "rows.jsonl").write_text(rows[0])
    try:
        with refuses():
            embed_rows(tiny_model_folder, str(media_folder / "rows.jsonl"), tmp_path / "out.parquet", "image", "file")
    finally:
        (media_folder / "rows.jsonl").unlink()
    assert not Path(tmp_path / "out.parquet").exists()
