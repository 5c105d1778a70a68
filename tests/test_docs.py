"""What the documents show works: recipes, files and code are taken out of the pages and used."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import openimp
from openimp import cli
from openimp.common.json_lines import read_lines
from openimp.data.sources import open_source
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.evaluation.evaluate import check_sets
from openimp.inference.onnx import export
from openimp.planning.costs import meta_model
from openimp.recipe.file import RecipeLoader
from openimp.recipe.registry import modality_class, objective_class
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source, Task
from openimp.study.schema import Study
from openimp.training.trainer import train
from tests.messages import refuses

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/design").glob("*.md")])
SOURCE = {"path": "photos"}
TASK = {
    "source": "photos",
    "inputs": {"image": "file", "text": "label"},
    "objectives": [{"type": "contrastive"}],
    "views": [{"image": {"size": 64}}],
}


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The fenced blocks of a language, each with the file name that may follow it."""
    fence = rf"^```{language}(?: ([^\n]+))?\n(.*?)^```$"
    return re.findall(fence, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def framed(text: str) -> dict:
    """A recipe, or a part of one, or of its task or source, as a recipe."""
    data = yaml.load(text, RecipeLoader)
    if data.keys() <= Task.model_fields.keys():
        data = {"tasks": {"task": {**TASK, **data}}}
    elif data.keys() <= Source.model_fields.keys():
        data = {"sources": {"photos": data}}
    assert data.keys() <= Recipe.model_fields.keys(), f"no part of a recipe: {text}"
    sources = data.get("sources", {"photos": SOURCE})
    return {"name": "part", "sources": sources, "tasks": {"task": {**TASK, "source": next(iter(sources))}}, **data}


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The packages of docs/modalities.md and docs/objectives.md, as if they were installed."""
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    for kind in ("modalities", "objectives"):
        page = ROOT / "docs" / f"{kind}.md"
        ((_, toml),) = [found for found in blocks(page, "toml") if found[0] == "pyproject.toml"]
        points = tomllib.loads(toml)["project"]["entry-points"][f"openimp.{kind}"]
        info = tmp_path / f"outside_{kind}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outside-{kind}\nVersion: 1\n", encoding="utf-8")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[openimp.{kind}]\n{lines}", encoding="utf-8")
        for name, code in blocks(page, "python"):
            if name:
                assert len(code.splitlines()) <= 80
                (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for find in (modality_class, objective_class):
        find.cache_clear()
    yield
    for find in (modality_class, objective_class):
        find.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_and_part_of_one_is_valid(page, outside):
    for name, text in blocks(page, "yaml"):
        if name == "study.yaml":
            Study.model_validate(yaml.load(text, RecipeLoader))
        else:
            Recipe.build(framed(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_examples_of_the_data_page_are_read(tmp_path, monkeypatch):
    page = ROOT / "docs" / "data.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    for name, text in blocks(page, "csv") + blocks(page, "jsonl"):
        Path(name).write_text(text, encoding="utf-8")
    known = {}
    for _, code in blocks(page, "python"):
        exec(code, known)
    read = set()
    for _, text in blocks(page, "yaml"):
        recipe = Recipe.build(
            {**framed(text), "train": {"steps": 8, "num_workers": 0}, "alternation": {"kind": "cycle"}}
        )
        given = yaml.load(text, RecipeLoader).keys()
        if "tasks" in given and not any(recipe.sources[task.source].hub for task in recipe.tasks.values()):
            batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
            batches.data.fit()
            for step in range(len(batches)):
                loaded = batches[step]
                assert not loaded.bad
                read.add(recipe.tasks[loaded.visit.task].source)
        elif "sources" in given and "tasks" not in given:
            for name, source in recipe.sources.items():
                assert len(open_source(name, source))
    assert read == {"photos", "songs", "birds", "shards", "stream"}


def test_the_sets_of_the_evaluation_page_can_be_measured(media_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, labels in {"photos": ["robin", "wren"], "more_photos": ["robin", "wren", "owl"]}.items():
        for label in labels:
            (tmp_path / folder / label).mkdir(parents=True)
            for i in range(10):
                shutil.copy(media_folder / "0.png", f"{folder}/{label}/{i}.png")
    shutil.copy(media_folder / "0.mp4", tmp_path)
    films = [
        {"file": "0.mp4", "caption": "a film", "label": label, "split": 1} for label in ("brush_hair", "ClimbStairs")
    ]
    Path("films.jsonl").write_text("".join(json.dumps(film) + "\n" for film in films), encoding="utf-8")
    ((_, text),) = blocks(ROOT / "docs" / "evaluation.md", "yaml")
    recipe = Recipe.build({"name": "birds", **yaml.load(text, RecipeLoader)})
    data = TaskData(recipe, recipe.make_modalities())
    data.fit()
    tables = check_sets(meta_model(recipe, data.modalities, data.classes), recipe, data.modalities, data.classes)
    assert (len(tables["more"]), len(tables["rest"])) == (20, 30)


@pytest.fixture
def demo_run(little_run, tmp_path, monkeypatch):
    """The current folder has the little run for the demo's."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(little_run)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_on_the_page_runs(page, little_data, demo_run):
    for name, file in {"cat.png": "pictures/red/0.png", "dog.png": "pictures/blue/0.png", "flute.ogg": "0.wav"}.items():
        Path(name).symlink_to(little_data / file)
    Path("mine.yaml").symlink_to(little_data / "recipe.yaml")
    known = {}
    for _, code in blocks(ROOT / page, "python"):
        exec(code, known)
    assert known["pictures"].shape[0] == 2
    assert known["texts"].shape[0] == 3
    if page == "docs/python.md":
        assert torch.equal(known["same"].encode_text("a cat"), known["model"].encode_text("a cat"))
        assert len(read_lines(Path("runs/mine/metrics.jsonl"))) == 20


@pytest.mark.slow
def test_the_search_page_runs(little_data, demo_run, monkeypatch):
    """The commands and the code, with the little run for the demo's, its pictures for the photos, and a sound."""
    pytest.importorskip("lancedb")
    Path("music").mkdir()
    shutil.copytree(little_data / "pictures", "photos/2025")
    for name, file in {"cat.png": "pictures/red/0.png", "riff.wav": "0.wav", "music/0.wav": "1.wav"}.items():
        shutil.copy(little_data / file, name)
    page = ROOT / "docs" / "search.md"
    for line in "".join(commands for _, commands in blocks(page, "sh")).splitlines():
        words = shlex.split(line)
        if words[0] == "embedding-atlas":
            assert {"embedding", "image", "name"} <= {*words} & {*pq.read_schema(words[1]).names}
        if words[0] == "openimp":
            monkeypatch.setattr("sys.argv", words)
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert not end.value.code, line
    known = {}
    for _, code in blocks(page, "python"):
        exec(code, known)
    assert {Path(hit.path).parent.parent.name for hit in known["hits"]} == {"2025"}


@pytest.mark.slow
def test_the_publishing_page_runs(little_data, demo_run):
    Path("flute.wav").symlink_to(little_data / "0.wav")
    noise = np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8)
    PIL.Image.fromarray(noise).save("cat.png")
    export("runs/demo", Path("onnx"))
    known = {}
    for _, code in blocks(ROOT / "docs" / "publish.md", "python"):
        exec(code.replace("crop_pct = 1 ", "crop_pct = 8 / 9 "), known)  # The little recipe has the default.
    assert known["vectors"].shape == (3, 32)
    assert known["batch"].shape == (1, 3, 16, 16)
    (found,) = known["session"].run(["vectors"], {"input": known["batch"]})
    expected = openimp.load("runs/demo", "cpu", "fp32").encode_image("cat.png", normalize=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)


