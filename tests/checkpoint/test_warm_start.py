"""Fine-tuning: training starts from another model's weights and words, with new heads where it has other classes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import openimp
from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints
from openimp.data.loader import load_batches
from openimp.data.task_data import TaskData
from openimp.inference.publish import push
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer, train
from tests.messages import refuses
from tests.saved import assert_equal

NEW_HEAD = """{source: painted, inputs: {image: file, text: 'painted {label}'}, batch_size: 8, objectives: [
    {type: classification, label: label, of: image}, {type: contrastive, positives_by: label}],
    views: [{image: {size: 16}, text: {length: 8}}]}"""


def recipe_of(folder: Path, init: Path, *changes: str) -> Recipe:
    """The little recipe with another task in place of its own two."""
    ours = [f"train.init={init}", "sources.painted={path: pictures}", f"tasks={{named: {NEW_HEAD}}}", "evaluation={}"]
    return Recipe.load(folder / "recipe.yaml", [*ours, *changes])


@pytest.fixture
def pictures_only(own_data: Path) -> Path:
    """The little data, and its recipe without sounds."""
    file = own_data / "recipe.yaml"
    file.write_text(file.read_text().replace("  audio: {window: 512, hop: 256, bins: 32}\n", ""))
    return own_data


def test_the_encoder_starts_from_the_checkpoint_and_the_new_head_learns(little_run, pictures_only, tmp_path, capsys):
    training = Trainer(set_up(recipe_of(pictures_only, little_run, "train.steps=60"), tmp_path / "run"))
    before = dcp.read(checkpoints(little_run)[-1] / "ema")
    ours = training.model.state_dict()
    heads = {f"classifiers.painted:label.{kind}" for kind in ("weight", "bias")}
    assert {name for name in ours if name not in before} == heads
    for name, tensor in ours.items():
        assert name in heads or torch.equal(tensor, before[name]), name
    assert_equal(training.updater.ema.weights, ours)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("starts from")]
    folder, loaded, new, left = line.split("; ")
    assert folder == f"starts from {checkpoints(little_run)[-1]}"
    assert set(loaded.removeprefix("loaded: ").split(", ")) == {
        "encoder", "stems.vision", "stems.text", "projections.vision-to-text", "projections.text-to-vision",
        "temperatures.text-vision",
    }  # fmt: skip
    assert new == "new: classifiers.painted:label"
    assert set(left.removeprefix("left behind: ").split(", ")) == {
        "stems.audio", "projections.audio-to-text", "projections.text-to-audio", "temperatures.audio-text",
        "classifiers.pictures:label",
    }  # fmt: skip
    losses = []
    for loaded_batch in load_batches(training.batches, 0):
        losses.append(float(training.make_step(loaded_batch).parts["image:label"]))
    assert np.mean(losses[-10:]) < 0.5 * losses[0]
    assert not torch.equal(training.model.state_dict()["encoder.norm.weight"], before["encoder.norm.weight"])


def test_the_tokenizer_is_the_checkpoints(little_run, pictures_only, tmp_path):
    """Not one of the new texts, which say `painted`."""
    train(recipe_of(pictures_only, little_run, "train.steps=2"), tmp_path / "run")
    (ours,), theirs = checkpoints(tmp_path / "run"), checkpoints(little_run)[-1]
    assert (ours / "tokenizer.json").read_text() == (theirs / "tokenizer.json").read_text()


def test_a_tokenizer_file_may_move(little_run, pictures_only, tmp_path):
    """Models have a copy, and two files with the same tokenizer are equal."""
    file = tmp_path / "words.json"
    shutil.copy(checkpoints(little_run)[-1] / "tokenizer.json", file)
    train(recipe_of(pictures_only, little_run, "train.steps=2", f"modalities.text.tokenizer={file}"), tmp_path / "run")
    file.unlink()
    push(tmp_path / "run", "me/model", tmp_path / "pushed")
    model = openimp.load(tmp_path / "run")
    assert model.config.modalities["text"].tokenizer == str(checkpoints(tmp_path / "run")[-1] / "tokenizer.json")
    for init, changes in (("run", []), ("pushed", []), ("run", [f"modalities.text.tokenizer={file}"])):
        training = Trainer(
            set_up(recipe_of(pictures_only, tmp_path / init, *changes), tmp_path / f"{len(changes)}{init}")
        )
        assert training.data.modalities["text"].state() == model.modalities["text"].state()


def test_texts_without_a_word_that_the_tokenizer_knows_are_told(little_data, capsys):
    recipe = Recipe.load(little_data / "recipe.yaml", ["modalities.text.min_df=1"])
    for known_word in ("a", "tone"):
        modalities = recipe.make_modalities()
        modalities["text"].fit([[known_word]])
        TaskData(recipe, modalities).fit(["text"])
        is_told = "% of the training texts have no word" in capsys.readouterr().err
        assert is_told == (known_word == "tone"), "the texts of pictures have no tone"


def test_a_head_of_the_same_classes_is_taken_and_of_other_classes_is_not(little_run, own_data, tmp_path):
    def classifier(name: str, *changes: str) -> torch.Tensor:
        recipe = Recipe.load(own_data / "recipe.yaml", [f"train.init={little_run}", *changes])
        training = Trainer(set_up(recipe, tmp_path / name))
        return training.model.state_dict()["classifiers.pictures:label.weight"]

    before = dcp.read(checkpoints(little_run)[-1] / "ema")["classifiers.pictures:label.weight"]
    assert before.any()
    assert torch.equal(classifier("same"), before)
    turned = "tasks.named.objectives.1.classes=[white, red, green, blue]"
    assert not torch.isclose(classifier("turned", turned), before).any()
    shutil.move(own_data / "pictures" / "white", own_data / "pictures" / "yellow")
    assert not torch.isclose(classifier("renamed", "evaluation={}"), before).any()


@pytest.mark.parametrize("by_stem", [False, True])
def test_a_modality_that_is_new_starts_anew(own_data, tmp_path, capsys, by_stem):
    """A model that only saw learns to hear and to read. Its tokenizer is made of the new texts. Experts and blocks that
    stems have for themselves are new."""
    text = (own_data / "recipe.yaml").read_text()
    if by_stem:
        text = text.replace("layers: 2,", "layers: 2, modality_specific_layers: 1,")
        (own_data / "recipe.yaml").write_text(text.replace("experts: 2", "experts: {vision: 2, text: 2, audio: 4}"))
        text = text.replace("experts: 2", "experts: {vision: 2}")
    seeing = re.sub(r"  (audio|text): \{(window|vocab).*\n", "", text)
    (own_data / "seeing.yaml").write_text(seeing)
    only = (
        "{source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label}], batch_size: 8}"
    )
    changes = [f"tasks={{seen: {only}}}", "tasks.seen.views=[{image: {size: 16}}]", "evaluation={}", "train.steps=2"]
    train(Recipe.load(own_data / "seeing.yaml", changes), tmp_path / "seeing")
    capsys.readouterr()
    recipe = Recipe.load(own_data / "recipe.yaml", [f"train.init={tmp_path / 'seeing'}"])
    training = Trainer(set_up(recipe, tmp_path / "hearing"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("starts from"))
    assert "; loaded: stems.vision, encoder, classifiers.pictures:label; new: stems.text, stems.audio, " in line
    assert ("encoder.blocks.*.mlp.groups.audio.router.weight_ED" in line) == by_stem
    assert ("encoder.own.audio.*.attention." in line) == by_stem
    before = dcp.read(checkpoints(tmp_path / "seeing")[-1] / "ema")
    assert torch.equal(training.model.state_dict()["stems.vision.embed.weight"], before["stems.vision.embed.weight"])
    for loaded in load_batches(training.batches, 0, 6):
        assert training.make_step(loaded).total.isfinite()


@pytest.mark.parametrize(
    "change",
    [
        "model={width: 64, heads: 4}",
        "model.moe=null",
        "model.moe.experts={vision: 2, text: 2}",
        "modalities.vision.patch=[2, 4, 4]",
        "modalities.text.vocab_size=400",
        "modalities.text.tokenizer=other.json",
        "train.init=nothing",
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(little_run, pictures_only, tmp_path, change):
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(pictures_only / "other.json"))
    with refuses():
        Trainer(set_up(recipe_of(pictures_only, little_run, change), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_folder_whose_tensors_are_not_its_configurations_is_refused(little_run, pictures_only, tmp_path):
    folder = Path(shutil.copytree(checkpoints(little_run)[-1], tmp_path / "init"))
    tensors = dcp.read(folder / "ema")
    for change in (None, torch.zeros(3)):
        spoiled = {name: tensor for name, tensor in tensors.items() if name != "encoder.norm.weight"}
        shutil.rmtree(folder / "ema")
        dcp.save(folder / "ema", spoiled | ({} if change is None else {"encoder.norm.weight": change}))
        with refuses():
            Trainer(set_up(recipe_of(pictures_only, folder), tmp_path / "run"))
    (folder / "config.json").write_text(json.dumps({"format": 1}))
    with refuses():
        Trainer(set_up(recipe_of(pictures_only, folder), tmp_path / "run"))
