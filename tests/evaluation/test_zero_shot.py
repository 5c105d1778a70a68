"""Zero-shot classification: what the classes, labels and prompts are, and what is said of those that do not fit."""

import ast
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from little import png
from messages import refuses
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import openimp.evaluation
from openimp.evaluation.classification import Classified
from openimp.evaluation.evaluate import check_sets, evaluate, measure, open_set
from openimp.evaluation.evaluator import Evaluator
from openimp.recipe.tasks import Source

LABELS = ["red_thing", "sea", "red_thing", "tree", "sea", "red_thing", "sky", "night", "fire"]
PROMPTS = ["{}", "a picture of {}, and what is around it", "the {}"]


@pytest.fixture
def labelled(setup):
    """Classifies pictures with these labels."""

    def make(labels=LABELS, pictures=None, **options):
        columns = {"label": labels} | ({"picture": pictures} if pictures else {})
        return setup({"labelled": columns}, **{"type": "zero_shot", "label": "label"} | options)

    return make


def answers(made) -> Classified:
    evaluator = Evaluator(*made)
    _, (classified,) = measure(evaluator, "things", open_set(evaluator, "things"))
    return classified


def test_classes_are_prompts_averaged_as_unit_vectors(labelled):
    """Against a naive computation with `Model.encode`, one picture and one prompt at a time."""
    made = labelled(prompts=PROMPTS)
    (result,) = evaluate(*made, step=3)
    model, classes = made.inference_model(), sorted(set(LABELS))
    texts = [[model.encode_text(prompt.format(name), normalize=True) for prompt in PROMPTS] for name in classes]
    weights = F.normalize(torch.stack([torch.cat(prompts).mean(0) for prompts in texts]), dim=-1)
    images = torch.cat([model.encode_image(png(i), normalize=True) for i in range(len(LABELS))])
    similar = (images @ weights.T).numpy()
    truth = [classes.index(label) for label in LABELS]
    assert (result["n"], result["candidates"], result["chance"]) == (9, 6, 1 / 6)
    for k in (1, 5):
        assert result[f"top{k}"] == pytest.approx(top_k_accuracy_score(truth, similar, k=k))
    assert 0 < result["top5"] < 1, "or the line above would say nothing"
    assert result["per_class"] == pytest.approx(balanced_accuracy_score(truth, similar.argmax(1)))
    assert (result["type"], result["task"], result["step"]) == ("zero_shot", "image -> label", 3)
    assert (result["prompts"], result["view"]["text"]) == (PROMPTS, {"length": 8})


def test_figures_and_confusion_of_answers_known_by_hand():
    """Three of class a, one of b: both figures of accuracy, and where the wrong ones went."""
    truth, predicted, rank = np.array([0, 0, 0, 1]), np.array([0, 0, 2, 1]), np.array([1, 1, 6, 1])
    classified = Classified(
        "a", "b", classes=list("abcdefgh"), row=np.arange(4), truth=truth, predicted=predicted, rank=rank
    )
    figures = classified.metrics()
    assert (figures["top1"], figures["top5"]) == (0.75, 0.75)
    assert figures["per_class"] == pytest.approx((2 / 3 + 1) / 2)
    assert classified.confusion()[:2, :3].tolist() == [[2, 0, 1], [0, 1, 0]]
    assert classified.confusion().sum() == 4


@pytest.mark.parametrize(
    ("labels", "options", "classes", "truth"),
    [
        (["red_thing", "DeepSea"], {"words": True}, ["deep sea", "red thing"], [1, 0]),
        # Not a name that is given in place of a label.
        (
            ["red_thing", "DeepSea"],
            {"words": True, "classes": {"red_thing": "RedThing", "DeepSea": "DeepSea"}},
            ["RedThing", "deep sea"],
            [0, 1],
        ),
        # A label is compared as it is written in YAML, in a mapping as in a list.
        (["true", "false"], {"classes": {True: "yes", False: "no"}}, ["yes", "no"], [0, 1]),
        ([True, False], {"classes": [True, False]}, ["true", "false"], [0, 1]),
        ([2, 1], {"classes": [1, 2]}, ["1", "2"], [1, 0]),
        (["{sea}", "tree"], {"prompts": ["a {}"]}, ["tree", "{sea}"], [1, 0]),
        # Equal texts are one class: otherwise, their vectors would be equal, and each row wrong.
        (["sea", "Tree", "Sea ", "tree"], {}, ["Sea ", "Tree"], [0, 1, 0, 1]),
    ],
)
def test_labels_become_the_texts_of_classes(labelled, labels, options, classes, truth):
    classified = answers(labelled(labels, **options))
    assert (classified.classes, classified.truth.tolist()) == (classes, truth)


