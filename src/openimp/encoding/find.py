"""Finds models by their names, also public ones."""

import re
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from openimp.checkpoint.find import bundled_names, find_own_model
from openimp.checkpoint.folder import FORMAT, describe_model, save_model
from openimp.common.cache import cached, stable_hash
from openimp.common.names import BUNDLED, CONSE, OPEN_CLIP, PUBLIC, Name, absolute_name, single_names
from openimp.encoding.conse import SIMILARITY_TEMPERATURE
from openimp.encoding.frozen import open_encoder
from openimp.encoding.libraries import open_clip_names, open_open_clip
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe

LAYOUT = 1
"""Version of what `_write_public` writes. Folders of other versions are not used."""
TRAINING_DATA = f"{OPEN_CLIP}:training-data"
"""The source of a model as its authors published it. It cannot be read."""


def find_model(name: str | Path) -> Path:
    """The folder of a model of openimp, as `find_own_model` finds it, or of a public model.

    For a public model, a folder is written into openimp's cache. The model in it has no encoder. It reads pictures,
    videos and texts with the public model as a frozen tower, which it only names.
    """
    if not isinstance(name, str | Path) or Name.parse(name).scheme not in PUBLIC:
        return find_own_model(name)
    # The model in the cache must not depend on the current folder.
    public_name = absolute_name(str(name), Path.cwd())

    def checked(folder: Path) -> Path:
        describe_model(folder).recipe.validated()  # An error if an older version of openimp has written it.
        return folder

    # With the fingerprint, because the files behind a name may change.
    key = stable_hash([LAYOUT, FORMAT, public_name, _open_public(public_name).fingerprint])
    return cached("public", key, checked, lambda folder: _write_public(public_name, folder))


def is_public(recipe: Recipe) -> bool:
    """Whether the recipe is that of a public model, which openimp did not train."""
    return any(source.path == TRAINING_DATA for source in recipe.sources.values())


def list_models(pattern: str = "*") -> list[str]:
    """The names of the models that come with openimp, and with open_clip if it is installed, like `timm.list_models`.

    `pattern` has the wildcards of the shell: `list_models("*SigLIP2*")`.
    """
    names = [f"{BUNDLED}:{name}" for name in bundled_names()]
    if find_spec("open_clip"):
        names += open_clip_names()
    return [name for name in names if fnmatchcase(name, pattern)]


class _Public(NamedTuple):
    """What openimp must know of a public model to use it."""

    features: int
    fingerprint: str
    temperature: Tensor | float  # of its cosines
    bias: Tensor | None  # of its logits; None unless it was trained with the sigmoid loss


def _open_public(name: str) -> _Public:
    if Name.parse(name).scheme == CONSE:
        encoder = open_encoder(name, "text")
        return _Public(encoder.features, encoder.fingerprint, SIMILARITY_TEMPERATURE, None)
    opened = open_open_clip(name)
    temperature = (-opened.network.logit_scale).exp()
    return _Public(opened.features, opened.fingerprint, temperature, opened.network.logit_bias)


def _write_public(name: str, folder: Path) -> None:
    """Writes the folder of `find_model` for a public model. It keeps the temperature and the bias of that model."""
    public = _open_public(name)
    recipe = _recipe_of(name, public.features, "softmax" if public.bias is None else "sigmoid")
    config = recipe.to_config({})
    modalities = config.make_modalities()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # The heads are hashed to recognize the model, so they must always be the same.
        model = IMP(config, modalities)
    (temperature,) = model.fp32_modules()
    with torch.no_grad():
        temperature.temperature.copy_(torch.as_tensor(public.temperature))
        if public.bias is not None:
            temperature.bias.copy_(public.bias)
    save_model(folder, model, config, modalities, recipe.to_yaml())


def _recipe_of(name: str, features: int, loss: str) -> Recipe:
    """The recipe of a model that openimp did not train: its modalities, and no data that can be read."""
    title = "-".join(map(_title, single_names(name)))
    tasks = {"pictures": "image", "clips": "video"}
    if Name.parse(name).scheme == CONSE:
        del tasks["clips"]
    task = {"source": "unknown", "objectives": [{"type": "contrastive", "loss": loss}]}
    return Recipe.build(
        {
            "name": re.sub(r"[^\w.-]+", "-", title).strip("-.") or "open_clip",
            "model": {"width": features, "embed_dim": features, "layers": 0, "heads": 1, "space": "joint"},
            "modalities": {"vision": {"tower": name}, "text": {"tower": name}},
            "sources": {"unknown": {"path": TRAINING_DATA}},
            "tasks": {
                task_name: {**task, "inputs": {media: media, "text": "text"}} for task_name, media in tasks.items()
            },
        }
    )


def _title(name: str) -> str:
    """A title that does not tell the folders of this machine."""
    is_local = Name.parse(name).folder is not None
    return Path(name).name if is_local else name.rpartition(":")[2]
