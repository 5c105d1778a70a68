"""Frozen encoders that a `Tower` uses: models of openimp, open_clip, timm and sentence-transformers.

Shape suffixes: M clips (what is encoded at once: a picture, a text, or a piece of a recording), D features.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from openimp.checkpoint.find import download, find_model
from openimp.checkpoint.folder import SavedModel, load_model
from openimp.checkpoint.public_vit import timm_opens
from openimp.common.cache import stable_hash
from openimp.common.device import pick_device
from openimp.common.errors import UserError, library_errors
from openimp.common.modality import Rng
from openimp.common.names import LOCAL, SENTENCE_TRANSFORMERS, TIMM, Name
from openimp.common.protocols import learned_files
from openimp.common.safe_files import local_folder, read_text, sha256
from openimp.common.texts import valid_text
from openimp.encoding.engine import ItemEncoder
from openimp.modalities.image import upright
from openimp.modalities.media import decoder_errors
from openimp.modalities.open_clip import CODE
from openimp.modalities.vision import inception_box, to_rgb
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import alone
from openimp.parallel.layout import weights_hash
from openimp.recipe.registry import modality_class

CROP = 0.5
"""Smallest random crop, as a share of the picture's area."""
ASPECT = 1.33
"""Largest factor by which a random crop changes the aspect ratio."""
CLIPS = 64
"""Clips in a forward pass of a tower."""
LONGEST_TEXT = 10_000
"""Maximum number of characters of a text for a library. The tokenizer of the library cuts the text further."""
LONGEST_SIDE = 2048
"""Largest side, in pixels, of a picture that is given to a library, which shrinks it further."""

_OPENING = Lock()
"""Held while a model is opened, so that several threads do not load it at once."""


class FrozenEncoder(ABC):
    """An encoder of items of one modality.

    Attributes:
        features: D.
        fingerprint: a hash of everything that decides on its vectors.
        reader: openimp's modality that decodes items. It may have protocols that show and cut them.
        view: the view in which `reader` reads them.
    """

    features: int
    fingerprint: str
    reader: Any
    view: Any

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        """The clips (M, ...) of a raw value; with `rng`, one random clip. BadMedia if it cannot be read."""
        if rng is None:
            return self.reader.encode_input(value, self.view)
        return self.reader.transform(self.reader.decode(value, [self.view], rng), self.view, rng)[None]

    @abstractmethod
    def embed(self, clips: np.ndarray) -> Tensor:
        """The vectors (M, D) of clips of one or several items."""


class OwnEncoder(FrozenEncoder):
    """A model that openimp loads, also one of open_clip. Its vectors are features before the heads, or embeddings."""

    def __init__(self, name: str, modality: str, embeds: bool) -> None:
        model, saved, weights = _open(find_model(name))
        config = saved.config
        _require_modality(modality, config.views, name)
        if any(hasattr(options, "tower") for options in config.modalities.values()):
            raise UserError(f"{name}: has a tower itself")
        self.reader = saved.modalities[modality]
        self.view = config.views[modality]
        if embeds and not model.share_a_space(modality, modality):
            raise UserError(
                f"{name}: has a space for each pair of modalities; write the vectors of one with openimp embed "
                "--join --towards, and name their column in `to`"
            )
        self.features = model.config.embed_dim if embeds else model.config.width
        # Without defaults, so that a later version of openimp with more options knows the same encoder.
        options = [part.model_dump_json(exclude_defaults=True) for part in (self.reader.config, self.view)]
        parts = [weights, sorted(learned_files([self.reader]).items()), options, embeds]
        self.fingerprint = stable_hash(parts)[:16]
        towards = modality if embeds else None
        self._encoder = ItemEncoder(model, self.reader, self.view, towards, "fp32")  # Slow, but once per item.

    def embed(self, clips: np.ndarray) -> Tensor:
        # Ranks embed different items, so the routers of a sparse model must not wait for each other.
        with torch.no_grad(), alone():
            parts = [clips[start : start + CLIPS] for start in range(0, len(clips), CLIPS)]
            tokens = (self.reader.tokens(part, self.view, None) for part in parts)
            return torch.cat([self._encoder.encode_tokens(part) for part in tokens])


class LibraryEncoder(FrozenEncoder):
    """A model that sentence-transformers opens, also one of transformers."""

    def __init__(self, name: str, modality: str) -> None:
        self._library, self.fingerprint = _open_library(name)
        _require_modality(modality, self._library.modalities, name)
        self._modality = modality
        self.features = self._library.get_embedding_dimension()
        options = {}
        if modality == "audio":
            options["sample_rate"] = self._library[0].processor.feature_extractor.sampling_rate
        self.reader, self.view = _reader_and_view(modality, options)

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        if self.reader.reads_text:
            return _objects(valid_text(value[:LONGEST_TEXT]))
        if self._modality != "image":
            return super().read(value, rng)
        return _objects(_picture(value, rng))

    def embed(self, clips: np.ndarray) -> Tensor:
        inputs = list(clips)
        if self._modality == "audio":
            rate = self.reader.config.sample_rate
            inputs = [{"array": samples, "sampling_rate": rate} for samples in clips]
        return self._library.encode(inputs, convert_to_tensor=True, show_progress_bar=False)


class TimmEncoder(FrozenEncoder):
    """A model of timm for pictures. Its vectors are those before the classifier."""

    def __init__(self, name: str, modality: str) -> None:
        _require_modality(modality, ["image"], name)
        self._trunk, self._transform, self.fingerprint = _open_timm(name)
        self.features = self._trunk.head_hidden_size
        self.reader, self.view = _reader_and_view(modality, {})

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        return self._transform(_picture(value, rng)).numpy()[None]

    def embed(self, clips: np.ndarray) -> Tensor:
        device = next(self._trunk.parameters()).device
        with torch.no_grad():
            return torch.cat([self._trunk(part.to(device)) for part in torch.from_numpy(clips).split(CLIPS)])


