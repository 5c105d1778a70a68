"""Zero-shot classification: what the classes, labels and prompts are, and what is said of those that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from openimp.evaluation.classification import Classified
from openimp.evaluation.evaluate import check_sets, evaluate, measure
from openimp.evaluation.evaluator import Evaluator
from openimp.recipe.tasks import Source
from tests.little import png
from tests.messages import refuses

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
    _, (classified,) = measure(Evaluator(*made), "things")
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
        (["{sea}", "tree"], {"prompts": ["a {}", "{{}} {}"]}, ["tree", "{sea}"], [1, 0]),
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
    assert (classified.classes, classified.truth.tolist()) == (["sea", "tree"], [0, 1, 0])
    assert evaluate(*made)[0]["skipped_rows"][0].startswith("things2.png: ")


def test_classes_with_equal_tokens_are_named(labelled, capsys):
    evaluate(*labelled(["sea", "sea" * 50, "sea" * 51] * 3))
    assert f"reads the classes {'sea' * 50!r} and {'sea' * 51!r} as the same text" in capsys.readouterr().err


def test_classes_without_a_known_word_are_named_with_a_remedy(labelled, capsys):
    stems = {"vision": {"patch": [2, 8, 8]}, "audio": {"window": 512, "hop": 256, "bins": 32}, "text": {"min_df": 1}}
    for words in (False, True):
        evaluate(*labelled(["RedSquare", "noise"], words=words, keys={"modalities": stems}))
    assert capsys.readouterr().err == (
        "evaluation.sets.things: the model knows no word of 1 class: 'RedSquare'; give other names in classes, or "
        "split names such as BrushHair by words: true\n"
    )


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ([1, 2], {}),
        (["see"], {"classes": ["sea", "sky"]}),
        (["sea", ""], {}),
        (["DeepSea", "deep_sea"], {"words": True}),
        (["a", "b"], {"classes": {"a": "sea", "b": "sea"}}),
        (["sea", None], {}),
        ([["sea"], ["tree"]], {"splits": "label"}),
        (["sea", "tree"], {"splits": "part"}),
        (["sea", "tree"], {"reader": "audio"}),
    ],
)
def test_bad_input_is_said_in_one_sentence(labelled, labels, options):
    with refuses():
        evaluate(*labelled(labels, **options))


@pytest.mark.parametrize(
    "prompt",
    ["a {:>2000000000}", "{!r}", "{:{}}", "{} {}", "{}}", "a"],
)
def test_prompts_are_filled_without_any_format_and_checked_before_anything_is_encoded(labelled, prompt):
    made = labelled(["sea", "tree"], prompts=[prompt])
    with refuses():
        check_sets(*made, {})
