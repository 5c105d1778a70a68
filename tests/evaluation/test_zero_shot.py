import io
import re

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from openimp.common.errors import UserError
from openimp.data.sources import open_source
from openimp.evaluation.classification import Classified, classify
from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.evaluator import Evaluator
from openimp.evaluation.zero_shot import class_embeddings
from openimp.inference.model import Model
from openimp.recipe.tasks import Source

LABELS = ["red_thing", "sea", "red_thing", "tree", "sea", "red_thing", "sky", "night", "fire"]
PROMPTS = ["{}", "a picture of {}, and what is around it", "the {}"]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def setup(tmp_path, tiny_recipe, tiny_model):
    """Writes labelled pictures and makes a recipe that classifies them, its model, its modalities and its source."""

    def make(labels=LABELS, pictures=None, folder=".", **options):
        pictures = pictures or [png(i) for i in range(len(labels))]
        pq.write_table(pa.table({"picture": pictures, "label": labels}), tmp_path / "labelled.parquet")
        task = {
            "type": "zero_shot",
            "source": "labelled",
            "inputs": {"image": "picture"},
            "label": "label",
            "view": {"image": {"size": 16}},
            **options,
        }
        recipe = tiny_recipe(
            sources={"all": {"path": "unused.parquet"}, "labelled": {"path": str(tmp_path / "labelled.parquet")}},
            train={"precision": "fp32"},
            evaluation={"sets": {"things": task}, "batch_size": 4},
            folder=folder,
        )
        return *tiny_model(recipe), recipe, open_source("labelled", recipe.sources["labelled"])

    return make


def test_classes_are_prompts_averaged_as_unit_vectors(setup):
    """Against a naive computation with `Model.encode`, one picture and one prompt at a time."""
    imp, modalities, recipe, _ = setup(prompts=PROMPTS)
    (result,) = evaluate(imp, recipe, modalities, step=3)
    model = Model(imp, recipe.to_config({}), modalities, "fp32")
    model.views["image"] = recipe.evaluation.sets["things"].view["image"]
    classes = sorted(set(LABELS))
    weights = []
    for name in classes:
        prompts = torch.cat([model.encode_text(prompt.format(name), normalize=True) for prompt in PROMPTS])
        weights.append(F.normalize(prompts.mean(0), dim=0))
    found = class_embeddings(Evaluator(imp, recipe, modalities), recipe.evaluation.sets["things"], classes)
    torch.testing.assert_close(found, torch.stack(weights), rtol=0, atol=1e-5)
    images = torch.cat([model.encode_image(png(i), normalize=True) for i in range(len(LABELS))])
    similar = (images @ torch.stack(weights, dim=1)).numpy()
    truth = np.array([classes.index(label) for label in LABELS])
    place = np.array([list(np.argsort(-row)).index(i) for row, i in zip(similar, truth)])
    assert (result["n"], result["candidates"], result["chance"]) == (9, 6, 1 / 6)
    assert result["top1"] == pytest.approx((place < 1).mean())
    assert result["top5"] == pytest.approx((place < 5).mean())
    assert 0 < result["top5"] < 1  # or the line above would say nothing
    assert result["per_class"] == pytest.approx(np.mean([(place < 1)[truth == i].mean() for i in range(6)]))
    assert (result["type"], result["task"], result["step"]) == ("zero_shot", "image -> label", 3)
    assert result["prompts"] == PROMPTS
    assert result["view"]["text"] == {"length": 8}
    assert evaluate(imp, recipe, modalities, step=3) == [result]


def test_figures_and_confusion_of_answers_known_by_hand():
    """Three of class a, one of b: both figures of accuracy, and where the wrong ones went."""
    truth, predicted, rank = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1]), np.array([1, 1, 6, 1])
    found = Classified("a", "b", list("abcdefgh"), np.arange(4), truth, predicted, rank)
    figures = found.metrics()
    assert (figures["top1"], figures["top5"]) == (0.75, 0.75)
    assert figures["per_class"] == pytest.approx((2 / 3 + 1) / 2)
    assert found.confusion()[:2, :3].tolist() == [[2, 0, 1], [0, 1, 0]]
    assert found.confusion().sum() == 4


