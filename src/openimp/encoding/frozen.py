"""Frozen encoders that a `Tower` uses: models of openimp, of open_clip, and of sentence-transformers.

Shape suffixes: M clips, D features.
"""

import hashlib
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openimp.checkpoint.find import find_model
from openimp.checkpoint.folder import SavedModel, load_model
from openimp.common.device import pick_device
from openimp.common.errors import UserError
from openimp.common.modality import Modality, Rng
from openimp.common.names import SENTENCE_TRANSFORMERS, HubName, Name
from openimp.encoding.engine import ItemEncoder
from openimp.modalities.image import upright
from openimp.modalities.media import decoder_errors
from openimp.modalities.vision import inception_box
from openimp.model.embedder import Embedder
from openimp.recipe.registry import modality_class

CROP = 0.5
"""Smallest share of a picture's area in a random crop."""
ASPECT = 1.33
"""Largest factor by which a random crop changes the aspect ratio."""


class FrozenEncoder(ABC):
    """An encoder of items of one modality.

    Attributes:
        features: D.
        weights: a hash of its weights.
        reader: openimp's modality that shows and cuts items.
        view: what `reader` takes.
    """

    features: int
    weights: str
    reader: Modality
    view: Any

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        """The clips (M, ...) of a raw value; with `rng`, a single random crop. BadMedia if it cannot be read."""
        if rng is None:
            return self.reader.encode_input(value, self.view)
        return self.reader.transform(self.reader.decode(value, [self.view], rng), self.view, rng)[None]

    @abstractmethod
    def embed(self, clips: np.ndarray) -> Tensor:
        """The vectors (M, D) of clips of one or several items."""


class OwnEncoder(FrozenEncoder):
    """A model that openimp loads, also one of open_clip. Its vectors are the features before the heads."""

    def __init__(self, name: str, modality: str) -> None:
        model, saved = _open(find_model(name))
        if modality not in saved.modalities:
            raise UserError(f"tower {name}: has no modality {modality}; it has {', '.join(saved.modalities)}")
        if "tower" in type(saved.modalities[modality].config).model_fields:
            raise UserError(f"tower {name}: its {modality} has a tower itself")
        self.reader = saved.modalities[modality]
        self.view = saved.config.views[modality]
        self.features = model.config.width
        self.weights = _hash(model)
        self._encoder = ItemEncoder(model, self.reader, self.view, None, "fp32")  # Once, so it may take longer.

    @torch.no_grad()
    def embed(self, clips: np.ndarray) -> Tensor:
        return self._encoder.encode_tokens(self.reader.tokens(clips, self.view, None))


class LibraryEncoder(FrozenEncoder):
    """A model of sentence-transformers, or of transformers, which that library opens as well."""

    def __init__(self, name: str, modality: str) -> None:
        self._library = _open_library(name)
        if modality not in self._library.modalities:
            raise UserError(f"tower {name}: has no modality {modality}; it has {', '.join(self._library.modalities)}")
        self._modality = modality
        self.features = self._library.get_embedding_dimension()
        self.weights = _hash(self._library)
        plain = modality_class(modality)
        options = {}
        if modality == "audio":
            options["sample_rate"] = self._library[0].processor.feature_extractor.sampling_rate
        self.reader = plain(plain.Config(**options))
        self.view = plain.View()

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        if self.reader.reads_text:
            return _objects(value)
        if self._modality != "image":
            return super().read(value, rng)
        with decoder_errors(), upright(value) as picture:
            picture = picture.convert("RGB")
        if rng is not None:
            size = (picture.height, picture.width)
            box = inception_box(size, size, CROP, ASPECT, rng.random(4).tolist())
            picture = picture.crop(box)
        return _objects(picture)

    def embed(self, clips: np.ndarray) -> Tensor:
        inputs = list(clips)
        if self._modality == "audio":
            rate = self.reader.config.sample_rate
            inputs = [{"array": samples, "sampling_rate": rate} for samples in clips]
        vectors: Tensor = self._library.encode(inputs, convert_to_tensor=True, show_progress_bar=False)
        return vectors


def open_encoder(name: str, modality: str) -> FrozenEncoder:
    """Opens the encoder of a modality by the name of its model."""
    kind = LibraryEncoder if Name.parse(name).scheme == SENTENCE_TRANSFORMERS else OwnEncoder
    return kind(name, modality)


def vector_sizes(name: str) -> dict[str, int]:
    """The modalities that a model can be a tower of, with the size of its vectors."""
    if Name.parse(name).scheme == SENTENCE_TRANSFORMERS:
        library = _open_library(name)
        return dict.fromkeys(library.modalities, library.get_embedding_dimension())
    model, saved = _open(find_model(name))
    return dict.fromkeys(saved.modalities, model.config.width)


@cache
def _open(folder: Path) -> tuple[Embedder, SavedModel]:
    """A model on the GPU if there is one. Several modalities share it."""
    model, saved = load_model(folder)
    return model.to(pick_device()), saved


@cache
def _open_library(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(f"{name}: needs sentence-transformers: pip install 'openimp[sentence-transformers]'") from None
    parsed = Name.parse(name)
    hub_name = HubName.parse(parsed.rest)
    place = hub_name.repository if hub_name else parsed.folder
    if place is None:
        raise UserError(
            f"{name}: expected {SENTENCE_TRANSFORMERS}:OWNER/NAME or {SENTENCE_TRANSFORMERS}:local-dir:FOLDER"
        )
    try:
        return SentenceTransformer(
            place,
            revision=hub_name.revision if hub_name else None,
            device=str(pick_device()),
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # The libraries raise many kinds.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}: sentence-transformers cannot open it: {reason}") from None


def _hash(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, weight in model.state_dict().items():
        total.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        total.update(weight.reshape(-1).view(torch.uint8).cpu().numpy())
    return total.hexdigest()[:16]


def _objects(value: Any) -> np.ndarray:
    """An array (1,) that holds an object."""
    array = np.empty(1, object)
    array[0] = value
    return array
