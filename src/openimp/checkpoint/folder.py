"""Checkpoints: a folder each, written whole or not at all, that `openimp.load` opens as it is.

    step-00001000/
      model.safetensors       weights (the averaged ones too, in ema.safetensors, where the recipe keeps them); several
                              processes write their parts into model-00001-of-00002.safetensors and so on
      config.json             the resolved recipe, the classes of each head, the class of the model, the version of this
                              layout
      tokenizer.json ...      what the modalities learned
      optimizer.safetensors   the optimisers' moments and counts, by parameter name, in parts likewise
      state.json              where the training stands, which loop made it, and from which data
      manifest.json           size and SHA-256 of every other file, so that damage is noticed before a run goes on

Nothing here is ever unpickled. `saver` writes them.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openimp.checkpoint.shards import file_name, parts, read, there, write
from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.common.safe_files import read_text, refuse_links
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.parallel.distributed import agreed, rank, world
from openimp.recipe.schema import Recipe

FORMAT = 5
"""Version of this layout and of what weights mean. Formats up to 3 had other positions, heads and temperatures."""
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
BEST = "best"


def save_model(
    folder: Path, model: Embedder, recipe: Recipe, modalities: Mapping[str, Modality], classes: Mapping[str, list[Any]]
) -> None:
    """Writes what `load_model` reads: weights, configuration, and what the modalities learned."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write(folder / file_name("model"), tensors)
    for name, text in texts_of(model, recipe, modalities, classes).items():
        (folder / name).write_text(text, encoding="utf-8")


def texts_of(
    model: Embedder, recipe: Recipe, modalities: Mapping[str, Modality], classes: Mapping[str, list[Any]]
) -> dict[str, str]:
    """The configuration and what the modalities learned, by file name."""
    config = {"format": FORMAT, "model": type(model).__name__, "recipe": recipe.to_dict(), "classes": dict(classes)}
    learned = {name: text for modality in modalities.values() for name, text in modality.state().items()}
    return {"config.json": json.dumps(config, indent=1, ensure_ascii=False), **learned}


def load_model(folder: Path) -> tuple[IMP, Recipe, dict[str, Modality], dict[str, list[Any]]]:
    """The model of a folder that `save_model` wrote, in evaluation mode, with averaged weights where there are any.

    A file that was cut short is refused; a flipped bit in the weights is not seen, see `verify`.

    Raises:
        UserError: the folder holds no model, or one that does not fit its configuration.
    """
    recipe, classes, learned = read_config(folder)
    modalities = recipe.make_modalities()
    for modality in modalities.values():
        modality.load_state(learned)
    check_layers(folder, recipe)
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
    load_weights(model, folder, assign=True)
    return model.eval(), recipe, modalities, classes


def check_layers(folder: Path, recipe: Recipe) -> None:
    """Refuses a model if its configuration asks for more layers than its weights have tensors.

    Every block takes time and memory to make, even on the meta device, and their number is only a number in a file.

    Raises:
        UserError: it asks for more, or the weights are missing or damaged.
    """
    layers, tensors = recipe.model.layers, len(parts(folder, _used(folder)))
    if layers > tensors:
        raise UserError(f"{folder}: does not fit the model: {layers} layers in {tensors} tensors")


def read_config(
    folder: Path, model: type[Embedder] | None = IMP
) -> tuple[Recipe, dict[str, list[Any]], dict[str, str]]:
    """The recipe, the classes by head, and the modalities' learned state of a model folder.

    Raises:
        UserError: there is none, it is damaged, or its model is none of the class `model`.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no model here, expected a run or a folder with config.json")
    file = folder / "config.json"
    config = _read_object(file)
    if config.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {config.get('format')!r}, this version of openimp reads format {FORMAT}; "
            "train the model again, or use the version that saved it"
        )
    found = config.get("model")
    if model and found != model.__name__:
        raise UserError(
            f"{folder}: holds {found}, expected {model.__name__}; a study's peers are loaded by openimp.study.run alone"
        )
    for key in ("recipe", "classes"):
        if not isinstance(config.get(key), dict):
            raise UserError(f"{file}: {key} is missing, or no object")
    names = ("config.json", "state.json", MANIFEST)
    learned = {path.name: _read_text(path) for path in folder.glob("*.json") if path.name not in names}
    return Recipe.build(config["recipe"], folder, str(file)), config["classes"], learned


def saved_step(folder: Path) -> int | None:
    """The step at which a training saved this folder; None where a model was saved by itself."""
    return read_state(folder)["step"] if (folder / "state.json").exists() else None


def read_state(folder: Path) -> dict[str, Any]:
    """Where the training stood that saved this folder.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / "state.json"
    state = _read_object(file)
    if not isinstance(state.get("step"), int):
        raise UserError(f"{file}: damaged: step is missing, or no whole number")
    return state


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights to use of a folder, whole: the averaged ones where there are any.

    Raises:
        UserError: they are missing or damaged.
    """
    return read(folder, _used(folder))


def load_weights(model: Embedder, folder: Path, assign: bool = False) -> None:
    """Loads the weights to use of a folder, which must be exactly the model's tensors."""
    try:
        model.load_state_dict(weights(folder), assign=assign)
    except RuntimeError as error:
        file = folder / file_name(_used(folder))
        raise UserError(f"{file}: does not fit the model: {' '.join(str(error).split())[:300]}") from None


