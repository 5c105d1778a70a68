"""Frozen encoders that a `Tower` uses: models of openimp, open_clip, timm and sentence-transformers.

Shape suffixes: M clips (what is encoded at once: a picture, a text, or a piece of a recording), D features,
K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from openimp.checkpoint.find import find_own_model
from openimp.checkpoint.folder import SavedModel, load_model
from openimp.common.cache import cached, stable_hash
from openimp.common.device import pick_device
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Rng
from openimp.common.names import CONSE, OPEN_CLIP, SENTENCE_TRANSFORMERS, TIMM, ConseName, Name
from openimp.common.protocols import learned_files
from openimp.common.texts import valid_text
from openimp.encoding.conse import MAX_CLASSES, TEMPERATURE, NameSpace, class_names
from openimp.encoding.engine import ItemEncoder
from openimp.encoding.libraries import close_all, open_open_clip, open_sentence_transformer, open_timm
from openimp.modalities.image import upright
from openimp.modalities.media import decoder_errors
from openimp.modalities.video import Video
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
"""Maximum number of clips in a forward pass. sentence-transformers has its own maximum."""
LONGEST_TEXT = 10_000
"""Maximum number of characters of a text for a library. The tokenizer of the library cuts the text further."""
LONGEST_SIDE = 2048
"""Largest side, in pixels, of a picture that is given to a library, which shrinks it further."""
OPEN_CLIP_MODALITIES = ("image", "video", "text")
CONSE_MODALITIES = ("image", "text")

_OPENING = Lock()
"""Held while a model is opened, so that several threads do not load it at once."""
_TOKENIZING = Lock()
"""Held by open_clip's tokenizers. Those of transformers raise an error if two threads use one at once."""


class FrozenEncoder(ABC):
    """An encoder of items of one modality.

    Attributes:
        features: D.
        fingerprint: a hash of everything that decides on its vectors.
        reader: openimp's modality of the items, which may also show and cut them. `read` need not use it.
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

    def read_segment(self, value: Any, start: float, end: float) -> np.ndarray:
        """The clips (M, ...) of one of the reader's segments. BadMedia if it cannot be read."""
        return self.reader.encode_segment(value, self.view, start, end)

    @torch.no_grad()
    def embed(self, clips: np.ndarray) -> Tensor:
        """The vectors (M, D) of clips of one or several items."""
        return torch.cat([self._embed(clips[start : start + CLIPS]) for start in range(0, len(clips), CLIPS)])

    @abstractmethod
    def _embed(self, clips: np.ndarray) -> Tensor:
        """The vectors (M, D) of at most `CLIPS` clips."""


class OwnEncoder(FrozenEncoder):
    """A model of openimp. Its vectors are features before the heads, or embeddings."""

    def __init__(self, name: str, modality: str, embeds: bool) -> None:
        model, saved, weights = _open(find_own_model(name))
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
        # Without defaults, so that the fingerprint stays the same in a later version of openimp with more options.
        options = [part.model_dump_json(exclude_defaults=True) for part in (self.reader.config, self.view)]
        parts = [weights, sorted(learned_files([self.reader]).items()), options, embeds]
        self.fingerprint = stable_hash(parts)[:16]
        towards = modality if embeds else None
        # fp32 is slow, but training items are embedded once.
        self._encoder = ItemEncoder(model, self.reader, self.view, towards, "fp32")

    def _embed(self, clips: np.ndarray) -> Tensor:
        # Ranks embed different items, so the routers of a sparse model must not wait for each other.
        with alone():
            return self._encoder.encode_tokens(self.reader.tokens(clips, self.view, None))


class SentenceTransformerEncoder(FrozenEncoder):
    """A model that sentence-transformers opens, also one of transformers."""

    def __init__(self, name: str, modality: str) -> None:
        self._library, self.fingerprint = open_sentence_transformer(name)
        _require_modality(modality, self._library.modalities, name)
        self._modality = modality
        self.features = self._library.get_embedding_dimension()
        options = {}
        if modality == "audio":
            options["sample_rate"] = self._library[0].processor.feature_extractor.sampling_rate
        self.reader, self.view = _reader_and_view(modality, options)

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        if self.reader.reads_text:
            return np.fromiter([_text(value)], object)
        if self._modality != "image":
            return super().read(value, rng)
        return np.fromiter([_picture(value, rng)], object)

    def _embed(self, clips: np.ndarray) -> Tensor:
        inputs = list(clips)
        if self._modality == "audio":
            rate = self.reader.config.sample_rate
            inputs = [{"array": samples, "sampling_rate": rate} for samples in clips]
        return self._library.encode(inputs, convert_to_tensor=True, show_progress_bar=False)