def _require_modality(modality: str, known: Iterable[Any], name: str) -> None:
    if modality not in known:
        raise UserError(f"{name}: has no modality {modality}; it has {', '.join(map(str, known))}")


def _reader_and_view(modality: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """openimp's modality with some options, and its default view."""
    plain = modality_class(modality)
    return plain(plain.Config(**options)), plain.View()


def _picture(value: Any, rng: Rng | None) -> PIL.Image.Image:
    """A picture for a library; with `rng`, a random crop of it. BadMedia if it cannot be read."""
    with decoder_errors(), upright(value) as opened:
        picture = to_rgb(opened).copy()  # The caller's picture must not be shrunk below.
    if picture.mode == "RGBA":  # What is transparent is white, as for openimp's own models.
        background = PIL.Image.new("RGB", picture.size, "white")
        background.paste(picture, mask=picture.getchannel("A"))
        picture = background
    if rng is not None:
        size = (picture.height, picture.width)
        picture = picture.crop(inception_box(size, size, CROP, ASPECT, rng.random(4).tolist()))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))  # Many of them are in memory at a time.
    return picture


def open_encoder(name: str, modality: str, embeds: bool = False) -> FrozenEncoder:
    """Opens the encoder of a modality by the name of its model.

    With `embeds`, the vectors of a model of openimp are its embeddings, else its features before the heads.
    """
    scheme = Name.parse(name).scheme
    # `openimp plan` makes models on the meta device, but a frozen encoder must compute.
    with _OPENING, torch.device("cpu"):
        if scheme == SENTENCE_TRANSFORMERS:
            return LibraryEncoder(name, modality)
        if scheme == TIMM:
            return TimmEncoder(name, modality)
        return OwnEncoder(name, modality, embeds)


def release_encoders() -> None:
    """Frees the memory of encoders that no tower uses."""
    for opened in (_open, _open_timm, _open_library):
        opened.cache_clear()


def vector_sizes(name: str) -> dict[str, int]:
    """The modalities for which a model can be the tower, with the size of its vectors."""
    scheme = Name.parse(name).scheme
    if scheme == TIMM:
        return {"image": TimmEncoder(name, "image").features}
    if scheme == SENTENCE_TRANSFORMERS:
        library, _ = _open_library(name)
        names = [modality for modality in library.modalities if isinstance(modality, str)]
        return dict.fromkeys(names, library.get_embedding_dimension())
    model, saved, _ = _open(find_model(name))
    return dict.fromkeys(saved.modalities, model.config.width)


@cache
def _open(folder: Path) -> tuple[Embedder, SavedModel, str]:
    """A model, on the GPU if there is one, and a hash of its weights. Several modalities share it."""
    model, saved = load_model(folder)
    return model.to(pick_device()), saved, weights_hash(model).hexdigest()


@cache
def _open_timm(name: str) -> tuple[Any, Any, str]:
    """A model of timm, on the GPU if there is one, its transform of pictures, and a hash of both."""
    with timm_opens(name):
        import timm

        trunk = timm.create_model(Name.parse(name).rest, pretrained=True, num_classes=0).eval().requires_grad_(False)
    config = timm.data.resolve_data_config(model=trunk)
    fingerprint = stable_hash([weights_hash(trunk).hexdigest(), sorted(config.items())])[:16]
    return trunk.to(pick_device()), timm.data.create_transform(**config), fingerprint


@cache
def _open_library(name: str) -> tuple[Any, str]:
    """A model of sentence-transformers, on the GPU if there is one, and a hash of its weights and configuration."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"{name}: needs sentence-transformers: pip install 'openimp[sentence-transformers]'") from None
    folder = _library_folder(name)
    files = sorted(folder.rglob("*.json"))
    for file in files:
        if file.name.endswith("config.json"):
            _refuse_kernels(name, file)
    with library_errors(f"{name}: sentence-transformers cannot open it"):
        library = SentenceTransformer(
            str(folder),
            device=str(pick_device()),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    options = [(file.relative_to(folder).as_posix(), sha256(file)) for file in files]
    return library, stable_hash([weights_hash(library).hexdigest(), *options])[:16]


def _refuse_kernels(name: str, file: Path) -> None:
    """Refuses a configuration that names a kernel on the Hugging Face Hub, which transformers may download and run."""
    try:
        config = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: {file.name} is damaged: {error}") from None
    for key in CODE & config.keys() if isinstance(config, dict) else ():
        if isinstance(config[key], str) and "/" in config[key]:
            raise UserError(f"{name}: {key} in {file.name} names code, {config[key]!r}, which openimp does not run")


def _library_folder(name: str) -> Path:
    """The folder of a model of sentence-transformers, which is downloaded if it is on the Hub."""
    if (folder := local_folder(name)) is not None:
        return folder
    identifier = Name.parse(name).rest
    if Path(identifier).is_dir():  # The Hub would be asked several times before an error that blames the network.
        raise UserError(f"{name}: a model in a folder is named {SENTENCE_TRANSFORMERS}:{LOCAL}{identifier}")
    return download(name, ("*.json", "*.txt", "*.model", "*.safetensors"))


def _objects(value: Any) -> np.ndarray:
    """An array (1,) that holds an object."""
    array = np.empty(1, object)
    array[0] = value
    return array
