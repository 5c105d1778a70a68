"""Figures of classes: splits, mean average precision, and trained heads, against other ways to compute them."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

import openimp
from openimp.checkpoint.folder import load_model
from openimp.commands import run_eval
from openimp.common.json_lines import read_lines
from openimp.evaluation.classification import Classified
from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.metrics import average_precision
from openimp.model.imp import IMP
from openimp.training.callbacks import Callback, EarlyStopping
from openimp.training.trainer import train
from tests.little import png
from tests.messages import refuses
from tests.trained import recipe_of

COLOURS = ["red", "green", "blue", "white"]
LISTS = [[colour for j, colour in enumerate(COLOURS[:3]) if i >> j & 1] for i in range(8)]
HOT = np.array([[colour in row for colour in COLOURS] for row in LISTS])
ZERO_SHOT = {"type": "zero_shot", "label": "colour"}
SPLITS = ZERO_SHOT | {"splits": "part"}


def naive_map(hot, score) -> float:
    """The mean over the classes that have an example."""
    return np.mean([average_precision_score(hot[:, i], score[:, i]) for i in np.flatnonzero(hot.any(0))])


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 5), st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=60, deadline=None)
def test_the_mean_average_precision_is_scikit_learns(seed, n, k, step):
    """Scores that tie, where they are rounded, and classes without an example among them."""
    rng = np.random.default_rng(seed)
    hot, score = rng.random((n, k)) < 0.3, rng.normal(size=(n, k)).astype(np.float32)
    hot[0, 0] = True
    score = np.round(score / step) * step if step else score
    metrics = average_precision(score, hot)
    assert metrics["map"] == pytest.approx(naive_map(hot, score))
    assert metrics["chance"] == pytest.approx(hot[:, hot.any(0)].mean())
    assert (metrics["n"], metrics["candidates"]) == (n, k)
    low, high = metrics["interval"]
    assert 0 <= low <= high <= 1 + 1e-9


def test_the_interval_of_average_precision_is_that_of_drawing_examples():
    rng = np.random.default_rng(0)
    hot = rng.random((200, 2)) < 0.4
    score = hot + rng.normal(0, 1, hot.shape)
    means = [naive_map(hot[draw], score[draw]) for draw in rng.integers(0, 200, (400, 200))]
    assert average_precision(score, hot)["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_scores_that_are_no_numbers_are_last():
    hot = np.array([[True], [False], [False], [False]])
    score = np.array([[np.nan], [1.0], [2.0], [np.nan]])
    assert average_precision(score, hot)["map"] == 1 / 4


def classified(truth, rank, classes, splits) -> Classified:
    return Classified("image", "label", classes, truth, truth, rank, splits)


def test_figures_of_splits_are_their_means():
    """By hand: of splits a (0, 1, 2) and b (2, 3), two thirds and none at the first place."""
    splits = {"a": np.array([0, 1, 2]), "b": np.array([2, 3])}
    metrics = classified(np.array([0, 1, 1, 1]), np.array([1, 1, 2, 9]), list("xyzuvw"), splits).metrics()
    assert (metrics["n"], metrics["candidates"]) == (4, 6)
    assert metrics["top1"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["top5"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["per_class"] == pytest.approx(((1 + 1 / 2) / 2 + 0) / 2)
    assert [(name, part["n"], part["top1"]) for name, part in metrics["splits"].items()] == [
        ("a", 3, 2 / 3),
        ("b", 2, 0),
    ]


def test_the_interval_of_splits_is_that_of_drawing_examples():
    """Overlapping splits of different sizes: an example counts in each split that it is in."""
    rng = np.random.default_rng(0)
    hit = rng.random(300) < np.repeat([0.2, 0.9], [200, 100])
    splits = {"1": np.arange(200), "2": np.arange(150, 300)}
    metrics = classified(np.zeros(300, int), np.where(hit, 1, 2), ["x", "y"], splits).metrics()
    means = []
    for _ in range(4000):
        # Each of the three parts of the rows is drawn from itself.
        drawn = np.concatenate([rng.integers(*part, part[1] - part[0]) for part in ((0, 150), (150, 200), (200, 300))])
        means.append((hit[drawn[:200]].mean() + hit[drawn[150:]].mean()) / 2)
    assert metrics["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


TASKS = """
named:
  source: all
  inputs: {image: picture, text: text}
  objectives: [{type: contrastive}, {type: classification, label: colour}]
  views: [{image: {size: 16}, text: {length: 8}}]
