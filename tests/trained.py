"""Recipes in the folders of little.py, trainers of them, and what their runs record."""

from pathlib import Path
from typing import Any

from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

CLOCK = ("examples_per_s", "tokens_per_s", "mfu", "data_wait", "waits", "step_p50", "step_p95", "seconds")
"""Figures of a metrics line that no two runs share."""


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return Recipe.load(folder / "recipe.yaml", changes)


def trainer_of(folder: Path, run: Path, *changes: str, **options: Any) -> Trainer:
    """`options` are those of `set_up`."""
    return Trainer(set_up(recipe_of(folder, *changes), run, **options))


def figures(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without `CLOCK`."""
    lines = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
