"""Models of open_clip in openimp compute what they compute in their own library."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import openimp
from openimp.cli import app
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.encoding.frozen import release_encoders
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.model import Model
from openimp.inference.onnx import export
from openimp.inference.publish import push
from openimp.recipe.schema import Recipe
from openimp.search import Query
from tests import public
from tests.messages import refuses
from tests.recordings import film

TEXTS = ["a red square", "A  Cat's &amp; dog, green!", "", "blue " * 40, "unheard-of"]


@pytest.fixture(scope="module", params=public.MODELS)
def public_model(request, tmp_path_factory) -> tuple[str, Path, Model]:
    """A model's name and folder, and the model in openimp."""
    folder = tmp_path_factory.mktemp("public") / request.param
    return request.param, folder, openimp.load(public.write(request.param, folder), "cpu", "fp32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Pictures of several shapes, formats and modes; Pillow resizes those with a palette or with an alpha channel
    differently after a conversion to RGB."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    kinds = {"a.png": ((70, 50), "RGB"), "b.jpg": ((640, 480), "RGB"), "c.png": ((33, 90), "P"),
             "d.png": ((64, 64), "L"), "e.png": ((90, 60), "RGBA"), "f.webp": ((20, 28), "RGB"),
             "g.png": ((40, 80), "1")}  # fmt: skip
    for name, (size, mode) in kinds.items():
        small = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)).resize(
            size, PIL.Image.Resampling.BICUBIC
        )
        small.convert("RGB" if mode == "P" else mode).convert(mode).save(folder / name)
    return sorted(folder.iterdir())