def test_a_modality_from_another_package_is_as_the_page_says(outside, tmp_path, monkeypatch):
    page = ROOT / "docs" / "modalities.md"
    monkeypatch.chdir(tmp_path)
    for name, code in blocks(page, "python"):
        if not name:
            exec(code, {})
    lines = (tmp_path / "traces.jsonl").read_text().splitlines()
    lines[0] = '{"trace": [[0.0, 1.0]], "activity": "walking"}'
    (tmp_path / "traces.jsonl").write_text("\n".join(lines))
    ((_, text),) = blocks(page, "yaml")
    options = {"steps": 4, "num_workers": 0, "max_bad_fraction": 0.1}
    assert train(Recipe.build(yaml.load(text, RecipeLoader) | {"train": options}, tmp_path), tmp_path / "run")
    (result,) = read_lines(tmp_path / "run" / "results.jsonl")
    assert (result["n"], result["candidates"]) == (63, 2)
    (skipped,) = read_lines(tmp_path / "run" / "skipped.jsonl")
    assert skipped["where"] == "traces.jsonl[0]"
    assert skipped["why"] == "expected finite samples (N, 3), found an array of shape [1, 2]"
    model = openimp.load(tmp_path / "run", "cpu")
    traces = [np.random.default_rng(0).normal(size=(length, 3)) for length in (100, 900)]
    assert model.encode_accelerometer(traces).shape == (2, 64)


