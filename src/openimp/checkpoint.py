"""Checkpoints: a folder each, written whole or not at all, that `openimp.load` opens as it is.

    step-00001000/
      model.safetensors       weights (the averaged ones too, in ema.safetensors, where the recipe keeps them)
      config.json             the resolved recipe, the classes of each head, the class of the model, the version of this
                              layout
      tokenizer.json ...      what the modalities learned
      optimizer.safetensors   the optimisers' moments and counts, by parameter name
      state.json              where the training stands, which loop made it, and from which data
      manifest.json           size and SHA-256 of every other file, so that damage is noticed before a run goes on

Nothing here is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openimp.distributed import like
from openimp.errors import UserError
from openimp.modalities import Modality, modalities_of
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.recipe import Recipe

FORMAT = 2
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
BEST = "best"


class NotSaved(UserError):
    """A checkpoint could not be written, for the disk is full or broken; those before it are as they were."""


def save_model(
    folder: Path, model: Embedder, recipe: Recipe, modalities: Mapping[str, Modality], classes: Mapping[str, list[Any]]
) -> None:
    """Writes what `load_model` reads: weights, configuration, and what the modalities learned."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    name = type(model).__name__
    config = {"format": FORMAT, "model": name, "recipe": recipe.to_dict(), "classes": dict(classes)}
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
    for modality in modalities.values():
        for name, text in modality.state().items():
            (folder / name).write_text(text, encoding="utf-8")


def load_model(folder: Path) -> tuple[IMP, Recipe, dict[str, Modality], dict[str, list[Any]]]:
    """The model of a folder that `save_model` wrote, in evaluation mode, with averaged weights where there are any.

    A file that was cut short is refused; a flipped bit in the weights is not seen, see `verify`.

    Raises:
        UserError: the folder holds no model, or one that does not fit its configuration.
    """
    recipe, classes, learned = read_config(folder)
    modalities = modalities_of(recipe)
    for modality in modalities.values():
        modality.load_state(learned)
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
    load_weights(model, weights_file(folder), assign=True)
    return model.eval(), recipe, modalities, classes


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
        raise UserError(f"{file}: format {config.get('format')!r}, this version of openimp reads format {FORMAT}")
    found = config.get("model")  # Older ones do not say.
    if model and found not in (None, model.__name__):
        raise UserError(
            f"{folder}: holds {found}, expected {model.__name__}; a study's peers are loaded by openimp.study alone"
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


def weights_file(folder: Path) -> Path:
    """The weights to use of a folder: the averaged ones where there are any."""
    averaged = folder / "ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def load_weights(model: Embedder, file: Path, assign: bool = False) -> None:
    """Loads a safetensors file that must hold exactly the model's tensors."""
    tensors = read_tensors(file)
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        raise UserError(f"{file}: does not fit the model: {' '.join(str(error).split())[:300]}") from None


def save_checkpoint(
    run: Path,
    step: int,
    keep: int,
    state: Mapping[str, Any],
    moments: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor] | None,
    model: Embedder,
    recipe: Recipe,
    modalities: Mapping[str, Modality],
    classes: Mapping[str, list[Any]],
) -> Path:
    """Writes one checkpoint beside the others, moves it into place, and removes all but the last `keep` up to it and
    the one that is marked as the best.

    Raises:
        NotSaved: it cannot be written. Nothing of it is left.
    """
    folder = folder_of(run, step)
    draft = folder.with_name(f".{folder.name}.tmp")
    try:
        for left in folder.parent.glob(".step-*"):  # by a crash
            shutil.rmtree(left)
        draft.mkdir(parents=True)
        save_model(draft, model, recipe, modalities, classes)
        if averaged is not None:
            save_file(dict(averaged), draft / "ema.safetensors")
        save_file(dict(moments), draft / "optimizer.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
        manifest = {file.name: _facts(file) for file in sorted(draft.iterdir())}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in draft.iterdir():
            _sync(file)
        if folder.exists():  # Damaged, or the run would have gone on from it.
            _remove(folder)
        os.replace(draft, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise NotSaved(f"{folder}: could not be saved: {reason}; older checkpoints are untouched") from None
    # One of a later step is damaged, or the run would have gone on from it. Left there, it would pass for the newest.
    found, best = checkpoints(run), (folder.parent / BEST).resolve().name
    earlier = [path for path in found if path <= folder]
    kept = {*earlier[-keep:], *(path for path in earlier if path.name == best)}
    for other in found:
        if other not in kept:
            _remove(other)
    return folder


def mark_best(run: Path, step: int) -> None:
    """Lets `checkpoints/best` lead to the checkpoint of a step, if there is one."""
    folder = folder_of(run, step)
    if folder.exists():
        draft = folder.with_name(f".{BEST}.tmp")
        draft.unlink(missing_ok=True)
        draft.symlink_to(folder.name)
        os.replace(draft, folder.with_name(BEST))


def verify(folder: Path) -> None:
    """Reads all of a checkpoint and compares it with its manifest.

    Only a run that goes on asks for this. Whoever uses a model would wait for gigabytes to be hashed; there it is
    enough that safetensors refuses a file of another length than its header says.

    Raises:
        UserError: a file is missing or is not what was saved. It names the first one.
    """
    file = folder / MANIFEST
    if not file.exists() and "sources" not in read_state(folder):
        return  # Older versions of openimp wrote neither.
    for name, saved in _read_object(file).items():
        path = folder / name
        try:
            found = _facts(path)
        except FileNotFoundError:
            raise UserError(f"{path}: missing") from None
        except OSError as error:
            raise UserError(f"{path}: damaged: {error.strerror}") from None
        if found != saved:
            raise UserError(f"{path}: damaged: its {found['size']:,} bytes are not those that were saved")


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
    """Puts moments and averages back, to a model that has its weights already, and returns the training's state."""
    if averaged is not None:
        for name, tensor in read_tensors(folder / "ema.safetensors").items():
            averaged[name].copy_(like(tensor, averaged[name]))
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in read_tensors(folder / "optimizer.safetensors").items():
        name, _, field = key.partition("|")
        parameter = parameters[name]
        # Counts stay on the CPU unless the optimiser is fused on an accelerator, where they live beside the moments.
        # Temperatures were scalars once.
        value = value if field == "step" else value.reshape(parameter.shape)
        owner[parameter].state.setdefault(parameter, {})[field] = like(value, parameter)
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
    """The folder with the weights that a path means: itself, or the newest checkpoint of a run."""
    if (path / "config.json").exists():
        return path
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path}: no model here (a run with a checkpoint, or a folder with config.json)")
    return found[-1]


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
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: damaged: {error}") from None


def _facts(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with file.open("rb") as stream:
        return {"size": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _remove(folder: Path) -> None:
    """Moved aside first: a crash may not leave half of it in its place."""
    aside = folder.with_name(f".{folder.name}.old")
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