class TimmEncoder(FrozenEncoder):
    """A model of timm for pictures. Its vectors are those before the classifier, or the logits if it `classifies`."""

    def __init__(self, name: str, modality: str, classifies: bool = False) -> None:
        _require_modality(modality, ["image"], name)
        self.network, self._transform, self.fingerprint = open_timm(name, classifies)
        self.features = self.network.num_classes if classifies else self.network.head_hidden_size
        self.reader, self.view = _reader_and_view(modality, {})

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        return self._transform(_picture(value, rng)).numpy()[None]

    def _embed(self, clips: np.ndarray) -> Tensor:
        return self.network(torch.from_numpy(clips).to(next(self.network.parameters()).device))


class OpenClipEncoder(FrozenEncoder):
    """A model of open_clip. Its vectors are the library's, before they are normalized.

    The library's transform of evaluation prepares pictures and the frames of films. The vector of a clip is the mean of
    its frames' unit vectors (CLIP4Clip's mean pooling, arXiv 2104.08860). Films have up to four clips.
    """

    def __init__(self, name: str, modality: str) -> None:
        _require_modality(modality, OPEN_CLIP_MODALITIES, name)
        self._opened = open_open_clip(name)
        self._modality = modality
        self.features = self._opened.features
        self.reader, self.view = _reader_and_view(modality, {})
        if modality == "video":
            self.reader = _WholeFrames(self.reader.config)
            self.view = Video.View(size=self._opened.size, frames=4, stride=8)
        options = self.view.model_dump_json(exclude_defaults=True)
        self.fingerprint = stable_hash([self._opened.fingerprint, options])[:16]

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        if self._modality == "text":
            with _TOKENIZING:
                return self._opened.tokenizer([_text(value)]).numpy()
        if self._modality == "video":
            return self._prepare_clips(super().read(value, rng))
        if rng is not None:
            return self._prepare([_picture(value, rng)])
        # In full size and in the file's own mode, because the library resizes before it converts to RGB.
        with decoder_errors(), upright(value) as picture:
            return self._prepare([picture])

    def read_segment(self, value: Any, start: float, end: float) -> np.ndarray:
        return self._prepare_clips(super().read_segment(value, start, end))

    def _prepare_clips(self, clips: np.ndarray) -> np.ndarray:
        """Clips (M, T, H, W, 3) as the network takes them: (M, T, 3, H, W) fp32."""
        return np.stack([self._prepare(map(PIL.Image.fromarray, clip)) for clip in clips])

    def _prepare(self, pictures: Iterable[PIL.Image.Image]) -> np.ndarray:
        """Pictures as the network takes them: (N, 3, H, W) fp32."""
        return torch.stack([self._opened.transform(picture) for picture in pictures]).numpy()

    def _embed(self, clips: np.ndarray) -> Tensor:
        """The vectors (M, D) of texts (M, L), pictures (M, 3, H, W), or clips of films (M, T, 3, H, W)."""
        network = self._opened.network
        batch = torch.from_numpy(clips).to(next(network.parameters()).device)
        if self._modality == "text":
            return network.encode_text(batch, normalize=False)
        if self._modality == "image":
            return network.encode_image(batch, normalize=False)
        return network.encode_image(batch.flatten(0, 1), normalize=True).unflatten(0, batch.shape[:2]).mean(1)


class ConseEncoder(FrozenEncoder):
    """A classifier of pictures and an encoder of texts, which `NameSpace` joins."""

    def __init__(self, name: str, modality: str) -> None:
        _require_modality(modality, CONSE_MODALITIES, name)
        opened = _open_conse(name)
        self.features = opened.texts.features
        self.fingerprint = opened.fingerprint
        self._encoder: FrozenEncoder = opened.texts if modality == "text" else opened.classifier
        self._place = opened.space.texts if modality == "text" else opened.space.pictures
        self.reader = self._encoder.reader
        self.view = self._encoder.view

    def read(self, value: Any, rng: Rng | None = None) -> np.ndarray:
        return self._encoder.read(value, rng)

    def _embed(self, clips: np.ndarray) -> Tensor:
        return self._place(self._encoder.embed(clips))


