"""Recipes that are drafted from data: they train as they are, and say what they chose."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from openimp.checkpoint.folder import read_config
from openimp.checkpoint.warm_start import open_warm_start
from openimp.common.json_lines import read_lines
from openimp.drafting.assembling import ChosenTower, Start, assemble, source_name
from openimp.drafting.draft import draft_recipe, find_tasks, fit, largest_memory
from openimp.drafting.machine import Machine
from openimp.drafting.sizing import steps_between_evaluations, text
from openimp.drafting.writing import write
from openimp.evaluation.baseline import comparison
from openimp.evaluation.results import percent, read_results
from openimp.model.imp import IMP
from openimp.planning.memory import step_memory
from openimp.recipe.file import RecipeLoader
from openimp.recipe.schema import Recipe
from openimp.study.variants import peak_memory
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer
from tests.messages import refuses
from tests.recordings import picture_file

COLORS = {"red": (220, 30, 30), "blue": (40, 50, 220), "green": (30, 200, 40)}
SHADES = ("bright", "dark", "pale", "dull")
CPU = Machine("a CPU", is_gpu=False, memory=8e9, host_memory=16e9, speed=1e11, workers=1)
GPU = Machine("a GPU", is_gpu=True, memory=7e10, host_memory=1e11, speed=1e14, workers=8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder is empty."""
    monkeypatch.chdir(tmp_path)
    # `datasets` would report a local data set to a server, and keep it in the cache of whoever runs the tests.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


def examples(count: int = 30) -> list[tuple[str, str, bytes]]:
    """(color, caption, picture) of each."""
    rows = []
    for i in range(count):
        color = list(COLORS)[i % 3]
        noise = np.random.default_rng(i).integers(-20, 20, (40, 48, 3))
        picture = Image.fromarray((np.array(COLORS[color]) + noise).clip(0, 255).astype(np.uint8))
        rows.append((color, f"a {SHADES[i % 4]} {color} square number {i}", picture_file(picture, "PNG")))
    return rows


