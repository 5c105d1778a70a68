"""Converts models of open_clip to folders in openimp's layout, in openimp's cache. They are used like any model folder.

A name is open_clip:NAME/TAG, open_clip:hf-hub:OWNER/NAME, or open_clip:local-dir:FOLDER. The library itself finds and
downloads the weights. Weights that are not safetensors are read with `weights_only=True`, which runs no code.

The folder is made once. It is made again if it cannot be loaded, for example after a change of openimp's format, its
recipes or the library. The folder of a local model is also made again if one of the model's files has changed.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from safetensors import safe_open

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import FORMAT, load_model, text_files
from openimp.common.cache import cached, stable_hash
from openimp.common.errors import UserError, library_errors, nearest
from openimp.common.names import LOCAL, OPEN_CLIP, Name
from openimp.common.protocols import load_learned
from openimp.common.safe_files import file_state, local_folder, read_text
from openimp.common.versions import library_version
from openimp.modalities.open_clip import (
    CONFIG,
    TEXT_CONFIG,
    check_config,
    checked_files,
    import_open_clip,
    layers_in,
    without_entries,
)
from openimp.model.open_clip import OpenCLIP, build
from openimp.recipe.schema import Recipe

LAYOUT = 1
"""Version of what is made of a model. Folders of other versions are not used."""
TRAINING_DATA = f"{OPEN_CLIP}:training-data"
"""The source of a model as its authors published it. It cannot be read."""
UNSTABLE = {"is_local", "local_files_only", "transformers_version"}
"""Entries that tell how transformers wrote a file. They would change the hash of a model that is the same."""
HUB = "hf-hub:"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
"""File names of a local model's weights, in order of preference. Any other safetensors file comes last."""


class Public(NamedTuple):
    """A model that the library has found."""

    config: dict[str, Any]  # model_cfg and preprocess_cfg
    weights: Path
    name: str  # as `open_clip.get_tokenizer` takes it


def wrapped_folder(name: str) -> Path:
    """The folder of a model by its name, which is made unless it is there and can be loaded."""

    def read(folder: Path) -> Path:
        _, saved = load_model(folder)  # Weights are only mapped into memory: it takes less than a tenth of a second.
        saved.recipe.validated()
        return folder

    return cached("wrapped", _key(name), read, lambda folder: _convert(name, _find(name), folder))


def _key(name: str) -> str:
    """A hash of the name and, of a local model, of the names, sizes and times of its files."""
    source: list[Any] = [name]
    if (folder := local_folder(name)) is not None:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        source = [str(folder.resolve()), *((file.name, file_state(file)) for file in files)]
    return stable_hash([LAYOUT, FORMAT, library_version("open_clip_torch"), *source])


def _find(name: str) -> Public:
    """Finds a model, and downloads it if the library has not yet."""
    library = import_open_clip()
    identifier = Name.parse(name).rest
    if (folder := local_folder(name)) is not None:
        return Public(_read_config(folder / CONFIG), _local_weights(name, folder), identifier)
    with library_errors(f"{name}: open_clip did not provide the model"):
        if identifier.startswith(HUB):
            download = partial(library.pretrained.download_pretrained_from_hf, identifier.removeprefix(HUB))
            return Public(_read_config(Path(download(filename=CONFIG))), Path(download()), identifier)
        return _find_by_tag(library, name)


def _find_by_tag(library: Any, name: str) -> Public:
    identifier = Name.parse(name).rest
    model, _, tag = identifier.partition("/")
    architecture = library.get_model_config(model)
    weights_config = library.get_pretrained_cfg(model, tag)
    if architecture is None and Path(identifier).is_dir():
        raise UserError(f"{name}: a model in a folder is named {OPEN_CLIP}:{LOCAL}{identifier}")
    if architecture is None:
        raise UserError(f"{name}: open_clip has no model {model!r}{nearest(model, library.list_models())}")
    if not weights_config:
        tags = ", ".join(library.list_pretrained_tags_by_model(model)) or "none"
        raise UserError(f"{name}: expected {OPEN_CLIP}:{model}/TAG with one of the tags {tags}")
    if not _fits(weights_config, architecture):
        other = f"{model}-quickgelu" if weights_config.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise UserError(f"{name}: these weights were trained with another activation: use {OPEN_CLIP}:{other}/{tag}")
    config = {"model_cfg": architecture, "preprocess_cfg": _preprocessing(weights_config)}
    return Public(config, Path(library.download_pretrained(weights_config)), model)


def _fits(weights_config: Mapping[str, Any], architecture: Mapping[str, Any]) -> bool:
    """Whether weights were trained with the activation of an architecture."""
    return bool(weights_config.get("quick_gelu")) == bool(architecture.get("quick_gelu"))


