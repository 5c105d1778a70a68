import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from openimp.inference.classify import Classifier, class_heads, classify_files
from openimp.inference.evaluate import evaluate
from openimp.inference.model import load
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests import little
from tests.messages import refuses

SETS = """{
  head: {type: classification, source: pictures, inputs: {image: file}, task: named, label: label,
         view: {image: {size: 16}}},
  names: {type: zero_shot, source: pictures, inputs: {image: file}, label: label, prompts: ["a {} square", "{}"],
          view: {image: {size: 16}}}
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluation sets are a classification head and names of classes."""
    folder = little.write(tmp_path_factory.mktemp("data"))
    recipe = Recipe.load(folder / "recipe.yaml", [f"evaluation.sets={SETS}", "train.precision=fp32", "train.steps=3"])
    run = tmp_path_factory.mktemp("run")
    train(recipe, run)
    return run


@pytest.fixture(scope="module")
def pictures(run) -> list[Path]:
    return sorted(Path(load(run).recipe.sources["pictures"].path).rglob("*.png"))


def test_predictions_are_those_of_the_evaluation(run, pictures):
    model = load(run, precision="fp32")
    names = [*little.PICTURES]
    by_head = model.classify_image(pictures)
    by_names = model.classify("image", pictures, names=names, prompts=["a {} square", "{}"], batch_size=5)
    top1 = {result["set"]: result["top1"] for result in evaluate(run)}
    assert 0.25 < top1["head"] < 1 or 0.25 < top1["names"] < 1, "or the lines below would say little"
    for name, predictions in (("head", by_head), ("names", by_names)):
        assert sorted(predictions.classes) == sorted(names)
        right = [label == picture.parent.name for label, picture in zip(predictions.labels, pictures)]
        assert sum(right) / len(right) == pytest.approx(top1[name])
        assert predictions.probabilities.sum(1).tolist() == pytest.approx([1] * len(pictures))
    texts = F.normalize(
        torch.stack([model.encode_text([f"a {name} square", name], normalize=True).mean(0) for name in names]), dim=-1
    )
    cosines = model.encode_image(pictures, normalize=True) @ texts.T
    expected = (model.logit_scale.exp() * cosines).softmax(1)
    torch.testing.assert_close(by_names.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_the_command_prints_a_line_per_file_that_can_be_read(run, pictures, openimp, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    code, out, err = openimp("classify", run, pictures[0], bad, pictures[-1], "-k", "2")
    assert code == 0
    assert err.startswith("1 file could not be read, or not completely:\n")
    assert str(bad) in err
    predictions = load(run).classify_image([pictures[0], pictures[-1]])
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [str(pictures[0]), str(pictures[-1])]
    assert [line[1] for line in lines] == predictions.labels
    assert all(len(line) == 5 and float(line[2]) >= float(line[4]) for line in lines)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(pictures[0], mixed / "a.png")
    (mixed / "a.txt").write_text("a caption")
    Image.open(pictures[1]).save(mixed / "b.gif")  # The model has no modality for clips.
    code, out, err = openimp("classify", run, mixed)
    assert (code, len(out.splitlines())) == (0, 2)
    assert err == "left out 1 text file: the model has no classification head for text\n"
    code, out, _ = openimp("classify", run, pictures[0], "--class", "red", "--class", "blue", "--prompt", "a {} square")
    assert code == 0
    assert {*out.split("\t")[1::2]} == {"red", "blue"}


def test_what_cannot_be_classified_is_refused(run, pictures, tmp_path):
    model = load(run)
    sound = np.zeros(16_000, np.float32)
    for change in (
        {"names": ["red"]},
        {"names": ["red", "red"]},
        {"names": ["red", ""]},
        {"names": ["red " * 20, "blue", "red " * 21]},
        {"names": [0, 1]},
        {"names": ["red", "blue"], "prompts": ["a square"]},
        {"names": "red"},
        {"names": {"red": "a red square", "blue": "a blue square"}},
        {"names": ["red", "blue"], "prompts": []},
        {"prompts": ["a {}"]},
        {"names": ["red", "blue"], "head": "pictures:label"},
        {"head": "pictures:labels"},
        {"modality": "audio", "inputs": sound},
        {"modality": "smell", "names": ["red", "blue"]},
        {"modality": "smell"},
    ):
        with refuses():
            model.classify(**{"modality": "image", "inputs": pictures[:1]} | change)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    with refuses():
        model.classify_image([bad])
    with refuses():
        classify_files(run, [bad])
    assert model.classify_audio(sound, names=["low", "high"]).probabilities.shape == (1, 2)


def test_items_of_a_sigmoid_head_have_any_number_of_classes(tiny_recipe):
    objective = {"type": "classification", "label": "tags", "loss": "sigmoid"}
    task = {"source": "all", "inputs": {"image": "image", "text": "text"}, "objectives": [objective]}
    recipe = tiny_recipe(tasks={"tagged": task}, modalities={"vision": {"patch": [2, 8, 8]}})
    assert class_heads(recipe, "image") == {"all:tags": True}
    classifier = Classifier(["a", "b", "c"], None, lambda logits: logits, has_lists=True)
    probabilities = classifier.predict(torch.tensor([[9.0, 9.0, -9.0]])).probabilities
    assert (probabilities > 0.9).tolist() == [[True, True, False]]
