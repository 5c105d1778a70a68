"""Checkpoint folders: their layout, and how to load a model or a training run from them and verify them.

    step-00001000/
      model/          the weights, in safetensors files
      ema/            their moving average (EMA), if the recipe asks for it; `load_model` prefers it to model/
      optimizer/      the optimizer state; the tensors are called PARAMETER|FIELD
      config.json     the version of this layout, the class of the model, and its `ModelConfig`
      recipe.yaml     the recipe with all defaults; a model is used without it
      tokenizer.json  what the text modality learned; other modalities write files of their own
      state.json      the step, the name of the training's `Variant`, fingerprints of the data, positions in streams
      manifest.json   size and SHA-256 of every other file; a run resumes only if all of them match

`saver` writes such a folder completely or not at all. Nothing is ever unpickled.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.lift import lift_6
from openimp.common.errors import UserError, counted, one_line
from openimp.common.folders import is_hidden
from openimp.common.modality import Modalities, Modality
from openimp.common.progress import notice
from openimp.common.protocols import file_copies, learned_files, load_learned
from openimp.common.safe_files import read_object, read_required, sha256
from openimp.common.schema import checked
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.model.init import SkipInit
from openimp.parallel.distributed import rank, run_on_all_ranks, world_size
from openimp.recipe.file import parse_mapping, to_yaml
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe

FORMAT = 8
"""Version of this layout and of the meaning of the weights. Formats 6 and 7 are read, too, and others are refused."""
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
BEST = "best"


class SavedRecipe(NamedTuple):
    """The recipe in a model's folder. Using the model needs no recipe, so only `validated` parses it."""

    text: str | None  # in YAML; None: no recipe
    file: Path  # paths in the recipe are relative to its folder

    def validated(self) -> Recipe:
        """The recipe. UserError if there is none, or if it has a key that this version of openimp does not know."""
        if self.text is None:
            raise UserError(f"{self.file}: missing; only embedding and search of files work without it")
        data = parse_mapping(self.text, self.file, "recipe")
        return Recipe.build(data, self.file.parent, str(self.file))


NO_RECIPE = SavedRecipe(None, Path(RECIPE))


class SavedModel(NamedTuple):
    """The content of a model's folder, without the weights."""

    config: ModelConfig
    modalities: dict[str, Modality]  # with what they learned
    recipe: SavedRecipe


def save_model(
    folder: Path, model: Embedder, config: ModelConfig, modalities: Modalities, recipe: str | None = None
) -> None:
    """Writes what `load_model` reads: weights, configuration, what the modalities learned, and the recipe if given."""
    files = text_files(model, config, modalities, recipe)  # First, because it may fail.
    dcp.save(folder / "model", dcp.stage(model.state_dict(), {}))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def text_files(
    model: Embedder, config: ModelConfig, modalities: Modalities, recipe: str | None = None
) -> dict[str, str]:
    """The text files of a model's folder, by name."""
    data = {"format": FORMAT, "class": type(model).__name__, **config.model_dump(mode="json")}
    name_file_copies(data, modalities)
    files = {CONFIG: json.dumps(data, indent=1, ensure_ascii=False), **learned_files(modalities.values())}
    return files if recipe is None else {**files, RECIPE: recipe}


def name_file_copies(data: dict[str, Any], modalities: Modalities) -> None:
    """Lets the options of a configuration or recipe name the copies in the model's folder instead of files, which may
    move. `data` is changed."""
    for modality in modalities.values():
        options = data["modalities"].get(modality.stem, {})
        options.update({option: copy for option, copy in file_copies(modality).items() if options.get(option)})


def load_model(folder: Path) -> tuple[Embedder, SavedModel]:
    """Loads the model of a checkpoint, or of a folder that `save_model` wrote, in evaluation mode.

    The weights are the EMA if the folder has one. A truncated file is refused. A flipped bit in the weights is found
    only by `verify`.
    """
    saved = describe_model(folder)
    # Without SkipInit, torch would import its compiler to initialize weights on the meta device, half a second of work.
    with torch.device("meta"), SkipInit():
        model = IMP(saved.config, saved.modalities)
    try:
        model.load_state_dict(read_weights(folder), assign=True)
    except RuntimeError as error:
        raise UserError(f"{weights_folder(folder)}: does not fit the model: {one_line(error)}") from None
    return model.eval(), saved


