"""Starting a training run from the weights of another model, for fine-tuning (`train.init`)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.find import find_own_model
from openimp.checkpoint.folder import RECIPE, read_config, require_finite, weights_folder
from openimp.checkpoint.public_vit import RGB, ViTWeights
from openimp.common.errors import UserError
from openimp.common.modality import Classes, Modalities, Modality
from openimp.common.names import CONSE, OPEN_CLIP, SENTENCE_TRANSFORMERS, TIMM, Name
from openimp.common.protocols import file_copies, load_learned
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import run_on_rank_zero
from openimp.recipe.file import differences, flat
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe

SAME = (
    "width", "layers", "heads", "mlp_dim", "qk_norm", "bias", "gelu", "embed_dim", "modality_specific_layers",
    "moe.experts", "moe.layers",
)  # fmt: skip
"""Keys of `model` that must be the same in both models: they determine the shape or the meaning of a tensor."""

MAX_LISTED = 10
"""Maximum number of options that an error lists. Models with different modalities differ in dozens."""


class SavedWeights:
    """The EMA in a checkpoint if it has one, else the weights."""

    def __init__(self, folder: Path, shown_name: str) -> None:
        """`shown_name` is for messages."""
        self.folder = folder
        self.shown_name = shown_name
        self.shapes = dcp.shapes(weights_folder(folder))

    def __str__(self) -> str:
        return self.shown_name

    def may_lack(self, name: str) -> bool:
        """Whether the tensor `name` of the new model keeps its initial values if these weights lack it.

        True for a stem's own experts and modality-specific blocks, if the saved model lacks that stem's.
        """
        of_stem = re.search(r"\.(groups|own)\.\w+\.", name)
        return of_stem is not None and not any(of_stem[0] in saved for saved in self.shapes)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors in place."""
        dcp.fill(weights_folder(self.folder), tensors)


@dataclass(frozen=True)
class WarmStart:
    """Weights that fit a recipe.

    Attributes:
        saved_classes: the classes of each classification head of the saved model.
        stems: names of the stems for which the modalities have loaded the other model's state, such as its tokenizer.
    """

    weights: SavedWeights | ViTWeights
    saved_classes: dict[str, list[Any]]
    stems: frozenset[str]

    def load(self, model: Embedder, classes: Classes) -> str:
        """Loads the weights, and returns a line that lists the loaded parts. Every rank must call this.

        The encoder is always loaded, except what the weights `may_lack`. A stem, projection head or temperature is
        loaded if both models have one of this name. A classification head is loaded if it also has the same classes in
        the same order. All other parts keep their initial values, and are listed as new.
        """
        saved_shapes = self.weights.shapes
        tensors = model.state_dict()
        saved_parts = dict.fromkeys(map(_part, saved_shapes))
        model_parts = dict.fromkeys(map(_part, tensors))
        changed_heads = {
            f"classifiers.{head}" for head, values in self.saved_classes.items() if classes.get(head) != values
        }
        loadable_parts = {"encoder", *saved_parts} - changed_heads
        loaded_tensors = {}
        new_parts_and_tensors = [part for part in model_parts if part not in loadable_parts]
        for name, tensor in tensors.items():
            if _part(name) not in loadable_parts:
                continue
            if name not in saved_shapes and self.weights.may_lack(name):
                new_parts_and_tensors.append(re.sub(r"\.\d+", ".*", name))  # One entry for all layers.
                continue
            saved_shape = list(saved_shapes[name]) if name in saved_shapes else "missing"
            shape = list(tensor.shape)
            if saved_shape != shape:
                raise UserError(f"train.init: {self.weights}: {name} is {saved_shape} there, {shape} here")
            loaded_tensors[name] = tensor
        self.weights.fill(loaded_tensors)
        require_finite(loaded_tensors, f"train.init: {self.weights}")
        parts_by_title = {
            "loaded": [part for part in model_parts if part in loadable_parts],
            "new": [*dict.fromkeys(new_parts_and_tensors)],
            "left behind": [part for part in saved_parts if part not in model_parts or part in changed_heads],
        }
        text = "; ".join(f"{title}: {', '.join(parts) or 'nothing'}" for title, parts in parts_by_title.items())
        return f"starts from {self.weights}; {text}"


def open_warm_start(recipe: Recipe, modalities: Modalities) -> WarmStart | None:
    """Opens the model that `train.init` names, and loads what its modalities learned into those of the same stem.

    An encoder or a shared stem with other options is a UserError.
    """
    init = recipe.train.init
    if init is None:
        return None
    try:
        scheme = Name.parse(init).scheme
        if scheme == TIMM:
            return _open_vit(init, recipe, modalities)
        if scheme in (OPEN_CLIP, SENTENCE_TRANSFORMERS, CONSE):
            raise UserError(
                f"{init}: the encoder can start from a model of timm, not of {scheme}; expected timm:NAME, such as "
                f"timm:vit_base_patch16_siglip_224.v2_webli. A model of {scheme} can be a tower of the recipe's "
                "modalities"
            )
        return _open_saved(init, recipe, modalities)
    except UserError as error:
        raise UserError(f"train.init: {error}") from None


