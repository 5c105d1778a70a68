"""The recipe: what it refuses, and how it says so; what it fills in, and that nothing is lost on the way to YAML."""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

import openimp
from openimp.common.names import absolute_name
from openimp.recipe.file import RecipeLoader, parse_mapping, read_recipe, to_yaml
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests.messages import refuses


def bomb(start: str, each: str) -> str:
    """Lists or mappings of aliases of aliases: 30 lines stand for 4^29 values."""
    lines = [f"k{i}: &k{i} " + (each.format(f"*k{i - 1}") if i else start) for i in range(30)]
    return "\n".join(lines)


SIZES = ["imp_s", "imp_b", "imp_m", "imp_l", "imp_moe_s", "imp_moe_b", "imp_moe_l"]
BUNDLED = ["demo", "mixture", "icons", "photos_and_speech", "public", *SIZES]


@pytest.fixture
def file(little_data):
    return little_data / "recipe.yaml"


# What is changed. What is answered is in tests/messages.json.
REFUSED = [
    # An unknown key is answered with the nearest one of its own mapping.
    "optimiser.lr=1",
    "train.stepz=1",
    "model.moe.expert=4",
    "tasks.named.bacth_size=4",
    "tasks.named.objectives.0.positive_by=x",
    "tasks.named.inputs.image={colum: x}",
    "tasks.named.views.0.image.sise=16",
    "tasks.named.views.1.imagge={}",
    "evaluation.sets.tones.views={}",
    "evaluation.sets.colours.view.audio={}",
    "modalities.vision.pach=8",
    "modalities.visions={}",
    "tasks.named.views.0.image.drop_tokens=1.0",
    "tasks.heard.views.0.audio.drop_tokens=1.0",
    "model.moe={experts:8, layers:2}",
    "zzz=1",
    # A wrong type or value is answered with what was expected and what was found.
    "train.steps=many",
    "train.steps='7'",
    "train.steps=1e3",
    "train.steps=0",
    "train.compile=1",
    "train.precision=fp16",
    "optimizer.lr=-1",
    "train=fast",
    "name=",
    "tasks.named.views.0.image.size=big",
    "sources.pictures.where={label: [red, 1.5]}",
    "sources.pictures.where={label: 1.5}",
    "tasks.named.objectives.0.type=contrast",
    "tasks.named.objectives.0=contrastive",
    "tasks.named.objectives.0={positives_by: label}",
    "modalities.vision.patch=[2, 8]",
    "modalities.vision.patch=[2, 8, 8, 8]",
    "tasks.named.views=[]",
    "tasks.named.objectives.0.pairs=[]",
    "tasks.named.inputs.image=[]",
    "tasks.named.weight=.inf",
    # So is a missing one.
    "tasks.named.objectives.1={type: classification}",
    "tasks.other={source: pictures, objectives: [{type: contrastive}]}",
    "sources={}",
    # Parts must fit each other.
    "model.heads=3",
    "model.moe.layers=3",
    "parallel.expert_degree=3",
    "model.moe.experts={vision: 2, text: 2}",
    "model.moe.experts={vision: 2, texts: 2, audio: 2}",
    "model={layers: 2, modality_specific_layers: 2, moe: {experts: {vision: 2, text: 2, audio: 2}, layers: 1}}",
    "sources.pictures={}",
    "sources.pictures.hub=x/y",
    "sources.pictures={path: x.tar, stream: true, cache: disk}",
    "sources.pictures.split=test",
    "name=../../x",
    "name='..'",
    "name=/tmp/x",
    'name="a\\ab"',
    "sources.pictures.window=9",
    "sources.pictures.part={of: 4}",
    "sources.pictures.part={of: 4, keep: [4]}",
    "sources.pictures={path: x.tar, stream: true, part: {of: 2, keep: [0]}}",
    "sources.pictures={path: x.tar, stream: true, limit: 3}",
    "sources.pictures={hub: x/y, format: parquet}",
    "tasks.named.source=picture",
    "evaluation.sets.tones.source=x",
    "tasks.named.inputs={imag: file, text: label}",
    "tasks.named.objectives.0.pairs=[[image, txt]]",
    "tasks.named.objectives.0.pairs=[[image, image]]",
    "tasks.named.objectives.0.pairs=[[image, text], [text, image]]",
    (
        "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label, "
        "classes: [red]}]}"
    ),
    (
        "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label, "
        "loss: sigmoid}]}"
    ),
    "tasks.named.objectives.1.of=audio",
    "tasks.named.objectives.1.classes=[red, red]",
    (
        "tasks.other={source: pictures, inputs: {image: file, video: file}, "
        "objectives: [{type: contrastive, positives_in: x}]}"
    ),
    "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: contrastive}]}",
    "tasks.other={source: sounds, inputs: {text: x}, objectives: [{type: classification, label: x}]}",
    "evaluation.sets.tones.inputs={audio: sound}",
    "evaluation.sets.tones.inputs.text={column: caption, draw: 2}",
    "evaluation.sets.tones.view.batch_size=4",
    "evaluation.sets.colours.view.weight=0.5",
    "evaluation.sets.colours.inputs={video: file}",
    "evaluation.sets.colours.reader=txt",
    # Sizes that no use needs, and that would take hours or all memory, are answered with the limit.
    "evaluation.sets.tones.view.audio.clips=1000000000",
    "modalities.audio.window=2147483648",
    "train.steps=10000000000000000000000",
    "tasks.named.interval=1000000000",
    # A view that makes no whole patch is answered with the sizes that do.
    "tasks.named.views.0.image.size=20",
    "tasks.named.views.0.image.size=[16, 4]",
    "tasks.named.views.1.image.size=1000",
    "evaluation.sets.tones.view.audio.seconds=0.4",
    "evaluation.sets.tones.view.audio.seconds=0.01",
    "tasks.named.views.0.text.length=17",
    # A misspelled name does not begin a new task, source or evaluation set.
    "tasks.nammed.weight=2",
    "sources.picture.path=elsewhere",
    "evaluation.sets.tone.label=x",
    # Names of heads have a slash for a dot.
    (
        "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: classification, label: a.b}, "
        "{type: classification, label: a/b}]}"
    ),
    "optimizer.muon_momentum=0.8",
]


