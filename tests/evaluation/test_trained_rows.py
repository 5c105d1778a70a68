"""How many evaluated rows are rows of training."""

import json

import numpy as np
import pytest

from openimp.data.sources import open_source
from openimp.evaluation.evaluator import ReadableRows
from openimp.evaluation.provenance import trained_field
from openimp.recipe.schema import Recipe

PARTS = {"of": 4, "drop": [0]}


@pytest.mark.parametrize(
    ("trained_on", "evaluated", "share"),
    [
        ({}, {}, 1),
        ({"cache": "memory", "license": "MIT"}, {}, 1),
        ({}, {"limit": 5}, 1),
        ({"part": PARTS}, {"part": PARTS, "limit": 5}, 1),
        ({"part": PARTS}, {"part": {"of": 4, "keep": [0]}}, 0),
        ({"part": PARTS}, {"part": {"of": 4, "keep": [3]}}, 1),
        ({"where": {"split": "train"}}, {"where": {"split": "test"}}, 0),
        ({"where": {"split": ["val", "train"]}}, {"where": {"split": "val"}}, 1),
        ({"where": {"split": "train"}}, {"where": {"split": ["val", "train"]}}, 0.5),
        ({"limit": 15}, {}, 0.5),
        ({}, {"path": "link.jsonl"}, 1),
        ({}, {"path": "other.jsonl"}, 0),
        ({}, {"root": "media"}, 0),
        ({"path": "rows.parquet", "stream": True}, {"path": "rows.parquet"}, 1),
        ({"path": "rows.parquet", "stream": True, "where": {"split": "train"}}, {"path": "rows.parquet"}, None),
    ],
)
def test_rows_of_training_are_counted_in_the_data_itself(tmp_path, little_data, trained_on, evaluated, share):
    rows = [{"text": str(i), "split": ("train", "val", "test")[i % 3]} for i in range(30)]
    for name in ("rows.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    (tmp_path / "media").mkdir()
    recipe = Recipe.load(little_data / "recipe.yaml").to_dict()
    sources = {"seen": {"path": "rows.jsonl"} | trained_on, "asked": {"path": "rows.jsonl"} | evaluated}
    recipe = Recipe.build({**recipe, "sources": recipe["sources"] | sources}, tmp_path)
    table = open_source("asked", recipe.sources["asked"].model_copy(update={"path": tmp_path / "rows.jsonl"}))
    readable = ReadableRows(np.arange(len(table)), [], "")
    found = trained_field({"seen": recipe.sources["seen"]}, recipe, table, readable)
    assert found == ({} if share is None else {"trained": share * len(table)})


def test_data_that_may_have_moved_are_not_said_to_be_unseen(tmp_path, little_data):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}', encoding="utf-8")
    recipe = Recipe.load(little_data / "recipe.yaml")
    moved = Recipe.build(
        recipe.to_dict() | {"sources": recipe.to_dict()["sources"] | {"sounds": {"path": "rows.jsonl"}}}, tmp_path
    )
    table = open_source("sounds", moved.sources["sounds"])
    assert trained_field(recipe.training_sources, moved, table, ReadableRows(np.arange(1), [], "")) == {}
