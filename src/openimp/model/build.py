"""Builds the model that a recipe describes: openimp's own, or one of another library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from openimp.common.modality import Modalities
from openimp.modalities.open_clip import layers_in, reader_of
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.model.open_clip import OpenCLIP
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class Architecture:
    """A kind of model. Its functions take a recipe and its modalities, which must be fitted.

    Attributes:
        build: makes the model; its third argument is the number of classes of each classification head, by name.
        count_layers: the number of layers that are asked for. Creating a layer takes time and memory, and the recipe
            may be untrusted.
        embed_dim: the number of features of the embeddings.
        initializes: whether `build` gives weights their initial values, which it can do on the meta device. Otherwise
            weights are always loaded, and `build` computes the values of buffers, so it cannot be on the meta device.
    """

    build: Callable[[Recipe, Modalities, Mapping[str, int] | None], Embedder]
    count_layers: Callable[[Recipe, Modalities], int]
    embed_dim: Callable[[Recipe, Modalities], int]
    initializes: bool


OWN = Architecture(
    IMP.from_recipe,
    count_layers=lambda recipe, _: recipe.model.layers,
    embed_dim=lambda recipe, _: recipe.model.embed_dim,
    initializes=True,
)
OPEN_CLIP = Architecture(
    OpenCLIP.from_recipe,
    count_layers=lambda _, modalities: layers_in(reader_of(modalities).files),
    embed_dim=lambda _, modalities: reader_of(modalities).embed_dim,
    initializes=False,
)


def architecture_of(recipe: Recipe) -> Architecture:
    """The kind of model that a recipe describes."""
    return OPEN_CLIP if recipe.model.wrap else OWN


def build_model(recipe: Recipe, modalities: Modalities, classes: Mapping[str, int] | None = None) -> Embedder:
    """The model with random weights, or if they are always loaded, without values for them; see `Architecture`."""
    return architecture_of(recipe).build(recipe, modalities, classes)
