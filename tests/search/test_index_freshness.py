"""An index holds what the files are now, and the vectors of the model that it is searched with."""

import json
import os
import shutil
from pathlib import Path

import PIL.Image
import pytest

from openimp.common.safe_files import sha256
from openimp.search import build_index, open_index
from openimp.search.table import Items
from tests.messages import refuses

pytest.importorskip("lancedb")
LONG_AGO = 1_000_000_000
"""A modification time in seconds."""


def write_picture(file: Path, shade: int) -> None:
    """Pictures of all shades have files of the same size and time."""
    PIL.Image.new("L", (16, 16), shade).save(file, "BMP")
    os.utime(file, (LONG_AGO, LONG_AGO))


def indexed_hashes(index: Path) -> set[str]:
    return {row["sha256"] for row in Items(index).table.to_arrow().to_pylist()}


def test_a_file_of_the_same_size_and_time_is_embedded_again_if_its_content_is_new(tiny_model_folder, tmp_path):
    """As if a tool had set its time back."""
    folder, index = tmp_path / "media", tmp_path / "x.index"
    folder.mkdir()
    write_picture(folder / "0.bmp", 10)
    build_index(tiny_model_folder, [folder], index)
    write_picture(folder / "0.bmp", 200)
    assert build_index(tiny_model_folder, [folder], index).changed == 1
    assert indexed_hashes(index) == {sha256(folder / "0.bmp")}


def test_a_file_that_was_written_just_before_it_was_indexed_is_hashed_again(tiny_model_folder, tmp_path):
    """It might have been written again within the same tick of the clock. It is not embedded again, and can be read."""
    folder, index = tmp_path / "media", tmp_path / "x.index"
    folder.mkdir()
    PIL.Image.new("L", (16, 16)).save(folder / "0.bmp")
    build_index(tiny_model_folder, [folder], index)
    state, *_ = (stored.state for stored in Items(index).stored().values())
    assert "recent" in state
    (hit,) = (opened := open_index(index)).search("noise")
    assert opened.read(hit.id) == folder / "0.bmp"
    os.utime(folder / "0.bmp", (LONG_AGO, LONG_AGO))
    assert build_index(tiny_model_folder, [folder], index).unchanged == 1
    state, *_ = (stored.state for stored in Items(index).stored().values())
    assert "recent" not in state


def test_an_index_of_a_model_with_other_options_is_refused(tiny_model_folder, media_folder, tmp_path):
    """The window of the spectrogram changes no weight."""
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    build_index(model, [media_folder / "0.wav"], tmp_path / "x.index")
    config = json.loads((model / "config.json").read_text())
    config["modalities"]["audio"]["window"] //= 2
    (model / "config.json").write_text(json.dumps(config))
    with refuses():
        build_index(model, [media_folder / "0.wav"], tmp_path / "x.index")
