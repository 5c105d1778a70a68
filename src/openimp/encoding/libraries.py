"""Opens public models of open_clip, timm and sentence-transformers, which the libraries download, cache and compute.

Models stay open until `close_all`, on the GPU if there is one. Each comes with a fingerprint: a hash of
everything that decides on its vectors. Weights in a folder must be safetensors. Other weights of open_clip are read
with `weights_only=True`, which runs no code.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field

from openimp.checkpoint.find import download
from openimp.checkpoint.public_vit import opening_timm
from openimp.common.cache import stable_hash
from openimp.common.device import pick_device
from openimp.common.errors import UserError, library_errors, nearest
from openimp.common.names import CONFIGS, LOCAL, OPEN_CLIP, OPEN_CLIP_CONFIG, SENTENCE_TRANSFORMERS, HubName, Name
from openimp.common.progress import quiet_libraries
from openimp.common.safe_files import CONVERT, local_folder, read_object, read_required, require_safetensors, sha256
from openimp.common.schema import checked
from openimp.common.versions import require_library
from openimp.parallel.layout import weights_hash
from openimp.recipe.file import flat

OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""The files that open_clip prefers if a folder has several files of weights."""
ON_HUB = "hf-hub:"
TRANSFORMERS_CONFIG = re.compile(
    r"config(\..+)?\.json|(tokenizer|(video_)?preprocessor|processor|audio_tokenizer|generation|adapter|router|"
    r"sentence_.+)_config\.json"
)
"""The names of files that transformers and sentence-transformers read as configurations. Others, such as the
data_config.json of all-MiniLM-L6-v2, are no part of a model. A config.VERSION.json may replace config.json."""
KERNELS = {"attn_implementation", "_attn_implementation", "experts_implementation"}
"""Entries of a configuration that may name kernels on the Hugging Face Hub, which transformers downloads and runs."""

CONFIGURATION = ("*.json", "*.txt", "*.model")
"""Files of a model of sentence-transformers besides its weights: configurations and vocabularies."""
PICKLED = "pytorch_model.bin"
"""The files with the weights of a part of such a model, such as `2_Dense`."""


class OpenClipModel(NamedTuple):
    """A model as open_clip opens it."""

    network: Any
    transform: Any  # of a Pillow picture, as in the library's evaluation
    tokenizer: Any
    features: int  # the size of its vectors
    size: tuple[int, int]  # height and width of a prepared picture
    fingerprint: str


class _VisionConfig(BaseModel):
    timm_model_name: Annotated[str, Field(pattern=r"^[\w.-]*$")] | None = None  # of timm; no path


class _TextConfig(BaseModel):
    tokenizer_kwargs: dict[Literal["clean", "strip_sep_token"], Any] | None = None
    """Others, such as trust_remote_code, are refused."""
    hf_model_name: str | None = None
    hf_tokenizer_name: str | None = None


class _ModelConfig(BaseModel):
    embed_dim: int
    vision_cfg: _VisionConfig
    text_cfg: _TextConfig


class _Config(BaseModel):
    """What is checked of a configuration of open_clip that a stranger may have written."""

    model_cfg: _ModelConfig


def import_open_clip() -> Any:
    """The library open_clip, or a UserError that says how to install it."""
    require_library("open_clip", "peers")
    import open_clip

    return open_clip


def open_clip_names() -> list[str]:
    """The models that open_clip lists, without weights that were trained with another activation."""
    library = import_open_clip()
    return [
        f"{OPEN_CLIP}:{model}/{tag}"
        for model, tag in library.list_pretrained()
        if _same_activation(library.get_pretrained_cfg(model, tag), library.get_model_config(model))
    ]


@cache
def open_open_clip(name: str) -> OpenClipModel:
    """Opens a model of open_clip: open_clip:NAME/TAG, open_clip:hf-hub:OWNER/NAME or open_clip:FOLDER."""
    with quiet_libraries(name):
        library = import_open_clip()
        identifier, tag = _identify(name)
    # The random numbers of the training stay as they are.
    with (
        torch.random.fork_rng(devices=[]),
        quiet_libraries(name),
        library_errors(f"{name}: open_clip cannot open it"),
    ):
        config = library.get_model_config(identifier)
        network, transform = library.create_model_from_pretrained(identifier, tag, weights_only=True)
        tokenizer = library.get_tokenizer(identifier)
    size = network.visual.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    for name_option in ("hf_model_name", "hf_tokenizer_name"):  # Folders of the same content may have any name.
        config["text_cfg"].pop(name_option, None)
    fast_tokenizer = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    options = [config, network.visual.preprocess_cfg, fast_tokenizer and fast_tokenizer.to_str()]
    fingerprint = stable_hash([weights_hash(network).hexdigest(), json.dumps(options, sort_keys=True)])[:16]
    network = network.eval().requires_grad_(False).to(pick_device())
    return OpenClipModel(
        network,
        transform,
        tokenizer,
        features=config["embed_dim"],
        size=(height, width),
        fingerprint=fingerprint,
    )


