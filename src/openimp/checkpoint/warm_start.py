"""Starting from another model's weights, for fine-tuning: `train.init`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import download, model_folder, read_config, weights
from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.model.embedder import Embedder
from openimp.recipe.file import flat
from openimp.recipe.schema import Recipe

SAME = ("width", "layers", "heads", "mlp_dim", "qk_norm", "embed_dim", "moe.experts", "moe.layers")
"""Keys of `model` that decide on a tensor's shape, or on what it means. Others, such as a routing, may change."""


@dataclass(frozen=True)
class WarmStart:
    """A model to start from, that suits a recipe.

    Attributes:
        folder: where it is.
        classes: the classes of each of its classification heads.
        stems: those that it shares with the recipe, whose modalities know what they had learned.
    """

    folder: Path
    classes: dict[str, list[Any]]
    stems: frozenset[str]

    def load(self, model: Embedder, classes: Mapping[str, list[Any]]) -> str:
        """Puts the weights in place, the averaged ones where there are any, and tells in one line what came of it.

        The encoder is taken, and each stem, projection and temperature that has the same name; a classification head
        only if it has the same classes in the same order. What else the model has stays as it is.

        Raises:
            UserError: the file is damaged, or a tensor is missing or has another shape.
        """
        tensors, ours = weights(self.folder), model.state_dict()
        there, here = (dict.fromkeys(map(_part, names)) for names in (tensors, ours))
        other = {f"classifiers.{head}" for head, values in self.classes.items() if classes.get(head) != values}
        taken = {"encoder", *there} - other
        chosen = {}
        for name, tensor in ours.items():
            if _part(name) in taken:
                found = list(tensors[name].shape) if name in tensors else "missing"
                if found != list(tensor.shape):
                    raise UserError(f"train.init: {self.folder}: {name} is {found} there, {list(tensor.shape)} here")
                chosen[name] = tensors[name]
        model.load_state_dict(chosen, strict=False)
        told = {
            "loaded": [part for part in here if part in taken],
            "new": [part for part in here if part not in taken],
            "left behind": [part for part in there if part not in here or part in other],
        }
        text = "; ".join(f"{how}: {', '.join(parts) or 'nothing'}" for how, parts in told.items())
        return f"starts from {self.folder}; {text}"


def open_start(recipe: Recipe, modalities: Mapping[str, Modality]) -> WarmStart | None:
    """Opens the recipe's `train.init`, and gives the modalities that it shares with it what theirs have learned.

    Raises:
        UserError: there is no model, or its encoder or a shared modality has other options.
    """
    if recipe.train.init is None:
        return None
    try:
        init = recipe.train.init
        # Not any OWNER/NAME, as openimp.load: a mistyped path would start from a stranger's model.
        folder = download(init) if init.startswith("hub:") else model_folder(Path(init))
        before, classes, learned = read_config(folder)
        stems = frozenset(recipe.modalities) & frozenset(before.modalities)
        ours, theirs = _identity(recipe, stems), _identity(before, stems)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UserError(f"{folder}: {key} is {theirs.get(key)!r} there, {ours.get(key)!r} here")
        for modality in modalities.values():
            if modality.stem in stems:
                modality.load_state(learned)
    except UserError as error:
        raise UserError(f"train.init: {error}") from None
    return WarmStart(folder, classes, stems)


def _identity(recipe: Recipe, stems: Iterable[str]) -> dict[str, Any]:
    """All that two models must have in common for the weights of one to mean the same in the other."""
    model = flat(recipe.model.model_dump(mode="json"))
    configs = {stem: recipe.modalities[stem].model_dump(mode="json") for stem in stems}
    return {f"model.{key}": model.get(key) for key in SAME} | flat({"modalities": configs})


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to: the encoder, or one stem, head or temperature."""
    return "encoder" if name.startswith("encoder.") else ".".join(name.split(".")[:2])
