"""Pictures, clips and texts as a model of open_clip reads them (`model.wrap`).

The state of these modalities is the files from which the library builds the model and its tokenizer again: its
configuration, and the configurations of the parts that transformers provides. They are saved with the weights, so
nothing is downloaded when a model is loaded.

Shape suffixes: B examples, T frames, C channels, H height, W width, L tokens, P values per token.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import PIL.Image
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.modality import Modalities, Modality, Rng, StemSpec, Tokens
from openimp.common.protocols import TensorInput
from openimp.common.schema import Count, PositiveShare, Share, Strict, checked
from openimp.common.texts import valid_text
from openimp.modalities.image import Image, upright
from openimp.modalities.media import decoder_errors
from openimp.modalities.text import Text
from openimp.modalities.tokenizer_file import open_tokenizer
from openimp.modalities.video import Video
from openimp.modalities.vision import CHANNELS, Vision, check_pixels

CONFIG = "open_clip_config.json"
"""The library's configuration of the model and of its preprocessing, in the library's own format."""
TEXT_CONFIG = "text_tower_config.json"
"""The configuration of a text tower from transformers."""
CODE = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation"}
"""Entries that name classes in other files, or kernels on the Hugging Face Hub, which transformers may download and
run."""
LONGEST_TEXT = 10_000
"""Most characters of a text that are tokenized."""
LONGEST_CONTEXT = 2**13
"""Most tokens of a text that a configuration may ask for."""
_Side = Annotated[int, Field(ge=1, le=2**12, strict=True)]
"""A picture's side that a configuration may ask for, in pixels."""
_TOKENIZING = Lock()
"""A tokenizer of transformers raises an error if two threads use it at once."""


def import_open_clip() -> Any:
    """The library, or a UserError that says how to install it."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed: pip install 'openimp[peers]'") from None
    return open_clip


def checked_files(json_files: Mapping[str, str]) -> dict[str, str]:
    """The JSON files of the library's model, by name, without entries that could make it run or fetch code.

    Raises:
        UserError: the configuration is missing or damaged, asks for code, or needs a file that is missing.
    """
    if CONFIG not in json_files:
        raise UserError(f"{CONFIG}: missing, so the model of open_clip cannot be built")
    files = {name: without_entries(CODE, name, text) for name, text in json_files.items()}
    config = json.loads(files[CONFIG])
    check_config(config)
    text = config["model_cfg"]["text_cfg"]
    if text.get("hf_model_name") and TEXT_CONFIG not in files:
        raise UserError(f"{TEXT_CONFIG}: missing, so the text tower cannot be built")
    if "tokenizer.json" in files:
        _check_tokenizer(files["tokenizer.json"])
    elif text.get("hf_tokenizer_name"):
        raise UserError("tokenizer.json: missing, so texts cannot be read")
    return files


@lru_cache(maxsize=1)  # Three modalities have the same tokenizer, and that of SigLIP 2 takes ten seconds.
def _check_tokenizer(text: str) -> None:
    open_tokenizer("tokenizer.json", lambda: text)


class _VisionConfig(BaseModel):
    timm_model_name: Annotated[str, Field(pattern=r"^[\w.-]*$")] | None = None


class _TextConfig(BaseModel):
    tokenizer_kwargs: dict[Literal["clean", "strip_sep_token"], Any] | None = None
    """Others, such as trust_remote_code, are refused."""
    context_length: Annotated[int, Field(ge=1, le=LONGEST_CONTEXT, strict=True)] = 1


class _ModelConfig(BaseModel):
    vision_cfg: _VisionConfig
    text_cfg: _TextConfig


class _PreprocessConfig(BaseModel):
    size: _Side | Annotated[list[_Side], Field(min_length=1, max_length=2)] | None = None


class _Config(BaseModel):
    """What is checked of the library's configuration."""

    model_cfg: _ModelConfig
    preprocess_cfg: _PreprocessConfig


def check_config(config: Any) -> None:
    """Refuses a configuration of the library that is damaged, or that could make it run or fetch code."""
    checked(_Config, config, CONFIG)


def layers_in(files: Mapping[str, str]) -> int:
    """The number of layers that the library's files ask for. transformers has many names for it."""
    model = json.loads(files[CONFIG])["model_cfg"]
    towers = [model.get(name) for name in ("vision_cfg", "text_cfg", "multimodal_cfg")]
    layers = [tower.get("layers") for tower in towers if isinstance(tower, dict)]
    layers += [value for key, value in json.loads(files.get(TEXT_CONFIG, "{}")).items() if "layer" in key]
    counts = chain.from_iterable(value if isinstance(value, list) else [value] for value in layers)
    return sum(count for count in counts if isinstance(count, int) and count > 0)