def describe_model(folder: Path) -> SavedModel:
    """Reads the content of a model's folder, without the weights.

    A model with more layers than the weights have tensors is refused. Creating a layer takes time and memory even on
    the meta device, and the configuration may be untrusted.
    """
    config, learned, recipe = read_config(folder)
    modalities = config.make_modalities()
    load_learned(modalities.values(), learned)
    layers = config.model.layers
    tensor_count = len(dcp.shapes(weights_folder(folder)))
    if layers > tensor_count:
        raise UserError(
            f"{folder}: config.json asks for {layers} layers, but the weights are only {tensor_count} tensors"
        )
    return SavedModel(config, modalities, recipe)


def read_config(folder: Path, any_class: bool = False) -> tuple[ModelConfig, dict[str, str], SavedRecipe]:
    """Reads the configuration of a model, what its modalities learned, by file name, and its recipe.

    With `any_class`, it may be a model of a study instead of `IMP`.
    """
    file = folder / CONFIG
    if not file.exists():
        raise UserError(f"{folder}: no model here; expected a run with a checkpoint, or a folder with config.json")
    data = read_object(file)
    recipe_file = folder / RECIPE
    recipe = SavedRecipe(read_required(recipe_file) if recipe_file.exists() else None, recipe_file)
    if data.get("format") == 6:
        try:
            recipe = SavedRecipe(to_yaml(data["recipe"]), file)
            data = lift_6(data)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: damaged: it cannot be read: {error!r}") from None
    # Format 7 had more keys, which the schemas list as `removed`.
    version = data.pop("format", None)
    if version is None:
        raise UserError(
            f"{folder}: is not a model of openimp; docs/names.md tells how models of other libraries are named"
        )
    if version not in (7, FORMAT):
        raise UserError(
            f"{file}: the model is in format {version}, and this version of openimp reads formats 6, 7 and 8 "
            "only; use the version that saved it, or train the model again"
        )
    model_class = data.pop("class", None)
    if not any_class and model_class != IMP.__name__:
        raise UserError(
            f"{folder}: holds {model_class}, expected {IMP.__name__}; only the study that trained it can load it"
        )
    not_learned = (CONFIG, "state.json", MANIFEST)
    # macOS adds files with names such as ._config.json to archives and to some disks.
    files = (path for path in folder.glob("*.json") if path.name not in not_learned and not path.name.startswith("."))
    learned = {path.name: read_required(path) for path in files}
    return checked(ModelConfig, data, str(file), folder), learned, recipe


def saved_step(folder: Path) -> int | None:
    """The step at which a training run saved this folder, or None if `save_model` wrote it."""
    return read_state(folder)["step"] if (folder / "state.json").exists() else None


