"""Builds models: openimp's own, or one of another library."""

from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe


def count_layers(config: ModelConfig, modalities: Modalities) -> int:
    """The number of layers that a model has. Creating a layer takes time and memory, and the configuration may be
    untrusted."""
    if config.model.wrap:
        from openimp.modalities.open_clip import layers_in

        return layers_in(next(iter(modalities.values())).state())
    return config.model.layers


def build_model(config: ModelConfig, modalities: Modalities) -> Embedder:
    """The model with random weights; if another library's model is wrapped, without values for its weights.

    `modalities` must be fitted.
    """
    if config.model.wrap:
        from openimp.model.open_clip import OpenCLIP  # It imports a library that takes seconds to import.

        return OpenCLIP.from_config(config, modalities)
    return IMP.from_config(config, modalities)


def build_for_training(recipe: Recipe, modalities: Modalities, classes: Classes) -> Embedder:
    """The model of `build_model` that a recipe trains. `classes` are those of each classification head."""
    model = build_model(recipe.to_config(classes), modalities)
    if recipe.memory.activation_checkpointing:
        model.checkpoint_activations()
    return model
