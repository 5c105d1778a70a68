"""The base of image and video: one stem, and frames that are cropped, flipped, color-jittered and cut into patches.

A picture counts as one frame. The values of a patch are in the order (t, h, w, c). So the stem can embed one frame as
if it were repeated, by summing its kernel over the frames of a patch.
"""

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import PIL.Image
import torch
from pydantic import Field
from torch import Tensor

from openimp.common.modality import BadMedia, Modality, Rng, StemSpec, Tokens
from openimp.common.protocols import TensorInput
from openimp.common.schema import Count, Pair, PartialShare, PositiveShare, Share, Strict, Triple
from openimp.modalities.media import PatchGrid, check_range, narrowed, patch_count, tokens_kept

Size = tuple[int, int]
"""Height and width."""
Box = tuple[float, float, float, float]
"""A box in a picture: left, upper, right and lower, in pixels, as Pillow takes it."""
CHANNELS = 3
MARGIN = 1.15
"""Decoded pictures are larger than their views by this factor, so that crops keep some detail."""
JITTERED = 0.8
"""Share of the training pictures to which color jitter is applied."""


class Vision(Modality):
    """Base of image and video."""

    stem = "vision"
    tensor_axes: ClassVar[tuple[str, ...]]  # the shape of a batch that `from_tensor` takes

    class Config(PatchGrid):
        """The patch embedding and the position tables, which image and video share."""

        removed = {"fps": (None,)}

        axes = ("frames", "height", "width")
        patch: Triple = (4, 16, 16)
        """Frames, height and width (pixels) of a patch."""
        tables: Triple = (16, 32, 32)
        """Rows of the position table of each axis. A patch's row is its relative place along the axis. A table must
        have at least as many rows as the largest input has patches."""
        positions: Literal["axes", "grid"] = "axes"
        """axes: a table per axis, whose rows are summed and normalized, as in the paper. grid: a table for the frames,
        and one with a row for each place in a picture, height x width of `tables`. Their rows are summed, but not
        normalized, as in most public vision Transformers."""
        absolute: dict[Literal["frames", "height", "width"], Count] = Field({})
        """Axes with absolute positions, and the number of frames or pixels that each table spans. With `{frames: 64}`
        the eighth frame has the same position in a clip of 8 frames as in a clip of 16. The positions along other axes
        are relative, as in the paper."""

    class View(Strict):
        """Size, tokens and augmentation of a picture."""

        size: Count | Pair = 256
        """Pixels per side, or [height, width]; multiples of the patch. The paper: 256, and 128 for low resolution."""
        drop_tokens: PartialShare = 0.0
        """Share of tokens dropped in training (DropToken); the paper: 0.75 for 16 frames of 256 pixels."""
        crop: PositiveShare = 0.5
        """Smallest share of the picture's area that a training crop shows (Inception crop; the paper: 0.5). 1: the
        largest center crop."""
        aspect: Annotated[float, Field(ge=1)] = 2.0
        """Largest factor by which the aspect ratio of a training crop differs from the view's. 1: no distortion; small
        pictures are then learned faster."""
        flip: bool = True
        """Mirror half of the training pictures. Turn it off if captions mention left and right."""
        jitter: Share = 0.2
        """Largest change of brightness, contrast and saturation, in four of five training pictures: each is multiplied
        by a random factor between 1 - jitter and 1 + jitter. 0: no change."""
        crop_pct: PositiveShare = 8 / 9
        """Share of the shorter side that the center crop of evaluation keeps (as in timm; the release resizes to 288
        pixels and keeps 256). 1: all of it, for pictures whose content fills the frame."""

        @property
        def hw(self) -> Size:
            """Height and width in pixels."""
            return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def patch(self) -> tuple[int, ...]:
        """Frames, height and width of a token."""
        return tuple(self.config.patch)

    def stem_spec(self) -> StemSpec:
        patch = (*self.config.patch, CHANNELS)
        frames, height, width = self.config.tables
        on_grid = self.config.positions == "grid"
        return StemSpec(
            values=self.config.token_values(*patch),
            axes=(frames, height * width) if on_grid else (frames, height, width),
            position_norm=not on_grid,
            patch=patch,
            conv_channels=self.config.conv_channels,
        )

    def values(self) -> int:
        return self.config.token_values(*self.patch, CHANNELS)

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (1, *view.hw, CHANNELS)

    def length(self, view: Any) -> int:
        return tokens_kept(patch_count(self.shape(view), self.patch), view.drop_tokens)

    def check(self, view: Any) -> None:
        height, width = view.hw
        self.config.check(1, height, f"size: height of {height} pixels is")
        self.config.check(2, width, f"size: width of {width} pixels is")

    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """Cuts pixels (B, [t,] h, w, 3) into patches: values (B, L, P) uint8."""
        return self._tokens(torch.from_numpy(items), view.drop_tokens, rngs)

    def from_tensor(self, batch: Tensor) -> Tokens:
        """Cuts a batch in -1..1, as open_clip prepares it, into patches: (B, 3, H, W), or (B, T, 3, H, W) for clips."""
        if batch.ndim != len(self.tensor_axes) or batch.shape[-3] != CHANNELS or not batch.is_floating_point():
            shape = ", ".join(self.tensor_axes)
            raise TypeError(f"expected float ({shape}) in -1..1, found {batch.dtype} {list(batch.shape)}")
        sizes: dict[str, Any] = {"size": tuple(batch.shape[-2:])}
        if batch.ndim == 5:
            sizes["frames"] = batch.shape[1]
        self.check(self.View(**sizes))
        check_range(batch)
        return self._tokens(batch.movedim(-3, -1), 0.0, None)

    def tensor_input(self, view: Any) -> TensorInput:
        height, width = view.hw
        return TensorInput(
            (CHANNELS, height, width),
            torch.float32,
            "RGB pixels divided by 127.5, minus 1. Turn the picture as its EXIF data say. Put transparent pixels on "
            f"white. Cut out the center: the largest box of {height} x {width} in proportion, its sides times "
            f"{view.crop_pct:.6g}. Resize it to {height} "
            f"pixels in height and {width} in width, with Pillow's bilinear filter.",
        )

    def _tokens(self, frames: Tensor, drop: float, rngs: list[Rng] | None) -> Tokens:
        frames = frames if frames.ndim == 5 else frames[:, None]
        tokens = self.config.cut(frames, self.patch, drop, rngs)
        if self.config.positions == "axes":
            return tokens
        frame, row, column = tokens.coords.unbind(-1)
        place = row * self.config.tables[2] + column
        return tokens._replace(coords=torch.stack([frame, place], dim=-1))

    def _render(self, frames: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """Crops, resizes and augments frames (T, H, W, 3 or 4) to (T, h, w, 3), all in the same way.

        Transparent pictures get a random plain background in training and a white one in evaluation.
        """
        size = frames.shape[1:3]
        box = center_box(size, view.hw, view.crop_pct if rng is None else 1.0)
        mirror = False
        color_matrix = None
        background: tuple[int, ...] = (255, 255, 255)
        if rng is not None:
            draw = rng.random(12).tolist()  # Always 12 numbers, so that options do not change the crops.
            if view.crop < 1:
                box = inception_box(size, view.hw, view.crop, view.aspect, draw[:4])
            mirror = view.flip and draw[4] < 0.5
            if view.jitter and draw[11] < JITTERED:
                color_matrix = jitter_matrix(*(1 + view.jitter * (2 * x - 1) for x in draw[5:8]))
            background = tuple(int(256 * x) for x in draw[8:11])
        out = np.empty((len(frames), *view.hw, CHANNELS), np.uint8)
        for i, frame in enumerate(frames):
            picture = PIL.Image.fromarray(frame)
            if picture.mode == "RGBA":
                on_background = PIL.Image.new("RGB", picture.size, background)
                on_background.paste(picture, mask=picture)
                picture = on_background
            picture = picture.resize(view.hw[::-1], PIL.Image.Resampling.BILINEAR, box)
            if mirror:
                picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
            if color_matrix:
                picture = picture.convert("RGB", color_matrix)
            out[i] = np.asarray(picture)
        return out


def decoded_size(size: Size, views: Sequence[Any]) -> Size:
    """Height and width that a picture is decoded to: enough for all views with a margin, and never enlarged."""
    height, width = size
    scales = (max(view.hw[0] / height, view.hw[1] / width) * max(MARGIN, 1 / view.crop_pct) for view in views)
    scale = min(1.0, max(scales))
    return ceil(height * scale), ceil(width * scale)


def center_box(size: Size, target: Size, share: float = 1.0) -> Box:
    """The center box of a picture (H, W): the largest one with the target's aspect ratio, scaled by `share`."""
    scale = min(size[0] / target[0], size[1] / target[1]) * share
    return _box(size, target[0] * scale, target[1] * scale, 0.5, 0.5)


def inception_box(size: Size, target: Size, smallest: float, largest_factor: float, draw: list[float]) -> Box:
    """A random box with a share of the area between `smallest` and 1.

    Its aspect ratio differs from the target's by at most `largest_factor`. A box that is too wide or too tall is cut
    instead of drawn again, so with a narrow picture the share may be less than `smallest`.
    """
    share = smallest + (1 - smallest) * draw[0]
    aspect = target[1] / target[0] * largest_factor ** (2 * draw[1] - 1)
    area = share * size[0] * size[1]
    return _box(size, sqrt(area / aspect), sqrt(area * aspect), draw[2], draw[3])


def _box(size: Size, height: float, width: float, x: float, y: float) -> Box:
    """A box cut to the picture (H, W), at the fractions x and y of the free space. Rounding never puts it outside."""
    height = min(height, size[0])
    width = min(width, size[1])
    left = x * (size[1] - width)
    upper = y * (size[0] - height)
    return left, upper, min(left + width, size[1]), min(upper + height, size[0])


def jitter_matrix(brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """Pillow's 3 x 4 color matrix: saturation around the luma, contrast around middle gray, then brightness."""
    gray = brightness * contrast * (1 - saturation) * np.array([0.299, 0.587, 0.114])
    colors = brightness * contrast * saturation * np.eye(3) + gray
    shift = np.full((3, 1), brightness * (1 - contrast) * 127.5)
    return tuple(np.hstack([colors, shift]).ravel().tolist())


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a picture of any mode to RGB, or to RGBA if any of it is transparent."""
    if picture.mode == "F":  # Pillow would cut it to 0..255, but most such files have 0..1 or 0..65535.
        raise BadMedia("a picture of floating-point numbers")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).clip(0, 65535)
        wide = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        picture = PIL.Image.fromarray((values >> 8 if wide else values).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            return picture
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def shrink(picture: PIL.Image.Image, views: list[Any]) -> np.ndarray:
    """Resizes an RGB or RGBA picture to pixels (H, W, 3 or 4) of the size that the views need."""
    height, width = decoded_size((picture.height, picture.width), views)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(picture)


def drop_opaque_alpha(pixels: np.ndarray) -> np.ndarray:
    """Removes an alpha channel that is opaque everywhere."""
    opaque = pixels.shape[-1] == 4 and pixels[..., 3].min(initial=255) == 255
    return np.ascontiguousarray(pixels[..., :CHANNELS]) if opaque else pixels


def check_pixels(pixels: np.ndarray, axes: int) -> np.ndarray:
    """Converts integers in 0..255 with `axes` leading axes and 0 to 4 channels to 3 or 4 channels uint8.

    Refuses other arrays.
    """
    pixels = narrowed(pixels, np.uint8)
    if pixels.dtype != np.uint8:
        is_float = pixels.dtype.kind == "f"
        hint = "; if the pixels are in 0..1, give (255 * pixels).round().astype('uint8')" if is_float else ""
        raise BadMedia(f"expected integer pixels in 0..255, found {pixels.dtype}{hint}")
    if axes == 3 and pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        raise BadMedia(f"an array of shape {list(pixels.shape)} is one picture; stack frames to (T, H, W, 3)")
    pixels = pixels[..., None] if pixels.ndim == axes else pixels
    if pixels.ndim != axes + 1 or not 1 <= pixels.shape[-1] <= 4 or not pixels.size:
        raise BadMedia(f"expected pixels with 1 to 4 channels, found an array of shape {list(pixels.shape)}")
    if pixels.shape[-1] < CHANNELS:
        gray = pixels[..., :1]
        alpha = pixels[..., 1:]
        pixels = np.concatenate([gray, gray, gray, alpha], axis=-1)
    return drop_opaque_alpha(pixels)
