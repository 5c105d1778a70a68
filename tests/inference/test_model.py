import io
import json
import pickle
import pydoc
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pandas
import PIL.Image
import pyarrow
import pytest
import soundfile
import torch
import torch.nn.functional as F

import openimp
from openimp.common.errors import UserError
from openimp.data.trust import trained_here
from openimp.inference.model import Model
from tests.messages import refuses

ENDINGS = {"image": "png", "video": "mp4", "audio": "wav"}


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return openimp.load(tiny_model_folder, device="cpu", precision="fp32")


@pytest.fixture
def model_of(tiny_model):
    """Makes the untrained model of a recipe."""

    def make(recipe) -> Model:
        network, modalities = tiny_model(recipe)
        return Model(network, recipe.to_config({}), modalities, "fp32")

    return make


def inputs_of(modality: str, folder: Path) -> list:
    if modality == "text":
        return ["a", "a red square, and a green circle, and a blue line, and noise", "noise", ""]
    return [folder / f"{i}.{ENDINGS[modality]}" for i in range(3)]


@pytest.mark.parametrize(
    "moe",
    [
        None,
        {"experts": 4, "layers": 1},
        {"experts": {"vision": 4, "audio": 2, "text": 1}, "layers": 2},
    ],
)
def test_an_embedding_does_not_depend_on_the_rest_of_its_batch(moe, tiny_recipe, model_of, media_folder):
    model = model_of(tiny_recipe({"moe": moe}))
    for modality in model.modalities:
        inputs = inputs_of(modality, media_folder)
        together = model.encode(modality, inputs, normalize=True)
        alone = torch.cat([model.encode(modality, value, normalize=True) for value in inputs])
        backwards = model.encode(modality, inputs[::-1], normalize=True, batch_size=2).flip(0)
        assert (together - alone).abs().max() < 1e-5
        assert (together - backwards).abs().max() < 1e-5
        assert torch.pdist(together).min() > 1e-3, "or the lines above would say nothing"


def test_a_path_bytes_a_picture_an_array_and_a_tensor_are_the_same_input(model, media_folder):
    path = media_folder / "1.png"
    picture = PIL.Image.open(path)
    expected = model.encode_image(path)
    assert expected.shape == (1, 32)
    assert expected.dtype == torch.float32
    for same in (str(path), path.read_bytes(), picture, np.asarray(picture), [path]):
        assert torch.equal(model.encode_image(same), expected)
    # Worker processes get a pickle of `preprocess` if they are not forked.
    batch = torch.stack([model.preprocess(picture), pickle.loads(pickle.dumps(model.preprocess))(picture)])
    assert batch.shape == (2, 3, 32, 32)
    torch.testing.assert_close(model.encode_image(batch), expected.expand(2, -1), rtol=0, atol=1e-5)


def test_tokenizer_batches_are_the_texts_and_padding_changes_no_embedding(model):
    texts = ["a red square", "noise"]
    ids = model.tokenizer(texts)
    assert ids.shape == (2, 8)
    torch.testing.assert_close(model.encode_text(ids), model.encode_text(texts), rtol=0, atol=1e-5)
    assert torch.equal(model.tokenizer("noise"), ids[1:])
    assert model.encode_text(model.tokenizer([])).shape == model.encode_text([]).shape
    ids = model.tokenizer("a")
    assert (ids[0, 3:] == 0).all()
    for length in (3, 5):
        torch.testing.assert_close(model.encode_text(ids[:, :length]), model.encode_text(ids), rtol=0, atol=1e-5)
    assert model.encode_text(torch.zeros(1, 8, dtype=torch.int64)).isfinite().all(), "a text of pads alone"


