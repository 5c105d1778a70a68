"""Recipes in the folders of little.py, and trainers of them."""

from pathlib import Path
from typing import Any

from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return Recipe.load(folder / "recipe.yaml", changes)


def trainer_of(folder: Path, run: Path, *changes: str, **options: Any) -> Trainer:
    """`options` are those of `set_up`."""
    return Trainer(set_up(recipe_of(folder, *changes), run, **options))
