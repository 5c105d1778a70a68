"""What image and video share: one stem, frames that are cropped, flipped and coloured, and patches of them.

A still counts as one frame. Patches are laid out frame by frame, (t, h, w, c), so that a still repeated over a patch's
frames is the patch embedding summed over them, and one frame's values are enough.
"""

from math import ceil, sqrt
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import torch
from pydantic import Field

from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens
from openimp.common.schema import Count, Pair, Positive, Share, Strict, Triple
from openimp.modalities.media import PatchGrid, batch_coordinates, drop_tokens, kept, patchify

CHANNELS = 3
MARGIN = 1.15
"""Decoded pictures are this much larger than a view asks for, so that crops keep some detail."""
ASPECT = 2
"""The aspect ratio of a training crop differs from the view's by at most this factor."""
JITTERED = 0.8
"""Share of the training pictures to which color jitter is applied."""


class Vision(Modality):
    """Base of image and video."""

    stem = "vision"

    class Config(PatchGrid):
        """The patch embedding and its position tables, shared by image and video."""

        axes = ("frames", "height", "width")
        patch: Triple = (4, 16, 16)
        """Frames, height and width (pixels) of a patch."""
        tables: Triple = (16, 32, 32)
        """Rows of the position table of each axis. A patch's row is its relative place along the axis. A table must
        have at least as many rows as the largest input has patches."""
        absolute: dict[Literal["frames", "height", "width"], Count] = Field({})
        """Axes with absolute positions, and the number of frames or pixels that each table spans. With `{frames: 64}`
        the eighth frame has the same position in a clip of 8 frames as in a clip of 16. The positions along other axes
        are relative, as in the paper."""

        fps: Positive | None = None
        """Frames per second that clips are resampled to when they are read, for clips of different rates: a view's
        `stride` then counts these. null: it counts the file's own frames, as in the release."""

    class View(Strict):
        """How pictures are seen."""

        renamed = {"drop": "drop_tokens"}

        size: Count | Pair = 256
        """Pixels a side, or [height, width]; multiples of the patch. The paper: 256, and 128 for low resolution."""
        drop_tokens: Share = 0.0
        """Share of tokens dropped in training (DropToken); the paper: 0.75 for 16 frames of 256 pixels."""
        crop: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Smallest share of the picture's area that a training crop shows (Inception crop; the paper: 0.5). 1: the
        largest center crop."""
        flip: bool = True
        """Mirror half of the training pictures; turn it off where captions tell left from right."""
        jitter: Share = 0.2
        """Largest change of brightness, contrast and saturation, in four of five training pictures: each is multiplied
        by a random factor between 1 - jitter and 1 + jitter. 0: no change."""
        crop_pct: Annotated[float, Field(gt=0, le=1)] = 8 / 9
        """Share of the shorter side that evaluation's center crop keeps (timm has the same option; the release resizes
        to 288 pixels and keeps 256). 1: all of it, for pictures whose content fills the frame."""

        @property
        def hw(self) -> tuple[int, int]:
            """Height and width in pixels."""
            return (self.size, self.size) if isinstance(self.size, int) else self.size

    def stem_spec(self) -> StemSpec:
        frames, height, width = self.config.patch
        return StemSpec(values=frames * height * width * CHANNELS, axes=tuple(self.config.tables))

    def grid(self, view: Any) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        return (1, view.hw[0] // self.config.patch[1], view.hw[1] // self.config.patch[2])

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (1, *view.hw, CHANNELS)

    def whole(self, view: Any) -> "Vision":
        return type(self)(self.config.model_copy(update={"patch": self.shape(view)[:3]}))

    def length(self, view: Any) -> int:
        frames, rows, columns = self.grid(view)
        return kept(frames * rows * columns, view.drop_tokens)

    def check(self, view: Any) -> None:
        for axis, name, size in ((1, "height", view.hw[0]), (2, "width", view.hw[1])):
            check_multiple(f"size: {name}", size, self.config.patch[axis], self.config.limit(axis), "pixels")

    def _render(self, frames: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Frames (T, H, W, 3 or 4) to (T, h, w, 3), all with the same crop, background, flip and colours.

        Transparent pictures are composed on a random plain colour in training and on white in evaluation.
        """
        box, mirror, colours = centre_box(frames.shape[1:3], view.hw, view.crop_pct), False, None
        background: tuple[int, ...] = (255, 255, 255)
        if rng is not None:
            draw = rng.random(12).tolist()  # Always 12, so that options do not change a seed's crops.
            box = centre_box(frames.shape[1:3], view.hw)
            if view.crop < 1:
                box = inception_box(frames.shape[1:3], view.hw, view.crop, draw[:4])
            mirror = view.flip and draw[4] < 0.5
            if view.jitter and draw[11] < JITTERED:
                colours = jitter_matrix(*(1 + view.jitter * (2 * x - 1) for x in draw[5:8]))
            background = tuple(int(256 * x) for x in draw[8:11])
        out = np.empty((len(frames), *view.hw, CHANNELS), np.uint8)
        for i, frame in enumerate(frames):
            picture = PIL.Image.fromarray(frame)
            if picture.mode == "RGBA":
                plain = PIL.Image.new("RGB", picture.size, background)
                plain.paste(picture, mask=picture)
                picture = plain
            picture = picture.resize(view.hw[::-1], PIL.Image.Resampling.BILINEAR, box)
            if mirror:
                picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            out[i] = np.asarray(picture.convert("RGB", colours) if colours else picture)
        return out

    def _tokens(
        self, frames: torch.Tensor, patch: tuple[int, ...], drop: float, rngs: list[np.random.Generator] | None
    ) -> Tokens:
        """Frames (B, [T,] H, W, 3) to patches of `patch`, the last axes of the stem's."""
        sizes = frames.shape[1:-1]
        counts = tuple(size // side for size, side in zip(sizes, patch))
        counts = (1,) * (3 - len(counts)) + counts
        coords = self.config.coordinates(counts).to(frames.device)
        keep = drop_tokens(len(coords), drop, rngs)
        return Tokens(patchify(frames, patch, keep), batch_coordinates(coords, len(frames), keep))


def check_multiple(name: str, size: int, side: int, limit: int, unit: str) -> None:
    """Raises ValueError, naming the nearest sizes that do, unless `size` is a multiple of `side` up to `limit`."""
    largest = limit - limit % side
    if size % side or size > largest:
        below = min(max(side, size - size % side), largest)
        above = min(below + side, largest)
        nearest = f"{below}" if below == above or size > largest else f"{below} or {above}"
        raise ValueError(f"{name} of {size} {unit} is no multiple of {side} up to {largest}; {nearest} would do")


def shrunk_size(size: tuple[int, int], views: list[Any]) -> tuple[int, int]:
    """Height and width that a picture is decoded to: it covers every view with a margin, and is never enlarged."""
    height, width = size
    scale = max(max(view.hw[0] / height, view.hw[1] / width) * max(MARGIN, 1 / view.crop_pct) for view in views)
    scale = min(1.0, scale)
    return ceil(height * scale), ceil(width * scale)


def centre_box(size: tuple[int, int], target: tuple[int, int], share: float = 1.0) -> tuple[float, float, float, float]:
    """The center box (left, upper, right, lower) of a picture (H, W): the largest with the target's aspect ratio that
    fits, scaled by `share`."""
    scale = min(size[0] / target[0], size[1] / target[1]) * share
    return _box(size, target[0] * scale, target[1] * scale, 0.5, 0.5)


def inception_box(
    size: tuple[int, int], target: tuple[int, int], smallest: float, draw: list[float]
) -> tuple[float, float, float, float]:
    """A random box (left, upper, right, lower) of a share of the area and an aspect within `ASPECT` of the target's.

    A box too wide or too tall for the picture is cut, so that no draw has to be repeated: of a narrow picture it may
    show less than `smallest`.
    """
    share, aspect = smallest + (1 - smallest) * draw[0], target[1] / target[0] * ASPECT ** (2 * draw[1] - 1)
    area = share * size[0] * size[1]
    return _box(size, sqrt(area / aspect), sqrt(area * aspect), draw[2], draw[3])


def _box(size: tuple[int, int], height: float, width: float, x: float, y: float) -> tuple[float, float, float, float]:
    """A box cut to the picture (H, W), at shares x and y of the room there is; rounding must not put it outside."""
    height, width = min(height, size[0]), min(width, size[1])
    left, upper = x * (size[1] - width), y * (size[0] - height)
    return left, upper, min(left + width, size[1]), min(upper + height, size[0])


def jitter_matrix(brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """Pillow's 3 x 4 colour matrix: saturation about the luma, contrast about mid-grey, then brightness."""
    pure = brightness * contrast * saturation
    red, green, blue = (brightness * contrast * (1 - saturation) * luma for luma in (0.299, 0.587, 0.114))
    shift = brightness * (1 - contrast) * 127.5
    return pure + red, green, blue, shift, red, pure + green, blue, shift, red, green, pure + blue, shift


def colour(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A Pillow picture of any mode as RGB, or as RGBA if some of it is transparent."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).clip(0, 65535)
        wide = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        picture = PIL.Image.fromarray((values >> 8 if wide else values).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            return picture
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def shrink(pixels: np.ndarray, views: list[Any]) -> np.ndarray:
    """Pixels (H, W, 3 or 4) to the size that the views need."""
    if shrunk_size(pixels.shape[:2], views) == pixels.shape[:2]:
        return pixels
    return shrunk(PIL.Image.fromarray(pixels), views)


def shrunk(picture: PIL.Image.Image, views: list[Any]) -> np.ndarray:
    """A picture in RGB or RGBA as pixels (H, W, 3 or 4) of the size that the views need."""
    height, width = shrunk_size((picture.height, picture.width), views)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(picture)


def without_alpha(pixels: np.ndarray) -> np.ndarray:
    """Drops an alpha channel that is opaque everywhere."""
    opaque = pixels.shape[-1] == 4 and pixels[..., 3].min(initial=255) == 255
    return np.ascontiguousarray(pixels[..., :CHANNELS]) if opaque else pixels


def colour_array(pixels: np.ndarray, axes: int) -> np.ndarray:
    """An array of `axes` leading axes, with or without channels (1 to 4), to 3 or 4 channels.

    Raises:
        BadMedia: another type than uint8, another shape, or nothing in it.
    """
    if pixels.dtype != np.uint8:
        raise BadMedia(f"expected uint8 pixels, found {pixels.dtype}")
    pixels = pixels[..., None] if pixels.ndim == axes else pixels
    if pixels.ndim != axes + 1 or not 1 <= pixels.shape[-1] <= 4 or not pixels.size:
        raise BadMedia(f"expected pixels with 1 to 4 channels, found an array of shape {list(pixels.shape)}")
    if pixels.shape[-1] < CHANNELS:
        grey, alpha = pixels[..., :1], pixels[..., 1:]
        pixels = np.concatenate([grey, grey, grey, alpha], axis=-1)
    return without_alpha(pixels)