def test_the_confusion_agrees_with_top1(setup):
    imp, modalities, recipe, source = setup()
    found, counted = classify(*_of((imp, modalities, recipe, source)))
    assert found.classes == sorted(set(LABELS))
    assert np.trace(found.confusion()) / 9 == found.metrics()["top1"]
    assert found.confusion().sum(1).tolist() == [LABELS.count(name) for name in found.classes]
    assert counted.skipped == []


def test_names_of_classes_decide_the_outcome(setup):
    """Numbers as labels need names; with the names swapped the pictures are taken for the other class."""
    labels = [1, 2, 1, 2]
    first = classify(*_of(setup(labels, classes={1: "red", "2": "green"})))[0]
    swapped = classify(*_of(setup(labels, classes={"1": "green", "2": "red"})))[0]
    assert first.classes == ["red", "green"]
    assert (first.truth == [0, 1, 0, 1]).all()
    assert (swapped.predicted == 1 - first.predicted).all()


def test_a_name_takes_the_place_of_a_label(setup):
    plain = classify(*_of(setup()))[0]
    a, b = sorted({*plain.predicted.tolist()})[:2]
    one, other = plain.classes[a], plain.classes[b]
    swapped = dict(zip(plain.classes, plain.classes)) | {one: other, other: one}
    named = classify(*_of(setup(classes=swapped)))[0]
    assert named.classes == list(swapped.values())
    swap = {a: b, b: a}
    assert named.predicted.tolist() == [swap.get(i, i) for i in plain.predicted.tolist()]


def test_labels_that_are_names_are_read_as_their_words(setup):
    """But not a name that is given in place of a label."""
    plain = setup(["red_thing", "DeepSea"], words=True)
    assert classify(*_of(plain))[0].classes == ["deep sea", "red thing"]
    named = setup(["red_thing", "DeepSea"], words=True, classes={"red_thing": "RedThing", "DeepSea": "DeepSea"})
    assert classify(*_of(named))[0].classes == ["RedThing", "deep sea"]


def test_truth_values_and_numbers_are_classes(setup):
    """A label is compared as it is written in YAML, in a mapping as in a list."""
    assert classify(*_of(setup(["true", "false"], classes={True: "yes", False: "no"})))[0].classes == ["yes", "no"]
    assert classify(*_of(setup([True, False], classes=[True, False])))[0].classes == ["true", "false"]
    found = classify(*_of(setup([2, 1], classes=[1, 2])))[0]
    assert (found.classes, found.truth.tolist()) == (["1", "2"], [1, 0])


def test_classes_that_no_row_has_are_chosen_from(setup, tmp_path):
    """From a list and from files: a name a line, and a label and a name, after a byte order mark."""
    more = sorted({*LABELS, "moon", "sun"})
    (tmp_path / "names.txt").write_text("\n".join(["# comment", *more, ""]))
    (tmp_path / "pairs.txt").write_text("".join(f"{name}\t{name}\n" for name in more), "utf-8-sig")
    listed, *others = (
        evaluate(*_but_name(setup(classes=classes, folder=tmp_path)))
        for classes in (more, "names.txt", "pairs.txt", dict(zip(more, more)))
    )
    assert (listed[0]["candidates"], listed[0]["chance"]) == (8, 1 / 8)
    assert others == [listed] * 3
    assert listed[0]["top1"] <= evaluate(*_but_name(setup()))[0]["top1"]