def test_classes_that_no_row_has_are_chosen_from(labelled, tmp_path):
    """From a list and from files: a name a line, and a label and a name, after a byte order mark."""
    more = sorted({*LABELS, "moon", "sun"})
    (tmp_path / "names.txt").write_text("\n".join(["# comment", *more, ""]))
    (tmp_path / "pairs.txt").write_text("".join(f"{name}\t{name}\n" for name in more), "utf-8-sig")
    forms = (more, "names.txt", "pairs.txt", dict(zip(more, more)))
    listed, *others = (evaluate(*labelled(classes=classes)) for classes in forms)
    assert (listed[0]["candidates"], listed[0]["chance"]) == (8, 1 / 8)
    assert others == [listed] * 3
    assert listed[0]["top1"] <= evaluate(*labelled())[0]["top1"]


def test_unreadable_pictures_and_labels_are_left_out_counted_and_named(labelled, tmp_path):
    pictures = [png(i) for i in range(len(LABELS))]
    pictures[3] = b"broken"
    (result,) = evaluate(*labelled(pictures=pictures))
    assert (result["n"], result["skipped"]) == (8, 1)
    assert result["skipped_rows"][0].startswith("labelled.parquet[3]: ")
    assert result["candidates"] == 6, "its class is still one of those to choose from"
    for i, label in enumerate([b"sea", b"tree", b"\xff", b"sea"]):
        (tmp_path / f"things{i}.txt").write_bytes(label)
        (tmp_path / f"things{i}.png").write_bytes(png(i))
    made = labelled(inputs={"image": "file"}, label="text")
    made.recipe.sources["labelled"] = Source(path=str(tmp_path), where={"extension": "png"})
    classified = answers(made)
    assert (classified.classes, classified.row.tolist()) == (["sea", "tree"], [0, 1, 3])
    assert classified.truth.tolist() == [0, 1, 0]
    assert evaluate(*made)[0]["skipped_rows"][0].startswith("things2.png: ")


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([1, 2], {}),
        ([1, 2], {"classes": {"1": "red"}}),
        (["see"], {"classes": ["sea", "sky"]}),
        (["sea", ""], {}),
        (["sea", "_"], {"words": True}),
        (["DeepSea", "deep_sea"], {"words": True}),
        (["a", "b"], {"classes": {"a": "sea", "b": "sea"}}),
        (["sea", None], {}),
        ([["sea"], ["tree", None]], {}),
        ([["sea"], ["tree"]], {"splits": "label"}),
        (["sea", "tree"], {"splits": "part"}),
        (["sea", "tree"], {"label": "labels"}),
        (["sea", "tree"], {"reader": "audio"}),
    ],
)
def test_bad_input_is_said_in_one_sentence(labelled, labels, options):
    with refuses():
        evaluate(*labelled(labels, **options))


@pytest.mark.parametrize(
    "prompt",
    ["a {:>2000000000}", "a {:.3}", "{!r}", "{:{}}", "{} {}", "{0}", "{", "{}}", "a", "a {b}", "{.b}", "{[b]}"],
)
def test_prompts_are_filled_without_any_format_and_checked_before_anything_is_encoded(labelled, prompt):
    made = labelled(["sea", "tree"], prompts=[prompt])
    with refuses():
        check_sets(*made, {})


def test_modalities_have_no_name_here():
    """Only modalities/ and recipes know what a picture is."""
    names = entry_points(group="openimp.modalities").names
    for file in Path(openimp.evaluation.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and node.value in names), f"{file.name}:{node.lineno}"
