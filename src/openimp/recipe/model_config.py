"""`ModelConfig`: the configuration of a trained model, without what only training needs, such as data and losses."""

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, model_validator

from openimp.common.device import Precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Modality
from openimp.common.schema import FolderName, Strict, base_folder, checked, unknown_key
from openimp.recipe.model import Model
from openimp.recipe.registry import modality_class, tower_class

TwoNames = Annotated[tuple[str, str], Field(strict=False)]


class ComparedPair(Strict):
    """Two modalities whose embeddings contrastive objectives compare."""

    removed = {"sigmoid": (False, True)}

    modalities: TwoNames
    """Their names, sorted."""


class ModelConfig(Strict):
    """All that a trained model is, besides its weights and what its modalities learned. `Recipe.to_config` makes it."""

    name: FolderName
    """The name of the recipe."""
    model: Model
    """The encoder and its embedding space."""
    modalities: dict[str, Any]
    """Options of each stem."""
    views: Annotated[dict[str, Any], Field(min_length=1)]
    """The modalities in the recipe's order, each with its view for inference (`Recipe.inference_view`)."""
    pairs: list[ComparedPair] = []
    """The pairs of modalities that are trained to agree, sorted."""
    distilled: list[TwoNames] = []
    """The modalities that learn from vectors, each with the one that it can be compared with."""
    classes: dict[str, list[Any]] = {}
    """The classes of each classification head."""
    precision: Precision = "auto"
    """`train.precision` of the recipe."""

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> "ModelConfig":
        fill_stems(self.modalities, self.views, self.model, "views", info)
        for name, modality in self.make_modalities().items():
            self.views[name] = checked_view(modality, self.views[name], f"views.{name}")
        for name in chain(*(pair.modalities for pair in self.pairs), *self.distilled):
            if name not in self.views:
                raise UserError(f"the model has no modality {name!r}{nearest(name, self.views)}")
        return self

    def make_modalities(self) -> dict[str, Modality]:
        """New instances of the modalities, by name."""
        return make_modalities(self.views, self.modalities)


def class_for(name: str, stems: Mapping[str, Any]) -> type[Modality]:
    """The class that reads a modality for a model. `stems` are the options of each stem, validated or not."""
    modality = modality_class(name)
    options = stems.get(modality.stem)
    has_tower = hasattr(options, "tower") or (isinstance(options, Mapping) and "tower" in options)
    return tower_class(name) if has_tower else modality


def make_modalities(names: Iterable[str], stems: dict[str, Any]) -> dict[str, Modality]:
    """New instances of modalities, by name. `stems` are the options of each stem."""
    classes = {name: class_for(name, stems) for name in names}
    return {name: modality(stems[modality.stem]) for name, modality in classes.items()}


def fill_stems(stems: dict[str, Any], names: Iterable[str], model: Model, location: str, info: ValidationInfo) -> None:
    """Validates the options of the modalities' stems in place, and adds defaults. `location` is that of the names."""
    try:
        configs = {modality_class(name).stem: class_for(name, stems).Config for name in names}
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    experts = model.moe.experts_by_stem if model.moe else {}
    for key, named_stems in (("modalities", stems), ("model.moe.experts", experts)):
        for stem in named_stems:
            if stem not in configs:
                raise UserError(f"{key}: {unknown_key(stem, configs)}")
    for stem in configs if experts else ():
        if stem not in experts:
            raise UserError(f"model.moe.experts: no number of experts for the stem {stem}")
    for stem, config in configs.items():
        stems[stem] = checked(config, stems.get(stem, {}), f"modalities.{stem}", base_folder(None, info))


def checked_view(modality: Modality, options: Any, location: str) -> Any:
    """A modality's view from its options, with defaults. UserError if it does not give whole tokens."""
    view = checked(modality.View, options, location)
    try:
        modality.check(view)
    except ValueError as error:
        raise UserError(f"{location}: {error}") from None
    return view