def test_arrays_are_sounds_and_clips_and_the_clips_of_a_long_item_are_averaged(model, media_folder, tmp_path):
    sound, _ = soundfile.read(media_folder / "2.wav", dtype="int16")
    assert torch.equal(model.encode_audio(sound), model.encode_audio(media_folder / "2.wav"))
    samples = round(0.512 * 16_000)
    ends = model.encode_audio([sound[:samples], sound[-samples:]], normalize=True)
    whole = model.encode_audio(sound, normalize=True)
    torch.testing.assert_close(whole, F.normalize(ends.mean(0, keepdim=True), dim=-1), rtol=0, atol=1e-5)
    clip = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), np.uint8)
    assert model.encode_video([clip, media_folder / "0.mp4"]).shape == (2, 32)
    soundfile.write(tmp_path / "low.wav", np.random.default_rng(0).normal(0, 0.1, 9000), 8000)
    samples, rate = soundfile.read(tmp_path / "low.wav", dtype="float32")
    with_rate = model.encode_audio({"array": samples, "sampling_rate": rate})
    torch.testing.assert_close(with_rate, model.encode_audio(tmp_path / "low.wav"), rtol=0, atol=1e-4)
    with refuses():
        model.encode_audio({"array": samples, "sampling_rate": 0})


def test_normalize_gives_the_direction_of_the_plain_vector(model):
    plain = model.encode_text(["a", "noise"])
    unit = model.encode_text(["a", "noise"], True)  # open_clip's second argument
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(F.normalize(plain, dim=-1), unit)
    assert (plain.norm(dim=-1) - 1).abs().min() > 0.1
    assert model.logit_scale.exp().item() == pytest.approx(5.0), "the inverse of the temperature, 0.2"


def test_preprocess_and_tokenizer_follow_the_views(tiny_model_folder, media_folder, tmp_path):
    model = openimp.load(tiny_model_folder, device="cpu", precision="fp32")
    model.views["image"] = model.views["image"].model_copy(update={"size": (16, 24)})
    model.views["text"] = model.views["text"].model_copy(update={"length": 5})
    path = media_folder / "0.png"
    assert model.preprocess(path).shape == (3, 16, 24)
    assert model.tokenizer("noise").shape == (1, 5)
    tensor = model.preprocess(path)[None]
    torch.testing.assert_close(model.encode_image(tensor), model.encode_image(path), rtol=0, atol=1e-5)
    model.views["image"].size = 12
    with refuses():
        model.encode_image(path)
    model.views["text"].length = 100_000
    with refuses():
        model.encode_text("a")
    model.views["image"] = model.views["image"].model_copy(update={"size": 16, "crop_pct": 5.0})
    with refuses():
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists(), "nothing is written"


def test_vectors_can_be_trained_on_and_tensors_through(model, media_folder):
    probe = torch.nn.Linear(32, 2)
    probe(model.encode_image(media_folder / "0.png")).sum().backward()
    picture = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model.encode_image(picture).square().sum().backward()
    assert picture.grad.abs().sum() > 0
    sound = torch.cat([torch.rand(1, 4000), torch.zeros(1, 4192)], 1).requires_grad_()
    model.encode_audio(sound).square().sum().backward()
    assert sound.grad.isfinite().all(), "silence has gradients, too"
    assert sound.grad.abs().sum() > 0


def test_tensors_that_cannot_be_read_are_told(model):
    for modality, tensor in (
        ("image", torch.zeros(3, 32, 32)),
        ("image", torch.zeros(1, 3, 33, 32)),
        ("image", torch.full((1, 3, 32, 32), 255.0)),
        ("video", torch.full((1, 4, 3, 16, 16), torch.nan)),
        ("audio", torch.full((1, 8192), torch.inf)),
        ("audio", torch.zeros(1, 8092)),  # not a whole number of patches
        ("audio", torch.zeros(1, 0)),
        ("text", torch.zeros(1, 300, dtype=torch.int64)),
        ("text", torch.tensor(3)),
        ("text", torch.tensor([[2, model.modalities["text"].stem_spec().values]])),
        ("text", torch.tensor([[-1]])),
    ):
        with refuses():
            model.encode(modality, tensor)


def test_each_modality_is_encoded_towards_a_sensible_partner(model, tiny_recipe, model_of):
    partners = {"image": "text", "video": "text", "audio": "text", "text": "image"}
    assert {name: model.partner(name) for name in model.modalities} == partners
    assert not torch.equal(model.encode_text("a"), model.encode_text("a", towards="audio"))
    assert torch.equal(model.encode_text("a"), model.encode_text("a", towards="video"))  # they share a head
    for other in ("video", "smell"):
        with refuses():
            model.encode_image(np.zeros((9, 9, 3), np.uint8), towards=other)
    recipe = tiny_recipe()
    recipe.tasks = dict(reversed(recipe.tasks.items()))
    assert next(iter(recipe.tasks)) == "audio"
    assert model_of(recipe).partner("text") == "image"


