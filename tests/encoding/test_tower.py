"""Towers: frozen encoders whose vectors training reads."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import openimp
from openimp.checkpoint.folder import checkpoints, read_weights
from openimp.cli import app
from openimp.common.errors import UserError
from openimp.data.sources import open_source
from openimp.data.step_batches import StepBatches
from openimp.data.store import store_column
from openimp.data.task_data import TaskData
from openimp.encoding.frozen import open_encoder, release_encoders
from openimp.encoding.tower import make_teachers
from openimp.inference.model import load
from openimp.inference.model_card import model_card
from openimp.inference.onnx import export
from openimp.inference.public_recipe import shorten_paths
from openimp.inference.publish import push
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source
from openimp.search.build import build_index
from openimp.training.trainer import train
from tests import little, public
from tests.messages import refuses


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures in folders of their classes, and sounds; see tests/little.py."""
    return little.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[str, Path]:
    """A model of open_clip: its name and its folder."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    return public.write("clip", folder), folder


BOUND = """
name: bound
model: {width: 24, layers: 0, heads: 1, space: joint, embed_dim: 24}
sources: {pictures: {path: pictures}}
tasks:
  pictures:
    source: pictures
    inputs: {image: file, text: ["a {label} square", "{label}"]}
    objectives: [{type: contrastive, positives_by: label}]
    batch_size: 8
    views: [{}]
train: {steps: 4, num_workers: 0, save_every: 2}
evaluation: {sets: {colours: {type: zero_shot, source: pictures, inputs: {image: file}, label: label}}}
"""
SOUNDS = """
sources: {sounds: {path: sounds.jsonl}}
tasks:
  heard:
    source: sounds
    inputs: {audio: sound, text: caption}
    objectives: [{type: contrastive, positives_by: caption}]
    batch_size: 6
    views: [{}]
evaluation: {}
"""
STUDENT = """
name: student
model: {width: 16, layers: 1, heads: 1, mlp_dim: 16, space: joint, embed_dim: 24}
modalities: {vision: {patch: [1, 8, 8]}, text: {vocab_size: 300, positions: 8}}
train: {steps: 4, num_workers: 1, save_every: 2}
evaluation: {}
"""


def recipe_of(data: Path, tower: str, **changes: Any) -> Recipe:
    stems = {"vision": {"tower": tower}, "text": {"tower": tower}}
    return Recipe.build({**yaml.safe_load(BOUND), "modalities": stems, **changes}, data)


def hears(data: Path, tower: str, **changes: Any) -> Recipe:
    """As `recipe_of`, with sounds instead of pictures."""
    stems = {"audio": {"tower": tower}, "text": {"tower": tower}}
    return recipe_of(data, tower, modalities=stems, **yaml.safe_load(SOUNDS), **changes)


def taught_by(data: Path, teacher: str) -> Recipe:
    """A small encoder that learns the vectors of a teacher."""
    tasks = yaml.safe_load(BOUND)["tasks"]
    tasks["pictures"] |= {
        "objectives": [{"type": "distill", "of": name, "teacher": teacher} for name in ("image", "text")],
        "views": [{"image": {"size": 16}, "text": {"length": 6}}],
    }
    return recipe_of(data, teacher, tasks=tasks, **yaml.safe_load(STUDENT))


def write_bert(folder: Path) -> str:
    """Writes a model of transformers, and returns openimp's name of it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(public.WORDS), **sizes)).save_pretrained(folder)
    public.word_tokenizer().save_pretrained(folder)
    return f"sentence_transformers:local-dir:{folder}"