def _identify(name: str) -> tuple[str, str | None]:
    """The name and the tag that open_clip takes. UserError if there is no such model, or if it may run code."""
    library = import_open_clip()
    identifier = Name.parse(name).rest
    if (folder := local_folder(name)) is not None:
        _require_config(name, folder)
        require_safetensors(folder, OPEN_CLIP_WEIGHTS)
        _check_open_clip(name, folder / OPEN_CLIP_CONFIG)
        return f"{LOCAL}{folder}", None
    if identifier.startswith(ON_HUB):
        with library_errors(f"{name}: open_clip did not provide the model"):
            repository = identifier.removeprefix(ON_HUB)
            file = library.pretrained.download_pretrained_from_hf(repository, filename=OPEN_CLIP_CONFIG)
        _check_open_clip(name, Path(file))
        return identifier, None
    model, _, tag = identifier.partition("/")
    architecture = library.get_model_config(model)
    weights_config = library.get_pretrained_cfg(model, tag)
    if architecture is None and Path(identifier).is_dir():
        _require_config(name, Path(identifier))
    if architecture is None:
        raise UserError(f"{name}: open_clip has no model {model!r}{nearest(model, library.list_models())}")
    if not weights_config:
        tags = library.list_pretrained_tags_by_model(model)
        raise UserError(f"{name}: expected {OPEN_CLIP}:{model}/TAG{nearest(tag, tags)}")
    if not _same_activation(weights_config, architecture):
        other = f"{model}-quickgelu" if weights_config.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise UserError(f"{name}: these weights were trained with another activation: use {OPEN_CLIP}:{other}/{tag}")
    return model, tag


def _same_activation(weights_config: Any, architecture: Any) -> bool:
    """Whether weights were trained with the activation of an architecture."""
    return bool(weights_config.get("quick_gelu")) == bool(architecture.get("quick_gelu"))


def _check_open_clip(name: str, file: Path) -> None:
    """Refuses a configuration of open_clip that is damaged, or that could make a library run or fetch code."""
    text = checked(_Config, read_object(file), f"{name}: {file.name}").model_cfg.text_cfg
    # The tokenizer of a model in a folder is in this folder, also if the configuration has another name for it.
    tokenizer = text.hf_tokenizer_name and str(local_folder(name) or text.hf_tokenizer_name)
    for source in filter(None, (text.hf_model_name, tokenizer)):
        for file_name in ("config.json", "tokenizer_config.json"):
            transformers_file = _find(name, source, file_name)
            if transformers_file is not None:
                _refuse_code(name, transformers_file)


def _find(name: str, source: str, file_name: str) -> Path | None:
    """A file of a folder, or of a repository of the Hub. None if there is no such file."""
    if Path(source).is_dir():
        file = Path(source) / file_name
        return file if file.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with library_errors(f"{name}: the Hugging Face Hub did not provide {file_name} of {source}"):
        try:
            return Path(hf_hub_download(source, file_name))
        except LocalEntryNotFoundError:  # The Hub could not be asked.
            raise
        except EntryNotFoundError:
            return None


def _refuse_code(name: str, file: Path) -> None:
    """Refuses a configuration of transformers that names classes in other files, or kernels on the Hub."""
    _refuse_kernels(name, file)
    if "auto_map" in read_object(file):  # transformers would ask on the terminal whether to run it.
        raise UserError(f"{name}: auto_map in {file.name} names code, which openimp does not run")


def _require_config(name: str, folder: Path) -> None:
    """Refuses a folder without the files by which the name's library recognizes a model."""
    files = CONFIGS[str(Name.parse(name).scheme)]
    if not any((folder / file).exists() for file in files):
        raise UserError(f"{name}: the folder has no {' or '.join(files)}")


