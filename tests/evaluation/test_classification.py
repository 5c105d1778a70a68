"""Figures of classes: splits, mean average precision, and trained heads, against other ways to compute them."""

import io
import json
import tracemalloc

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, top_k_accuracy_score

from openimp.checkpoint.folder import load_model
from openimp.commands import run_eval
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.common.progress import console
from openimp.evaluation.classification import Classified
from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.metrics import average_precision
from openimp.evaluation.results import table
from openimp.inference.model import Model
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train

COLOURS = ["red", "green", "blue", "white"]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 5), st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=60, deadline=None)
def test_the_mean_average_precision_is_scikit_learns(seed, n, k, step):
    """Scores that tie, where they are rounded, and classes without an example among them."""
    rng = np.random.default_rng(seed)
    hot, score = rng.random((n, k)) < 0.3, rng.normal(size=(n, k)).astype(np.float32)
    hot[0, 0] = True
    score = np.round(score / step) * step if step else score
    some = hot.any(0)
    found = average_precision(score, hot)
    expected = [average_precision_score(hot[:, i], score[:, i]) for i in np.flatnonzero(some)]
    assert found["map"] == pytest.approx(np.mean(expected))
    assert found["chance"] == pytest.approx(hot[:, some].mean())
    assert (found["n"], found["candidates"]) == (n, k)
    low, high = found["interval"]
    assert 0 <= low <= high <= 1 + 1e-9