def library_vectors(folder: Path, files: list[Path], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors as open_clip computes them."""
    library, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images = torch.stack([transform(PIL.Image.open(file)) for file in files])
    with torch.no_grad():
        library.eval()
        return library.encode_image(images, normalize=True), library.encode_text(tokenizer(texts), normalize=True)


def test_training_reads_the_vectors_of_the_library_which_are_computed_once(data, clip):
    name, folder = clip
    recipe = recipe_of(data, name)
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    counts = []

    def progress(items: range, description: str) -> range:
        counts.append(len(items))
        return items

    batches.data.prepare(progress, {})
    assert counts == [24, 8]  # pictures, and two texts of each class
    batch = batches[0].batch
    rows = batches.data.source_of_task["pictures"].rows(batches[0].rows, ["file", "label"])
    files = [data / "pictures" / row["file"] for row in rows]
    pairs = [(f"a {row['label']} square", row["label"]) for row in rows]
    images, texts = library_vectors(folder, files, sum(pairs, ()))
    torch.testing.assert_close(batch.tokens["image"].values[:, 0], images * 24**0.5, atol=4e-3, rtol=1e-3)  # fp16
    differences = texts.view(8, 2, 24) * 24**0.5 - batch.tokens["text"].values
    assert (differences.abs().amax(-1).amin(1) < 4e-3).all(), "each text is one of two"

    def written() -> list[int]:
        files = Path(os.environ["OPENIMP_CACHE"]).glob("decoded/*/*")
        return sorted(file.stat().st_mtime_ns for file in files)

    before = written()
    again = StepBatches(TaskData(recipe, recipe.make_modalities()))
    again.data.prepare(None, {})
    assert written() == before
    assert torch.equal(again[0].batch.tokens["image"].values, batch.tokens["image"].values)
    # A worker that is spawned gets the vectors without the tower.
    copy = pickle.loads(pickle.dumps(again))
    assert torch.equal(copy[0].batch.tokens["text"].values, again[0].batch.tokens["text"].values)


def test_a_model_without_an_encoder_starts_with_the_cosines_of_its_tower(data, clip, tmp_path):
    name, folder = clip
    recipe = recipe_of(data, name, optimizer={"lr": 1e-12})
    train(recipe, tmp_path / "run")
    model = openimp.load(tmp_path / "run", "cpu", "fp32")
    files = sorted((data / "pictures").rglob("*.png"))[:3]
    texts = ["a red square", "blue"]
    cosines = model.encode_image(files, normalize=True) @ model.encode_text(texts, normalize=True).T
    images, text_vectors = library_vectors(folder, files, texts)
    torch.testing.assert_close(cosines, images @ text_vectors.T, atol=1e-5, rtol=1e-5)
    of_vectors = model.encode_image(7 * images, normalize=True) @ model.encode_text(text_vectors, normalize=True).T
    torch.testing.assert_close(of_vectors, images @ text_vectors.T, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="expected float vectors"):
        model.encode_image(torch.zeros(2, 3))
    sized = "{type: zero_shot, source: pictures, inputs: {image: file}, label: label, view: {image: {size: 32}}}"
    other = tmp_path / "other.yaml"  # The size is for other models, as in recipes/evaluation.
    other.write_text(
        f"sources: {{pictures: {{path: {data / 'pictures'}}}}}\nevaluation: {{sets: {{named: {sized}}}}}\n"
    )
    assert [result["set"] for result in openimp.evaluate(tmp_path / "run", recipe=other)] == ["named"]
    export(tmp_path / "run", tmp_path / "onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "onnx" / "image.onnx")
    (vectors,) = graph.run(["vectors"], {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(vectors), model.encode_image(images, normalize=True), atol=1e-4, rtol=0)


def test_crops_are_further_vectors_of_a_picture(data, clip):
    name, _ = clip
    recipe = recipe_of(data, name, modalities={"vision": {"tower": name, "crops": 3}, "text": {"tower": name}})
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.prepare(None, {})
    vectors = batches.data.stores["pictures", "image", "file"][0]
    assert vectors.shape == (3, 24)
    assert len(np.unique(vectors, axis=0)) == 3


def test_random_crops_differ_from_file_to_file_and_do_not_depend_on_the_place(data, clip, tmp_path, monkeypatch):
    """They did repeat in each file of the cache."""
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("openimp.data.store.ITEMS_PER_FILE", 2)
    (tmp_path / "data").mkdir()
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for name in "abcd":
        picture.save(tmp_path / "data" / f"{name}.png")
    name, _ = clip
    tower = recipe_of(data, name, modalities={"vision": {"tower": name, "crops": 2}, "text": {"tower": name}})
    image = tower.make_modalities()["image"]

    def vectors() -> dict[str, bytes]:
        table = open_source("data", Source(path=str(tmp_path / "data")))
        store = store_column(table, image, "file", [])
        assert all((store[row][0] == store[0][0]).all() for row in range(len(table))), "the whole picture is the same"
        return {table.row_name(row): store[row][1].tobytes() for row in range(len(table))}

    before = vectors()
    assert len({*before.values()}) == 4
    (tmp_path / "data" / "a.png").unlink()
    assert vectors() == {name: vector for name, vector in before.items() if name != "a.png"}


def test_an_encoder_above_a_tower_trains_and_resumes(data, clip, tmp_path):
    """Texts are read by an ordinary stem."""
    name, _ = clip
    model = {"width": 32, "layers": 1, "heads": 2, "mlp_dim": 64, "space": "joint", "embed_dim": 24}
    stems = {"vision": {"tower": name}, "text": {"vocab_size": 300, "positions": 16}}
    recipe = recipe_of(data, name, model=model, modalities=stems)
    run = tmp_path / "run"
    train(recipe, run)
    *_, last = checkpoints(run)
    weights = read_weights(last)
    shutil.rmtree(last)
    train(recipe, run, resume=True)
    assert all(torch.equal(weight, weights[name]) for name, weight in read_weights(last).items())
    card = model_card(openimp.load(run, "cpu"), last, "me/model", None)
    assert f"reads vision with the frozen encoder open_clip:local-dir:{Path(name).name}, which is not part" in card
    assert "reads text with" not in card


def test_a_model_of_openimp_is_a_tower_for_sounds(data, tmp_path):
    train(Recipe.load(str(data / "recipe.yaml"), ["train.steps=2"]), tmp_path / "tower")
    recipe = hears(data, str(tmp_path / "tower"), model=yaml.safe_load(BOUND)["model"] | {"width": 32, "embed_dim": 32})
    audio = recipe.make_modalities()["audio"]
    file = data / "0.wav"
    vector = audio.tokens(audio.encode_input(file, None), None, None).values[0, 0]
    assert vector.norm() == pytest.approx(32**0.5, rel=1e-4)
    train(recipe, tmp_path / "run")
    assert openimp.load(tmp_path / "run", "cpu").encode_audio(file).shape == (1, 32)
    # Bundled recipes of evaluations have views, but a tower has its own.
    sounds = {"type": "zero_shot", "source": "sounds", "inputs": {"audio": "sound"}, "label": "caption"}
    sets = {"sounds": sounds | {"view": {"audio": {"seconds": 5, "clips": 2}}}}
    evaluation = {"sources": {"sounds": {"path": str(data / "sounds.jsonl")}}, "evaluation": {"sets": sets}}
    (tmp_path / "evaluation.yaml").write_text(json.dumps(evaluation))
    (result,) = openimp.evaluate(tmp_path / "run", recipe=tmp_path / "evaluation.yaml")
    assert result["n"] == 15

    # A tower that cannot be opened is no fault of the files, so the index does not remember them as unreadable.
    shutil.move(tmp_path / "tower", tmp_path / "elsewhere")
    with refuses():
        build_index(tmp_path / "run", [file])
    shutil.move(tmp_path / "elsewhere", tmp_path / "tower")
    assert build_index(tmp_path / "run", [file]).new == 1


def test_a_public_model_is_a_teacher(data, clip):
    name, folder = clip
    recipe = taught_by(data, name)
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    batches.data.prepare(None, make_teachers(recipe))
    batch = batches[0].batch
    rows = batches.data.source_of_task["pictures"].rows(batches[0].rows, ["file", "label"])
    files = [data / "pictures" / row["file"] for row in rows]
    images, texts = library_vectors(folder, files, [f"a {row['label']} square" for row in rows])
    for targets, vectors in zip(batch.targets, (images, texts)):
        torch.testing.assert_close(targets["vector"], vectors, atol=1e-3, rtol=1e-3)  # fp16


def test_a_resumed_run_has_the_vectors_of_its_teacher_or_refuses_others(data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    teacher = tmp_path / "teacher"
    changes = ["model.embed_dim=24", "model.space=joint", "evaluation={}"]
    train(Recipe.load(str(data / "recipe.yaml"), ["train.steps=1", *changes]), teacher)
    recipe = taught_by(data, str(teacher))
    train(recipe, tmp_path / "whole")
    whole = read_weights(checkpoints(tmp_path / "whole")[-1])

    def stopped(name: str) -> Path:
        run = shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(checkpoints(run)[-1])
        return run

    shutil.move(teacher, tmp_path / "elsewhere")
    train(recipe, stopped("cached"), resume=True)
    resumed = read_weights(checkpoints(tmp_path / "cached")[-1])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), "cached vectors need no teacher"
    train(Recipe.load(str(data / "recipe.yaml"), ["train.steps=2", *changes]), teacher)
    shutil.rmtree(tmp_path / "cache" / "decoded")
    with refuses():
        train(recipe, stopped("changed"), resume=True)
    train(Recipe.load(str(data / "recipe.yaml"), ["train.steps=1", "evaluation={}"]), tmp_path / "disjoint")
    with refuses():
        train(taught_by(data, str(tmp_path / "disjoint")), tmp_path / "student")
    shown = shorten_paths(recipe.to_dict())["tasks"]["pictures"]["objectives"]
    assert {options["teacher"] for options in shown} == {"teacher"}


def test_what_a_run_costs_is_known_before_it_is_trained(data, clip, tmp_path):
    """On the meta device, on which weights have no values, the tower is not made."""
    recipe = recipe_of(data, clip[0])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "one step" in shown.output


def test_a_model_of_timm_reads_pictures(data, tmp_path):
    torch.manual_seed(0)
    library = timm.create_model("test_convnext", num_classes=0).eval()
    timm.models.save_for_hf(library, tmp_path / "timm", safe_serialization=True)
    name = f"timm:local-dir:{tmp_path / 'timm'}"
    files = sorted((data / "pictures").rglob("*.png"))[:3]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=library))
    with torch.no_grad():
        expected = F.normalize(library(torch.stack([transform(PIL.Image.open(file)) for file in files])), dim=-1)
    tower = open_encoder(name, "image")
    found = F.normalize(tower.embed(np.concatenate([tower.read(file) for file in files])), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    clear = PIL.Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # It is seen on white, not black.
    np.testing.assert_array_equal(tower.read(clear), tower.read(PIL.Image.new("RGB", (40, 40), "white")))
    large = PIL.Image.new("RGB", (3000, 40))
    tower.read(large)
    assert large.size == (3000, 40)

    with refuses():
        recipe_of(data, name).make_modalities()["text"].stem_spec()


def test_a_model_of_transformers_reads_texts(data, clip, tmp_path):
    from sentence_transformers import SentenceTransformer

    name = write_bert(tmp_path / "bert")
    model = {"width": 32, "layers": 0, "heads": 1, "space": "joint", "embed_dim": 32}
    recipe = recipe_of(data, clip[0], model=model, modalities={"vision": {"tower": clip[0]}, "text": {"tower": name}})
    text = recipe.make_modalities()["text"]
    vectors = text.tokens(np.concatenate([text.encode_input(words, None) for words in ("a cat", "red")]), None, None)
    expected = SentenceTransformer(str(tmp_path / "bert")).encode(["a cat", "red"], convert_to_tensor=True)
    torch.testing.assert_close(vectors.values[:, 0], F.normalize(expected) * 32**0.5, atol=1e-4, rtol=1e-4)
    half_a_pair = text.encode_input("\ud83d", None)
    assert text.tokens(half_a_pair, None, None).values.isfinite().all()
    train(recipe, tmp_path / "run")
    assert openimp.load(tmp_path / "run", "cpu").encode_text(["red", "a cat"]).shape == (2, 32)


def test_pickled_weights_of_transformers_are_refused(data, tmp_path):
    folder = tmp_path / "bert"
    name = write_bert(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with refuses():
        recipe_of(data, name).make_modalities()["text"].stem_spec()


def test_pickled_weights_of_a_part_of_a_sentence_transformer_are_refused(tmp_path):
    """Only a layer after the encoder has them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    write_bert(tmp_path / "bert")
    parts = [Transformer(str(tmp_path / "bert")), Pooling(32), Dense(32, 8)]
    folder = tmp_path / "model"
    SentenceTransformer(modules=parts).save(str(folder))
    name = f"sentence_transformers:local-dir:{folder}"
    assert open_encoder(name, "text").features == 8
    torch.save(load_file(folder / "2_Dense" / "model.safetensors"), folder / "2_Dense" / "pytorch_model.bin")
    release_encoders()
    assert open_encoder(name, "text").features == 8
    (folder / "2_Dense" / "model.safetensors").unlink()
    release_encoders()
    with refuses():
        open_encoder(name, "text")


def test_another_vocabulary_is_another_tower(tmp_path):
    """vocab.txt and sentencepiece's *.model have no names in the weights."""
    name = write_bert(tmp_path / "bert")
    prints = set()
    for file in ("", "vocab.txt", "spiece.model"):
        if file:
            (tmp_path / "bert" / file).write_text("other words")
        release_encoders()
        prints.add(open_encoder(name, "text").fingerprint)
    assert len(prints) == 3


def test_a_tower_of_a_strangers_model_is_not_opened_before_it_is_used(data, clip, tmp_path):
    """Neither one that does not exist, nor the model itself, nor damaged facts about it."""
    train(recipe_of(data, clip[0]), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*4")
    config = json.loads((folder / "config.json").read_text())
    for tower in ("hub:somebody/nothing", str(folder)):
        config["modalities"]["text"]["tower"] = tower
        (folder / "config.json").write_text(json.dumps(config))
        assert CliRunner().invoke(app, ["info", str(folder)], catch_exceptions=False).exit_code == 0
    with refuses():
        openimp.load(folder, "cpu").encode_text("red")
    (folder / "tower-text.json").write_text('{"fingerprint": "a", "features": "24"}')
    with refuses():
        openimp.load(folder, "cpu")


def test_configurations_that_name_code_are_refused(data, tmp_path):
    name = write_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "evil/kernel"}))
    with refuses():
        recipe_of(data, name).make_modalities()["text"].stem_spec()