heard: {source: all, inputs: {audio: sound, text: text}, objectives: [{type: contrastive}]}
"""


@pytest.fixture
def headed(setup):
    """Pictures with columns, and a model that has been trained (not at all) to classify others of them.

    Returns the setup, and the classes of the head.
    """

    def make(columns, loss="softmax", classes=COLOURS, **options):
        tasks = yaml.safe_load(TASKS)
        tasks["named"]["objectives"][1] |= {"loss": loss, "classes": classes}
        options = {"type": "classification", "task": "named", "label": "colour"} | options
        made = setup({"rows": columns}, keys={"tasks": tasks}, **options)
        torch.manual_seed(0)
        model = IMP(made.recipe.to_config({"all:colour": classes}), made.modalities).eval()
        torch.nn.init.normal_(model.classifiers["all:colour"].weight, std=3)
        torch.nn.init.normal_(model.classifiers["all:colour"].bias)
        return made._replace(model=model), {"all:colour": [*classes]}

    return make


@torch.inference_mode()
def logits(made, n) -> np.ndarray:
    """Naive: one picture at a time."""
    image, view = made.modalities["image"], made.options.view["image"]
    tokens = [image.tokens(image.encode_input(png(i), view), view, None) for i in range(n)]
    features = [made.model.encode("image", picture).features for picture in tokens]
    return torch.cat([made.model.classify(vector, "all:colour") for vector in features]).numpy()


def test_a_trained_head_is_asked_about_held_out_rows(headed):
    names, truth = [f"c{i}" for i in range(9)], [i % 8 for i in range(24)]
    made, known = headed({"colour": [names[i] for i in truth]}, classes=names)
    (result,) = evaluate(*made, step=4, classes=known)
    scores = logits(made, len(truth))
    for k in (1, 5):
        assert result[f"top{k}"] == pytest.approx(top_k_accuracy_score(truth, scores, k=k, labels=range(9)))
    assert 0 < result["top1"] < result["top5"] < 1, "or the line above would say nothing"
    assert result["per_class"] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(1)))
    assert (result["n"], result["candidates"], result["chance"]) == (24, 9, 1 / 9)
    assert (result["type"], result["task"], result["step"]) == ("classification", "image -> colour", 4)
    assert (result["prompts"], result["prompts_version"]) == (None, None)


def test_a_sigmoid_head_has_the_mean_average_precision(headed):
    made, known = headed({"colour": [row or None for row in LISTS]}, "sigmoid")
    (result,) = evaluate(*made, classes=known)
    assert result["map"] == pytest.approx(naive_map(HOT, logits(made, 8)))
    assert (result["task"], result["n"], result["candidates"], result["chance"]) == ("image -> colour (mAP)", 8, 4, 0.5)
    assert "top1" not in result


def test_rows_of_lists_are_ranked_by_the_names_of_classes(setup):
    """Zero-shot, with a class that no row has, which does not count."""
    made = setup({"rows": {"colour": LISTS}}, **ZERO_SHOT, classes=COLOURS, prompts=["a {} square"])
    (result,) = evaluate(*made)
    model = made.inference_model()
    images = model.encode_image([png(i) for i in range(8)], normalize=True)
    texts = model.encode_text([f"a {colour} square" for colour in COLOURS], normalize=True)
    assert result["map"] == pytest.approx(naive_map(HOT, (images @ texts.T).detach().numpy()))
    assert (result["candidates"], result["prompts"]) == (4, ["a {} square"])


@pytest.mark.parametrize(
    ("colours", "options"),
    [
        (["red", "pink"], {}),
        ([["red"], ["rad"]], {"loss": "sigmoid"}),
        (["red", None], {}),
        ([["red"], ["blue"]], {}),
        (["red", "blue"], {"loss": "sigmoid"}),
        (["red"], {"task": "heard"}),
    ],
)
def test_a_head_that_cannot_be_asked_is_told(headed, colours, options):
    with refuses():
        made, known = headed({"colour": colours}, **options)
        check_sets(*made, known)


def test_rows_in_no_split_and_classes_and_splits_of_unreadable_rows_are_named(setup, headed):
    made = setup({"rows": {"colour": ["red", "blue"], "part": [[1], []]}}, **SPLITS)
    with refuses():
        check_sets(*made, {})
    pictures = [png(0), b"broken"]
    made = setup({"rows": {"colour": ["red", "blue"], "part": [[1], [1, 2]], "picture": pictures}}, **SPLITS)
    with refuses():
        evaluate(*made)
    made, known = headed({"colour": [[], ["red"]], "picture": pictures}, "sigmoid")
    with refuses():
        evaluate(*made, classes=known)
    with refuses():
        check_sets(*setup({"rows": {"colour": [[], []]}}, **ZERO_SHOT), {})


def test_a_set_that_does_not_fit_the_model_stops_no_evaluation_of_others(little_run, tmp_path):
    task = "evaluation.sets.heads={type: classification, task: nosuch, source: pictures, " + OPTIONS + "}"
    out = tmp_path / "results.jsonl"
    run_eval(little_run, ["tones"], None, out, [task])
    assert [line["set"] for line in read_lines(out)] == ["tones", "tones"]
    with refuses():
        run_eval(little_run, None, None, out, [task])


OPTIONS = "inputs: {image: file}, label: label, view: {image: {size: 16}}"


def test_a_training_keeps_the_results_of_the_sets_that_can_be_measured(own_data, tmp_path, capsys):
    """A set is lost on the way, for example with its disk. That is an error only at the end of the training."""
    picture = (own_data / "pictures" / "red" / "0.png").read_bytes()
    (own_data / "x.png").write_bytes(picture)
    (own_data / "lost.jsonl").write_text('{"file": "x.png", "label": "red"}')
    lost = f"evaluation.sets.lost={{type: zero_shot, source: lost, {OPTIONS}}}"
    changes = ["train.steps=2", "evaluation.every=1", "sources.lost={path: lost.jsonl}", lost, "evaluation.best=tones"]
    recipe = recipe_of(own_data, *changes)

    evaluated = []

    class LosesASet(Callback):
        def on_step(self, step, metrics):
            (own_data / "x.png").unlink(missing_ok=True)

        def on_evaluation(self, step, results):
            evaluated.append((step, len(results)))

    with refuses():
        train(recipe, tmp_path / "run", callbacks=[LosesASet(), EarlyStopping("lost", patience=1)])
    assert evaluated == [(1, 3), (2, 3)]
    shown = " ".join(capsys.readouterr().out.split())
    assert "lost.jsonl[0]" in shown
    assert shown.count("evaluation.sets.lost") == shown.count("; training goes on") == 1, "the last one is the error"
    (own_data / "x.png").write_bytes(picture)
    with refuses():  # Although a callback ends the training as soon as it can.
        train(recipe, tmp_path / "stopped", callbacks=[LosesASet(), EarlyStopping("tones", patience=1)])
    (own_data / "x.png").unlink(missing_ok=True)
    assert (tmp_path / "run" / "checkpoints" / "best").exists()
    measured = [(line["step"], line["set"]) for line in read_lines(tmp_path / "run" / "results.jsonl")]
    assert measured == [(step, name) for step in (1, 2) for name in ("colours", "tones", "tones")]
    with refuses():
        train(recipe, tmp_path / "other")  # It is lost before the start.


def test_a_run_measures_its_head_by_another_recipe(little_data, little_run, tmp_path):
    """The head of a run, whose classes are in its checkpoint, by a recipe of sources and sets alone."""
    file = tmp_path / "heads.yaml"
    file.write_text(
        f"sources: {{squares: {{path: {little_data / 'pictures'}}}}}\n"
        "evaluation: {sets: {squares: {type: classification, task: named, source: squares, inputs: {image: file},"
        " label: label, view: {image: {size: 24}}}}}\n"
    )
    size = ["evaluation.sets.squares.view.image.size=16"]
    (result,) = openimp.evaluate(little_run, ["squares"], recipe=file, overrides=size)
    _, saved = load_model(next(iter((little_run / "checkpoints").glob("*12"))))
    assert (result["n"], result["candidates"], result["view"]["image"]["size"]) == (24, 4, 16)
    assert saved.config.classes == {"pictures:label": sorted(COLOURS)}
    assert result["top1"] > 0.9, "the run has learned its colours"