def test_the_interval_of_average_precision_is_that_of_drawing_examples():
    rng = np.random.default_rng(0)
    hot = rng.random((200, 2)) < 0.4
    score = hot + rng.normal(0, 1, hot.shape)
    drawn = [rng.integers(0, 200, 200) for _ in range(400)]
    means = [np.mean([average_precision_score(hot[d, i], score[d, i]) for i in (0, 1)]) for d in drawn]
    assert average_precision(score, hot)["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_the_memory_of_an_interval_does_not_grow_with_its_resamples():
    rng = np.random.default_rng(0)
    hot = rng.random((2**15, 1)) < 0.5
    tracemalloc.start()
    found = average_precision(hot + rng.normal(0, 1, hot.shape), hot)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26, "all weights alone are 2**15 x 201 x 8 bytes, and they are held several times"
    low, high = found["interval"]
    assert low < found["map"] < high < low + 0.05


def test_scores_that_are_no_numbers_are_last():
    hot = np.array([[True], [False], [False], [False]])
    score = np.array([[np.nan], [1.0], [2.0], [np.nan]])
    assert average_precision(score, hot)["map"] == 1 / 4


def test_figures_of_splits_are_their_means():
    """By hand: of splits a (0, 1, 2) and b (2, 3), two thirds and none at the first place."""
    rank, truth = np.array([1, 1, 2, 9]), np.array([0, 1, 1, 1])
    splits = {"a": np.array([0, 1, 2]), "b": np.array([2, 3])}
    found = Classified("image", "label", list("xyzuvw"), np.arange(4), truth, truth, rank, splits).metrics()
    assert (found["n"], found["candidates"]) == (4, 6)
    assert found["top1"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["top5"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["per_class"] == pytest.approx(((1 + 1 / 2) / 2 + 0) / 2)
    assert {name: (part["n"], part["top1"]) for name, part in found["splits"].items()} == {"a": (3, 2 / 3), "b": (2, 0)}
    with console.capture() as captured:
        console.print(table([{"set": "s", "task": "image -> label", "skipped": 0, **found}]), width=80)
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    assert any(line.startswith("image -> label 4 33.3 [") for line in lines)
    assert any(line.startswith("split a 3 66.7 [") for line in lines)


def test_the_interval_of_splits_is_that_of_drawing_examples():
    """Overlapping splits of different sizes: an example counts in each split that it is in."""
    rng = np.random.default_rng(0)
    hit = rng.random(300) < np.repeat([0.2, 0.9], [200, 100])
    splits = {"1": np.arange(200), "2": np.arange(150, 300)}
    rank = np.where(hit, 1, 2)
    found = Classified("a", "b", ["x", "y"], np.arange(300), np.zeros(300, int), np.zeros(300, int), rank, splits)
    means = []
    for _ in range(4000):
        # Each of the three parts of the rows is drawn from itself.
        drawn = np.concatenate([rng.integers(*part, part[1] - part[0]) for part in ((0, 150), (150, 200), (200, 300))])
        means.append((hit[drawn[:200]].mean() + hit[drawn[150:]].mean()) / 2)
    assert found.metrics()["interval"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.01)


@pytest.fixture
def setup(tmp_path, tiny_recipe, tiny_model):
    """Pictures with rows of columns, and a model that has been trained (not at all) to classify others of them."""

    def make(rows, options, loss="softmax", classes=COLOURS, view={"size": 16}, pictures=None):  # noqa: B006
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["picture"] = pictures or [png(i) for i in range(len(rows))]
        pq.write_table(pa.table(columns), tmp_path / "r.parquet")
        named = {"type": "contrastive"}
        head = {"type": "classification", "label": "colour", "loss": loss, "classes": classes}
        task = {"source": "trained", "inputs": {"image": "picture", "text": "text"}, "objectives": [named, head]}
        heard = {"source": "trained", "inputs": {"audio": "sound", "text": "text"}, "objectives": [named]}
        recipe = tiny_recipe(
            sources={"trained": {"path": "unused"}, "rows": {"path": str(tmp_path / "r.parquet")}},
            tasks={"named": {**task, "views": [{"image": view, "text": {"length": 8}}]}, "heard": heard},
            train={"precision": "fp32"},
            evaluation={"sets": {"held out": {"source": "rows", "inputs": {"image": "picture"}, "view": {"image": view}}
                                 | options}, "batch_size": 3},
        )  # fmt: skip
        known = {"trained:colour": classes}
        _, modalities = tiny_model(recipe)
        torch.manual_seed(0)
        model = IMP.from_config(recipe.to_config(known), modalities).eval()
        torch.nn.init.normal_(model.classifiers["trained:colour"].weight, std=3)
        torch.nn.init.normal_(model.classifiers["trained:colour"].bias)
        return model, recipe, modalities, known

    return make


def logits(model, recipe, modalities, n):
    """Naive: one picture at a time."""
    image, view = modalities["image"], recipe.evaluation.sets["held out"].view["image"]
    with torch.inference_mode():
        tokens = [image.tokens(image.encode_input(png(i), view), view, None) for i in range(n)]
        return torch.cat(
            [model.classify(model.encode({"image": t}).features, "trained:colour") for t in tokens]
        ).numpy()


HEAD = {"type": "classification", "task": "named", "label": "colour"}


def test_a_trained_head_is_asked_about_held_out_rows(setup):
    rows = [{"colour": COLOURS[i % 3]} for i in range(11)]
    model, recipe, modalities, known = setup(rows, HEAD)
    (result,) = evaluate(model, recipe, modalities, step=4, classes=known)
    scores, truth = logits(model, recipe, modalities, 11), [i % 3 for i in range(11)]
    hit = scores.argmax(1) == truth
    assert result["top1"] == pytest.approx(top_k_accuracy_score(truth, scores, k=1, labels=range(4)))
    assert 0 < result["top1"] < 1, "or the line above would say nothing"
    assert result["per_class"] == pytest.approx(np.mean([hit[np.array(truth) == i].mean() for i in range(3)]))
    assert (result["n"], result["candidates"], result["chance"]) == (11, 4, 1 / 4)
    assert (result["type"], result["task"], result["step"]) == ("classification", "image -> colour", 4)
    assert (result["prompts"], result["prompts_version"], list(result["view"])) == (None, None, ["image"])
    assert result["source"] == "rows"


def test_the_first_five_of_a_head(setup):
    names = [f"c{i}" for i in range(9)]
    rows = [{"colour": names[i % 9]} for i in range(18)]
    model, recipe, modalities, known = setup(rows, HEAD, classes=names)
    (result,) = evaluate(model, recipe, modalities, classes=known)
    expected = top_k_accuracy_score([i % 9 for i in range(18)], logits(model, recipe, modalities, 18), k=5)
    assert result["top5"] == pytest.approx(expected)
    assert result["top1"] < result["top5"] < 1


def test_a_sigmoid_head_has_the_mean_average_precision(setup):
    rows = [{"colour": [c for j, c in enumerate(COLOURS[:3]) if i >> j & 1] or None} for i in range(8)]
    model, recipe, modalities, known = setup(rows, HEAD, "sigmoid")
    (result,) = evaluate(model, recipe, modalities, classes=known)
    hot = np.array([[i >> j & 1 for j in range(3)] for i in range(8)])
    scores = logits(model, recipe, modalities, 8)
    expected = np.mean([average_precision_score(hot[:, j], scores[:, j]) for j in range(3)])
    assert result["map"] == pytest.approx(expected)
    assert (result["task"], result["n"], result["candidates"], result["chance"]) == ("image -> colour (mAP)", 8, 4, 0.5)
    assert "top1" not in result


def test_rows_of_lists_are_ranked_by_the_names_of_classes(setup):
    """Zero-shot, with a class that no row has, which does not count."""
    rows = [{"colour": [c for j, c in enumerate(COLOURS[:3]) if i >> j & 1]} for i in range(8)]
    options = {"type": "zero_shot", "label": "colour", "classes": COLOURS, "prompts": ["a {} square"]}
    imp, recipe, modalities, _ = setup(rows, options)
    (result,) = evaluate(imp, recipe, modalities)
    model = Model(imp, recipe.to_config({}), modalities, "fp32")
    model.views["image"] = recipe.evaluation.sets["held out"].view["image"]
    images = model.encode_image([png(i) for i in range(8)], normalize=True)
    texts = model.encode_text([f"a {c} square" for c in COLOURS], normalize=True)
    similar = (images @ texts.T).detach().numpy()
    expected = [average_precision_score([i >> j & 1 for i in range(8)], similar[:, j]) for j in range(3)]
    assert result["map"] == pytest.approx(np.mean(expected))
    assert (result["candidates"], result["prompts"]) == (4, ["a {} square"])


def test_rows_without_any_class_have_no_figure(setup):
    """The one row with a class cannot be read."""
    rows = [{"colour": []}, {"colour": ["red"]}]
    model, recipe, modalities, known = setup(rows, HEAD, "sigmoid", pictures=[png(0), b"broken"])
    with pytest.raises(UserError, match="held out: no row that can be read has a class in column 'colour'"):
        evaluate(model, recipe, modalities, classes=known)


def test_splits_may_overlap(setup):
    rows = [{"colour": COLOURS[i % 4], "part": [[1], [1, 2], [2]][i % 3]} for i in range(9)]
    options = {"type": "zero_shot", "label": "colour", "splits": "part"}
    imp, recipe, modalities, _ = setup(rows, options)
    (result,) = evaluate(imp, recipe, modalities)
    del options["splits"]
    singles = []
    for part in (1, 2):
        some = setup(rows, options)
        some[1].sources["rows"].where = {"part": part}
        singles += evaluate(*some[:3])
    assert [(name, found["n"]) for name, found in result["splits"].items()] == [("1", 6), ("2", 6)]
    assert result["top1"] == np.mean([single["top1"] for single in singles])
    assert [found["top1"] for found in result["splits"].values()] == [single["top1"] for single in singles]
    assert (result["n"], result["candidates"]) == (9, 4)


@pytest.mark.parametrize(
    ("rows", "options", "loss", "message"),
    [
        (
            ["red", "pink"],
            HEAD,
            "softmax",
            "'pink' is not among the classes; known: blue, green, red, white",
        ),
        (["red", None], HEAD, "softmax", "has 1 row without a class"),
        ([["red"], ["blue"]], HEAD, "softmax", "r.parquet.0.: expected one class, found .'red'."),
        (["red", "blue"], HEAD, "sigmoid", "r.parquet.0.: expected a list of classes, found 'red'"),
        (["red"], HEAD | {"task": "name"}, "softmax", "task: no task 'name'; did you mean 'named'"),
        (["red"], HEAD | {"task": "heard"}, "softmax", "label: tasks.heard has no classification of 'colour'"),
        (["red"], HEAD | {"label": "color"}, "softmax", "no classification of 'color'; did you mean 'colour'"),
        (["red"], HEAD | {"source": "row"}, "softmax", "no source 'row'; did you mean 'rows'"),
    ],
)
def test_a_head_that_cannot_be_asked_is_told(setup, rows, options, loss, message):
    def make_and_open():
        model, recipe, modalities, known = setup([{"colour": value} for value in rows], options, loss)
        check_sets(model, recipe, modalities, known)

    with pytest.raises(UserError, match=message) as error:
        make_and_open()
    assert "evaluation.sets.held out" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_and_its_text_are_not_two_classes(setup):
    """The last of them would have had the rows of both."""
    model, recipe, modalities, known = setup([{"colour": "1"}], HEAD, classes=["1", "2"])
    known["trained:colour"][1] = 1
    with pytest.raises(UserError, match="column 'colour' of source rows: class '1' and another one are both '1' as"):
        check_sets(model, recipe, modalities, known)


def test_a_split_of_unreadable_rows_is_named(setup):
    rows = [{"colour": "red", "part": [1]}, {"colour": "blue", "part": [1, 2]}]
    options = {"type": "zero_shot", "label": "colour", "splits": "part"}
    model, recipe, modalities, _ = setup(rows, options, pictures=[png(0), b"broken"])
    with pytest.raises(UserError, match="held out: no row of split '2' can be read"):
        evaluate(model, recipe, modalities)


def test_a_row_in_no_split_is_named(setup):
    rows = [{"colour": "red", "part": [1]}, {"colour": "blue", "part": []}]
    model, recipe, modalities, _ = setup(rows, {"type": "zero_shot", "label": "colour", "splits": "part"})
    with pytest.raises(UserError, match=r"column 'part' of source rows: r.parquet\[1\] is in no split"):
        check_sets(model, recipe, modalities, {})


def test_a_run_measures_its_head_as_eval_does(little_data, little_run, tmp_path):
    """The head of a run, whose classes are in its checkpoint, by a recipe of sources and sets alone."""
    file = tmp_path / "heads.yaml"
    file.write_text(
        f"sources: {{squares: {{path: {little_data / 'pictures'}}}}}\n"
        "evaluation: {sets: {squares: {type: classification, task: named, source: squares, inputs: {image: file},"
        " label: label, view: {image: {size: 24}}}}}\n"
    )
    run_eval(little_run, None, str(file), tmp_path / "found.jsonl", ["evaluation.sets.squares.view.image.size=16"])
    (found,) = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    _, saved = load_model(next(iter((little_run / "checkpoints").glob("*12"))))
    assert (found["n"], found["candidates"], found["view"]["image"]["size"]) == (24, 4, 16)
    assert saved.config.classes == {"pictures:label": sorted(COLOURS)}
    assert found["top1"] > 0.9, "the run has learned its colours"


def test_training_measures_its_head_and_keeps_the_best(little_data, tmp_path):
    held = "type: classification, task: named, source: pictures, inputs: {image: file}, label: label"
    sets = f"evaluation={{every: 2, best: known, sets: {{known: {{{held}, view: {{image: {{size: 16}}}}}}}}}}"
    train(Recipe.load(little_data / "recipe.yaml", [sets, "train.steps=3"]), tmp_path / "run")
    found = read_lines(tmp_path / "run" / "results.jsonl")
    assert [(one["step"], one["task"], one["candidates"]) for one in found] == [
        (2, "image -> label", 4),
        (3, "image -> label", 4),
    ]
    best = max(found, key=lambda one: (one["top1"], -one["step"]))
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == f"step-{best['step']:08}"


def test_a_training_keeps_the_results_of_the_sets_that_can_be_measured(own_data, tmp_path):
    (own_data / "broken").mkdir()
    (own_data / "broken" / "x.png").write_bytes(b"no picture")
    (own_data / "broken.jsonl").write_text('{"file": "broken/x.png", "label": "red"}')
    broken = "{type: zero_shot, source: broken, inputs: {image: file}, label: label, view: {image: {size: 16}}}"
    changes = ["train.steps=2", "sources.broken={path: broken.jsonl}", f"evaluation.sets.broken={broken}"]
    with pytest.raises(UserError, match="broken: no row of source broken can be read"):
        train(Recipe.load(own_data / "recipe.yaml", changes), tmp_path / "run")
    assert [line["set"] for line in read_lines(tmp_path / "run" / "results.jsonl")] == ["colours", "tones", "tones"]
