"""Models and an index of earlier versions are still read. tools/write_fixtures.py wrote them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import openimp
from openimp.checkpoint.folder import checkpoints, manifest_entry, verify
from openimp.checkpoint.warm_start import open_warm_start
from openimp.commands import run_eval, run_info
from openimp.common.json_lines import read_lines
from openimp.inference.embed import embed
from openimp.inference.model import Model
from openimp.recipe.schema import Recipe
from openimp.search import build_index, open_index
from openimp.training.trainer import train
from tests.messages import refuses

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FORMATS = ["format-6", "format-7", "format-8"]
TEXTS = ["a red apple", "a slice of cake"]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


@pytest.fixture
def fixtures(tmp_path, monkeypatch) -> Path:
    """A copy of the fixtures, which is the current folder."""
    shutil.copytree(FIXTURES, tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path / "fixtures")
    return tmp_path / "fixtures"


def require_equal_vectors(model: Model) -> None:
    newest = openimp.load(FIXTURES / "checkpoint", "cpu", "fp32")
    assert torch.equal(model.encode_text(TEXTS), newest.encode_text(TEXTS))
    assert torch.equal(model.encode_image(PICTURE), newest.encode_image(PICTURE))


def with_keys_that_went(folder: Path) -> Path:
    """Gives a model in format 6 keys of its recipe that this version no longer has."""
    config = json.loads((folder / "config.json").read_text())
    config["recipe"]["model"]["moe"] |= {"gates": "softmax", "slots": 1, "routing": "expert_choice", "top_k": 1}
    config["recipe"]["train"]["upcycle"] = True
    config["recipe"]["evaluation"]["sets"]["stills"]["type"] = "telepathy"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["checkpoint", "pushed", *FORMATS])
def test_each_folder_holds_the_same_model(fixtures, name):
    model = openimp.load(name, "cpu", "fp32")
    require_equal_vectors(model)
    newest = openimp.load("checkpoint")
    assert model.config == newest.config
    assert model.recipe == newest.recipe
    assert list(model.views) == ["image", "text"]


def test_the_checkpoint_is_what_its_manifest_says():
    verify(FIXTURES / "checkpoint")


def test_an_index_of_an_earlier_version_is_refused(fixtures):
    """Its fingerprints left out parts of the model and of its options."""
    pytest.importorskip("lancedb")
    with refuses():
        open_index("index", "cpu")
    Path("apple.txt").write_text("a red apple")
    with refuses():
        build_index("checkpoint", ["apple.txt"], "index")


def test_a_model_is_used_although_its_recipe_has_keys_that_went(fixtures, capsys):
    folder = with_keys_that_went(fixtures / "format-6")
    model = openimp.load(folder, "cpu", "fp32")
    require_equal_vectors(model)
    model.save("saved")
    require_equal_vectors(openimp.load("saved", "cpu", "fp32"))
    Path("apple.txt").write_text("a red apple")
    assert embed(folder, ["apple.txt"], "vectors.parquet").rows == {"text": 1}
    init = Recipe.load("recipe.yaml", [f"train.init={folder}"])
    warm_start = open_warm_start(init, init.make_modalities())
    assert warm_start.saved_classes == model.classes
    for use in (lambda: model.recipe, lambda: run_eval(folder, None, None, None)):
        with refuses():
            use()
    run_info(str(folder), [])
    printed = capsys.readouterr()
    assert "parameters" in printed.out, "info shows what it can"
    assert "what a step costs is not known: " in printed.err


def test_a_run_in_format_6_resumes_and_goes_on_in_format_8(fixtures):
    folder = Path(shutil.copytree("checkpoint", "run/checkpoints/step-00000003"))
    (folder / "recipe.yaml").unlink()
    config = json.loads(Path("format-6/config.json").read_text())
    config["recipe"]["train"]["steps"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps({name: manifest_entry(folder / name) for name in names}))
    with refuses():
        train(Recipe.load("recipe.yaml", ["train.steps=5", "optimizer.lr=0.5"]), Path("run"), resume=True)
    recipe = Recipe.load("recipe.yaml", ["train.steps=5"])
    with refuses():
        train(recipe, Path("run"), resume=True)
    assert train(recipe, Path("run"), resume=True, allow_changed_data=True)
    assert [line["step"] for line in read_lines(Path("run/metrics.jsonl"))] == [5]
    newest = checkpoints(Path("run"))[-1]
    assert json.loads((newest / "config.json").read_text())["format"] == 8
    assert openimp.load("run").recipe.train.steps == 5


def test_a_folder_of_another_library_and_a_revision_of_a_folder_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with refuses():
        openimp.load(tmp_path)
    with refuses():
        Model.from_pretrained(tmp_path, revision="main")


def test_evaluation_has_one_process(fixtures, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refuses():
        run_eval(fixtures / "checkpoint", None, None, None)


def test_a_model_without_a_recipe_is_used_and_says_what_is_missing(fixtures):
    (fixtures / "pushed" / "recipe.yaml").unlink()
    model = openimp.load("pushed", "cpu", "fp32")
    require_equal_vectors(model)
    with refuses():
        _ = model.recipe


@pytest.mark.parametrize(
    "change",
    [
        {"views": {}},
        {"views": {"smell": {}}},
        {"pairs": [{"modalities": ["image", "audio"]}]},
        {"distilled": [["image", "txt"]]},
        {"classes": {"stills:vendor": 4}},
        {"modalities": {"vision": {"patch": 4}}},
        {"optimizer": {}},
        {"model": {"heads": 3}},
        {"model": {"moe": {"experts": 2, "layers": 1, "gates": "scaled"}}},
        {"model": {"moe": {"experts": 2, "layers": 1, "routing": "token_choice"}}},
    ],
    ids=str,
)
def test_a_configuration_that_describes_no_model_is_refused_in_one_sentence(fixtures, change):
    file = fixtures / "format-7" / "config.json"
    config = json.loads(file.read_text())
    model = config["model"] | change.get("model", {})
    file.write_text(json.dumps(config | change | {"model": model}))
    with refuses():
        openimp.load("format-7")