def write_files(folder: str, by_color: bool = False, captions: bool = False) -> None:
    for i, (color, caption, data) in enumerate(examples()):
        file = Path(folder, color if by_color else "", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if captions:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_csv() -> None:
    write_files("in")
    rows = [f"{i},{i}.png,{caption},x" for i, (_, caption, _) in enumerate(examples())]
    Path("pictures.csv").write_text("\n".join(["id,picture,caption,colour", *rows]), encoding="utf-8")


def write_parquet(file: str, rows: list[dict]) -> None:
    """Rows with the pictures of the examples."""
    Path(file).parent.mkdir(exist_ok=True)
    pictures = [{"image": {"bytes": data, "path": None}} for *_, data in examples(len(rows))]
    pq.write_table(pa.Table.from_pylist([picture | row for picture, row in zip(pictures, rows)]), file)


NAMES = [{"label": color} for color, *_ in examples()]
NUMBERS = [{"label": i % 3} for i in range(30)]


def tasks_of_kinds(media_folder: Path, *kinds: str):
    """The tasks for a table of media of these kinds with captions."""
    for file in media_folder.glob("*.*"):
        Path(file.name).write_bytes(file.read_bytes())
    rows = [{**{kind: f"{i % 3}.{kind}" for kind in kinds}, "title": f"a {i}"} for i in range(300)]
    Path("all.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return find_tasks(["all.jsonl"])[0]


FORMATS = {
    "captions": (lambda: write_files("media", captions=True), "media"),
    "csv": (write_csv, "pictures.csv"),
    "numbers": (lambda: write_parquet("pictures.parquet", NUMBERS), "pictures.parquet"),
    "hub": (lambda: [write_parquet(f"hub/{split}.parquet", NAMES) for split in ("train", "test")], "hub:hub"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_drafted_recipe_trains_unchanged_and_is_evaluated(openimp, kind):
    write, path = FORMATS[kind]
    write()
    code, text, err = openimp("init", path)
    assert code == 0, err
    Path("mine.yaml").write_text(text, encoding="utf-8")
    assert openimp("train", "mine.yaml", "--set", "train.steps=20", "--set", "train.num_workers=0")[0] == 0
    recipe = Recipe.load("mine.yaml")
    run = Path("runs") / recipe.name
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 20
    assert not (run / "skipped.jsonl").exists()
    results = read_lines(run / "results.jsonl")
    assert {result["set"] for result in results} == recipe.evaluation.sets.keys() != set()
    assert not any(result["skipped"] for result in results)
    if kind == "hub":
        assert recipe.sources["hub_test"].split == "test"


@pytest.mark.slow
def test_data_can_be_trained_on_in_one_step_and_resumed(openimp):
    write_files("classes", by_color=True)
    code, out, err = openimp("train", "classes", "--set", "train.num_workers=0", "--set", "train.steps=3")
    assert code == 0, err
    assert "to change it: openimp init classes > mine.yaml" in err
    # What training gained: the plain colors of the classes are found without it.
    without, trained, advice = out.splitlines()[-3:]
    assert advice.startswith("Next:  openimp classify runs/classes FILES...")
    assert re.fullmatch(
        r"classes without an encoder: 33.3 % by chance, [\d.]+ % with the most frequent class, "
        r"100.0 % by the 20 nearest neighbors of pixels",
        without,
    )
    results = read_results(Path("runs/classes/results.jsonl"))
    names, head = (f"{percent(result['top1'])} %" for result in results)
    assert trained == f"classes trained: {names} by the names of the classes, {head} by the classification head"
    assert Recipe.load("runs/classes/recipe.yaml").sources.keys() == {"classes", "classes_test"}
    code, out, _ = openimp("train", "classes", "--resume")
    assert (code, "all 3 steps are done" in out) == (0, True)
    _, _, err = openimp("train", "classes", "--set", "name=other", "--set", "train.steps=0")
    assert "the recipe goes into runs/other/recipe.yaml" in err
    Path("other").mkdir()
    Path("classes").rename("other/classes")
    code, _, err = openimp("train", "other/classes", "--resume", "auto")
    assert code == 2
    assert "runs/classes: holds a run on other data than other/classes; name another directory" in err
    Path("other/classes").rename("classes")
    Path("mine").symlink_to("classes")
    assert source_name("mine") == "mine"
    code, _, err = openimp("train", "runs/classes")
    assert code == 2
    assert "is a run; to go on: openimp train runs/classes/recipe.yaml --run-dir runs/classes --resume" in err
    code, out, _ = openimp("train", "runs/classes/recipe.yaml", "--resume")
    assert (code, "all 3 steps are done" in out) == (0, True)

    # A run that made no step is drafted again, because its data may have been mended.
    shutil.rmtree("runs/classes/checkpoints")
    code, _, err = openimp("train", "classes", "--resume", "auto")
    assert (code, "has logged 3 steps, but has no checkpoint" in err) == (2, True)
    for log in ("metrics.jsonl", "results.jsonl"):
        Path("runs/classes", log).unlink()
    for file in [*Path("classes").rglob("*.*")]:
        file.with_suffix(".txt").write_text(f"a caption of number {file.stem}")
    code, _, err = openimp("train", "classes", "--resume", "auto", "--set", "train.steps=1")
    assert code == 0, err
    assert Recipe.load("runs/classes/recipe.yaml").tasks["classes"].inputs["text"].columns == ["text"]


@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
def test_a_recipe_for_any_machine_is_valid_and_its_yaml_says_the_same(media_folder, machine):
    draft = assemble("all", tasks_of_kinds(media_folder, "png", "wav", "mp4"), machine, {})
    assert Recipe.build(draft.recipe).tasks.keys() == {"all_image", "all_audio", "all_video"}
    text = write(draft.recipe, draft.comments)
    assert yaml.load(text, RecipeLoader) == draft.recipe
    assert max(map(len, text.splitlines())) <= 120


def test_few_cores_prepare_decoded_data_without_another_process(media_folder):
    tasks = tasks_of_kinds(media_folder, "png")
    uncached = replace(CPU, host_memory=1000)
    for machine, workers in ((CPU, 0), (replace(CPU, workers=4), 4), (uncached, 1), (GPU, 8)):
        assert assemble("all", tasks, machine, {}).recipe["train"]["num_workers"] == workers


def test_names_of_classes_are_short_texts_and_classify_with_full_weight():
    write_files("colors", by_color=True)
    (task,), _ = find_tasks(["colors"])
    recipe = assemble("colors", [task], CPU, {}).recipe
    (drafted,) = recipe["tasks"].values()
    assert drafted["inputs"]["text"] == "label"
    assert [objective.get("weight", 1) for objective in drafted["objectives"]] == [1, 1]
    for view in drafted["views"]:
        assert view["image"]["jitter"] == 0, "the pictures are small"
        assert view["text"]["length"] <= 8
    assert drafted["views"][-1]["text"]["length"] == 8, "queries may be longer than names"
    names = ["red", "blue"] * 40 + ["dark green", "dark grey"]
    assert text(names, 1000, names)[1] == 3, "two words and the end token, so that no two names are equal"
    words = {"vocab_size": 8192, "min_df": 2, "positions": 8}
    assert text(names, 1000, []) == (words, 2)
    languages = ["C", "C++", "Python"] * 40
    assert text(languages, 1000, []) == (words, 2)
    assert text(languages, 1000, languages)[0] == {"vocab_size": 2048, "positions": 8}, "two have equal words"


def test_a_picture_whose_text_names_a_side_is_not_mirrored_with_a_tower_for_texts_either(media_folder):
    tasks = tasks_of_kinds(media_folder, "png")
    tasks[0].task.text.sample.append("a bird on the left")
    for towers in ({}, {"text": ChosenTower("sentence_transformers:a/b", 24)}):
        (task,) = assemble("all", tasks, CPU, towers).recipe["tasks"].values()
        assert [view["image"]["flip"] for view in task["views"]] == [False, False]


def test_a_training_that_cannot_be_tested_says_so(media_folder, tmp_path, monkeypatch):
    for file in media_folder.glob("?.*"):
        if file.suffix in (".png", ".txt"):
            shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "too few different values of" in draft_recipe([str(tmp_path)]).notes[-1]
    write_files("classes", by_color=True)
    for file in Path("classes").rglob("??.png"):
        file.unlink()
    recipe = Recipe.build({"name": "few", **yaml.load(draft_recipe(["classes"]).text, RecipeLoader)}, tmp_path)
    (without,) = comparison(recipe, [], "classes")
    assert without == "classes without an encoder: not measured, because no rows are held out"


def test_two_towers_of_one_stem_are_refused(media_folder):
    tasks = [*tasks_of_kinds(media_folder, "png"), *tasks_of_kinds(media_folder, "mp4")]
    with refuses():
        assemble("all", tasks, CPU, {"image": ChosenTower("timm:a", 24), "video": ChosenTower("hub:b/c", 24)})


def test_a_draft_fits_the_model_to_start_from(media_folder, tiny_model_folder):
    """Also for sounds and clips, although a draft alone would choose another encoder, tokenizer and patches."""
    drafted = draft_recipe([str(media_folder)], init=str(tiny_model_folder))
    recipe = Recipe.build({"name": "more", **yaml.load(drafted.text, RecipeLoader)}, Path.cwd())
    assert {*recipe.to_config({}).views} == {"image", "video", "audio", "text"}
    start = open_warm_start(recipe, recipe.make_modalities())
    assert start.stems == {"vision", "audio", "text"}
    assert f"--init {tiny_model_folder}" in drafted.text
    config, *_ = read_config(tiny_model_folder)
    without_clips = config.model_copy(update={"views": {"text": config.views["text"], "image": config.views["image"]}})
    draft = assemble("x", tasks_of_kinds(media_folder, "mp4"), CPU, {}, Start("x", without_clips))
    vision = config.modalities["vision"].model_dump(mode="json", exclude_defaults=True)
    assert draft.recipe["modalities"]["vision"] == vision, "which pictures and clips share"
    for changes in ({"init": "open_clip:ViT-B-32/openai"}, {"init": "openimp:base", "towers": ["openimp:base"]}):
        with refuses():
            draft_recipe([str(media_folder)], **changes)


def test_the_caches_of_all_sources_together_are_bounded(media_folder):
    tasks = tasks_of_kinds(media_folder, "png")
    small = replace(CPU, host_memory=CPU.host_memory / 100)
    many = [tasks[0]._replace(name=f"all_{number}") for number in range(40)]
    caches = [source["cache"] for source in assemble("all", many, small, {}).recipe["sources"].values()]
    assert 1 < caches.count("memory") < 40


@pytest.mark.slow
def test_batches_are_halved_until_the_step_with_the_most_memory_fits(media_folder):
    draft = assemble("all", tasks_of_kinds(media_folder, "png", "mp4"), CPU, {})
    draft.recipe["modalities"]["vision"] = {"patch": [8, 32, 32]}
    draft.recipe["train"]["precision"] = "bf16"
    recipe, steps = Recipe.build(draft.recipe), draft.recipe["train"]["steps"]
    modalities = recipe.make_modalities()
    needed = largest_memory(recipe, modalities, {}, is_gpu=False)
    step = step_memory(recipe, modalities, {}, "all_video", 1, precision="bf16", on_gpu=False)
    weights = sum(weight.numel() for weight in IMP(recipe.to_config({}), modalities).parameters())
    with_muon = sum(weight.numel() for weight in IMP(recipe.to_config({}), modalities).hidden_matrices())
    moments = 2 * weights - with_muon
    assert needed == 4 * (weights + moments) + step.peak.total() + step.inputs

    def batch_sizes(memory: int) -> list[int]:
        fit(draft, {}, {"all_image": 300, "all_video": 300}, replace(CPU, memory=memory, speed=1e18))
        return [task["batch_size"] for task in draft.recipe["tasks"].values()]

    assert batch_sizes(needed) == [128, 64]
    assert batch_sizes(needed - 1) == [64, 32]
    assert draft.recipe["train"]["steps"] == pytest.approx(2 * steps, rel=0.02)
    assert batch_sizes(0) == [2, 2]
    weights_of_tasks = [task["weight"] for task in draft.recipe["tasks"].values()]
    assert weights_of_tasks == [1, 1], "a batch of two is not halved, so its task needs no more steps"


SIZES = {
    "most of it are activations": ({}, 64),
    "most of it are weights": ({"width": 256, "heads": 4, "mlp_dim": 1024, "layers": 6}, 8),
}
"""Options of the model, and the batch size. With few examples, Muon's peak is in the update."""


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("optimizer", ["Muon", "AdamW"])
def test_the_memory_of_a_draft_is_that_of_a_real_step(media_folder, tmp_path, monkeypatch, optimizer, size):
    """Weights, optimizer state, gradients, activations, inputs: on this CPU, in the precision that it trains in."""
    monkeypatch.chdir(tmp_path)
    model, batch_size = SIZES[size]
    draft = assemble("all", tasks_of_kinds(media_folder, "png", "wav"), CPU, {}).recipe
    draft["model"] |= model
    draft["train"]["num_workers"] = 0
    draft["evaluation"] = {}
    for task in draft["tasks"].values():
        task["batch_size"] = batch_size
    if optimizer == "AdamW":
        del draft["optimizer"]["muon_lr"]
    trainer = Trainer(set_up(Recipe.build(draft, Path.cwd()), tmp_path / "run"))
    planned = largest_memory(trainer.recipe, trainer.data.modalities, trainer.data.classes, is_gpu=False)

    batches = [trainer.batches[step].batch for step in range(12)]
    peak = peak_memory(trainer)
    states = [state for optimizer in trainer.updater.optimizers for state in optimizer.state.values()]
    held = _bytes_of([*trainer.model.parameters(), *states]) + max(map(_bytes_of, batches))
    assert planned == pytest.approx(held + peak, rel=0.1)


def _bytes_of(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def test_names_from_the_data_cannot_change_the_recipe():
    name = "label\nname: stolen\n\u2028seed: 7 #"
    write_parquet("rows.parquet", [{name: color, "on": caption} for color, caption, _ in examples()])
    draft = assemble("rows", find_tasks(["rows.parquet"])[0], CPU, {})
    assert yaml.load(write(draft.recipe, draft.comments), RecipeLoader) == draft.recipe
    assert draft.recipe["name"] == "rows"
    assert name in {objective.get("label") for objective in draft.recipe["tasks"]["rows"]["objectives"]}


def test_groups_that_all_fall_into_one_part_are_not_held_out():
    """By their hashes, all five speakers would be."""
    speakers = ["s0", "s14", "s21", "s26", "s39"]
    rows = [{"caption": caption, "speaker": speakers[i % 5]} for i, (_, caption, _) in enumerate(examples())]
    write_parquet("rows.parquet", rows)
    ((_, _, split),), _ = find_tasks(["rows.parquet"])
    assert (split.rows, split.test) == (30, None)


def test_no_two_tasks_write_one_source_or_evaluation_set():
    write_csv()
    for name in ("birds_classes.csv", "birds.csv"):
        shutil.copy("pictures.csv", name)
    tasks, _ = find_tasks(["birds_classes.csv", "birds.csv"])
    names = [f"{task.name}{ending}" for task in tasks for ending in ("", "_test", "_classes")]
    assert len({*names}) == len(names)


def test_sparse_texts_and_objects_in_a_group_column_are_drafted():
    """Three of four texts are missing, and a user is an object."""
    titles = [caption if i % 4 == 0 else None for i, (_, caption, _) in enumerate(examples(120))]
    write_parquet("rows.parquet", [{"title": title, "user": {"id": i % 10}} for i, title in enumerate(titles)])
    recipe = assemble("rows", find_tasks(["rows.parquet"])[0], CPU, {}).recipe
    assert recipe["train"]["max_bad_fraction"] == 1
    assert recipe["sources"]["rows"]["part"]["by"] == "user"


def test_the_recipe_names_the_command_that_drafts_it_again_and_columns_that_are_named_must_fit(openimp):
    write_csv()
    code, out, err = openimp("init", "pictures.csv", "--text", "caption")
    assert code == 0, err
    assert "openimp init pictures.csv --text caption > " in out
    for option in ("--text", "--label"):
        code, out, err = openimp("init", "pictures.csv", option, "id")
        assert (code, out) == (2, "")
        assert option in err


@pytest.mark.parametrize(
    ("steps", "rows", "every"),
    [
        (10_000, 1000, 2000),
        (10_000, 40_000, 3334),
        (10_000, 200_000, None),
        (600, 100, 200),
        (200, 100, None),
        (600, 0, None),  # Numbers as classes are no texts, so there may be no evaluation set.
    ],
)
def test_a_long_training_is_measured_before_its_end_unless_that_takes_long(steps, rows, every):
    recipe = {"tasks": {"a": {"weight": 1, "batch_size": 64}, "b": {"weight": 3, "batch_size": 128}}}
    assert steps_between_evaluations(recipe | {"train": {"steps": steps}}, rows) == every
