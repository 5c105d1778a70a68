"""Models of open_clip in openimp compute what they compute in their own library."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL.Image
import public
import pytest
import torch
from messages import refuses
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import openimp
from openimp.checkpoint.find import find_model
from openimp.cli import app
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.model import Model
from openimp.inference.onnx import export
from openimp.recipe.schema import Recipe

TEXTS = ["a red square", "A  Cat's &amp; dog, green!", "", "blue " * 40, "unheard-of"]


@pytest.fixture(scope="module", params=public.MODELS)
def wrapped(request, tmp_path_factory) -> tuple[str, Path, Model]:
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
def test_features_and_logits_are_those_of_the_library(wrapped, pictures):
    _, folder, model = wrapped
    library, transform, tokenizer = library_of(folder)
    images = torch.stack([transform(PIL.Image.open(file)) for file in pictures])
    seen, read = library.encode_image(images, normalize=False), library.encode_text(tokenizer(TEXTS), normalize=False)
    prepared = torch.stack([model.preprocess(PIL.Image.open(file)) for file in pictures])
    assert torch.equal(prepared, images)
    assert torch.equal(model.tokenizer(TEXTS), tokenizer(TEXTS))
    # From files, from memory, and through the interface of open_clip.
    for inputs in (pictures, [file.read_bytes() for file in pictures], prepared):
        torch.testing.assert_close(model.encode_image(inputs), seen, atol=1e-5, rtol=1e-5)
    for inputs in (TEXTS, model.tokenizer(TEXTS)):
        torch.testing.assert_close(model.encode_text(inputs), read, atol=1e-5, rtol=1e-5)
    logits = library.logit_scale.exp() * torch.nn.functional.normalize(seen) @ torch.nn.functional.normalize(read).T
    scale, (_, bias) = model.logit_scale.exp(), model.imp.temperature("image", "text")()
    ours = scale * model.encode_image(pictures, normalize=True) @ model.encode_text(TEXTS, normalize=True).T
    if library.logit_bias is not None:
        logits, ours = logits + library.logit_bias, ours + bias
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-5)  # The scale is 14.


@torch.no_grad()
def test_a_clip_of_identical_frames_has_the_vector_of_the_image(wrapped, pictures):
    _, _, model = wrapped
    pixels = np.asarray(PIL.Image.open(pictures[0]))
    image = model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(model.encode_video(np.stack([pixels] * 6), normalize=True), image, atol=1e-5, rtol=1e-5)
    other = np.asarray(PIL.Image.open(pictures[3]).convert("RGB").resize((70, 50)))
    frames = model.encode_image([pixels, other], normalize=True).mean(0, keepdim=True)
    view = model.views["video"]
    model.views["video"] = view.model_copy(update={"frames": 2})
    clip = model.encode_video(np.stack([pixels, other]), normalize=True)
    model.views["video"] = view
    torch.testing.assert_close(clip, torch.nn.functional.normalize(frames), atol=1e-5, rtol=1e-5)


def test_a_saved_model_needs_neither_the_original_nor_the_network(wrapped, tmp_path, monkeypatch):
    _, folder, model = wrapped
    model.save(tmp_path / "saved")
    folder.rename(tmp_path / "gone")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is used"))
    try:
        again = openimp.load(tmp_path / "saved", "cpu", "fp32")
        assert checkpoint_fields(again.imp, again.modalities) == checkpoint_fields(model.imp, model.modalities)
        assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))
    finally:
        (tmp_path / "gone").rename(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """The name of a model."""
    return public.write("clip", tmp_path_factory.mktemp("clip") / "model")


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_changed_folder_is_converted_again(tmp_path):
    name, weights = public.write("clip", tmp_path / "clip"), tmp_path / "clip" / "open_clip_model.safetensors"
    before = find_model(name)
    save_file(load_file(weights) | {"logit_scale": torch.tensor(3.0)}, weights)
    assert openimp.load(name).logit_scale.item() == pytest.approx(3.0)
    assert find_model(name) != before
    weights.rename(weights.with_name("any.safetensors"))
    assert openimp.load(name).logit_scale.item() == pytest.approx(3.0)


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_cached_model_that_does_not_fit_is_converted_again(clip, monkeypatch):
    conversions, convert = [], open_clip.load_checkpoint
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *a, **b: conversions.append(1) or convert(*a, **b))
    expected = openimp.load(clip).encode_text(TEXTS)
    conversions.clear()
    os.truncate(find_model(clip) / "model" / "model.safetensors", 10_000)
    assert not conversions
    for _ in range(2):
        assert torch.equal(openimp.load(clip).encode_text(TEXTS), expected)
    assert len(conversions) == 1, "it is made again, once"


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
    invoke("push", clip, "me/clip", "--to", "public")
    assert str(Path(clip.rpartition(":")[2]).parent) not in Path("public/config.json").read_text()
    assert torch.equal(openimp.load("public").encode_text("a cat"), openimp.load(clip).encode_text("a cat"))


def test_a_folder_is_indexed_and_searched(clip, little_data, tmp_path):
    pytest.importorskip("lancedb")
    invoke("index", clip, little_data / "pictures", "--out", tmp_path / "index")
    query = little_data / "pictures" / "red" / "0.png"
    lines = invoke("search", tmp_path / "index", "--image", query, "--json", "-k", 1).splitlines()
    assert json.loads(lines[-1])["path"] == str(query)
    assert len(invoke("search", tmp_path / "index", "a red square", "--json").splitlines()) == 10
    with refuses():
        invoke("index", clip, "--out", tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-32", "ViT-B-32: expected open_clip:ViT-B-32/TAG with one of the tags .*laion2b"),
        ("open_clip:ViT-B-32/nonsense", "nonsense: expected open_clip:ViT-B-32/TAG"),
        ("open_clip:ViT-B-23/openai", "no model 'ViT-B-23'; did you mean"),
        ("open_clip:ViT-B-32/openai", "another activation: use open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:local-dir:nowhere", "no such folder"),
    ],
)
def test_wrong_names_are_explained(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32" / "openai").mkdir(parents=True)  # A folder does not hide a model that the library knows.
    with pytest.raises(UserError, match=message):
        openimp.load(name)


def test_files_that_could_hold_code_are_refused(clip, tmp_path):
    folder = Path(shutil.copytree(clip.rpartition(":")[2], tmp_path / "model"))
    weights = folder / "open_clip_model.safetensors"
    content = weights.read_bytes()

    def refused(message: str, **options: Any) -> None:
        edit(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].update(options))
        with pytest.raises(UserError, match=message):
            openimp.load(f"open_clip:local-dir:{folder}")

    refused("does not fit the model", width=64)
    refused("tokenizer_kwargs.trust_remote_code: expected 'clean' or", tokenizer_kwargs={"trust_remote_code": True})
    edit(folder / "open_clip_config.json", lambda config: config["model_cfg"]["text_cfg"].pop("tokenizer_kwargs"))
    weights.write_bytes(b"damaged")
    refused("open_clip_model.safetensors: damaged")
    weights.unlink()
    torch.save({}, folder / "open_clip_pytorch_model.bin")
    refused("has no safetensors file")
    (tmp_path / "outside").write_bytes(content)
    weights.symlink_to(tmp_path / "outside")
    refused("is a link out of")


@pytest.mark.parametrize(
    ("kind", "part", "change", "message"),
    [
        ("clip", "text_cfg", {"layers": 10**9}, "asks for 1000000002 layers, but"),
        ("clip", "vision_cfg", {"layers": [2, 10**9]}, "asks for 1000000004 layers, but"),
        ("clip", "text_cfg", {"context_length": 10**6}, "context_length: must be at most 8192, found 1000000"),
        ("clip", "preprocess_cfg", {"size": [10**6, 4]}, "preprocess_cfg.size.0: must be at most 4096, found 1000000"),
        ("bert", "text_tower", {"num_hidden_layers": 10**9}, "asks for 1000000002 layers, but the weights are only"),
    ],
)
def test_a_configuration_cannot_ask_for_more_than_the_weights_have(kind, part, change, message, tmp_path):
    """Neither that of a public model nor, which is all that transformers' is in, that of a saved one."""
    name = public.write(kind, tmp_path / kind)
    saved = part == "text_tower"
    if saved:
        folder = Path(shutil.copytree(find_model(name), tmp_path / "saved"))
        edit(folder / "text_tower_config.json", lambda config: config.update(change))
    else:
        file = tmp_path / kind / "open_clip_config.json"
        edit(file, lambda config: (config if part == "preprocess_cfg" else config["model_cfg"])[part].update(change))
    with pytest.raises(UserError, match=message):
        openimp.load(folder if saved else name)