def without_entries(keys: Set[str], name: str, text: str) -> str:
    """The text of a JSON file without the entries that have these keys."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: damaged: {error}") from None
    if not isinstance(data, dict) or keys.isdisjoint(data):
        return text
    return json.dumps({key: value for key, value in data.items() if key not in keys})


@contextmanager
def unpacked(files: Mapping[str, str]) -> Iterator[str]:
    """The name under which the library finds the files of a model: `local-dir:` and a temporary folder."""
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        if TEXT_CONFIG in files:  # transformers reads it from a folder under this name.
            (Path(folder) / "config.json").write_text(files[TEXT_CONFIG], encoding="utf-8")
            config = json.loads(files[CONFIG])
            config["model_cfg"]["text_cfg"]["hf_model_name"] = folder
            (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield f"local-dir:{folder}"


class OpenClip(Modality):
    """What the modalities of a wrapped model share: the library's files, from which each takes its options."""

    _files: dict[str, str] | None = None

    @property
    def files(self) -> dict[str, str]:
        """The library's files, by name."""
        if self._files is None:
            raise RuntimeError("no model yet: call load_state first")
        return self._files

    def fit(self, corpus: Iterable[list[str]]) -> None:
        """Learns nothing, because the library has a tokenizer."""

    def state(self) -> dict[str, str]:
        return self.files

    def load_state(self, state: Mapping[str, str]) -> None:
        # Drops the cached properties, which belong to the files from before.
        self.__dict__ = {"config": self.config, "_files": checked_files(state)}

    @cached_property
    def library(self) -> dict[str, Any]:
        """The library's configuration."""
        return json.loads(self.files[CONFIG])

    @property
    def embed_dim(self) -> int:
        """Features of the embedding space."""
        return self.library["model_cfg"]["embed_dim"]

    def check(self, view: Any) -> None:
        """Every view fits."""

    def tensor_input(self, view: Any) -> TensorInput:
        raise UserError(f"{self.name} cannot be exported: a wrapped model has no ONNX graphs here; use its own library")