def test_a_model_has_methods_of_its_own_modalities_only(model, tiny_recipe, model_of):
    assert not hasattr(model, "encode_smell")
    assert repr(model.encode_image).startswith("encode(inputs: Any, normalize: bool = False")
    assert "Pillow" in pydoc.render_doc(model.preprocess)
    assert {"encode_image", "encode_text", "encode_video", "encode_audio"} <= set(dir(model))
    tasks = {"audio": tiny_recipe().to_dict()["tasks"]["audio"]}
    listener = model_of(tiny_recipe(tasks=tasks, modalities={"audio": {"window": 512, "hop": 256, "bins": 32}}))
    assert not hasattr(listener, "encode_image")
    assert listener.preprocess is None
    with refuses():
        _ = listener.logit_scale


def test_unreadable_inputs_are_named(model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    for modality, value, message in (
        ("image", [str(broken)], r"broken\.png: cannot be read as image"),
        ("audio", "missing.wav", r"missing\.wav: cannot be read as audio: no such file"),
        ("image", "https://a/b.png", r"https://a/b.png: cannot be read as image: .*; download it first"),
        ("image", "", "input 0: cannot be read as image: an empty path"),
        ("text", ["a", 7], "input 1: cannot be read as text"),
        ("image", [torch.zeros(3, 32, 32)], "torch.stack"),
        ("video", np.zeros((9, 16, 3), np.uint8), "is one picture"),
        ("audio", {"array": np.zeros(9), "sampling_rate": 7.5}, "a sampling rate of 7.5"),
        ("audio", {"path": None, "bytes": None}, "found the keys"),
        ("audio", np.full(9, 32767.0), "expected samples in -1..1, found 32767"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode(modality, value)
    with refuses():
        model.encode_text("a", batch_size=0)
    with refuses():
        model.encode_text(pandas.DataFrame({"text": ["a"]}))
    with open(broken, "rb") as binary, open(broken) as text:
        pass
    for closed in (binary, [binary], text):
        with refuses():
            model.encode_image(closed)
    with refuses():
        openimp.evaluate(model)


def test_inputs_may_be_in_any_ordinary_container(model, media_folder):
    texts = ["noise", "a square"]
    expected = model.encode_text(texts)
    for container in (
        tuple(texts),
        iter(texts),
        np.array(texts),
        dict.fromkeys(texts).keys(),
        pandas.Series(texts),
        pyarrow.array(texts),
        datasets.Dataset.from_dict({"t": texts})["t"],
    ):
        assert torch.equal(model.encode_text(container), expected)
    assert model.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 32)
    raw = (media_folder / "0.png").read_bytes()
    expected = model.encode_image(raw)
    written = io.BytesIO()
    written.write(raw)
    for picture in (written, [io.BytesIO(raw)], {"bytes": raw, "path": "a.png"}):
        assert torch.equal(model.encode_image(picture), expected)


def test_texts_without_a_known_word_are_told_in_one_line(tiny_recipe, model_of, capsys):
    recipe = tiny_recipe()
    recipe.modalities["text"].min_df = 1
    words = model_of(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unknown = words.encode_text(["a red", "xylophone", "xylophone"])[1]
        words.encode_text(["xylophone", "oboe\x1b[2J"])
        assert not unknown.any()
        assert not words.encode_text(["a red", ""])[1].any()
    told = "with no word that the model knows (the vector is 0); the first:"
    lines = [f"1 text {told} 'xylophone'", f"2 texts {told} 'xylophone'", f"1 text {told} ''"]
    assert capsys.readouterr() == ("", "\n".join([*lines, ""]))


def test_a_model_file_cannot_ask_for_more_layers_than_it_has(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with refuses():
        openimp.load(folder)


def test_save_and_load_give_the_same_model(model, tmp_path, media_folder):
    model.save_pretrained(tmp_path / "exported")
    again = openimp.load(tmp_path / "exported", device="cpu", precision="fp32")
    assert not again.training
    for modality in model.modalities:
        inputs = inputs_of(modality, media_folder)
        assert torch.equal(again.encode(modality, inputs), model.encode(modality, inputs))
    with refuses():
        model.save(tmp_path / "exported")


def test_what_cannot_be_loaded_is_said_in_one_sentence(tmp_path, monkeypatch):
    """A name that looks like a path is not looked up on the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    paths = ("no/such/folder", "./typo", "typo", "models/typo", str(tmp_path / "typo"))
    for name, message in (
        (tmp_path, "no model here"),
        *((path, f"^{path}: no such folder; ") for path in paths),
        ("a/b", "^a/b: no such folder; a model on the Hugging Face Hub is named hub:OWNER/NAME"),
        ("hub:models/typo", "^hub:models/typo: the Hugging Face Hub did not provide the model: "),
    ):
        with pytest.raises(UserError, match=message) as error:
            openimp.load(name)
        assert "\n" not in str(error.value)


def test_a_precision_or_device_that_no_model_computes_on_is_refused(tiny_model_folder):
    """Instead of fp32 without a word."""
    with refuses():
        openimp.load(tiny_model_folder, device="cpu", precision="fp16")
    for device in ("gpu", "cuda:99"):
        with refuses():
            openimp.load(tiny_model_folder, device=device)
    model = openimp.load(tiny_model_folder, device="cpu")
    model.precision = "half"
    with refuses():
        model.encode_text("a")


def test_a_model_of_the_hub_is_named_with_its_revision(tiny_model_folder, tiny_recipe, tmp_path, monkeypatch):
    """From the hub's cache, where a snapshot holds links to files that are named by their hash."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--them--model", "0123456789" * 4
    for folder in ("blobs", "refs", f"snapshots/{commit}/model"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    for i, file in enumerate(path for path in tiny_model_folder.rglob("*") if path.is_file()):
        shutil.copy(file, repository / "blobs" / f"{i}")
        snapshot = repository / "snapshots" / commit / file.relative_to(tiny_model_folder)
        snapshot.symlink_to(repository / "blobs" / f"{i}")
    assert openimp.load("hub:them/model@v1", device="cpu").recipe.name == "tiny"
    with refuses():
        openimp.load("hub:them/model@v2")


@pytest.mark.slow
def test_import_imports_no_torch():
    code = (
        "import sys, openimp\n"
        "assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert openimp.__version__\n"
        "assert {'IMP', 'Recipe', 'index', 'embed', 'load', 'open_index', 'train'} <= {*dir(openimp)}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_loading_imports_neither_the_compiler_nor_distributed_checkpoints(tiny_recipe, model_of, tmp_path):
    model_of(tiny_recipe({"moe": None, "attention_init": "mimetic"})).save(tmp_path / "model")
    code = (
        "import sys, openimp; openimp.load(sys.argv[1], 'cpu')\n"
        "print(sys.modules.keys() & {'torch._dynamo', 'torch._inductor', 'torch.distributed.checkpoint'})"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "model")]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "set()\n"


def test_unknown_public_names_are_refused(model):
    assert all(getattr(openimp, name) is not None for name in dir(openimp))
    with pytest.raises(openimp.UserError, match="the model has no modality 'smell'; known: audio, image, text, video"):
        model.encode_smell("rose")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = openimp.lode


def test_a_model_of_this_user_that_is_saved_with_another_view_is_still_its_own(little_run, tmp_path, monkeypatch):
    model = openimp.load(little_run)
    model.views["image"].size = (24, 24)
    model.save(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    again = openimp.load("~/mine")
    (tmp_path / "red.txt").write_text("red")
    assert openimp.embed("~/mine", ["~/red.txt"], tmp_path / "vectors.parquet")
    assert again.views["image"].size == (24, 24)
    assert trained_here(tmp_path / "mine")
    assert openimp.load(little_run).views["image"].size != (24, 24)