def read_state(folder: Path) -> dict[str, Any]:
    """Reads state.json."""
    file = folder / "state.json"
    state = read_object(file)
    if not isinstance(state.get("step"), int):
        raise UserError(f"{file}: damaged: step is missing or is not an integer")
    return state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The EMA if there is one, else the weights: whole tensors by name. Those stored in fp16 are returned in fp32."""
    weights = dcp.read(weights_folder(folder))
    require_finite(weights, weights_folder(folder))
    return {name: weight.float() if weight.dtype is torch.float16 else weight for name, weight in weights.items()}


def require_finite(weights: Mapping[str, Tensor], source: object) -> None:
    """UserError if a weight is not a finite number. All that a model computes with it could be NaN.

    It reads each weight once, as using it does: weights of a file are only mapped into memory until then.
    """
    for name, weight in weights.items():
        if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise UserError(
                f"{source}: {name} has values that are not finite (NaN or infinite), so the model cannot be used; use "
                "an earlier checkpoint, or train it again"
            )


def weights_folder(folder: Path) -> Path:
    """The folder of the EMA if a checkpoint has one, else that of the weights."""
    ema = folder / "ema"
    return ema if ema.exists() else folder / "model"


def mark_best(run: Path, step: int) -> None:
    """Links `checkpoints/best` to the checkpoint of a step if that exists."""
    folder = checkpoint_folder(run, step)
    if folder.exists():
        draft = folder.with_name(f".{BEST}.tmp")
        draft.unlink(missing_ok=True)
        try:
            draft.symlink_to(folder.name)
        except OSError as error:  # On some network and USB disks. A later save may remove the checkpoint.
            notice(f"{folder}: is the best so far, but cannot be linked to: {error.strerror}")
            return
        best = folder.with_name(BEST)
        if best.is_dir() and not best.is_symlink():  # The run was copied by a program that follows links.
            shutil.rmtree(best)
        os.replace(draft, best)


def verify(folder: Path) -> None:
    """Compares all files of a checkpoint with its manifest. Each rank reads some of them.

    A difference is a UserError on all ranks. Only resuming does this, because hashing gigabytes would slow down every
    `load_model`.
    """
    run_on_all_ranks(lambda: _verify_share(folder))


def _verify_share(folder: Path) -> None:
    manifest = read_object(folder / MANIFEST)
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    # File managers and network file systems add hidden files and folders, which do not count.
    present = {path for path in paths if not is_hidden(path)} - {MANIFEST}
    for name in sorted(manifest.keys() | present)[rank() :: world_size()]:
        path = folder / name
        if name not in manifest:
            raise UserError(f"{path}: unknown: it is not in {MANIFEST}")
        if name not in present:  # Only files in the folder are opened: a manifest may name any other file.
            raise UserError(f"{path}: missing")
        try:
            entry = manifest_entry(path)
        except OSError as error:
            raise UserError(f"{path}: damaged: {error.strerror}") from None
        if entry != manifest[name]:
            size = counted(entry["size"], "byte")
            raise UserError(f"{path}: damaged: its size ({size}) or SHA-256 differs from the manifest")


def manifest_entry(file: Path) -> dict[str, Any]:
    """The size and SHA-256 of a file, as in the manifest."""
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def optimizer_state(model: Embedder, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The local shards of the optimizer state, by "PARAMETER|FIELD"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {}
    for optimizer in optimizers:
        for parameter, fields in optimizer.state.items():
            for field, value in fields.items():
                state[f"{names[parameter]}|{field}"] = value
    return state


def load_training_state(
    folder: Path, model: Embedder, optimizers: Sequence[torch.optim.Optimizer], ema: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Loads weights, EMA and optimizer state into this rank's shards, and returns the content of state.json."""
    dcp.load(folder / "model", model.state_dict())
    if ema is not None:
        dcp.load(folder / "ema", ema)
    parameters = dict(model.named_parameters())
    optimizer_of: dict[Tensor, torch.optim.Optimizer] = {}
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            optimizer_of |= dict.fromkeys(group["params"], optimizer)
    optimizer_tensors = {}
    for key in dcp.shapes(folder / "optimizer"):
        name, _, field = key.rpartition("|")  # The name of a parameter may have |, as a column of classes may.
        parameter = parameters.get(name)
        if parameter not in optimizer_of:
            raise UserError(f"{folder / 'optimizer'}: does not fit the model, which trains no parameter {name}")
        # Fused optimizers have the step count on the device of the parameter.
        on_device = torch.zeros((), device=parameter.device) if field == "step" else torch.empty_like(parameter)
        optimizer_tensors[key] = on_device
        optimizer_of[parameter].state.setdefault(parameter, {})[field] = on_device
    dcp.load(folder / "optimizer", optimizer_tensors)
    return read_state(folder)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first.

    If the process was killed while a checkpoint replaced that of the same step, the old one still has the name that
    `replaced_folder` gave it.
    """
    if not run.is_dir():
        return []
    folders: dict[str, Path] = {}
    # In this order, ".step-..." comes before "step-...", which counts if a step has both.
    for path in sorted((run / CHECKPOINTS).glob("*step-*")):
        if name := re.fullmatch(r"(step-\d+)|\.(step-\d+)\.replaced", path.name):
            folders[name[1] or name[2]] = path
    return sorted(folders.values(), key=step_of)  # Not by name: from 10**8 steps on, it has more digits.


def replaced_folder(folder: Path) -> Path:
    """The name of a checkpoint's folder while another one takes its place."""
    return folder.with_name(f".{folder.name}.replaced")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint of a step, which may not exist."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removesuffix(".replaced").rpartition("-")[2])
