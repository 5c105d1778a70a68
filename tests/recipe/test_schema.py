"""The recipe: what it refuses, and how it says so; what it fills in, and that nothing is lost on the way to YAML."""

from pathlib import Path

import pytest
import yaml
from messages import refuses
from pydantic import ValidationError

import openimp
from openimp.common.errors import UserError
from openimp.recipe.file import find_file, parse_mapping, read_recipe, to_yaml
from openimp.recipe.inputs import View
from openimp.recipe.model import absolute_name
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train


def bomb(start: str, each: str) -> str:
    """Lists or mappings of aliases of aliases: 30 lines stand for 4^29 values."""
    lines = [f"k{i}: &k{i} " + (each.format(f"*k{i - 1}") if i else start) for i in range(30)]
    return "\n".join(lines)


SIZES = ["imp_s", "imp_b", "imp_m", "imp_l", "imp_moe_s", "imp_moe_b", "imp_moe_l"]
BUNDLED = ["demo", "mixture", "icons", "photos_and_speech", "public", *SIZES]


@pytest.fixture
def file(little_data):
    return little_data / "recipe.yaml"


# What is changed, and the end of the one sentence that answers.
REFUSED = {
    # An unknown key is answered with the nearest one of its own mapping.
    "optimiser.lr=1": "unknown key 'optimiser'; did you mean 'optimizer'?",
    "train.stepz=1": "train: unknown key 'stepz'; did you mean 'steps'?",
    "model.moe.expert=4": "model.moe: unknown key 'expert'; did you mean 'experts'?",
    "tasks.named.bacth_size=4": "tasks.named: unknown key 'bacth_size'; did you mean 'batch_size'?",
    "tasks.named.objectives.0.positive_by=x": "tasks.named.objectives.0: unknown key 'positive_by'; did you mean "
    "'positives_by'?",
    "tasks.named.objectives.0.same=label": "tasks.named.objectives.0: key 'same' is now called 'positives_by'",
    "tasks.named.inputs.image={colum: x}": "tasks.named.inputs.image: unknown key 'colum'; did you mean 'column'?",
    "tasks.named.views.0.image.sise=16": "tasks.named.views[0].image: unknown key 'sise'; did you mean 'size'?",
    "tasks.named.views.1.imagge={}": "tasks.named.views[1]: unknown key 'imagge'; did you mean 'image'?",
    "evaluation.sets.tones.views={}": "evaluation.sets.tones: unknown key 'views'; did you mean 'view'?",
    "evaluation.sets.colours.view.audio={}": "evaluation.sets.colours.view: unknown key 'audio'; "
    "known: batch_size, image, sync, weight",
    "modalities.vision.pach=8": "modalities.vision: unknown key 'pach'; did you mean 'patch'?",
    "modalities.visions={}": "modalities: unknown key 'visions'; did you mean 'vision'?",
    "optimizer.clip=1": "optimizer: key 'clip' is now called 'max_grad_norm'",
    "tasks.named.views.0.share=2": "tasks.named.views[0]: key 'share' is now called 'weight'",
    "tasks.named.views.0.image.drop=0.5": "tasks.named.views[0].image: key 'drop' is now called 'drop_tokens'",
    "tasks.named.views.0.image.drop_tokens=1.0": "tasks.named.views[0].image: drop_tokens: must be below 1, found 1.0",
    "tasks.heard.views.0.audio.drop_tokens=1.0": "tasks.heard.views[0].audio: drop_tokens: must be below 1, found 1.0",
    "batch.micro=4": "key 'batch' is now called 'memory'",
    "model.moe={experts:8, layers:2}": "model.moe: unknown key 'experts:8': YAML needs a space after the colon, as in "
    "experts: 8",
    "tasks.named.views.0={weight:2}": "tasks.named.views[0]: unknown key 'weight:2': YAML needs a space",
    "modalities.vision.extent=[64, 512, 512]": "modalities.vision: there is no key 'extent' here: positions are "
    "relative; for other positions see 'absolute'",
    "evaluation.sets.colours.texts={red: scarlet}": "evaluation.sets.colours: key 'texts' is now called 'classes'",
    "zzz=1": "unknown key 'zzz'; known: alternation, evaluation, memory, modalities, model, name, optimizer, parallel, "
    "seed, sources, tasks, train",
    # A wrong type or value is answered with what was expected and what was found.
    "train.steps=many": "train.steps: expected a whole number, found 'many'",
    "train.steps='7'": "train.steps: expected a whole number, found '7'",
    "train.steps=1e3": "train.steps: expected a whole number, found 1000.0",
    "train.steps=0": "train.steps: must be at least 1, found 0",
    "train.compile=1": "train.compile: expected true or false, found 1",
    "train.precision=fp16": "train.precision: expected 'auto', 'bf16' or 'fp32', found 'fp16'",
    "optimizer.lr=-1": "optimizer.lr: must be above 0, found -1",
    "train=fast": "train: expected a mapping, found 'fast'",
    "name=": "name: expected text, found null",
    "tasks.named.views.0.image.size=big": "tasks.named.views[0].image: size: expected a whole number or "
    "a list, found 'big'",
    "tasks.named.views.0.image.size=[16, 16, 16]": "tasks.named.views[0].image: size: takes at most 2 items, found 3",
    "sources.pictures.where={label: [red, 1.5]}": "sources.pictures.where.label.1: expected text or a whole number, "
    "found 1.5",
    "sources.pictures.where={label: 1.5}": "sources.pictures.where.label: expected text, a whole number, true or false "
    "or a list, found 1.5",
    "tasks.named.objectives.0.type=contrast": "tasks.named.objectives.0: no objective is called "
    "'contrast'; did you mean 'contrastive'?",
    "tasks.named.objectives.0=contrastive": "tasks.named.objectives.0: expected a mapping, found 'contrastive'",
    "tasks.named.objectives.0={positives_by: label}": "tasks.named.objectives.0.type: required value is missing",
    "modalities.vision.patch=[2, 8]": "modalities.vision: patch.2: required value is missing",
    "modalities.vision.patch=[2, 8, 8, 8]": "modalities.vision: patch: takes at most 3 items, found 4",
    "tasks.named.views=[]": "tasks.named.views: needs at least 1 item, found 0",
    "tasks.named.objectives.0.pairs=[]": "tasks.named.objectives.0.pairs: needs at least 1 item, found 0",
    "tasks.named.inputs.image=[]": "tasks.named.inputs.image: names no column",
    "tasks.named.weight=.inf": "tasks.named.weight: expected a finite number, found inf",
    # So is a missing one.
    "tasks.named.objectives.1={type: classification}": "tasks.named.objectives.1.label: required value is missing",
    "tasks.other={source: pictures, objectives: [{type: contrastive}]}": "tasks.other.inputs: required value is "
    "missing",
    "sources={}": "sources: needs at least 1 item, found 0",
    # Parts must fit each other.
    "model.heads=3": "model: width 32 is not a multiple of heads 3",
    "model.moe.layers=3": "model: moe.layers 3 is more than layers 2",
    "parallel.expert_degree=3": "parallel.expert_degree: 2 experts cannot be divided equally among 3 ranks",
    "model.moe.experts={vision: 2, text: 2}": "model.moe.experts: no number of experts for the stem audio",
    "model.moe.experts={vision: 2, texts: 2, audio: 2}": "model.moe.experts: unknown key 'texts'; did you mean 'text'?",
    "model={layers: 2, modality_specific_layers: 2, moe: {experts: {vision: 2, text: 2, audio: 2}, layers: 1}}": (
        "model: moe.experts by stem: the modality-specific layers must come before the sparse layers"
    ),
    "sources.pictures={}": "sources.pictures: give exactly one of path and hub",
    "sources.pictures.hub=x/y": "sources.pictures: give exactly one of path and hub",
    "sources.pictures={path: x.tar, stream: true, cache: disk}": "sources.pictures: a streamed source cannot be "
    "cached; remove stream or cache",
    "sources.pictures.split=test": "sources.pictures: config, split and revision are for hub data sets; to select "
    "rows of a path, use where",
    "sources.pictures.revision=main": "sources.pictures: config, split and revision are for hub data sets",
    "name=../../x": "name: '../../x' cannot name a folder: use letters, and no slash or control character",
    "name='..'": "name: '..' cannot name a folder",
    "name=/tmp/x": "name: '/tmp/x' cannot name a folder",
    'name="a\\ab"': "name: 'a\\x07b' cannot name a folder",
    "sources.pictures.config=x": "sources.pictures: config, split and revision are for hub data sets",
    "sources.pictures.window=9": "sources.pictures: window is for streams; remove it, or set stream: true",
    "sources.pictures.part={of: 4}": "sources.pictures.part: exactly one of keep and drop",
    "sources.pictures.part={of: 4, keep: [4]}": "sources.pictures.part: there is no part 4",
    "sources.pictures={path: x.tar, stream: true, part: {of: 2, keep: [0]}}": "sources.pictures: a streamed source has "
    "no parts",
    "sources.pictures={path: x.tar, stream: true, limit: 3}": "sources.pictures: a streamed source has no limit",
    "sources.pictures={hub: x/y, format: parquet}": "sources.pictures: format is for a path; remove it",
    "tasks.named.source=picture": "tasks.named.source: no source 'picture'; did you mean 'pictures'?",
    "evaluation.sets.tones.source=x": "evaluation.sets.tones.source: no source 'x'; known: pictures, sounds",
    "tasks.named.inputs={imag: file, text: label}": "tasks: no modality is called 'imag'; did you mean 'image'?",
    "tasks.named.objectives.0.pairs=[[image, txt]]": "tasks.named.objectives.0: 'txt' is not an input of the "
    "task; did you mean 'text'?",
    "tasks.named.objectives.0.pairs=[[image, image]]": "tasks.named.objectives.0.pairs: a pair needs two "
    "different modalities",
    # Two objectives would share a temperature or a head, and one of the two metrics would be lost.
    "tasks.named.objectives.0.pairs=[[image, text], [text, image]]": "tasks.named.objectives.0: objectives.0 already "
    "compares image and text, with the same temperature; drop one of the two",
    "tasks.named.objectives=[{type: contrastive}, {type: contrastive, loss: sigmoid}]": "tasks.named.objectives.1: "
    "objectives.0 already compares image and text, with the same temperature; drop one of the two",
    "tasks.named.objectives=[{type: classification, label: label, of: image}, {type: classification, label: label}]":
    "tasks.named.objectives.1: objectives.0 already classifies image by label, with the same head",
    "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label, "
    "classes: [red]}]}": "tasks.other: tasks.named classifies 'label' of pictures too, by the same head, so loss and "
    "classes must be the same",
    "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: classification, label: label, "
    "loss: sigmoid}]}": "tasks.other: tasks.named classifies 'label' of pictures too",
    "tasks.named.objectives.1.of=audio": "tasks.named.objectives.1: 'audio' is not an input of the task; known: image, "
    "text",
    "tasks.other={source: pictures, inputs: {image: file}, objectives: [{type: contrastive}]}": "tasks.other."
    "objectives.0: a contrastive objective needs two inputs",
    "tasks.other={source: sounds, inputs: {text: x}, objectives: [{type: classification, label: x}]}": "tasks.other."
    "objectives.0: no input is without a mask, so name the modality to classify in `of`",
    "evaluation.sets.tones.inputs={audio: sound}": "evaluation.sets.tones.inputs: retrieval is between two modalities, "
    "found 1",
    "evaluation.sets.tones.inputs.text={column: caption, draw: 2}": "evaluation.sets.tones.inputs.text: evaluation "
    "draws nothing; drop draw",
    "evaluation.sets.tones.view.batch_size=4": "evaluation.sets.tones.view: weight, batch_size and sync are for "
    "training; "
    "use evaluation.batch_size",
    "evaluation.sets.colours.view.weight=0.5": "evaluation.sets.colours.view: weight, batch_size and sync are for",
    "evaluation.sets.colours.inputs={video: file}": "evaluation.sets.colours: no task trains modality 'video'; "
    "known: audio, image, text",
    "evaluation.sets.colours.reader=txt": "evaluation.sets.colours: no task trains modality 'txt'; "
    "did you mean 'text'?",
    # A view that makes no whole patch is answered with the sizes that do.
    "tasks.named.views.0.image.size=20": "tasks.named.views[0].image: size: height of 20 pixels is not a multiple of 8 "
    "up to 256; use 16 or 24",
    "tasks.named.views.0.image.size=[16, 4]": "tasks.named.views[0].image: size: width of 4 pixels is not a multiple "
    "of 8 up to 256; use 8 or 16",
    "tasks.named.views.1.image.size=1000": "tasks.named.views[1].image: size: height of 1000 pixels is not a multiple"
    " of 8 up to 256; use 256",
    "evaluation.sets.tones.view.audio.seconds=0.4": "evaluation.sets.tones.view.audio: seconds: 0.4 s are 25 frames, "
    "not a multiple of 16 up to 1024; use 0.256 or 0.512 s",
    "evaluation.sets.tones.view.audio.seconds=0.01": "evaluation.sets.tones.view.audio: seconds: 0.01 s are 1 frames, "
    "not a multiple of 16 up to 1024; use 0.256 s",
    "tasks.named.views.0.text.length=17": "tasks.named.views[0].text: length 17 is more than the 16 positions of the "
    "table",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_a_mistake_is_told_in_one_sentence_that_names_file_and_key(file, change):
    with pytest.raises(UserError) as error:
        Recipe.load(file, [change])
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: {REFUSED[change]}")


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
    ("text", "message"),
    [
        ("name: [x", "not valid YAML: .*line 1"),
        ("name: x\ntrain: {steps: 1}\nname: y", "not valid YAML: key 'name' is given twice .*line 3"),
        ("tasks: {a: {batch_size: 1, batch_size: 2}}", "not valid YAML: key 'batch_size' is given twice"),
        ("text: {{caption}}", "not valid YAML: .*unhashable key"),
        ("- a\n- b", "a recipe is a mapping of keys, found list"),
        ("", "a recipe is a mapping of keys, found NoneType"),
        ("name: \ttab: x", "not valid YAML"),
        (b"name: \xff\xfe", "not valid YAML"),
        ("name: x", "sources: required value is missing"),
        ("a: &a [*a]", "not valid YAML: an alias refers to a mapping or list that contains it"),
        (bomb("[0]", "[{0}, {0}, {0}, {0}]"), "not valid YAML: more than 100,000 values"),
        (bomb("{x: 0}", "{{<<: [{0}, {0}, {0}, {0}]}}"), "not valid YAML: more than 100,000 values"),
        ("a: " + "[" * 100_000, "not valid YAML: maximum recursion depth"),
        ("a: 2026-99-99", "not valid YAML: month must be"),
        ("a: " + "x" * 2**20, "is larger than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        Recipe.load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_a_recipe_is_found_by_path_or_by_name(file):
    assert find_file(str(file)) == file
    assert find_file("demo").name == "demo.yaml"
    with refuses():
        Recipe.load("dem")
    with refuses():
        Recipe.load("nowhere.yaml")


def test_overrides_reach_everything(file, tmp_path):
    recipe = Recipe.load(
        file,
        [
            "train.steps=7",
            "optimizer.lr=1e-3",
            "tasks.heard.weight=2",
            "tasks.named.views.1.image.drop_tokens=0.25",
            "tasks.named.objectives.1.weight=3",
            "alternation.kind=cycle",
            "model.moe=null",
            "sources.pictures.where={label: [red, blue]}",
            "name=a=b",
        ],
    )
    assert recipe.train.steps == 7
    assert recipe.optimizer.lr == 0.001
    assert recipe.tasks["heard"].weight == 2
    assert [view["image"].drop_tokens for view in recipe.tasks["named"].views] == [0.0, 0.25]
    assert recipe.tasks["named"].objectives[1].weight == 3
    assert recipe.alternation.kind == "cycle"
    assert recipe.model.moe is None
    assert recipe.sources["pictures"].where == {"label": ["red", "blue"]}
    assert recipe.name == "a=b"
    # A saved recipe has null for what is off.
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "saved.yaml", ["model.moe.experts=4", "model.moe.layers=1"]).model.moe.experts == 4


def test_a_model_sees_its_inputs_in_the_first_view_or_in_the_last_of_a_sequence(file):
    views = "tasks.named.views=[{image: {size: 16}}, {image: {size: 24}}]"
    assert Recipe.load(file, [views]).inference_view("image").size == 16
    assert Recipe.load(file, [views, "alternation.views=sequence"]).inference_view("image").size == 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.steps", "--set train.steps: expected KEY=VALUE"),
        ("tasks.named.views.2.batch_size=1", "--set tasks.named.views.2.batch_size=1: the recipe has no such key"),
        ("tasks.named.views.x.batch_size=1", "the recipe has no such key"),
        ("name.first=1", "the recipe has no such key"),
        ("seed=[1", r"'\[1' is not valid YAML"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(file, text, message):
    with pytest.raises(UserError, match=message):
        Recipe.load(file, [text])


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", ".001"])
def test_a_number_is_a_number_however_it_is_written(file, number):
    """YAML 1.1 takes 1e-3 for a word."""
    assert Recipe.load(file, [f"optimizer.lr={number}"]).optimizer.lr == 0.001


def test_words_that_look_a_little_like_numbers_stay_words(file):
    for word in ("e-3", "1e", "v1e3", "1e3x"):
        assert Recipe.load(file, [f"name={word}"]).name == word


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
            assert all(options for options in (view[name] for name in task["inputs"]))


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
    assert View() == View()
    assert Recipe.load(file, changes) == Recipe.load(file, changes)


def test_a_recipe_is_made_of_keywords_and_trains(little_data, tmp_path, monkeypatch):
    """Its paths start at the current folder."""
    monkeypatch.chdir(little_data)
    data, _ = read_recipe("recipe.yaml")
    recipe = openimp.Recipe(**data | {"train": {"steps": 2, "num_workers": 0}})
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
    data["tasks"]["named"]["views"][0]["image"]["size"] = 20
    with refuses():
        openimp.Recipe(**data)
    with refuses():
        Recipe.build(data)
    with pytest.raises(ValidationError, match=r"unknown key 'stepz'; did you mean 'steps'\?"):
        openimp.Recipe(**data | {"train": {"stepz": 1}})


def test_inputs_have_a_short_form(file):
    inputs = Recipe.load(file, ["tasks.heard.inputs.text=[caption, '{caption}!']"]).tasks["heard"].inputs
    assert inputs["audio"].columns == ["sound"]
    assert inputs["text"].columns == ["caption", "{caption}!"]
    assert inputs["text"].draw == 1


@pytest.mark.parametrize(
    "text", ["1e5", "4190e10", "12E3", "1_0e2", "null", "yes", "0x1f", "1.5", "~", "a: b", "", "é"]
)
def test_texts_survive_being_saved_as_yaml(text):
    data = {"value": text, text: [text, 1.5, 10, True, None]}
    assert parse_mapping(to_yaml(data), Path("recipe.yaml"), "recipe") == data


def test_a_recipe_may_have_as_many_values_as_its_text_has_characters():
    """A saved recipe has the classes of the files that the user's recipe names, but aliases stay limited."""
    data = {"classes": {f"class {i}": f"name {i}" for i in range(70_000)}}
    assert parse_mapping(to_yaml(data), Path("recipe.yaml"), "recipe") == data
