"""Starting a training from another model's weights, for fine-tuning (`train.init`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import find_model, model_folder, read_config, read_weights
from openimp.common.errors import UserError
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import Embedder
from openimp.recipe.file import differences, flat
from openimp.recipe.schema import Recipe

SAME = ("width", "layers", "heads", "mlp_dim", "qk_norm", "embed_dim", "moe.experts", "moe.layers")
"""Keys of `model` that must not change, because they determine the shape or the meaning of a tensor."""


@dataclass(frozen=True)
class WarmStart:
    """A model to start from, which fits a recipe. The modalities of the `stems` that they share have loaded what they
    learned, such as a tokenizer. `classes` are those of the model's classification heads."""

    folder: Path
    classes: dict[str, list[Any]]
    stems: frozenset[str]

    def load(self, model: Embedder, classes: Classes) -> str:
        """Loads the weights into a model and returns a line that lists what was loaded. The moving average is used if
        there is one.

        The encoder is loaded, and so is each stem, projection and temperature of the same name. A classification head
        is loaded only if it has the same classes in the same order. Everything else keeps its initial values.
        """
        tensors, ours = read_weights(self.folder), model.state_dict()
        there, here = (dict.fromkeys(map(_part, names)) for names in (tensors, ours))
        other = {f"classifiers.{head}" for head, values in self.classes.items() if classes.get(head) != values}
        loaded = {"encoder", *there} - other
        chosen = {}
        for name, tensor in ours.items():
            if _part(name) in loaded:
                found = list(tensors[name].shape) if name in tensors else "missing"
                if found != list(tensor.shape):
                    raise UserError(f"train.init: {self.folder}: {name} is {found} there, {list(tensor.shape)} here")
                chosen[name] = tensors[name]
        model.load_state_dict(chosen, strict=False)
        lists = {
            "loaded": [part for part in here if part in loaded],
            "new": [part for part in here if part not in loaded],
            "left behind": [part for part in there if part not in here or part in other],
        }
        text = "; ".join(f"{title}: {', '.join(parts) or 'nothing'}" for title, parts in lists.items())
        return f"starts from {self.folder}; {text}"


def open_start(recipe: Recipe, modalities: Modalities) -> WarmStart | None:
    """Opens the model of the recipe's `train.init`, and loads what the modalities of shared stems learned.

    An encoder or a shared modality with other options is a UserError.
    """
    if recipe.train.init is None:
        return None
    try:
        init = recipe.train.init
        # Unlike `openimp.load`, this requires "hub:", so that a mistyped path never starts from a stranger's model.
        folder = find_model(init) if init.startswith("hub:") else model_folder(Path(init))
        before, classes, learned = read_config(folder)
        stems = frozenset(recipe.modalities) & frozenset(before.modalities)
        for key, there, here in differences(_identity(before, stems), _identity(recipe, stems)):
            raise UserError(f"{folder}: {key} is {there!r} there, {here!r} here")
        for modality in modalities.values():
            if modality.stem in stems:
                modality.load_state(learned)
    except UserError as error:
        raise UserError(f"train.init: {error}") from None
    return WarmStart(folder, classes, stems)


def _identity(recipe: Recipe, stems: Iterable[str]) -> dict[str, Any]:
    """The options that two models must share so that a weight means the same in both."""
    model = flat(recipe.model.model_dump(mode="json"))
    configs = {stem: recipe.modalities[stem].model_dump(mode="json") for stem in stems}
    return {f"model.{key}": model.get(key) for key in SAME} | flat({"modalities": configs})


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to: the encoder, or one stem, head or temperature."""
    return "encoder" if name.startswith("encoder.") else ".".join(name.split(".")[:2])
