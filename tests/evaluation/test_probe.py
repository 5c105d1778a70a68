"""Probes find what the frozen features hold, learn from the training part alone, and refuse what they cannot learn."""

import io
import sys

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from openimp.commands import run_eval
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.encoding.engine import ItemEncoder
from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.probe import STRENGTHS, linear, nearest_neighbors
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}


def square(name: str, seed: int) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    pixels = (np.array(COLOURS.get(name, (128, 128, 128))) + rng.integers(-20, 21, (20, 20, 3))).clip(0, 255)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def setup(tmp_path, tiny_recipe, tiny_model):
    """Writes pictures of two parts and makes the recipe of a probe, its model and its modalities."""

    def make(known=tuple(COLOURS) * 6, asked=tuple(COLOURS) * 4, pictures=None, **options):
        for part, labels, seed in ("train", list(known), 0), ("test", list(asked), 100):
            shown = (pictures or {}).get(part) or [square(str(name), seed + i) for i, name in enumerate(labels)]
            pq.write_table(pa.table({"picture": shown, "label": labels}), tmp_path / f"{part}.parquet")
        task = {"type": "probe", "train": "train", "source": "test", "inputs": {"image": "picture"}, "label": "label",
                "k": 4, "view": {"image": {"size": 16}}} | options  # fmt: skip
        recipe = tiny_recipe(
            sources={name: {"path": f"{tmp_path}/{name}.parquet"} for name in ("all", "train", "test")},
            train={"precision": "fp32"},
            evaluation={"sets": {"colours": task}, "batch_size": 5},
        )
        model, modalities = tiny_model(recipe)
        return model, recipe, modalities

    return make


def test_colours_are_found_and_labels_at_random_are_not(setup):
    """Both classifiers tell the colours apart on an untrained encoder; the sides of a coin they cannot."""
    lines = evaluate(*setup(), step=3)
    assert [line["task"] for line in lines] == ["image -> label (linear)", "image -> label (kNN)"]
    for line in lines:
        assert (line["type"], line["step"], line["n"], line["candidates"], line["chance"]) == ("probe", 3, 12, 3, 1 / 3)
        assert line["top1"] == line["per_class"] == 1
        assert (line["train"]["source"], line["train"]["n"], line["source"]) == ("train", 18, "test")
        assert line["train"]["data_hash"] != line["data_hash"]
    assert lines[0]["C"] in STRENGTHS
    assert lines[1]["k"] == 4
    assert evaluate(*setup(), step=3) == lines
    coin = ["heads", "tails"] * 20
    for line in evaluate(*setup(coin, coin)):
        assert line["top1"] < 0.8


def test_the_mean_over_classes_is_that_of_a_lopsided_test_part(setup):
    """One of ten is blue and looks red."""
    test, looks = [*["red"] * 9, "blue"], [square("red", i) for i in range(10)]
    for line in evaluate(*setup(asked=test, pictures={"test": looks})):
        assert (line["top1"], line["per_class"]) == (0.9, 0.5)


def test_features_are_the_encoders_before_any_projection(setup):
    model, recipe, modalities = setup()
    image, view = modalities["image"], recipe.evaluation.sets["colours"].view["image"]
    items = [image.encode_input(square(name, 0), view) for name in COLOURS]
    with torch.no_grad():
        wanted = model.encode({"image": image.tokens(np.concatenate(items), view, None)}).features
    encoder = ItemEncoder(model, image, view, None, "fp32", 2, normalize=False)
    found = [vector for _, vector in encoder.encode((None, lambda item=item: item) for item in items)]
    torch.testing.assert_close(encoder.stack(found), wanted, rtol=0, atol=1e-5)
    before = evaluate(model, recipe, modalities)
    torch.nn.init.zeros_(model.projections["vision-to-text"].down.weight)
    after = evaluate(model, recipe, modalities)
    assert [line.pop("checkpoint") for line in before] != [line.pop("checkpoint") for line in after]
    assert before == after


def test_neighbours_vote_by_their_similarity():
    """Against the sum written out; of the four nearest, one very near outvotes two that are far."""
    rng = np.random.default_rng(0)
    known, asked, classes = rng.normal(size=(60, 5)), rng.normal(size=(40, 5)), np.arange(60) % 3
    similar = asked @ known.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(known, axis=1)
    wanted = []
    for row in similar:
        near = np.argsort(-row)[:7]
        wanted.append(np.bincount(classes[near], np.exp(row[near] / 0.07), 3).argmax())
    assert nearest_neighbors(known, classes, asked, 7).tolist() == wanted
    known = np.array([[1, 0], [0.5, 0.6], [0.5, 0.7], [-1, 0]])
    assert nearest_neighbors(known, np.array([0, 1, 1, 1]), np.array([[9, 0.1]]), 4).tolist() == [0]


def test_a_linear_probe_does_not_mind_the_scale_of_a_feature():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(80, 4)), np.arange(80) % 4
    features[np.arange(80), classes] += 2.5
    known, asked = np.split(features, 2)
    answers, c = linear(known, classes[:40], asked)
    assert (answers == classes[40:]).mean() > 0.7
    scale = np.array([1e6, 1, 1e-6, 1])
    scaled, same = linear(known * scale, classes[:40], asked * scale)
    assert (scaled == answers).all()
    assert c == same


def test_a_fit_that_does_not_converge_is_no_flood_of_warnings(monkeypatch, recwarn):
    monkeypatch.setattr("openimp.evaluation.probe.MAX_ITER", 1)
    classes = np.arange(60) % 2
    linear(np.random.default_rng(0).normal(size=(60, 30)), classes, np.zeros((1, 30)))
    assert not list(recwarn)