@cache
def open_timm(name: str, classifies: bool = False) -> tuple[Any, Any, str]:
    """A model of timm, its transform of pictures, and its fingerprint. `classifies` keeps its classifier."""
    with opening_timm(name) as identifier:
        import timm

        options: dict[str, Any] = {} if classifies else {"num_classes": 0}
        trunk = timm.create_model(identifier, pretrained=True, **options).eval().requires_grad_(False)
    config = timm.data.resolve_data_config(model=trunk)
    fingerprint = stable_hash([weights_hash(trunk).hexdigest(), sorted(config.items())])[:16]
    return trunk.to(pick_device()), timm.data.create_transform(**config), fingerprint


@cache
def open_sentence_transformer(name: str) -> tuple[Any, str]:
    """A model of sentence-transformers, and its fingerprint."""
    require_library("sentence_transformers", "sentence-transformers")
    folder = _sentence_transformer_folder(name)
    files = sorted(file for pattern in CONFIGURATION for file in folder.rglob(pattern))
    for file in files:
        if TRANSFORMERS_CONFIG.fullmatch(file.name):
            _refuse_kernels(name, file)
    for part in _parts(name, folder):
        # The library reads pickled weights if a part has no others.
        if (part / PICKLED).exists() and next(part.glob("*.safetensors"), None) is None:
            file = (part / PICKLED).relative_to(folder)
            raise UserError(f"{name}: {file} is pickled, and only .safetensors files are read{CONVERT}")
    with quiet_libraries(name), library_errors(f"{name}: sentence-transformers cannot open it"):
        from sentence_transformers import SentenceTransformer

        _refuse_own_classes(name, folder)
        library = SentenceTransformer(
            str(folder),
            device=str(pick_device()),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    options = [(file.relative_to(folder).as_posix(), sha256(file)) for file in files]
    return library, stable_hash([weights_hash(library).hexdigest(), *options])[:16]


def _sentence_transformer_folder(name: str) -> Path:
    """The folder of a model of sentence-transformers, which is downloaded if it is on the Hub."""
    folder = local_folder(name)
    if folder is None:
        # The Hub would be asked several times before an error that blames the network.
        rest = Name.parse(name).rest
        if Path(rest).is_dir():
            _require_config(name, Path(rest))
        if HubName.parse(rest) is None:
            raise UserError(
                f"{name}: no such folder; a model on the Hugging Face Hub has an owner, as in "
                f"{SENTENCE_TRANSFORMERS}:sentence-transformers/all-MiniLM-L6-v2"
            )
        folder = download(name, (*CONFIGURATION, "*.safetensors"))
    _require_config(name, folder)
    if next(folder.rglob("*.safetensors"), None) is None:
        raise UserError(f"{name}: has no weights in a .safetensors file, the only kind that is read{CONVERT}")
    return folder


def _refuse_own_classes(name: str, folder: Path) -> None:
    """Refuses a model of sentence-transformers with classes that neither that library nor transformers has.

    sentence-transformers would refuse them too, but advise an option that openimp does not have.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    reasons = []
    if (folder / "modules.json").exists():
        kinds = [module["type"] for module in json.loads(read_required(folder / "modules.json"))]
        reasons = [f"{kind} in modules.json" for kind in kinds if not kind.startswith("sentence_transformers.")]
    if (folder / "config.json").exists():
        config = read_object(folder / "config.json")
        if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING_NAMES:
            reasons.append("auto_map in config.json")
    if reasons:
        raise UserError(
            f"{name}: {reasons[0]} names code, which openimp does not run; choose a model whose code is part of "
            "transformers"
        )


def _parts(name: str, folder: Path) -> list[Path]:
    """The folders of the parts of a model of sentence-transformers; of a model of transformers, its own."""
    if not (folder / "modules.json").exists():
        return [folder]
    try:
        return [folder / part["path"] for part in json.loads(read_required(folder / "modules.json"))]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{name}: modules.json: damaged: expected a list of parts, each with a path") from None


def _refuse_kernels(name: str, file: Path) -> None:
    """Refuses a configuration of transformers that names a kernel on the Hugging Face Hub, for all or for a part."""
    for key, value in flat(read_object(file)).items():
        if not KERNELS.isdisjoint(key.split(".")) and isinstance(value, str) and "/" in value:
            raise UserError(f"{name}: {key} in {file.name} names code, {value!r}, which openimp does not run")


def close_all() -> None:
    """Forgets all open models, so that those that nobody uses free their memory."""
    for opened in (open_open_clip, open_timm, open_sentence_transformer):
        opened.cache_clear()