class _Conse(NamedTuple):
    """What the two modalities of `ConseEncoder` share."""

    classifier: TimmEncoder
    texts: SentenceTransformerEncoder
    space: NameSpace
    fingerprint: str


@cache
def _open_conse(name: str) -> _Conse:
    both = ConseName.parse(name)
    if both is None:
        raise UserError(f"{name}: expected {CONSE}:{TIMM}:NAME+{SENTENCE_TRANSFORMERS}:NAME")
    classifier = TimmEncoder(both.classifier, "image", classifies=True)
    texts = SentenceTransformerEncoder(both.texts, "text")
    names = class_names(classifier.network, both.classifier)

    def read(folder: Path) -> np.ndarray:
        return np.fromfile(folder / "vectors.f32", np.float32).reshape(len(names), texts.features)

    def write(folder: Path) -> None:
        texts.embed(np.array(names, object)).float().cpu().numpy().tofile(folder / "vectors.f32")

    # In the cache, because thousands of names take longer to embed than a query.
    name_KD = torch.from_numpy(cached("names", stable_hash([texts.fingerprint, *names]), read, write))
    parts = [classifier.fingerprint, texts.fingerprint, names, MAX_CLASSES, TEMPERATURE]
    return _Conse(classifier, texts, NameSpace(name_KD.to(pick_device())), stable_hash(parts)[:16])


class _WholeFrames(Video):
    """Films whose frames stay whole in evaluation. The library crops them."""

    def _render(self, frames: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        if rng is None:
            view = view.model_copy(update={"size": frames.shape[1:3], "crop_pct": 1.0})
        return super()._render(frames, view, rng)


def _require_modality(modality: str, known: Iterable[Any], name: str) -> None:
    if modality not in known:
        raise UserError(f"{name}: has no modality {modality}; it has {', '.join(map(str, known))}")


def _reader_and_view(modality: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """openimp's modality with some options, and its default view."""
    plain = modality_class(modality)
    return plain(plain.Config(**options)), plain.View()


def _text(value: Any) -> str:
    """A text for a library. BadMedia if it is none."""
    if not isinstance(value, str):
        raise BadMedia(f"expected a text, found {type(value).__name__}")
    return valid_text(value[:LONGEST_TEXT])


def _picture(value: Any, rng: Rng | None) -> PIL.Image.Image:
    """A picture for a library; with `rng`, a random crop of it. BadMedia if it cannot be read."""
    with decoder_errors(), upright(value) as opened:
        picture = to_rgb(opened).copy()  # `thumbnail` below shrinks in place, which must not change the caller's.
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
            return SentenceTransformerEncoder(name, modality)
        if scheme == TIMM:
            return TimmEncoder(name, modality)
        if scheme == OPEN_CLIP:
            return OpenClipEncoder(name, modality)
        if scheme == CONSE:
            return ConseEncoder(name, modality)
        return OwnEncoder(name, modality, embeds)


def release_encoders() -> None:
    """Forgets all open models, so that those that no tower uses free their memory."""
    _open.cache_clear()
    _open_conse.cache_clear()
    close_all()


def vector_sizes(name: str) -> dict[str, int]:
    """The modalities for which a model can be the tower, with the size of its vectors."""
    scheme = Name.parse(name).scheme
    if scheme == TIMM:
        return {"image": TimmEncoder(name, "image").features}
    if scheme == OPEN_CLIP:
        return dict.fromkeys(OPEN_CLIP_MODALITIES, open_open_clip(name).features)
    if scheme == CONSE:
        return dict.fromkeys(CONSE_MODALITIES, open_encoder(name, "text").features)
    if scheme == SENTENCE_TRANSFORMERS:
        library, _ = open_sentence_transformer(name)
        names = [modality for modality in library.modalities if isinstance(modality, str) and modality != "message"]
        return dict.fromkeys(names, library.get_embedding_dimension())
    model, saved, _ = _open(find_own_model(name))
    return dict.fromkeys(saved.modalities, model.config.width)


@cache
def _open(folder: Path) -> tuple[Embedder, SavedModel, str]:
    """A model, on the GPU if there is one, and a hash of its weights. Several modalities share it."""
    model, saved = load_model(folder)
    return model.to(pick_device()), saved, weights_hash(model).hexdigest()
