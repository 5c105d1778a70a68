"""Builds models: openimp's own, or one of another library."""

from openimp.common.modality import Classes, Modalities
from openimp.modalities.open_clip import layers_in, reader_of
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.model.open_clip import OpenCLIP
from openimp.recipe.model import Model
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe


def build_model(config: ModelConfig, modalities: Modalities) -> Embedder:
    """The model of fitted modalities, with random weights.

    A wrapped model has no values for its weights, which are always loaded. Its buffers have values only if it is not
    built on the meta device.
    """
    return OpenCLIP.from_config(config, modalities) if config.model.wrap else IMP(config, modalities)


def build_for_training(recipe: Recipe, modalities: Modalities, classes: Classes) -> Embedder:
    """The model of `build_model` that a recipe trains. `classes` are those of each classification head."""
    model = build_model(recipe.to_config(classes), modalities)
    if recipe.memory.activation_checkpointing:
        model.checkpoint_activations()
    return model


def count_layers(model: Model, modalities: Modalities) -> int:
    """The number of layers that a model asks for. Creating a layer takes time and memory, and the configuration may be
    untrusted."""
    return layers_in(reader_of(modalities).files) if model.wrap else model.layers


def embedding_size(model: Model, modalities: Modalities) -> int:
    """The number of features of the embeddings."""
    return reader_of(modalities).embed_dim if model.wrap else model.embed_dim