def test_unreadable_rows_are_left_out_counted_and_named(setup):
    pictures = [png(i) for i in range(len(LABELS))]
    pictures[3] = b"broken"
    imp, modalities, recipe, _ = setup(pictures=pictures)
    (result,) = evaluate(imp, recipe, modalities)
    assert (result["n"], result["skipped"]) == (8, 1)
    assert result["skipped_rows"][0].startswith("labelled.parquet[3]: ")
    # Its class is still one of those to choose from.
    assert result["candidates"] == 6


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1, 2], {}, r"evaluation\.sets\.things: source labelled: class 1 of column 'label' has no text"),
        (
            [1, 2],
            {"classes": {"1": "red"}},
            "source labelled: labelled.parquet.1.: '2' is not among the classes; known: 1",
        ),
        (["see"], {"classes": ["sea", "sky"]}, "'see' is not among the classes; did you mean 'sea'"),
        (["sea", ""], {}, "class '' of column 'label' has no text"),
        (["sea", "_"], {"words": True}, "class '_' of column 'label' has no text"),
        (["DeepSea", "deep_sea"], {"words": True}, "classes 'DeepSea' and 'deep_sea' have the same text, 'deep sea'"),
        (["a", "b"], {"classes": {"a": "sea", "b": "sea"}}, "classes 'a' and 'b' have the same text, 'sea'"),
        (["sea", None], {}, "column 'label' of source labelled has 1 row without a class"),
        ([["sea"], ["tree", None]], {}, "column 'label' of source labelled has 1 row without a class"),
        ([["sea"], ["tree"]], {"splits": "label"}, "splits need rows with one class each"),
        (["sea", "tree"], {"splits": "part"}, "has no column 'part'"),
        (["sea", "tree"], {"prompts": ["a picture"]}, "prompt 'a picture' needs one plain {}"),
        (["sea", "tree"], {"prompts": ["a {thing}"]}, "prompt 'a {thing}' needs one plain {}"),
        (["sea", "tree"], {"prompts": ["a {.thing}"]}, "prompt 'a {.thing}' needs one plain {}"),
        (["sea", "tree"], {"prompts": ["a {[thing]}"]}, "prompt 'a {\\[thing\\]}' needs one plain {}"),
        (["sea", "tree"], {"label": "labels"}, "no column 'labels'; did you mean 'label'"),
        (["sea", "tree"], {"reader": "audio"}, "no task trains image and audio together"),
    ],
)
def test_bad_input_is_said_in_one_sentence(setup, labels, options, message):
    imp, modalities, recipe, _ = setup(labels, **options)
    with pytest.raises(UserError, match=message.replace("{}", r"\{\}")) as error:
        evaluate(imp, recipe, modalities)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["a {:>2000000000}", "a {:.3}", "{!r}", "{:{}}", "{} {}", "{0}", "{", "{}}"])
def test_prompts_are_filled_without_any_format_and_checked_before_anything_is_encoded(setup, prompt):
    imp, modalities, recipe, _ = setup(["sea", "tree"], prompts=[prompt])
    with pytest.raises(UserError, match=re.escape(f"prompt {prompt!r} needs one plain {{}}")):
        check_sets(imp, recipe, modalities, {})


def test_class_names_may_hold_braces(setup):
    imp, modalities, recipe, _ = setup(["{sea}", "tree"], prompts=["a {}"])
    assert evaluate(imp, recipe, modalities)[0]["candidates"] == 2


def test_modalities_have_no_name_here():
    """Only modalities/ and recipes know what a picture is."""
    import ast
    from importlib.metadata import entry_points
    from pathlib import Path

    import openimp.evaluation.evaluate

    names = entry_points(group="openimp.modalities").names
    for file in Path(openimp.evaluation.evaluate.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{file.name}:{node.lineno}"


def _but_name(made):
    imp, modalities, recipe, _ = made
    return imp, recipe, modalities


def _of(made):
    imp, modalities, recipe, source = made
    return Evaluator(imp, recipe, modalities), recipe.evaluation.sets["things"], "evaluation.sets.things", source


def test_rows_whose_label_cannot_be_read_are_left_out(tmp_path, setup):
    """One label is no text."""
    folder = tmp_path / "things"
    folder.mkdir()
    for i, label in enumerate([b"sea", b"tree", b"\xff", b"sea"]):
        (folder / f"{i}.txt").write_bytes(label)
        (folder / f"{i}.png").write_bytes(png(i))
    imp, modalities, recipe, _ = setup(inputs={"image": "file"}, label="text")
    source = open_source("labelled", Source(path=str(folder)))
    found, counted = classify(*_of((imp, modalities, recipe, source)))
    assert (found.classes, found.row.tolist(), found.truth.tolist()) == (["sea", "tree"], [0, 1, 3], [0, 1, 0])
    assert [line.split(":")[0] for line in counted.skipped] == ["2.png"]
