"""Builds the model that a recipe describes: openimp's own, or one of another library."""

from collections.abc import Mapping

from openimp.common.modality import Modalities
from openimp.common.protocols import learned_files
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe


def count_layers(recipe: Recipe, modalities: Modalities) -> int:
    """The number of layers that a recipe asks for. Creating a layer takes time and memory, and the recipe may be
    untrusted."""
    if recipe.model.wrap:
        from openimp.modalities.open_clip import layers_in

        return layers_in(learned_files(modalities.values()))
    return recipe.model.layers


def build_model(recipe: Recipe, modalities: Modalities, classes: Mapping[str, int] | None = None) -> Embedder:
    """The model with random weights; if the recipe wraps another library's model, without values for its weights.

    `modalities` must be fitted. `classes` has the number of classes of each classification head, by name.
    """
    if recipe.model.wrap:
        from openimp.model.open_clip import OpenCLIP  # It imports a library that takes seconds to import.

        return OpenCLIP.from_recipe(recipe, modalities, classes)
    return IMP.from_recipe(recipe, modalities, classes)
