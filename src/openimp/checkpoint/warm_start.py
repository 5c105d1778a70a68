"""Starting a training run from the weights of another model, for fine-tuning (`train.init`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import find_model, model_folder, read_config, weights_folder
from openimp.common.errors import UserError
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import Embedder
from openimp.recipe.file import differences, flat
from openimp.recipe.schema import Recipe

SAME = ("width", "layers", "heads", "mlp_dim", "qk_norm", "embed_dim", "moe.experts", "moe.layers")
"""Keys of `model` that must be the same in both models: they determine the shape or the meaning of a tensor."""


@dataclass(frozen=True)
class WarmStart:
    """A saved model that fits a recipe."""

    folder: Path
    classes: dict[str, list[Any]]
    stems: frozenset[str]

    def load(self, model: Embedder, classes: Classes) -> str:
        """Loads the EMA if there is one, else the weights, and returns a line that lists the loaded parts.

        The encoder is always loaded. A stem, projection head or temperature is loaded if both models have one of this
        name. A classification head is loaded if it also has the same classes in the same order. All other parts keep
        their initial values. Each rank reads only its shards.
        """
        folder = weights_folder(self.folder)
        theirs, ours = dcp.metadata(folder), model.state_dict()
        their_parts, our_parts = (dict.fromkeys(map(_part, names)) for names in (theirs, ours))
        differing = {f"classifiers.{head}" for head, values in self.classes.items() if classes.get(head) != values}
        loaded = {"encoder", *their_parts} - differing
        chosen = {}
        for name, tensor in ours.items():
            if _part(name) in loaded:
                found = list(theirs[name].size) if name in theirs else "missing"
                if found != list(tensor.shape):
                    raise UserError(f"train.init: {self.folder}: {name} is {found} there, {list(tensor.shape)} here")
                chosen[name] = tensor
        dcp.fill(folder, chosen)
        lists = {
            "loaded": [part for part in our_parts if part in loaded],
            "new": [part for part in our_parts if part not in loaded],
            "left behind": [part for part in their_parts if part not in our_parts or part in differing],
        }
        text = "; ".join(f"{title}: {', '.join(parts) or 'nothing'}" for title, parts in lists.items())
        return f"starts from {self.folder}; {text}"


def open_warm_start(recipe: Recipe, modalities: Modalities) -> WarmStart | None:
    """Opens the model that `train.init` names, and loads what its modalities learned into those of the same stem.

    An encoder or a shared stem with other options is a UserError.
    """
    init = recipe.train.init or recipe.model.wrap
    if init is None:
        return None
    try:
        # Unlike `openimp.load`, this requires "hub:", so that a mistyped path never loads a stranger's model.
        folder = find_model(init) if init.startswith("hub:") else model_folder(Path(init))
        before, classes, learned = read_config(folder)
        stems = frozenset(recipe.modalities) & frozenset(before.modalities)
        if bool(before.model.wrap) != bool(recipe.model.wrap):
            there, here = before.model.wrap or "no other model", recipe.model.wrap or "no other model"
            raise UserError(f"{folder}: its recipe wraps {there}, and this one wraps {here}")
        # The modalities of a wrapped model only read media differently with other options.
        same = frozenset() if recipe.model.wrap else stems
        for key, there, here in differences(_identity(before, same), _identity(recipe, same)):
            raise UserError(f"{folder}: {key} is {there!r} there, {here!r} here")
        for modality in modalities.values():
            if modality.stem in stems:
                modality.load_state(learned)
    except UserError as error:
        raise UserError(f"train.init: {error}") from None
    return WarmStart(folder, classes, stems)


def _identity(recipe: Recipe, stems: Iterable[str]) -> dict[str, Any]:
    """The options that must be the same in two models for their weights to mean the same."""
    model = flat(recipe.model.model_dump(mode="json"))
    configs = {stem: recipe.modalities[stem].model_dump(mode="json") for stem in stems}
    return {f"model.{key}": model.get(key) for key in SAME} | flat({"modalities": configs})


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to: the encoder, or a stem, head or temperature."""
    return "encoder" if name.startswith("encoder.") else ".".join(name.split(".")[:2])