class Pictures(OpenClip, Vision):
    """Base of the pictures and clips of a wrapped model. Each frame is one token, which the model cuts into patches.

    Evaluation uses the library's transform. Training crops, mirrors and jitters as openimp does.
    """

    plain: ClassVar[type[Vision]]  # openimp's modality of these pictures or clips

    class Config(Strict):
        """A wrapped model prepares pictures as its library does."""

        removed = {"fps": (None,)}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that the model takes."""
        size = self.library["preprocess_cfg"]["size"]
        return (size, size) if isinstance(size, int) else (size[0], size[-1])

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, for pixels in 0..1."""
        options = self.library["preprocess_cfg"]
        return torch.tensor(options["mean"]), torch.tensor(options["std"])

    def fit_picture(self, picture: PIL.Image.Image) -> np.ndarray:
        """RGB pixels (H, W, 3) of the model's size."""
        return np.array(self.library_transform(picture))

    @cached_property
    def library_transform(self) -> Any:
        """The library's transform of Pillow pictures in evaluation, as far as its result is a Pillow picture."""
        transform = import_open_clip().transform
        options = transform.PreprocessCfg(**self.library["preprocess_cfg"])
        steps = transform.image_transform_v2(options, is_train=False)
        # The last two steps make a tensor and normalize it, which the model does on its device.
        return type(steps)(steps.transforms[:-2])

    def stem_spec(self) -> StemSpec:
        return StemSpec(values=prod(self.size) * CHANNELS, axes=(1,))

    def values(self) -> int:
        return self.stem_spec().values

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (self.length(view), *self.size, CHANNELS)

    def length(self, view: Any) -> int:
        return 1

    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        # `super()` is `Image` or `Video`.
        return super().decode(raw, [self._with_size(view) for view in views], rng)  # type: ignore[safe-super]

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        return super().transform(item, self._with_size(view), rng)  # type: ignore[safe-super]

    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """One token per frame of pixels (B, [T,] H, W, 3): values (B, T, P) uint8."""
        return self._frames(torch.from_numpy(items))

    def from_tensor(self, batch: Tensor) -> Tokens:
        """One token per frame of a batch that the library's transform made: (B, 3, H, W), or (B, T, 3, H, W)."""
        size = (CHANNELS, *self.size)
        if batch.ndim != len(self.tensor_axes) or batch.shape[-3:] != size or not batch.is_floating_point():
            axes = ", ".join(map(str, (*self.tensor_axes[:-3], *size)))
            raise TypeError(f"expected float ({axes}), as the library normalizes it, found {list(batch.shape)}")
        return self._frames(batch.movedim(-3, -1))

    def _frames(self, frames: Tensor) -> Tokens:
        values_BTP = (frames if frames.ndim == 5 else frames[:, None]).flatten(2)
        return Tokens(values_BTP, torch.zeros(*values_BTP.shape[:2], 1, dtype=torch.int64, device=frames.device))

    def _with_size(self, view: Any) -> Any:
        """A view as `plain` takes it, with the size of the model."""
        return view if isinstance(view, Vision.View) else self.plain.View(size=self.size, **view.model_dump())

    def _render(self, frames: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        if rng is not None:
            return super()._render(frames, view, rng)
        return np.stack([self.fit_picture(PIL.Image.fromarray(frame)) for frame in frames])


def normalized(pixels_BHWC: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) as the library's transform makes them of uint8 pixels, in the same order of operations."""
    images_BCHW = pixels_BHWC.movedim(-1, 1).contiguous().float().div(255)
    return images_BCHW.sub(mean_C[:, None, None]).div(std_C[:, None, None])


class OpenClipImage(Pictures, Image):
    """A picture, as the library's transform makes it of the same file, turned upright if its EXIF data say so."""

    plain = Image
    decoders = ("pillow", "torchvision", "open_clip_torch")

    class View(Strict):
        """Augmentation of a picture. Its size is the model's."""

        crop: PositiveShare = 0.9
        """Smallest share of the picture's area that a training crop shows (as in open_clip). 1: the largest center
        crop."""
        flip: bool = False
        """Mirror half of the training pictures."""
        jitter: Share = 0.0
        """Largest change of brightness, contrast and saturation in training. 0: no change."""

    @decoder_errors()
    def encode_input(self, value: Any, view: Any) -> np.ndarray:
        # In full size and in the file's own mode, because the library resizes before it converts to RGB.
        with upright(value) as picture:
            return self.fit_picture(picture)[None]

    def preprocess(self, picture: Any, view: Any) -> Tensor:
        """Converts a Pillow picture, or whatever `decode` takes, to a float tensor (3, H, W), as the library does."""
        return normalized(torch.from_numpy(self.encode_input(picture, view)), *self.statistics)[0]


class OpenClipVideo(Pictures, Video):
    """A clip, whose frames are transformed like pictures. Its features are the mean of those of its frames."""

    plain = Video
    decoders = ("av", "pillow", "torchvision", "open_clip_torch")

    class View(OpenClipImage.View):
        """Frames and augmentation of a clip. Its size is the model's."""

        frames: Count = 4
        """Frames per clip."""
        stride: Count = 8
        """Distance between frames. If a clip is too short, a smaller stride spreads `frames` over all of it."""
        clips: Count = 4
        """Most clips in evaluation, linearly spaced, whose embeddings are averaged. A film no longer than a clip has
        one."""

    def length(self, view: Any) -> int:
        return view.frames

    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        if isinstance(raw, np.ndarray):  # Frames in memory are not shrunk before the library resizes them.
            with decoder_errors():
                return check_pixels(raw, 3)
        return super().decode(raw, views, rng)

    def segments(self, value: Any, view: Any) -> list[tuple[float, float]]:
        return super().segments(value, self._with_size(view))

    def encode_segment(self, value: Any, view: Any, start: float, end: float) -> np.ndarray:
        return super().encode_segment(value, self._with_size(view), start, end)


class OpenClipText(OpenClip, Text):
    """A text, as the library's tokenizer reads it, up to the model's context length."""

    decoders = ("tokenizers", "transformers", "open_clip_torch")

    class Config(Strict):
        """A wrapped model has its own tokenizer."""

    class View(Strict):
        """A text is read up to the model's context length."""

        @property
        def length(self) -> None:
            """What `tokenize` takes: the model's own length."""

    @property
    def context_length(self) -> int:
        """Token ids of a text."""
        return self.library["model_cfg"]["text_cfg"].get("context_length", 77)

    @cached_property
    def library_tokenizer(self) -> Any:
        """The tokenizer that the library makes of its files."""
        with unpacked(self.files) as name:
            return import_open_clip().get_tokenizer(name)

    def stem_spec(self) -> StemSpec:
        vocabulary = self.library["model_cfg"]["text_cfg"].get("vocab_size", 49408)
        return StemSpec(values=vocabulary, axes=(self.context_length,), table=True)

    def length(self, view: Any) -> int:
        return self.context_length

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        return item[None] if rng is None else item

    def knows(self, value: Any, view: Any) -> bool:
        return True

    def from_tensor(self, batch: Tensor) -> Tokens:
        """Ids (B, L) of the library's tokenizer. All of them are valid, because the model finds the end by itself."""
        return super().from_tensor(batch)._replace(mask=torch.ones_like(batch, dtype=torch.bool))

    def _check_length(self, length: int) -> None:
        if length != self.context_length:
            raise TypeError(f"expected integer ids (B, {self.context_length}), found {length} per text")

    def _ids(self, text: str, views: list[Any]) -> np.ndarray:
        with _TOKENIZING:
            return self.library_tokenizer(valid_text(text[:LONGEST_TEXT]))[0].numpy()


READERS: dict[str, type[OpenClip]] = {reader.name: reader for reader in (OpenClipImage, OpenClipVideo, OpenClipText)}
"""The classes that read the modalities of a wrapped model, by name."""


def reader_of(modalities: Modalities) -> OpenClip:
    """One of the modalities of a wrapped model, all of which have the library's files."""
    return next(modality for modality in modalities.values() if isinstance(modality, OpenClip))