def test_names_of_code_in_a_configuration_of_transformers_are_ignored(tmp_path):
    """Of classes in other files, and of kernels on the Hub, which transformers would download and run."""
    name = public.write("bert", tmp_path / "bert")
    saved = Path(shutil.copytree(find_model(name), tmp_path / "saved"))
    named = {"auto_map": {"AutoModel": "code.Model"}, "attn_implementation": "kernels-community/flash-attn"}
    edit(saved / "text_tower_config.json", lambda config: config.update(named))
    model = openimp.load(saved)
    assert torch.equal(model.encode_text(TEXTS), openimp.load(name).encode_text(TEXTS))
    assert not named.keys() & json.loads(model.modalities["text"].files["text_tower_config.json"]).keys()


def test_a_wrapped_model_cannot_be_exported(clip, tmp_path):
    pytest.importorskip("onnxscript")
    with refuses():
        export(clip, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ({"inputs": {"audio": "audio", "text": "text"}}, {}),
        ({}, {"model": {"wrap": "open_clip:x/y", "width": 128}}),
        ({"views": [{"image": {"size": 64}}]}, {}),
        ({}, {"train": {"init": "timm:vit_base_patch16_siglip_224"}}),
    ],
)
def test_what_a_wrapped_model_cannot_do_is_said_in_a_sentence(task, changes):
    usual = {"source": "all", "inputs": {"image": "image", "text": "text"}, "objectives": [{"type": "contrastive"}]}
    data = {"name": "x", "model": {"wrap": "open_clip:x/y"}, "sources": {"all": {"path": "x"}}}
    with refuses():
        Recipe.build({**data, "tasks": {"t": usual | task}, **changes})