def _used(folder: Path) -> str:
    return "ema" if there(folder, "ema") else "model"


def mark_best(run: Path, step: int) -> None:
    """Lets `checkpoints/best` lead to the checkpoint of a step, if there is one."""
    folder = folder_of(run, step)
    if folder.exists():
        draft = folder.with_name(f".{BEST}.tmp")
        draft.unlink(missing_ok=True)
        draft.symlink_to(folder.name)
        os.replace(draft, folder.with_name(BEST))


def verify(folder: Path) -> None:
    """Reads all of a checkpoint and compares it with its manifest; of several processes each reads a share.

    Only a run that goes on asks for this. Whoever uses a model would wait for gigabytes to be hashed; there it is
    enough that safetensors refuses a file of another length than its header says.

    Raises:
        UserError: in all processes: a file is missing, is not what was saved, or was not saved at all. It names one.
    """
    agreed(lambda: _verify_share(folder))


def _verify_share(folder: Path) -> None:
    file = folder / MANIFEST
    # What begins with a dot comes from file managers and network file systems.
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    manifest = _read_object(file)
    for name in sorted(manifest.keys() | found)[rank() :: world()]:
        path = folder / name
        if name not in manifest:
            raise UserError(f"{path}: damaged: is not in {MANIFEST}")
        try:
            facts = facts_of(path)
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        except OSError as error:
            raise UserError(f"{path}: damaged: {error.strerror}") from None
        if facts != manifest[name]:
            raise UserError(f"{path}: damaged: its {facts['size']:,} bytes are not those that were saved")


def moments_of(model: Embedder, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' moments and counts, as they are sharded, by "parameter|moment"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": value
        for optimizer in optimizers
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_training(
    folder: Path, model: Embedder, optimizers: Sequence[torch.optim.Optimizer], averaged: dict[str, Tensor] | None
) -> dict[str, Any]:
    """Puts weights, averages and moments back, each process what it holds of them, and returns the training's state.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model.
    """
    from openimp.checkpoint.dcp import load

    load(folder, "model", model.state_dict())
    if averaged is not None:
        load(folder, "ema", averaged)
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    moments: dict[str, Tensor] = {}
    for optimizer in optimizers:
        optimizer.state.clear()
    for key in parts(folder, "optimizer"):
        name, _, field = key.partition("|")
        if name not in parameters:
            raise UserError(f"{folder / file_name('optimizer')}: does not fit the model: it has no parameter {name}")
        parameter = parameters[name]
        # A count lives beside the moments, for the optimisers are fused.
        moments[key] = torch.zeros((), device=parameter.device) if field == "step" else torch.empty_like(parameter)
        if parameter in owner:  # Else another process updates it.
            owner[parameter].state.setdefault(parameter, {})[field] = moments[key]
    load(folder, "optimizer", moments)
    return read_state(folder)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS).glob("step-*") if run.is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.name))


def folder_of(run: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder, which may be damaged inside."""
    return int(folder.name.removeprefix("step-"))


def model_folder(path: Path) -> Path:
    """The folder with the weights that a path means: itself, or the newest checkpoint of a run.

    Raises:
        UserError: there is none, or links lead out of it.
    """
    refuse_links(path)
    if (path / "config.json").exists():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path}: no model here (a run with a checkpoint, or a folder with config.json)")
    return found[-1]


def download(name: str) -> Path:
    """The folder of a model of the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION, downloaded or from its cache.

    Raises:
        UserError: the name is not of this form, or the model cannot be downloaded.
    """
    found = re.fullmatch(r"(?:hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not found:
        raise UserError(
            f"{name}: no such folder, and no model on the Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION)"
        )
    from huggingface_hub import snapshot_download

    allowed, ignored = ["*.json", "*.safetensors"], ["optimizer*"]
    try:
        folder = snapshot_download(found[1], revision=found[2], allow_patterns=allowed, ignore_patterns=ignored)
    except Exception as error:  # the hub's client raises its own errors, httpx's and OSError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {reason[0]}") from None
    return model_folder(Path(folder))


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: damaged: expected a JSON object")
    return found


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def facts_of(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with file.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
