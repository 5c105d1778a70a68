"""Distillation: modalities learn the vectors of another model from a column, and can then be compared through them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import openimp
from openimp.common.json_lines import read_lines
from openimp.common.modality import BadMedia
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.encoding.tower import make_teachers
from openimp.inference.join import embed_rows
from openimp.model.imp import IMP
from openimp.objectives.distill import unit_vector
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests.messages import refuses
from tests.trained import recipe_of

COLOURS = ["blue", "green", "red", "white"]
SIZE = 24
RECIPE = """
name: student
model: {width: 32, layers: 1, heads: 2, mlp_dim: 64, embed_dim: 24, space: joint}
modalities: {vision: {patch: [2, 8, 8]}, text: {vocab_size: 300, positions: 16}}
sources:
  pictures: {path: pictures.parquet}
  captions: {path: captions.jsonl}
tasks:
  seen: {source: pictures, inputs: {image: file}, objectives: [{type: distill, of: image, to: teacher}],
         batch_size: 8, views: [{image: {size: 16, crop: 1, jitter: 0}}]}
  read: {source: captions, inputs: {text: "a {label} square"}, batch_size: 4, views: [{text: {length: 12}}],
         objectives: [{type: distill, of: text, to: vector, loss: contrastive}]}
optimizer: {lr: 5e-3, warmup_steps: 5}
train: {steps: 80, num_workers: 0, log_every: 20, save_every: 20, precision: fp32}
evaluation:
  sets:
    pairs: {type: retrieval, source: pictures, inputs: {image: file, text: "a {label} square"},
            view: {image: {size: 16}, text: {length: 12}}}
"""


@pytest.fixture(scope="module")
def teacher() -> np.ndarray:
    """(4, Z) the vectors that the teacher gives to the names of the colours."""
    return np.random.default_rng(3).normal(size=(len(COLOURS), SIZE))


@pytest.fixture(scope="module")
def data(little_data: Path, tmp_path_factory: pytest.TempPathFactory, teacher: np.ndarray) -> Path:
    """A folder with recipe.yaml, pictures with vectors near those of their colours, and the names of the colours with
    theirs. Pictures and names are in different sources, so nothing says which belong together."""
    folder = tmp_path_factory.mktemp("distillation")
    rng = np.random.default_rng(0)
    labels = [label for label in COLOURS for _ in range(6)]
    vectors = teacher.repeat(6, axis=0) + rng.normal(scale=0.3, size=(24, SIZE))
    rows = {
        "file": [(little_data / "pictures" / label / f"{i % 6}.png").read_bytes() for i, label in enumerate(labels)],
        "label": labels,
        "teacher": pa.array([*vectors.astype(np.float16)], pa.list_(pa.float16())),
    }
    pq.write_table(pa.table(rows), folder / "pictures.parquet")
    lines = [json.dumps({"label": label, "vector": vector.tolist()}) for label, vector in zip(COLOURS, teacher)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def student(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe."""
    run = tmp_path_factory.mktemp("runs") / "student"
    train(recipe_of(data), run)
    return run


def test_a_student_takes_over_the_teachers_space(student, data, teacher):
    """Pictures find the teacher's vector of their colour, and the student's text, with which no task compares them."""
    lines = read_lines(student / "metrics.jsonl")
    for task, name in (("seen", "image:teacher"), ("read", "text:vector")):
        first, last = (line["tasks"][task][name] for line in (lines[0], lines[-1]))
        assert last < 0.35 * first, (task, first, last)
    model = openimp.load(student)
    assert not model.imp.temperatures
    with refuses():
        _ = model.logit_scale
    rows = pq.read_table(data / "pictures.parquet").to_pylist()
    seen = model.encode_image([row["file"] for row in rows], normalize=True)
    wanted = torch.tensor([COLOURS.index(row["label"]) for row in rows])
    for texts in (torch.tensor(teacher).float(), model.encode_text([f"a {c} square" for c in COLOURS])):
        found = (seen @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1)
        assert (found == wanted).float().mean() > 0.9
    results = {line["task"]: line["r1"] for line in read_lines(student / "results.jsonl")}
    assert results.keys() == {"image -> text", "text -> image"}
    assert min(results.values()) > 0.9


