"""Builds models: openimp's own, or one of another library."""

from collections.abc import Callable
from dataclasses import dataclass

from openimp.common.modality import Classes, Modalities
from openimp.modalities.open_clip import layers_in, reader_of
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.model.open_clip import OpenCLIP
from openimp.recipe.model import Model
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class Architecture:
    """A kind of model. Its functions take modalities that are fitted.

    Attributes:
        build: makes the model.
        count_layers: the number of layers that are asked for. Creating a layer takes time and memory, and the
            configuration may be untrusted.
        embed_dim: the number of features of the embeddings.
        builds_on_meta: whether `build` can be called on the meta device, and gives weights their initial values.
            Otherwise weights are always loaded, and `build` computes the values of buffers.
    """

    build: Callable[[ModelConfig, Modalities], Embedder]
    count_layers: Callable[[Model, Modalities], int]
    embed_dim: Callable[[Model, Modalities], int]
    builds_on_meta: bool


OPENIMP = Architecture(
    IMP.from_config,
    count_layers=lambda model, _: model.layers,
    embed_dim=lambda model, _: model.embed_dim,
    builds_on_meta=True,
)
OPEN_CLIP = Architecture(
    OpenCLIP.from_config,
    count_layers=lambda _, modalities: layers_in(reader_of(modalities).files),
    embed_dim=lambda _, modalities: reader_of(modalities).embed_dim,
    builds_on_meta=False,
)


def architecture_of(model: Model) -> Architecture:
    """The kind of a model."""
    return OPEN_CLIP if model.wrap else OPENIMP


def build_model(config: ModelConfig, modalities: Modalities) -> Embedder:
    """The model with random weights, or if they are always loaded, without values for them; see `Architecture`."""
    return architecture_of(config.model).build(config, modalities)


def build_for_training(recipe: Recipe, modalities: Modalities, classes: Classes) -> Embedder:
    """The model of `build_model` that a recipe trains. `classes` are those of each classification head."""
    model = build_model(recipe.to_config(classes), modalities)
    if recipe.memory.activation_checkpointing:
        model.checkpoint_activations()
    return model