def test_a_local_tower_cannot_be_pushed_and_a_changed_one_is_noticed(data, tmp_path):
    folder = tmp_path / "model"
    name = public.write("clip", folder)
    train(recipe_of(data, name), tmp_path / "run")
    with refuses():
        push(tmp_path / "run", "me/model", to=tmp_path / "pushed")
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, folder / "open_clip_model.safetensors")
    release_encoders()  # As in another process.
    model = openimp.load(tmp_path / "run", "cpu")
    with refuses():
        model.encode_text("red")


def test_what_a_tower_cannot_do_is_said_in_a_sentence(data, clip, tmp_path):
    name, _ = clip
    stems = {"vision": {"tower": name}, "text": {"tower": name}}
    for changes in (
        {"model": {"width": 24, "layers": 0, "heads": 1, "embed_dim": 32}},
        {"modalities": {**stems, "vision": {"tower": name, "patch": [1, 8, 8]}}},
    ):
        with refuses():
            recipe_of(data, name, **changes)
    # The second and third are folders without a model.
    places = (
        f"{tmp_path}/nothing",
        f"sentence_transformers:{tmp_path}",
        f"open_clip:{tmp_path}",
        "sentence_transformers:mini",
    )
    for tower in places:
        with refuses():
            recipe_of(data, tower).make_modalities()["image"].stem_spec()
    of_pixels = recipe_of(data, name).to_dict()
    of_pixels["tasks"]["pictures"]["views"] = [{"image": {"size": 64}}]
    with refuses():
        Recipe.build(of_pixels)
    with refuses():
        hears(data, name).make_modalities()["audio"].stem_spec()


def test_a_draft_with_towers_trains_heads_into_the_space_of_texts(data, clip, tmp_path, monkeypatch, openimp):
    name, folder = clip
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    code, _, errors = openimp("train", data / "pictures", "--tower", name, "--run-dir", run, "--set", "train.steps=3")
    assert code == 0, errors
    assert f"openimp init {data / 'pictures'} --tower {name} > mine.yaml" in errors
    recipe = Recipe.load(run / "recipe.yaml")
    assert (recipe.model.layers, recipe.model.width) == (0, 24)
    assert recipe.modalities["vision"].tower == recipe.modalities["text"].tower == name
    assert (run / "results.jsonl").exists()
    model = load(run, "cpu", "fp32")
    files = sorted((data / "pictures").rglob("*.png"))[:3]
    texts = ["a red square", "blue"]
    images, text_vectors = library_vectors(folder, files, texts)
    torch.testing.assert_close(model.encode_text(texts, normalize=True), text_vectors, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.encode_image(files, normalize=True), images, atol=1e-3)
    code, _, errors = openimp("train", run / "recipe.yaml", "--tower", name)
    assert (code, errors.strip()) == (
        2,
        "openimp: --tower: is for data; a recipe names its towers in `modalities` (docs/fine-tuning.md)",
    )