def test_the_penalty_is_chosen_by_the_training_examples():
    """Many useless features want a strong penalty; few good ones, and no noise, do not."""
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 2
    noisy = rng.normal(size=(60, 300))
    noisy[:, :20] += 0.4 * (2 * classes[:, None] - 1)
    exact = np.arange(60.0)[:, None] * [1, 0] + [0, 1]
    order = (np.arange(60) >= 31).astype(int)
    assert linear(noisy, classes, noisy)[1] < linear(exact, order, exact)[1]


def test_unreadable_rows_of_either_part_are_left_out_counted_and_named(setup):
    names = list(COLOURS) * 6
    spoiled = {"train": [square(name, i) if i != 4 else b"broken" for i, name in enumerate(names)],
               "test": [square(name, 99 + i) if i != 2 else b"broken" for i, name in enumerate(names)]}  # fmt: skip
    for line in evaluate(*setup(names, names, spoiled)):
        assert (line["n"], line["skipped"], line["train"]["n"], line["train"]["skipped"]) == (17, 1, 17, 1)
        assert line["skipped_rows"][0].startswith("test.parquet[2]: ")
        assert line["train"]["skipped_rows"][0].startswith("train.parquet[4]: ")
    spoiled["test"] = [b"broken"] * 18
    with pytest.raises(UserError, match="no row of source test can be read"):
        evaluate(*setup(names, names, spoiled))
    # With them a class had two examples.
    spoiled = {"train": [square("red", 0), square("red", 1), square("blue", 2), b"broken"]}
    made = setup(["red", "red", "blue", "blue"], ["red"], spoiled, k=1)
    with pytest.raises(UserError, match="source train has a single example of class 'blue'"):
        evaluate(*made)


@pytest.mark.parametrize(
    ("known", "asked", "options", "message"),
    [
        (["a", "a", "b", "b"], ["a", "c"], {}, "source train has no example of class 'c' of source test; leave it out"),
        (["a", "a", "b"], ["a"], {"k": 1}, "source train has a single example of class 'b'; a probe needs two of each"),
        (["a", "a"], ["a"], {}, "source train has 1 class; a probe needs two"),
        (["a", "a", "b", "b"], ["a"], {"k": 5}, "k is 5, but source train has 4 examples"),
        (
            ["a", "a", None, "b"],
            ["a"],
            {},
            "column 'label' of source train has 1 row without a class",
        ),
        (["a", "a", "b", "b"], ["a", None], {}, "column 'label' of source test has 1 row without a class"),
        (
            [["a"], ["b"]],
            ["a"],
            {},
            "source train: train.parquet[0]: expected one class, found ['a']",
        ),
        (["a", "a", "b", "b"], ["a"], {"label": "lable"}, "has no column 'lable'; did you mean 'label'?"),
        (["a", "a", "b", "b"], ["a"], {"inputs": {"image": "pictur"}}, "no column 'pictur'; did you mean 'picture'?"),
    ],
)
def test_what_no_probe_can_be_fitted_to_is_said_before_anything_is_encoded(setup, known, asked, options, message):
    model, recipe, modalities = setup(known, asked, **options)
    with pytest.raises(UserError) as error:
        check_sets(model, recipe, modalities, {})
    assert message in str(error.value)
    assert str(error.value).startswith("evaluation.sets.colours: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "test"}, "evaluation.sets.colours: train and source are both test; a probe needs new rows"),
        ({"train": "trian"}, "evaluation.sets.colours.train: no source 'trian'; did you mean 'train'?"),
        ({"inputs": {"image": "picture", "text": "label"}}, "takes at most 1 item, found 2"),
        ({"k": 0}, "k: must be at least 1, found 0"),
    ],
)
def test_a_recipe_whose_probe_makes_no_sense_is_refused(setup, options, message):
    with pytest.raises(UserError) as error:
        setup(**options)
    assert message in str(error.value)


def test_an_empty_part_is_refused(setup, tmp_path):
    model, recipe, modalities = setup()
    recipe.sources["test"].where = {"label": "pink"}
    with pytest.raises(UserError, match=r"source test .* no row has label = 'pink'"):
        check_sets(model, recipe, modalities, {})


def test_features_that_are_not_finite_are_refused(setup):
    model, recipe, modalities = setup()
    torch.nn.init.constant_(model.encoder.norm.weight, torch.nan)
    with pytest.raises(UserError, match="features of source test are not finite"):
        evaluate(model, recipe, modalities)


def test_scikit_learn_is_asked_for_where_it_is_missing(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(
        UserError, match=r"^evaluation\.sets\.colours: a probe needs scikit-learn: pip install 'openimp"
    ):
        check_sets(*setup(), {})


def test_a_run_is_probed_and_probed_again(little_data, tmp_path):
    """By its training, and by openimp eval in the very same bytes."""
    parts = {"seen": "['0', '1', '2', '3']", "unseen": "['4', '5']"}
    changes = [f"sources.{name}={{path: pictures, where: {{name: {names}}}}}" for name, names in parts.items()]
    probed = "type: probe, train: seen, source: unseen, inputs: {image: file}, label: label, view: {image: {size: 16}}"
    changes += [f"evaluation.sets={{probed: {{{probed}, k: 3}}}}", "train.steps=2"]
    train(Recipe.load(little_data / "recipe.yaml", changes), tmp_path / "run")
    run_eval(tmp_path / "run", None, None, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "run" / "results.jsonl").read_bytes()
    for line in read_lines(tmp_path / "again.jsonl"):
        assert (line["n"], line["train"]["n"], line["chance"]) == (8, 16, 0.25)
        assert line["where"] == {"name": ["4", "5"]}
        assert line["train"]["where"] == {"name": ["0", "1", "2", "3"]}
        assert line["top1"] > 0.5
