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
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train

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
    folder, rng = tmp_path_factory.mktemp("distillation"), np.random.default_rng(0)
    (folder / "pictures").symlink_to(little_data / "pictures")
    labels = [label for label in COLOURS for _ in range(6)]
    vectors = teacher.repeat(6, axis=0) + rng.normal(scale=0.3, size=(24, SIZE))
    rows = {
        "file": [str(little_data / "pictures" / label / f"{i % 6}.png") for i, label in enumerate(labels)],
        "label": labels,
        "teacher": pa.array([*vectors.astype(np.float16)], pa.list_(pa.float16())),
    }
    rows["file"] = [pa.scalar(Path(file).read_bytes()).as_py() for file in rows["file"]]
    pq.write_table(pa.table(rows), folder / "pictures.parquet")
    lines = [json.dumps({"label": label, "vector": vector.tolist()}) for label, vector in zip(COLOURS, teacher)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def student(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe."""
    run = tmp_path_factory.mktemp("runs") / "student"
    train(Recipe.load(data / "recipe.yaml"), run)
    return run


def test_a_student_takes_over_the_teachers_space(student, data, teacher):
    """Pictures find the teacher's vector of their colour, and the student's text, with which no task compares them."""
    lines = read_lines(student / "metrics.jsonl")
    for task, name in (("seen", "image:teacher"), ("read", "text:vector")):
        first, last = (line["tasks"][task][name] for line in (lines[0], lines[-1]))
        assert last < 0.35 * first, (task, first, last)
    model = openimp.load(student)
    assert not model.imp.temperatures
    rows = pq.read_table(data / "pictures.parquet").to_pylist()
    seen = model.encode_image([row["file"] for row in rows], normalize=True)
    wanted = torch.tensor([COLOURS.index(row["label"]) for row in rows])
    for texts in (torch.tensor(teacher).float(), model.encode_text([f"a {c} square" for c in COLOURS])):
        found = (seen @ torch.nn.functional.normalize(texts, dim=1).T).argmax(1)
        assert (found == wanted).float().mean() > 0.9
    results = {line["task"]: line["r1"] for line in read_lines(student / "results.jsonl")}
    print(results)
