"""Two evaluators, one model: where both can say the same, they say the same."""

from pathlib import Path

import PIL.Image
import pytest

import openimp
from openimp.common.errors import UserError
from openimp.evaluation.evaluate import evaluate
from openimp.recipe.schema import Recipe
from openimp.study.clip_benchmark import clip_benchmark_recalls
from openimp.training.trainer import train

KS = (1, 5, 10)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A few steps on emoji of one artist, whose pictures and texts are all different."""
    inputs = {"image": "image", "text": "name"}
    view = {"image": {"size": 32}, "text": {"length": 12}}
    where = {"split": "test", "vendor": "twemoji"}
    data = {
        "name": "few",
        "model": {"width": 32, "layers": 1, "heads": 2, "mlp_dim": 64, "embed_dim": 32},
        "modalities": {"vision": {"patch": [2, 8, 8]}},
        "sources": {"emoji": {"path": "openimp:stills.parquet", "where": where, "cache": "memory"}},
        "tasks": {
            "named": {
                "source": "emoji", "inputs": inputs, "batch_size": 32, "objectives": [{"type": "contrastive"}],
                "views": [view],
            }
        },
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": 40, "num_workers": 0, "precision": "fp32"},
        "evaluation": {
            "sets": {
                "emoji": {"type": "retrieval", "source": "emoji", "inputs": inputs, "view": view},
                "kinds": {
                    "type": "zero_shot", "source": "emoji", "inputs": {"image": "image"}, "label": "group",
                    "view": {"image": {"size": 32}},
                },
            }
        },
    }  # fmt: skip
    run = tmp_path_factory.mktemp("runs") / "few"
    train(Recipe.build(data), run)
    return run


def test_both_evaluators_find_the_same_recalls(run):
    model = openimp.load(run, precision="fp32")
    model.recipe.train.precision = "fp32"
    ours = {
        result["task"].split(" -> ")[1]: result
        for result in evaluate(model.imp, model.recipe, model.modalities, ["emoji"])
    }
    theirs = clip_benchmark_recalls(model, model.recipe, "emoji", KS)
    assert len(theirs) == 2 * len(KS)
    for k in KS:
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(ours["image"][f"r{k}"])
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(ours["text"][f"r{k}"])
    assert ours["image"]["r10"] > 2 * 10 / ours["image"]["candidates"]


def test_equal_pictures_are_one_with_several_texts(run, tmp_path):
    for name, level in (("dark", 30), ("light", 220), ("pale", 220)):
        PIL.Image.new("L", (32, 32), level).save(tmp_path / f"{name}.png")
    lines = ["image,name", "dark.png,night", "light.png,day", "pale.png,noon"]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    model = openimp.load(run)
    data = model.recipe.to_dict()
    data["sources"]["emoji"] = {"path": str(tmp_path / "rows.csv")}
    # Two pictures, so the right one is always among the first two.
    assert clip_benchmark_recalls(model, Recipe.build(data), "emoji", [2])["image_retrieval_recall@2"] == 1
    with pytest.raises(UserError, match="cannot look for 3 of 2; give smaller ks"):
        clip_benchmark_recalls(model, Recipe.build(data), "emoji", [3])


def test_a_set_that_it_cannot_measure_is_refused(run):
    model = openimp.load(run)
    with pytest.raises(UserError, match="takes pictures and their texts"):
        clip_benchmark_recalls(model, model.recipe, "kinds")
    with pytest.raises(UserError, match="did you mean 'emoji'"):
        clip_benchmark_recalls(model, model.recipe, "emojis")