@pytest.mark.parametrize("change", REFUSED)
def test_a_mistake_is_told_in_one_sentence_that_names_file_and_key(file, change):
    with refuses():
        Recipe.load(file, [change])


def test_sync_of_a_cached_source_is_refused(file):
    """Its cache keeps parts of long recordings, so a share of their length would be another moment."""
    recordings = ["tasks.named.inputs.audio=label", "tasks.named.views.0.sync=true"]
    with refuses():
        Recipe.load(file, [*recordings, "sources.pictures.cache=memory"])
    with refuses():
        Recipe.load(file, recordings[1:])


def test_no_task_at_all_is_refused(file):
    with refuses():
        Recipe.load(file, ["tasks.named.weight=0", "tasks.heard.weight=0"])


@pytest.mark.parametrize(
    "text",
    [
        "name: [x",
        "name: x\ntrain: {steps: 1}\nname: y",
        "tasks: {a: {batch_size: 1, batch_size: 2}}",
        "text: {{caption}}",
        "- a\n- b",
        "",
        "name: \ttab: x",
        b"name: \xff\xfe",
        "name: x",
        "a: &a [*a]",
        bomb("[0]", "[{0}, {0}, {0}, {0}]"),
        bomb("{x: 0}", "{{<<: [{0}, {0}, {0}, {0}]}}"),
        "a: " + "[" * 100_000,
        "a: " + "x" * 2**20,
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_sentence(tmp_path, text):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with refuses():
        Recipe.load(file)


def test_overrides_reach_everything(file, tmp_path):
    recipe = Recipe.load(
        file,
        [
            "optimizer.lr=1e-3",
            "tasks.named.views.1.image.drop_tokens=0.25",
            "tasks.named.objectives.1.weight=3",
            "model.moe=null",
            "sources.pictures.where={label: [red, blue]}",
            "name=a=b",
        ],
    )
    assert recipe.optimizer.lr == 0.001
    assert [view["image"].drop_tokens for view in recipe.tasks["named"].views] == [0.0, 0.25]
    assert recipe.tasks["named"].objectives[1].weight == 3
    assert recipe.model.moe is None
    assert recipe.sources["pictures"].where == {"label": ["red", "blue"]}
    assert recipe.name == "a=b"
    # A saved recipe has null for what is off.
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "saved.yaml", ["model.moe.experts=4", "model.moe.layers=1"]).model.moe.experts == 4


def test_what_only_old_yaml_reads_as_another_value_is_text(file):
    """no was false, 12:30 was 750, 010 was 8, 1e-3 was a text, and a date was none."""
    wanted = ["no", "on", "12:30", "010", "2024-01-31", "1_0:00", "0x1F", "=", "~a"]
    recipe = Recipe.load(file, [f"sources.pictures.where={{label: [{', '.join(wanted)}]}}"])
    assert recipe.sources["pictures"].where == {"label": wanted}
    assert yaml.load(recipe.to_yaml(), RecipeLoader)["sources"]["pictures"]["where"] == {"label": wanted}
    values = "[true, False, 10, -1_000, 1.5, .5, 1e-3, 1.0e-3, +1E-3, -2E+5, .inf, null, ~]"
    expected = [True, False, 10, -1000, 1.5, 0.5, 0.001, 0.001, 0.001, -200000.0, math.inf, None, None]
    assert yaml.load(values, RecipeLoader) == yaml.load(to_yaml(expected), RecipeLoader) == expected


def test_an_override_of_a_part_with_an_alias_leaves_the_other_parts(tmp_path):
    file = tmp_path / "aliases.yaml"
    file.write_text(
        """
sources: {pictures: {path: pictures}}
tasks:
  first: &task
    {source: pictures, inputs: {image: file, text: label}, objectives: [{type: contrastive}], batch_size: 8,
     views: &views [{image: {size: 32}}]}
  second: *task
  third: {source: pictures, inputs: {image: file, text: label}, objectives: [{type: contrastive}], batch_size: 8,
          views: *views}
"""
    )
    tasks = Recipe.load(file, ["tasks.first.views.0.image.size=64", "tasks.second.batch_size=4"]).tasks
    assert [task.views[0]["image"].size for task in tasks.values()] == [64, 32, 32]
    assert [task.batch_size for task in tasks.values()] == [8, 4, 8]


def test_a_task_that_is_not_trained_does_not_choose_the_view_of_inference(file):
    task = "source: pictures, inputs: {image: file, text: label}, objectives: [{type: contrastive}], batch_size: 8"
    other = f"tasks.other={{{task}, views: [{{image: {{size: 48}}}}]}}"
    recipe = Recipe.load(file, [other, "tasks.named.weight=0"])
    assert recipe.inference_view("image").size == 48
    assert Recipe.load(file, [other]).inference_view("image").size == 16


def test_a_model_sees_its_inputs_in_the_first_view_or_in_the_last_of_a_sequence(file):
    views = "tasks.named.views=[{image: {size: 16}}, {image: {size: 24}}]"
    assert Recipe.load(file, [views]).inference_view("image").size == 16
    assert Recipe.load(file, [views, "alternation.views=sequence"]).inference_view("image").size == 24


@pytest.mark.parametrize(
    "text",
    ["train.steps", "tasks.named.views.2.batch_size=1", "tasks.named.views.x.batch_size=1", "name.first=1", "seed=[1"],
)
def test_an_override_that_changes_nothing_is_refused(file, text):
    with refuses():
        Recipe.load(file, [text])


@pytest.mark.parametrize("name", [None, *BUNDLED])
def test_the_resolved_recipe_is_the_recipe(file, tmp_path, name):
    """Written out with every default and read again, from another folder."""
    recipe = Recipe.load(name or file)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.load(tmp_path / "resolved.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert Recipe.build(recipe.to_dict()) == recipe
    written = yaml.safe_load(recipe.to_yaml())
    assert written["optimizer"]["betas"] == [0.9, 0.999]
    for task in written["tasks"].values():
        for view in task["views"]:
            assert view.keys() == {"weight", "batch_size", "sync", *task["inputs"]}


def test_paths_start_at_the_recipe(file, little_data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    changes = ["sources.sounds={path: openimp:notes.parquet}", "sources.pictures.root=pictures"]
    sources = Recipe.load(file, changes).sources
    assert sources["pictures"].path == str(little_data / "pictures")
    assert sources["pictures"].root == str(little_data / "pictures")
    assert sources["sounds"].path == "openimp:notes.parquet"
    urls = ["sources.pictures.path=s3://bucket/a.parquet", f"sources.sounds.path={tmp_path}/x.csv"]
    sources = Recipe.load(file, urls).sources
    assert sources["pictures"].path == "s3://bucket/a.parquet"
    assert sources["sounds"].path == f"{tmp_path}/x.csv"


def test_paths_of_overrides_may_start_at_another_folder(file, little_data, tmp_path):
    """Also a text file that holds a list, which may lie in no other folder."""
    (tmp_path / "prompts.txt").write_text("the {} one\n")
    changes = ["sources.sounds={path: x.csv, root: /data}", "train.init=runs/a", "train.precision=fp32",
               "evaluation.sets.colours.prompts=prompts.txt"]  # fmt: skip
    recipe = Recipe.load(file, changes, tmp_path)
    assert (recipe.sources["sounds"].path, recipe.sources["sounds"].root) == (f"{tmp_path}/x.csv", "/data")
    assert recipe.train.init == f"{tmp_path}/runs/a"
    assert recipe.sources["pictures"].path == str(little_data / "pictures")
    assert recipe.evaluation.sets["colours"].prompts == ["the {} one"]
    with refuses():
        Recipe.load(file, ["evaluation.sets.colours.prompts=../x.txt"], tmp_path)


def test_a_path_may_start_at_the_home_directory(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    changes = [
        "sources.sounds={path: ~/x.csv, root: '~'}",
        "train.init=timm:local-dir:~/vit",
        "modalities.text.tokenizer=~/t.json",
    ]
    for folder in (None, tmp_path / "elsewhere"):
        recipe = Recipe.load(file, changes, folder)
        assert (recipe.sources["sounds"].path, recipe.sources["sounds"].root) == (f"{tmp_path}/x.csv", str(tmp_path))
        assert recipe.train.init == f"timm:local-dir:{tmp_path}/vit"
        assert recipe.modalities["text"].tokenizer == f"{tmp_path}/t.json"
    assert absolute_name("open_clip:local-dir:~/clip", "/other") == f"open_clip:local-dir:{tmp_path}/clip"
    wanted = f"{file.parent.resolve()}/a/~/x.csv"
    assert Recipe.load(file, ["sources.sounds.path=a/~/x.csv"]).sources["sounds"].path == wanted


def test_views_may_be_left_out(file):
    """One view is then enough, with each modality's defaults: the paper's."""
    changes = ["modalities={}", "evaluation={}", "tasks={one: {source: sounds, inputs: {audio: sound, text: caption}, "
               "objectives: [{type: contrastive}]}}"]  # fmt: skip
    (view,) = Recipe.load(file, changes).tasks["one"].views
    assert (view["audio"].seconds, view["text"].length) == (8.192, 16)
    assert (view.weight, view.batch_size) == (1.0, None)


def test_a_recipe_is_made_of_keywords_and_trains(little_data, tmp_path, monkeypatch):
    """Its paths start at the current folder."""
    monkeypatch.chdir(little_data)
    data, _ = read_recipe("recipe.yaml")
    recipe = openimp.Recipe(**data | {"train": {"steps": np.int64(2), "num_workers": 0}})
    assert recipe == Recipe.load("recipe.yaml", ["train={steps: 2, num_workers: 0}"])
    assert recipe.sources["pictures"].path == str(little_data / "pictures")
    monkeypatch.chdir(tmp_path)
    assert train(recipe, Path("run"))
    assert openimp.load("run").encode_text("a red square").shape == (1, 32)
    assert openimp.load("run").recipe == recipe


def test_a_recipe_without_a_name_has_that_of_its_file(little_data, tmp_path):
    text = (little_data / "recipe.yaml").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("name: little\n", ""))
    assert Recipe.load(file).name == "mine"
    assert Recipe.load(file, ["name=other"]).name == "other"


def test_a_mistake_in_keywords_is_told_in_the_same_words(little_data):
    data, _ = read_recipe(str(little_data / "recipe.yaml"))
    with pytest.raises(ValidationError, match=r"unknown key 'stepz'; did you mean 'steps'\?"):
        openimp.Recipe(**data | {"train": {"stepz": 1}})


@pytest.mark.parametrize(
    "text",
    [
        *["1e5", "4190e10", "12E3", "1_0e2", "e-3", "1e", "1e3x", "null", "yes", "0x1f", "1.5", "~"],
        *["a: b", "", "é", "a\x85b", "two\nlines", "\u2028", "x" * 200],
    ],
)
def test_texts_survive_being_saved_as_yaml(text):
    data = {"value": text, text: [text, 1.5, 10, True, None]}
    assert parse_mapping(to_yaml(data), Path("recipe.yaml"), "recipe") == data
