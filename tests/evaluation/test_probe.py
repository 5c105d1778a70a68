"""Probes find what the frozen features hold, learn from the training part alone, and refuse what they cannot learn."""

import io
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.probe import C_CANDIDATES, linear, nearest_neighbors
from tests.messages import refuses

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
NAMES = [*COLOURS] * 6


def square(name: str, seed: int) -> bytes:
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    pixels = (np.array(COLOURS.get(name, (128, 128, 128))) + rng.integers(-20, 21, (20, 20, 3))).clip(0, 255)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def squares(names, seed: int, broken: int | None = None) -> list[bytes]:
    return [b"broken" if i == broken else square(str(name), seed + i) for i, name in enumerate(names)]


@pytest.fixture
def probed(setup):
    """Probes with pictures of two parts, by default squares in the colours that are their labels."""

    def make(known=NAMES, asked=NAMES[:12], pictures=None, others=None, **options):
        tables = {
            "train": {"picture": pictures or squares(known, 0), "label": known},
            "test": {"picture": others or squares(asked, 100), "label": asked},
        }
        return setup(tables, **{"type": "probe", "train": "train", "label": "label", "k": 4} | options)

    return make


def test_colours_are_found_and_labels_at_random_are_not(probed):
    """Both classifiers tell the colours apart on an untrained encoder; the sides of a coin they cannot.

    The mean over classes is that of a test part in which one of ten is blue and looks red.
    """
    lines = evaluate(*probed(), step=3)
    assert [line["task"] for line in lines] == ["image -> label (linear)", "image -> label (kNN)"]
    for line in lines:
        assert (line["type"], line["step"], line["n"], line["candidates"], line["chance"]) == ("probe", 3, 12, 3, 1 / 3)
        assert line["top1"] == line["per_class"] == 1
        assert (line["train"]["source"], line["train"]["n"], line["source"]) == ("train", 18, "test")
        assert line["train"]["data_hash"] != line["data_hash"]
    assert lines[0]["C"] in C_CANDIDATES
    assert lines[1]["k"] == 4
    assert evaluate(*probed(), step=3) == lines
    for line in evaluate(*probed(asked=[*["red"] * 9, "blue"], others=squares(["red"] * 10, 0))):
        assert (line["top1"], line["per_class"]) == (0.9, 0.5)
    coin = ["heads", "tails"] * 20
    for line in evaluate(*probed(coin, coin)):
        assert line["top1"] < 0.8


def test_features_are_the_encoders_before_any_projection(probed):
    made = probed()
    before = evaluate(*made)
    torch.nn.init.zeros_(made.model.projections["vision-to-text"].down.weight)
    after = evaluate(*made)
    assert [line.pop("checkpoint") for line in before] != [line.pop("checkpoint") for line in after]
    assert before == after
    torch.nn.init.constant_(made.model.encoder.norm.weight, torch.nan)
    with refuses():
        evaluate(*made)


def test_labels_of_different_types_are_compared_as_text(probed):
    """A table of a CSV file has texts where one of a Parquet file has numbers."""
    number_of = {name: i for i, name in enumerate(sorted({*NAMES}))}
    asked = NAMES[:12]
    mixed = probed(
        [number_of[name] for name in NAMES],
        [str(number_of[name]) for name in asked],
        squares(NAMES, 0),
        squares(asked, 100),
    )
    for line in evaluate(*mixed):
        assert (line["n"], line["candidates"]) == (12, len(number_of))
        assert line["top1"] > 0.9


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


def test_the_penalty_is_chosen_by_the_training_examples():
    """Many useless features want a strong penalty; few good ones, and no noise, do not."""
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 2
    noisy = rng.normal(size=(60, 300))
    noisy[:, :20] += 0.4 * (2 * classes[:, None] - 1)
    exact = np.arange(60.0)[:, None] * [1, 0] + [0, 1]
    order = (np.arange(60) >= 31).astype(int)
    assert linear(noisy, classes, noisy)[1] < linear(exact, order, exact)[1]


def test_unreadable_rows_of_either_part_are_left_out_counted_and_named(probed):
    known = squares(NAMES, 0, broken=4)
    for line in evaluate(*probed(NAMES, NAMES, known, squares(NAMES, 99, broken=2))):
        assert (line["n"], line["skipped"], line["train"]["n"], line["train"]["skipped"]) == (17, 1, 17, 1)
        assert line["skipped_rows"][0].startswith("test.parquet[2]: ")
        assert line["train"]["skipped_rows"][0].startswith("train.parquet[4]: ")
    with refuses():
        evaluate(*probed(NAMES, NAMES, known, [b"broken"] * 18))
    pair = ["red", "red", "blue", "blue"]  # With its unreadable row a class has two examples.
    with refuses():
        evaluate(*probed(pair, ["red"], squares(pair, 0, broken=3), k=1))


AABB = ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("known", "asked", "options"),
    [
        (AABB, ["a", "c"], {}),
        (["a", "a", "b"], ["a"], {"k": 1}),
        (["a", "a"], ["a"], {}),
        (AABB, ["a"], {"k": 5}),
        (["a", "a", None, "b"], ["a"], {}),
        (AABB, ["a", None], {}),
        ([["a"], ["b"]], ["a"], {}),
    ],
)
def test_what_no_probe_can_be_fitted_to_is_said_before_anything_is_encoded(probed, known, asked, options):
    made = probed(known, asked, **options)
    with refuses():
        check_sets(*made, {})


def test_a_missing_library_is_told(probed, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with refuses():
        check_sets(*probed(), {})


@pytest.mark.parametrize(
    "options",
    [{"train": "test"}, {"train": "trian"}, {"inputs": {"image": "picture", "text": "label"}}, {"k": 0}],
)
def test_a_recipe_whose_probe_makes_no_sense_is_refused(probed, options):
    with refuses():
        probed(**options)