def test_an_error_of_an_objective_from_another_package_names_the_objective(outside):
    with refuses():
        Recipe.build(framed("objectives: [{type: contrastive}, {type: similarity, between: [image], score: score}]"))


SCORED = """
name: scored
model: {width: 32, layers: 1, heads: 2, mlp_dim: 64, embed_dim: 16}
modalities: {vision: {patch: [2, 8, 8]}, text: {vocab_size: 300, positions: 8}}
sources: {scored: {path: scored.jsonl}}
tasks: {pairs: {source: scored, inputs: {image: image, text: text}, batch_size: 24,
                views: [{image: {size: 16, crop: 1, jitter: 0}, text: {length: 4}}]}}
optimizer: {lr: 3e-3, warmup_steps: 5}
train: {steps: 40, num_workers: 0, log_every: 5, save_every: 20, max_bad_fraction: 0.05}
"""


def test_an_objective_from_another_package_is_trained_saved_and_loaded(outside, little_data, tmp_path):
    """Pictures with the right and with a wrong text, and in the column the cosine that they should have."""
    ((_, objectives),) = blocks(ROOT / "docs" / "objectives.md", "yaml")
    names = ("red", "green", "blue", "white")
    right = [(f"{name}/{i}.png", name, 0.9) for name in names for i in range(6)]
    wrong = [(f"{names[i % 4]}/{i // 4}.png", names[(i + 1 + i // 4 % 3) % 4], -0.2) for i in range(24)]
    rows = [{"image": file, "text": text, "score": score} for file, text, score in right + wrong]
    rows[0]["score"] = 5.0
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "scored.jsonl").write_text(lines, encoding="utf-8")
    data = yaml.load(SCORED, RecipeLoader)
    data["sources"]["scored"]["root"] = str(little_data / "pictures")
    data["tasks"]["pairs"] |= yaml.load(objectives, RecipeLoader)
    recipe = Recipe.build(data, tmp_path)
    assert train(recipe, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    first, *_, last = (line["tasks"]["pairs"]["image~text"] for line in lines)
    assert last < 0.05 < 0.2 < first
    ((bad, why),) = {(line["where"], line["why"]) for line in read_lines(tmp_path / "run" / "skipped.jsonl")}
    assert bad == "scored.jsonl[0]"
    assert why == "column 'score': expected a number from -1 to 1, found 5.0"
    model = openimp.load(tmp_path / "run", "cpu", "fp32")
    pictures = [little_data / "pictures" / name / "5.png" for name in names]
    cosines = model.encode_image(pictures, normalize=True) @ model.encode_text(list(names), normalize=True).T
    assert cosines.diagonal().min() > 0.5 > (cosines - torch.eye(4) * 9).max()


def test_every_field_of_a_run_has_a_meaning(little_run):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    lines = read_lines(little_run / "metrics.jsonl") + read_lines(little_run / "results.jsonl")
    checkpoint = next((little_run / "checkpoints").iterdir())
    names = {key for line in lines for key in line}
    names |= {path.name for path in [*little_run.iterdir(), *checkpoint.iterdir()]}
    assert not {name for name in names if f"`{name}`" not in page and f"`{name}/`" not in page}


def imported(code: str) -> set[str]:
    """The modules and packages of openimp's own that some code imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "openimp":
            names |= {f"openimp.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("openimp.")}


def test_imports_follow_the_layers_on_the_design_page():
    """A folder imports only folders on lines above its own."""
    ((_, text),) = [found for found in blocks(ROOT / "docs" / "design.md", "text") if found[0] == "layers"]
    level = {name: i for i, line in enumerate(text.splitlines()) for name in line.partition("  ")[0].split(", ")}
    package = ROOT / "src" / "openimp"
    for file in package.rglob("*.py"):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        assert own in level, f"{own} is missing in docs/design.md"
        code = re.sub(r"^if TYPE_CHECKING:\n(    .*\n)+", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for other in imported(code):
            assert other == own or level[other] < level[own], f"{file} imports {other}"


@pytest.mark.parametrize("name", ["design.md", "security.md"])
def test_the_tests_that_a_page_names_exist(name):
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    named = re.findall(r"`(?:(?:tests/)?([\w/]+\.py)::)?(test_\w+)`", page)
    assert named
    tests = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")}
    for file, name in named:
        assert any(path.endswith(file) and f"def {name}(" in text for path, text in tests.items()), name
