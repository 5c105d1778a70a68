import html
import json
import shutil
import socket

import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import openimp
from openimp.checkpoint.folder import SavedRecipe, read_config
from openimp.common.errors import UserError
from openimp.common.json_lines import append, read_lines
from openimp.data.files import BUNDLED_LICENSES, DEMO
from openimp.inference.model import Model
from openimp.inference.model_card import model_card
from openimp.inference.public_recipe import public_path, shorten_paths
from openimp.inference.publish import push
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe
from tests import hub
from tests.messages import refuses


@pytest.fixture
def server(monkeypatch):
    """A hub that huggingface_hub uses instead of the real one, with a login of its own."""
    with hub.serve() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield server


@pytest.fixture(scope="module")
def written(little_run, tmp_path_factory):
    """The little run as `openimp push --to` writes it."""
    folder = tmp_path_factory.mktemp("published") / "model"
    push(little_run, "me/little", folder, license="mit", overrides=["sources.sounds.license=CC-BY-4.0"])
    return folder


def cells(card: ModelCard, title: str) -> list[list[str]]:
    """The rows of the table in a section of the card."""
    section = card.text.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [html.unescape(line).strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")][2:]


def test_a_private_model_is_pushed_and_never_made_public(little_run, server):
    push(little_run, "me/little", private=True, license="mit")
    assert server.private == {"me/little": True}
    assert {"README.md", "config.json", "tokenizer.json", "recipe.yaml"} <= server.files["me/little"].keys()
    assert server.messages[0].startswith("little, ")
    model = openimp.load(little_run, "cpu")
    assert model.push_to_hub("me/little", token=hub.TOKEN, revision="tuned").endswith("/me/little")
    assert len(server.messages) == 2, "a second push is a second commit"
    assert server.branches == {"me/little": {"tuned"}}

    push(little_run, "me/open")
    before = dict(server.files["me/open"])
    with refuses():
        push(little_run, "me/open", private=True, license="mit")
    assert server.files["me/open"] == before


def test_the_card_says_what_the_model_was_trained_on_and_what_it_can_do(written, little_run):
    card = ModelCard.load(written / "README.md")
    assert card.data.library_name == "openimp"
    assert card.data.pipeline_tag == "feature-extraction"
    assert card.data.license == "mit"
    assert {"openimp", "image", "audio", "text", "mixture-of-experts"} <= set(card.data.tags)
    totals = read_lines(little_run / "metrics.jsonl")[-1]["totals"]
    assert cells(card, "Training data") == [
        ["pictures", "pictures", "24", str(totals["named"]["examples"]), "not stated"],
        ["sounds", "sounds.jsonl", "15", str(totals["heard"]["examples"]), "CC-BY-4.0"],
    ]
    colours, _, tones = read_lines(little_run / "results.jsonl")
    low, high = tones["interval"]
    figures = [f"{100 * tones['r1']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %", "33.3 %", "3", "15"]
    first, second, third = cells(card, "Results")
    assert first[:3] == ["colours (training data)", colours["task"], "top-1"]
    assert second[:3] == ["tones (training data)", "audio -> text", "R@1"]
    assert third == ["tones (training data)", "text -> audio", "R@1", *figures]


def test_only_sets_of_rows_of_training_are_marked_on_the_card(little_run, tmp_path):
    run = shutil.copytree(little_run, tmp_path / "run")
    colours, *tones = read_lines(run / "results.jsonl")
    for line in tones:
        del line["trained"]  # As of a source that may have moved.
    lines = [json.dumps(line) + "\n" for line in ({**colours, "trained": 0}, *tones)]
    (run / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    push(run, "me/unseen", tmp_path / "out")
    results = cells(ModelCard.load(tmp_path / "out" / "README.md"), "Results")
    assert [row[0] for row in results] == ["colours", "tones (training data)", "tones (training data)"]


def test_the_code_on_the_card_runs(written, media_folder, tmp_path, monkeypatch):
    text = (written / "README.md").read_text(encoding="utf-8")
    (code,) = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    assert 'openimp.load("hub:me/little")' in code
    PIL.Image.open(media_folder / "0.png").convert("RGB").save(tmp_path / "FILE.jpg")
    shutil.copy(media_folder / "0.wav", tmp_path / "FILE.wav")
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code.replace("hub:me/little", str(written)), found)
    assert found["image"].shape == found["audio"].shape == found["text"].shape


def test_results_of_other_weights_are_not_on_the_card(little_run, tmp_path):
    model = openimp.load(little_run, "cpu")
    with torch.no_grad():
        model.imp.stems["text"].after.bias += 1
    model.save(tmp_path / "changed")
    shutil.copy(little_run / "results.jsonl", tmp_path / "changed")
    push(tmp_path / "changed", "me/changed", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "There are no recorded results of these weights." in text
    assert "not recorded" in text, "a folder without a run does not tell the examples that were seen"


def test_results_of_other_libraries_are_on_the_card_and_what_they_do_not_tell_is_empty(little_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(little_run, run)
    line = read_lines(run / "results.jsonl")[0]
    told = {key: line[key] for key in ("checkpoint", "step")}
    unknown = dict.fromkeys(("n", "candidates", "interval", "chance"))
    append(run / "results.jsonl", {
        "set": "STS", "task": "text (spearman)", "type": "STS", "metric": "spearman", "score": -0.25, "skipped": 0,
        "library": "mteb 2", "note": "not comparable", **unknown, **told,
    })  # fmt: skip
    push(run, "me/little", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert cells(card, "Results")[-1] == ["STS", "text (spearman)", "spearman", "-25.0 %"]
    assert "\nSTS: not comparable.\n" in card.text


def test_nothing_tells_where_the_data_was(written, little_data):
    for file in written.rglob("*"):
        assert not file.is_file() or str(little_data).encode() not in file.read_bytes(), file
    recipe = yaml.safe_load((written / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["sources"]["sounds"]["path"] == "sounds.jsonl"
    Recipe.load(written / "recipe.yaml")
    assert read_config(written)[0].name == "little"


def test_paths_lose_their_folders_and_urls_their_secrets():
    for path, public in {
        "/home/ada/secret/photos.jsonl": "photos.jsonl",
        "/data/acme/shards/*.tar": "*.tar",
        "photos": "photos",
        "openimp:stills.parquet": "openimp:stills.parquet",
        "hub:me/little@v1": "hub:me/little@v1",
        "timm:local-dir:/home/ada/vit": "timm:local-dir:vit",
        "https://ada:pass@host:8080/a/b.parquet?key=1#x": "https://host:8080/a/b.parquet",
        "s3://bucket/*.parquet": "s3://bucket/*.parquet",
        "file:///home/ada/secret/photos.tar": "photos.tar",
        "simplecache::https://ada:pass@host/a.tar?key=1": "simplecache::https://host/a.tar",
    }.items():
        assert public_path(path) == public
    recipe = """
sources:
  a: {{path: {0}a.csv, root: {0}files, where: {{label: /m/04rlf}}}}
  b: {{hub: {0}set}}
  c: {{hub: me/set}}
train: {{init: {0}before, steps: 3}}
modalities: {{text: {{tokenizer: {0}tokenizer.json, positions: 8}}}}
"""
    assert shorten_paths(yaml.safe_load(recipe.format("/home/ada/"))) == yaml.safe_load(recipe.format(""))


def test_names_of_the_data_add_no_markup_to_the_card(tmp_path, tiny_recipe, tiny_model):
    evil = "a | <script>alert(1)</script>\n# b"
    tasks = {name: {**task, "source": evil} for name, task in tiny_recipe().to_dict()["tasks"].items()}
    recipe = tiny_recipe(sources={evil: {"path": "openimp:clips.parquet", "limit": 3}}, tasks=tasks)
    network, modalities = tiny_model(recipe)
    saved = SavedRecipe(recipe.to_yaml(), tmp_path / "recipe.yaml")
    Model(network, recipe.to_config({}), modalities, saved_recipe=saved).save(tmp_path / "model")
    push(tmp_path / "model", "me/evil", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\n# b" not in text
    (line,) = [line for line in text.splitlines() if "openimp:clips.parquet" in line and line.startswith("|")]
    assert line.endswith("| openimp:clips.parquet | 3 | not recorded | MIT |")
    assert line.count("|") == 6
    assert (tmp_path / "out" / "NOTICE").read_bytes() == (DEMO / "NOTICE").read_bytes()
    assert "Each of these pairs has a space of its own" in text, "the spaces are disjoint"


def test_a_model_with_classes_only_is_not_said_to_have_embeddings(tmp_path, tiny_recipe):
    tasks = tiny_recipe().to_dict()["tasks"]
    tasks = {"video": tasks["video"] | {"objectives": [{"type": "classification", "label": "label"}]}}
    tasks["video"]["inputs"] = {"video": "video"}
    for view in tasks["video"]["views"]:
        view.pop("text", None)
    recipe = tiny_recipe(tasks=tasks, modalities={"vision": {"patch": [2, 8, 8]}})
    (source,) = {task.source for task in recipe.tasks.values()}
    classes = {f"{source}:label": ["a", "b"]}
    modalities = recipe.make_modalities()
    network = IMP(recipe.to_config(classes), modalities)
    saved = SavedRecipe(recipe.to_yaml(), tmp_path / "recipe.yaml")
    model = Model(network, recipe.to_config(classes), modalities, saved_recipe=saved)
    card = model_card(model, tmp_path, "me/classes", None)
    assert "no embeddings" in card
    assert 'model.classify_video(["FILE.' in card
    for wrong in ("Its embeddings", "sentence_transformer", "openimp embed", "space of its own"):
        assert wrong not in card


def test_the_licenses_of_all_bundled_data_are_known():
    assert BUNDLED_LICENSES.keys() == {file.name for file in DEMO.glob("*.parquet")}


def test_what_cannot_be_pushed_is_said_in_one_sentence(little_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    for arguments, options in (
        ((little_run, "little"), {}),
        ((tmp_path / "missing", "me/little", out), {}),
        ((little_run, "me/little", tmp_path / "full"), {}),
        ((little_run, "me/little", out), {"overrides": ["train.steps=1"]}),
        ((little_run, "me/little", out), {"overrides": ["sources.sound.license=MIT"]}),
    ):
        with refuses():
            push(*arguments, **options)


def test_what_the_hub_refuses_and_a_hub_that_cannot_be_reached_are_said_in_one_sentence(
    tiny_model_folder, server, monkeypatch
):
    told = "^me/little: the upload to the Hugging Face Hub failed: "
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=told) as error:
        push(tiny_model_folder, "me/little")
    assert "\n" not in str(error.value)
    assert "hf_wrong" not in str(error.value)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    with refuses():
        push(tiny_model_folder, "me/little")