def library_of(folder: Path) -> tuple[Any, Any, Any]:
    """The library's own model, its transform and its tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def test_features_and_logits_are_those_of_the_library(public_model, pictures):
    _, folder, model = public_model
    library, transform, tokenizer = library_of(folder)
    images = torch.stack([transform(PIL.Image.open(file)) for file in pictures])
    seen = library.encode_image(images, normalize=True)
    read = library.encode_text(tokenizer(TEXTS), normalize=True)
    for inputs in (pictures, [file.read_bytes() for file in pictures]):
        torch.testing.assert_close(model.encode_image(inputs, normalize=True), seen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_text(TEXTS, normalize=True), read, atol=1e-5, rtol=1e-5)
    logits = library.logit_scale.exp() * seen @ read.T
    temperature, bias = model.imp.temperature("image", "text")()
    ours = model.encode_image(pictures, normalize=True) @ model.encode_text(TEXTS, normalize=True).T / temperature
    if library.logit_bias is not None:
        logits, ours = logits + library.logit_bias, ours + bias
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-5)  # The scale is 14.


@torch.no_grad()
def test_the_vector_of_a_clip_is_the_mean_of_those_of_its_frames(public_model, pictures):
    _, folder, model = public_model
    transform = library_of(folder)[1]
    height, width = transform(PIL.Image.open(pictures[0])).shape[1:]
    frames = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    images = model.encode_image([*frames], normalize=True)
    clip = model.encode_video(frames, normalize=True)
    torch.testing.assert_close(clip[0], torch.nn.functional.normalize(images.mean(0), dim=0), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """The name of a model."""
    return public.write("clip", tmp_path_factory.mktemp("clip") / "model")


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_file_of_weights_may_have_any_name(tmp_path):
    name = public.write("clip", tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / "any.safetensors")
    assert openimp.load(name).encode_text(TEXTS).shape == (5, 24)


def test_a_relative_name_means_the_folder_below_the_current_one(tmp_path, monkeypatch):
    """Although the folders of two models have equal names and contents."""
    for current in ("a", "b"):
        (tmp_path / current).mkdir()
        public.write("clip", tmp_path / current / "clip")
        monkeypatch.chdir(tmp_path / current)
        vectors = openimp.load("open_clip:local-dir:clip").encode_text(TEXTS)
        shutil.rmtree(tmp_path / current)
        release_encoders()
    assert vectors.shape == (5, 24)


def test_a_model_is_the_same_in_another_cache(clip, tmp_path, monkeypatch):
    here = openimp.load(clip)
    release_encoders()
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path))
    there = openimp.load(clip)
    assert checkpoint_fields(here.imp, here.modalities) == checkpoint_fields(there.imp, there.modalities)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.slow
def test_the_commands_take_a_name(clip, little_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sets.yaml").write_text(
        f"sources: {{mine: {{path: {little_data / 'pictures'}}}}}\n"
        "evaluation: {sets: {colours: {type: zero_shot, source: mine, inputs: {image: file}, label: label,"
        " view: {image: {size: 256, crop_pct: 1.0}}}}}\n"
    )
    invoke("eval", clip, "--recipe", "sets.yaml", "--out", "results.jsonl")
    (result,) = read_lines(Path("results.jsonl"))
    assert (result["n"], result["set"]) == (24, "colours")
    assert "size" not in result["view"]["image"]
    with refuses():
        push(Path(clip), "me/clip", tmp_path / "public")
    with refuses():
        export(clip, tmp_path / "onnx")
    for command in ("train", "report"):
        with refuses():
            invoke(command, clip)
    assert "vision is read by the frozen encoder" in invoke("info", clip)
    model = openimp.load(clip)
    assert model.logit_scale.item() == pytest.approx(np.log(14), abs=0.2)
    with refuses():
        model.encode_text(None)


def test_a_folder_is_indexed_and_searched(clip, little_data, tmp_path):
    pytest.importorskip("lancedb")
    # A long film becomes a red half and a blue one.
    colours = np.zeros((600, 32, 48, 3), np.uint8)
    colours[:300, ..., 0] = 255
    colours[300:, ..., 2] = 255
    (tmp_path / "film.mp4").write_bytes(film(colours))
    invoke("index", clip, little_data / "pictures", tmp_path / "film.mp4", "--out", tmp_path / "index")
    index = openimp.open_index(tmp_path / "index")
    assert index.counts["video"] > 1, "a long film is indexed in segments"
    for frame, is_first in ((colours[0], True), (colours[-1], False)):
        best, *_ = index.search(Query("image", frame), under=tmp_path / "film.mp4")
        assert (best.start < 12) == is_first
    query = little_data / "pictures" / "red" / "0.png"
    lines = invoke("search", tmp_path / "index", "--image", query, "--json", "-k", 1).splitlines()
    assert json.loads(lines[-1])["path"] == str(query)
    assert len(invoke("search", tmp_path / "index", "a red square", "--json").splitlines()) == 10
    with refuses():
        invoke("index", clip, "--out", tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-32", "ViT-B-32: expected open_clip:ViT-B-32/TAG; known: .*laion2b"),
        ("open_clip:ViT-B-32/openia", "expected open_clip:ViT-B-32/TAG; did you mean 'openai'?"),
        ("openclip:ViT-B-32/openai", "no such folder; did you mean 'open_clip'?"),
        ("empty", "empty: no model here; .*; a model of open_clip in a folder is named open_clip:empty"),
        ("open_clip:local-dir:ViT-B-32", "the folder has no open_clip_config.json"),
        ("open_clip:ViT-B-32/nonsense", "nonsense: expected open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-23/openai", "no model 'ViT-B-23'; did you mean"),
        ("open_clip:ViT-B-32/openai", "another activation: use open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:local-dir:nowhere", "no such folder"),
    ],
)
def test_wrong_names_are_explained(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32" / "openai").mkdir(parents=True)  # A folder does not hide a model that the library knows.
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "open_clip_config.json").touch()
    with pytest.raises(UserError, match=message):
        openimp.load(name)


def test_what_could_run_code_is_refused(clip, tmp_path):
    folder = Path(shutil.copytree(clip.rpartition(":")[2], tmp_path / "model"))
    weights = folder / "open_clip_model.safetensors"
    content = weights.read_bytes()

    def refused(message: str, **options: Any) -> None:
        edit(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].update(options))
        with pytest.raises(UserError, match=message):
            openimp.load(f"open_clip:local-dir:{folder}")

    refused("open_clip cannot open it: text pos_embed width changed", width=64)
    refused("tokenizer_kwargs.trust_remote_code: expected 'clean' or", tokenizer_kwargs={"trust_remote_code": True})
    edit(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].pop("tokenizer_kwargs"))
    weights.write_bytes(b"damaged")
    refused("open_clip cannot open it")
    weights.rename(folder / "other.safetensors")
    torch.save({}, folder / "open_clip_pytorch_model.bin")
    refused("open_clip_pytorch_model.bin may be preferred to other.safetensors")
    (folder / "other.safetensors").unlink()
    refused("has no weights in a .safetensors file")
    (tmp_path / "outside").write_bytes(content)
    weights.symlink_to(tmp_path / "outside")
    refused("is a link out of")


def test_a_text_tower_or_tokenizer_that_names_code_is_refused(tmp_path):
    name = public.write("bert", tmp_path / "bert")
    for file, named in (
        ("tower/config.json", {"attn_implementation": "kernels-community/flash-attn"}),
        ("tower/config.json", {"auto_map": {"AutoModel": "code.Model"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
    ):
        path = tmp_path / "bert" / file
        before = path.read_text()
        edit(path, lambda config, named=named: config.update(named))
        with refuses():
            openimp.load(name)
        path.write_text(before)
    openimp.load(name)


def test_a_recipe_that_wraps_a_model_is_told_of_towers():
    task = {"source": "all", "inputs": {"image": "image", "text": "text"}, "objectives": [{"type": "contrastive"}]}
    data = {"name": "x", "model": {"wrap": "open_clip:x/y"}, "sources": {"all": {"path": "x"}}, "tasks": {"t": task}}
    with refuses():
        Recipe.build(data)