def test_a_row_without_a_vector_is_a_bad_example(data, tmp_path):
    vectors = [[1.0] * 3, [float("nan")] * SIZE, None, [0.0] * SIZE, *[[1.0] * SIZE] * 20]
    rows = [{"label": f"row {i}", "vector": vector} for i, vector in enumerate(vectors)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    changes = [f"sources.captions.path={tmp_path / 'rows.parquet'}", "tasks.seen.weight=0", "tasks.read.batch_size=24"]
    recipe = recipe_of(data, *changes)
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    loaded = batches[0]
    assert {*loaded.rows} == {*range(4, 24)}
    assert torch.allclose(loaded.batch.targets[0]["vector"], torch.full((24, SIZE), SIZE**-0.5))
    reasons = {name.partition("[")[2][0]: why.removeprefix("column 'vector': ") for name, why in loaded.bad}
    assert reasons == {
        "0": "expected a list of 24 numbers (the model's embed_dim), found a list of shape [3]",
        "1": "a vector of length nan has no direction",
        "2": "expected a list of 24 numbers (the model's embed_dim), found None",
        "3": "a vector of length 0 has no direction",
    }
    for value in (["x"] * SIZE, [[1.0], []], 5.0, [[1.0]] * SIZE, "[1.0]"):
        with refuses(BadMedia):
            unit_vector(value, SIZE, "vector")


def test_a_set_that_cannot_be_measured_is_refused_before_a_teacher_embeds(student, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    only_texts = f"""tasks={{both: {{source: pictures, inputs: {{image: file, text: label}}, batch_size: 8,
        objectives: [{{type: distill, of: text, teacher: {student}}}]}}}}"""
    with refuses():
        train(recipe_of(data, only_texts), tmp_path / "run")
    assert not (tmp_path / "cache" / "decoded").exists()


def test_in_a_disjoint_space_the_recipe_names_what_to_compare_with(data):
    disjoint = "model.space=disjoint"
    with refuses():
        recipe_of(data, disjoint)
    one_task = """tasks={both: {source: pictures, inputs: {image: file, text: label}, objectives: [
        {type: distill, of: image, to: teacher}, {type: distill, of: text, to: teacher, towards: TOWARDS}]}}"""
    recipe = recipe_of(data, disjoint, "evaluation={}", one_task.replace("TOWARDS", "image"))
    model = IMP(recipe.to_config({}), recipe.make_modalities())
    assert [*model.projections] == ["text-to-vision", "vision-to-text"]
    assert model.share_a_space("image", "text")
    with refuses():
        recipe_of(data, disjoint, one_task.replace("TOWARDS", "imag"))


def test_in_a_disjoint_space_a_modality_learns_from_a_teacher_for_each_other(student, data, tmp_path):
    """As texts that are compared with pictures in the space of CLIP, and with sounds in that of CLAP."""
    taught = """tasks={both: {source: pictures, inputs: {image: file, text: label}, batch_size: 8, objectives: [
        {type: distill, of: text, teacher: STUDENT, towards: image},
        {type: distill, of: text, teacher: STUDENT, towards: OTHER}]},
        heard: {source: captions, inputs: {audio: label}, weight: 0, objectives: [
        {type: distill, of: audio, to: vector, towards: text}]}}"""
    changes = ["evaluation={}", "train.steps=2", "train.log_every=1"]

    def recipe(other: str, space: str) -> Recipe:
        task = taught.replace("STUDENT", str(student)).replace("OTHER", other)
        return recipe_of(data, *changes, f"model.space={space}", task)

    train(recipe("audio", "disjoint"), tmp_path / "run")
    *_, last = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert last["tasks"]["both"].keys() >= {"text to image by teacher", "text to audio by teacher"}
    for other, space in (("image", "disjoint"), ("audio", "joint")):
        with refuses():
            recipe(other, space)


def test_a_teacher_gives_the_vectors_that_embed_join_would_write(student, data, tmp_path):
    objectives = [{"type": "distill", "of": name, "teacher": str(student)} for name in ("image", "text")]
    inputs = {"image": "file", "text": ["a {label} square", "{label}"]}
    changes = {"inputs": inputs, "objectives": objectives, "views": [{"image": {"size": 16}, "text": {"length": 12}}]}
    taught = ["tasks.read.weight=0", "evaluation={}", "seed=1"]
    taught += [f"tasks.seen.{key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = recipe_of(data, *taught)
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    batches.data.prepare(None, make_teachers(recipe))
    loaded = batches[0]
    for targets, modality, column in zip(loaded.batch.targets, inputs, ("file", "a {label} square")):
        out = tmp_path / f"{modality}.parquet"
        embed_rows(student, str(data / "pictures.parquet"), out, modality, column, to="joined")
        joined = torch.tensor(pq.read_table(out)["joined"].to_pylist())
        cosines = (targets["vector"] * joined[loaded.rows]).sum(1)
        assert cosines.min() > 0.999, "openimp embed uses bf16 where it is fast, and a teacher fp32"

    train(recipe, tmp_path / "second")
    first, *_, last = (line["tasks"]["seen"] for line in read_lines(tmp_path / "second" / "metrics.jsonl"))
    for name in ("image by teacher", "text by teacher"):
        assert last[name] < 0.35 * first[name]
    for wrong in ("model.embed_dim=16", "sources.pictures.stream=true"):
        with refuses():
            train(recipe_of(data, *taught, wrong), tmp_path / "wrong")
    for wrong in ("", "to: teacher, teacher: runs/a"):
        with refuses():
            recipe_of(data, f"tasks.seen.objectives=[{{type: distill, of: image, {wrong}}}]")