def _open_saved(init: str, recipe: Recipe, modalities: Modalities) -> WarmStart:
    if Name.parse(init).scheme is None:  # Other ranks may not see the newest checkpoint of a run yet.
        folder = Path(run_on_rank_zero(lambda: str(find_own_model(init))))
    else:
        folder = find_own_model(init)
    saved_config, learned, _ = read_config(folder)
    stems = frozenset(recipe.modalities) & frozenset(saved_config.modalities)
    shared = [modality for modality in modalities.values() if modality.stem in stems]
    differing = differences(_identity(saved_config, shared), _identity(recipe, shared))
    if differing:
        more = f", and {len(differing) - MAX_LISTED} more" if len(differing) > MAX_LISTED else ""
        advice = f"copy model and modalities from {folder / RECIPE}"
        raise UserError(f"{folder}: {_listed(differing[:MAX_LISTED])}{more}; {advice}")
    for modality in shared:
        for option in file_copies(modality):
            _check_file_copy(folder, modality, option, learned)
    load_learned(shared, learned)
    weights = SavedWeights(folder, str(folder) if Name.parse(init).scheme is None else init)
    return WarmStart(weights, saved_config.classes, stems)


def _check_file_copy(folder: Path, modality: Any, option: str, learned: Mapping[str, str]) -> None:
    """Checks that a file that the recipe names, such as a tokenizer, has the content that the model was trained with.

    A file that is not there any more is not needed.
    """
    file = getattr(modality.config, option)
    if file and Path(file).exists():
        modality.fit(())
        ours = modality.state()
        modality.load_state(learned)
        if modality.state() != ours:
            key = f"modalities.{modality.stem}.{option}"
            raise UserError(f"{folder}: was trained with another file than {key} names; leave that key out")


def _open_vit(init: str, recipe: Recipe, modalities: Modalities) -> WarmStart:
    if recipe.model.moe:
        raise UserError(f"{init}: a public vision Transformer is dense; set model.moe: null")
    weights = ViTWeights(init, modalities)
    needed: dict[str, dict[str, Any]] = {"model": weights.model_options(), "modalities": {}}
    for modality in modalities.values():
        spec = modality.stem_spec()
        if spec.patch and spec.patch[-1] == RGB:
            options = weights.stem_options(recipe.modalities[modality.stem])
            needed["modalities"][modality.stem] = options
    needed_values = flat(needed)
    recipe_values = flat(recipe.to_dict())
    differing = differences(needed_values, {key: recipe_values[key] for key in needed_values})
    if differing:
        lines = [f"{init}: {_listed(differing)}; write into the recipe:"]
        changed = recipe.model_dump(mode="json", exclude_defaults=True)  # The recipe's other options stay.
        model = changed.get("model", {}) | needed["model"]
        stems = {stem: options | needed["modalities"].get(stem, {}) for stem, options in changed["modalities"].items()}
        stems = {stem: options for stem, options in stems.items() if options}
        for key, value in {"model": model, "modalities": stems}.items():
            flow = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
            lines.append(f"{key}: {flow.strip()}")
        raise UserError("\n".join(lines))
    return WarmStart(weights, {}, frozenset())


def _listed(differing: Iterable[tuple[str, Any, Any]]) -> str:
    """Options that the weights and the recipe do not share, with both values."""
    return ", ".join(f"{key} is {theirs!r} there, {ours!r} here" for key, theirs, ours in differing)


def _identity(config: Recipe | ModelConfig, modalities: Iterable[Modality]) -> dict[str, Any]:
    """The options that must be the same in two models for their weights to mean the same, with those of the stems of
    these modalities."""
    copied_options = {modality.stem: {*file_copies(modality)} for modality in modalities}
    model = flat(config.model.model_dump(mode="json"))
    if config.model.moe and config.model.moe.experts_by_stem:
        # Only the groups of these stems must agree. Other groups stay new, or are left behind.
        by_stem = config.model.moe.experts_by_stem
        model["moe.experts"] = ", ".join(f"{stem}: {by_stem[stem]}" for stem in sorted(copied_options))
    # Without files that are compared by their content, because they may be in several places.
    configs = {
        stem: config.modalities[stem].model_dump(mode="json", exclude=options)
        for stem, options in copied_options.items()
    }
    return {f"model.{key}": model.get(key) for key in SAME} | flat({"modalities": configs})


def _part(name: str) -> str:
    """The part of the model that a tensor belongs to: the encoder, or a stem, head or temperature."""
    return "encoder" if name.startswith("encoder.") else ".".join(name.split(".")[:2])
