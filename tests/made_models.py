"""Untrained models of recipes, and of made-up modalities. A model uses only the stems of the latter."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from openimp.checkpoint.folder import save_model
from openimp.common.modality import Modality, StemSpec
from openimp.common.protocols import Learned
from openimp.model.imp import IMP
from openimp.recipe.model import Model
from openimp.recipe.model_config import ComparedPair, ModelConfig
from openimp.recipe.schema import Recipe


def untrained(recipe: Recipe, corpus: list[list[str]]) -> tuple[IMP, dict[str, Modality]]:
    """The untrained model of a recipe, in evaluation mode, and its modalities, fitted to the texts of examples."""
    modalities = recipe.make_modalities()
    for modality in modalities.values():
        if isinstance(modality, Learned):
            modality.fit(corpus)
    torch.manual_seed(0)
    return IMP(recipe.to_config({}), modalities).eval(), modalities


def write_untrained(recipe: Recipe, corpus: list[list[str]], folder: Path) -> Path:
    """Writes the untrained model of a recipe to a folder that `openimp.load` opens, and returns the folder."""
    model, modalities = untrained(recipe, corpus)
    folder.mkdir(exist_ok=True)
    save_model(folder, model, recipe.to_config({}), modalities, recipe.to_yaml())
    return folder


class FixedStem(NamedTuple):
    stem: str
    spec: StemSpec

    def stem_spec(self) -> StemSpec:
        return self.spec


def model_config(model: Model, pairs: Iterable[tuple[str, str]], classes: dict[str, Any]) -> ModelConfig:
    """Without the validation, which knows only registered modalities."""
    compared = [ComparedPair(modalities=pair) for pair in pairs]
    return ModelConfig.model_construct(model=model, pairs=compared, distilled=[], classes=classes)