def public_names() -> list[str]:
    """The names of the models of open_clip that can be opened."""
    library = import_open_clip()
    return [
        f"{OPEN_CLIP}:{model}/{tag}"
        for model, tag in library.list_pretrained()
        if _fits(library.get_pretrained_cfg(model, tag), library.get_model_config(model))
    ]


def _preprocessing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The library's options of preprocessing with its defaults."""
    transform = import_open_clip().transform
    return transform.merge_preprocess_dict(asdict(transform.PreprocessCfg()), options)


def _read_config(file: Path) -> dict[str, Any]:
    with library_errors(f"{file}: cannot be read"):
        config = json.loads(read_text(file))
        options = _preprocessing(config.get("preprocess_cfg") or {})
        return {"model_cfg": config.get("model_cfg"), "preprocess_cfg": options}


def _local_weights(name: str, folder: Path) -> Path:
    named_files = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    files = named_files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name}: has no safetensors file, the only format that is read from a folder")
    return files[0]


def _convert(name: str, public: Public, folder: Path) -> None:
    """Writes a model of the library to an empty folder."""
    files = _files(name, public)
    _check_size(name, files, public.weights)
    encoder: Any = build(files)
    size = encoder.visual.preprocess_cfg["size"]
    config = json.loads(files[CONFIG])
    config["preprocess_cfg"]["size"] = size if isinstance(size, int) else list(size)
    files[CONFIG] = json.dumps(config, indent=1)
    # Without copies: a safetensors file is mapped into memory.
    encoder.load_state_dict = partial(encoder.load_state_dict, assign=True)
    with library_errors(f"{name}: {public.weights.name} does not fit the model"):
        import_open_clip().load_checkpoint(encoder, str(public.weights), weights_only=True)
    del encoder.load_state_dict
    recipe = _recipe_of(name, "softmax" if encoder.logit_bias is None else "sigmoid")
    model_config = recipe.to_config({})
    modalities = model_config.make_modalities()
    load_learned(modalities.values(), files)
    model = OpenCLIP(model_config, modalities, encoder, config["model_cfg"]["embed_dim"]).float()
    dcp.save(folder / "model", model.state_dict())
    for file, text in text_files(model, model_config, modalities, recipe.to_yaml()).items():
        (folder / file).write_text(text, encoding="utf-8")


def _recipe_of(name: str, loss: str) -> Recipe:
    """The recipe of a model that the library's authors trained: its modalities, and no data that can be read."""
    is_local = Name.parse(name).folder is not None  # Then the title must not tell the folders of this machine.
    title = Path(name).name if is_local else name.rpartition(":")[2]
    task = {"source": "unknown", "objectives": [{"type": "contrastive", "loss": loss}]}
    return Recipe.build(
        {
            "name": re.sub(r"[^\w.-]+", "-", title).strip("-.") or "open_clip",
            "model": {"wrap": name},
            "sources": {"unknown": {"path": TRAINING_DATA}},
            "tasks": {
                "pictures": {**task, "inputs": {"image": "image", "text": "text"}},
                "clips": {**task, "inputs": {"video": "video", "text": "text"}},
            },
        }
    )


def _check_size(name: str, files: Mapping[str, str], weights: Path) -> None:
    """Refuses a configuration that asks for more layers than there are tensors in a safetensors file."""
    if weights.suffix != ".safetensors":
        return
    with library_errors(f"{weights}: damaged"), safe_open(weights, "pt") as content:
        tensors = len(content.keys())
    if (layers := layers_in(files)) > tensors:
        raise UserError(f"{name}: asks for {layers} layers, but {weights.name} has only {tensors} tensors")


def _files(name: str, public: Public) -> dict[str, str]:
    """The library's files: configuration, tokenizer, and the configuration of a text tower from transformers."""
    config = json.loads(json.dumps(public.config))
    check_config(config)
    # One element instead of a scalar, which FSDP2 could not shard.
    config["model_cfg"]["nonscalar_logit_scale"] = True
    text = config["model_cfg"]["text_cfg"]
    files = {CONFIG: json.dumps(config)}
    with library_errors(f"{name}: its tokenizer or text tower cannot be read"):
        if tower := text.get("hf_model_name"):
            from transformers import AutoConfig

            files[TEXT_CONFIG] = AutoConfig.from_pretrained(tower, trust_remote_code=False).to_json_string()
        if text.get("hf_tokenizer_name"):
            with TemporaryDirectory() as folder:
                import_open_clip().get_tokenizer(public.name).save_pretrained(folder)
                files |= {file.name: read_text(file) for file in Path(folder).glob("*.json")}
    return {name: without_entries(UNSTABLE, name, text) for name, text in checked_files(files).items()}
