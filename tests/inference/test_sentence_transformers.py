"""sentence-transformers' own `encode` gives the vectors of `Model.encode`, for all that both take."""

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

import openimp
from openimp.common.errors import UserError
from tests.messages import refuses


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return openimp.load(tiny_model_folder, "cpu", "fp32")


@pytest.fixture(scope="module")
def theirs(tiny_model_folder):
    return openimp.sentence_transformer(tiny_model_folder, "cpu", "fp32")


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_texts_and_files_of_all_modalities_may_be_in_one_list(model, theirs, media_folder):
    files = [str(media_folder / name) for name in ("0.png", "1.wav", "2.mp4")]
    found = theirs.encode(["a red square", *files, "noise", Path(files[0])], batch_size=4)
    assert found.shape == (6, 32)
    close(found[[0, 4]], model.encode_text(["a red square", "noise"]))
    close(found[[1, 5]], model.encode_image([files[0]] * 2))
    close(found[2:3], model.encode_audio(files[1]))
    close(found[3:4], model.encode_video(files[2]))
    # One input gives one vector.
    close(theirs.encode("a red square"), model.encode_text("a red square")[0])
    close(theirs.encode(str(media_folder / "0.png")), model.encode_image(media_folder / "0.png")[0])
    close(theirs.encode("0.png"), model.encode_text("0.png")[0])  # There is no such file here, so it is a text.


def test_files_of_formats_that_the_library_does_not_know_are_no_texts(model, theirs, media_folder, tmp_path):
    with PIL.Image.open(media_folder / "0.png") as picture:
        picture.save(tmp_path / "0.tif")
    close(theirs.encode(str(tmp_path / "0.tif")), model.encode_image(media_folder / "0.png")[0])


def test_arrays_pictures_and_dicts_are_what_the_library_says(model, theirs, media_folder):
    picture = PIL.Image.open(media_folder / "1.png")
    sound, rate = soundfile.read(media_folder / "1.wav", dtype="float32")
    clip = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), np.uint8)
    pictures = [picture, np.asarray(picture), torch.from_numpy(np.array(picture)), {"image": picture}]
    close(theirs.encode(pictures), model.encode_image(picture).expand(4, -1))
    sounds = [sound, {"audio": sound}, {"array": sound, "sampling_rate": rate}]
    close(theirs.encode(sounds), model.encode_audio(sound).expand(3, -1))
    clips = [clip, {"video": clip}, {"array": clip, "video_metadata": None}]
    close(theirs.encode(clips), model.encode_video(clip).expand(3, -1))


def test_options_of_the_library_work(model, theirs):
    unit = theirs.encode(["a", "noise"], normalize_embeddings=True, convert_to_tensor=True)
    close(unit, model.encode_text(["a", "noise"], normalize=True))
    close(theirs.encode(["red"], prompt="a "), model.encode_text("a red"))
    close(theirs.encode(["a"], towards="audio"), model.encode_text("a", towards="audio"))
    assert theirs.encode(["a"], truncate_dim=8).shape == (1, 8)
    assert theirs.get_embedding_dimension() == 32
    assert theirs.similarity_fn_name == "cosine"


def test_what_the_model_cannot_encode_is_said_in_one_sentence(theirs, tmp_path):
    (tmp_path / "notes.docx").touch()
    for value, message in (
        ({"text": "a", "image": np.zeros((9, 9, 3), np.uint8)}, "an input is image and text, but the model encodes "),
        ({"role": "user", "content": "a"}, "an input is message, but the model encodes one of image, text"),
        (tmp_path / "notes.docx", "the model reads no .docx files"),
        (tmp_path / "missing.png", "cannot be read as image"),
        (7, "Unsupported input type: int"),
    ):
        with pytest.raises(UserError, match=message):
            theirs.encode([value])
    with refuses():
        theirs.save(str(tmp_path / "saved"))


def test_the_library_is_optional(tiny_model_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with refuses():
        openimp.sentence_transformer(tiny_model_folder)
