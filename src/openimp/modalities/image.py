"""Pictures: anything that Pillow reads, to one frame of patches."""

from typing import Any

import numpy as np
import PIL.AvifImagePlugin
import PIL.IcoImagePlugin
import PIL.Image
import PIL.ImageOps
import torch

from openimp.common.modality import BadMedia, Tokens
from openimp.modalities.media import MAX_PIXELS, SHOWN, Source, readable, reason, webp
from openimp.modalities.vision import Vision, colour, colour_array, shrink, shrunk, shrunk_size

# Formats that hold pixels, as far as this build of Pillow has them. It would hand others, such as EPS, to a program of
# the system.
PIL.Image.init()
PIXELS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
FORMATS = tuple(name for name in PIXELS if name in PIL.Image.OPEN)
ICON = b"\0\0\1\0"
"""First bytes of an ICO file."""
COSTLY = ("WEBP", "AVIF", "JPEG2000")
"""Formats whose decoders take twice the memory a pixel that others take, or more."""
MAX_SCANS = 100
"""Scans of a progressive JPEG; encoders make about ten."""
PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the loader's workers are the parallel part


class Image(Vision):
    """A still, seen as a clip whose frames are all alike; its tokens carry the values of one frame."""

    name = "image"
    extensions = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga", ".ico")
    decoders = ("pillow",)

    def values(self) -> int:
        return self.stem_spec().values // self.config.patch[0]

    def decode(self, raw: Any, views: list[Any], rng: np.random.Generator | None = None) -> np.ndarray:
        """A picture to (H, W, 3), or (H, W, 4) where it is transparent; uint8.

        `raw` is bytes, a path, a Pillow picture, or a uint8 array (H, W) or (H, W, 1 to 4).
        """
        if isinstance(raw, np.ndarray):
            return shrink(colour_array(raw, 2), views)
        try:
            if isinstance(raw, PIL.Image.Image):
                _check_size(raw)
                return shrunk(colour(PIL.ImageOps.exif_transpose(raw)), views)
            with readable(raw) as source:
                picture = _open(source)
                if "progressive" in picture.info:
                    _check_progressive(picture, source)
                # JPEG shrinks by 2, 4 or 8 while it decodes; a turned picture may be asked for either way round.
                height, width = shrunk_size((picture.height, picture.width), views)
                turned_width, turned_height = shrunk_size((picture.width, picture.height), views)
                picture.draft(None, (max(width, turned_width), max(height, turned_height)))
                _check_size(picture)
                PIL.ImageOps.exif_transpose(picture, in_place=True)
                return shrunk(colour(picture), views)
        except BadMedia:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            raise BadMedia(reason(error)) from None

    def transform(self, item: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Pixels (H, W, C) to (h, w, 3), or (1, h, w, 3) in evaluation; uint8."""
        frames = self._render(item[None], view, rng)
        return frames if rng is None else frames[0]

    def tokens(self, items: np.ndarray, view: Any, rngs: list[np.random.Generator] | None) -> Tokens:
        """Pixels (B, h, w, 3) to patches of one frame, (B, L, h * w * 3 of a patch) uint8."""
        return self._tokens(torch.from_numpy(items), self.config.patch[1:], view.drop_tokens, rngs)

    def show(self, value: Any, view: Any) -> bytes:
        """The pixels that evaluation sees, as a small WebP file."""
        return webp(self.encode_input(value, view)[0], SHOWN)

    def from_tensor(self, batch: torch.Tensor) -> Tokens:
        """Pictures (B, 3, H, W) in -1..1, open_clip's convention, to tokens."""
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise TypeError(f"expected float (B, 3, H, W) in -1..1, found {batch.dtype} {list(batch.shape)}")
        self.check(self.View(size=(batch.shape[2], batch.shape[3])))
        return self._tokens(batch.permute(0, 2, 3, 1), self.config.patch[1:], 0.0, None)

    def preprocess(self, picture: Any, view: Any) -> torch.Tensor:
        """A Pillow picture, or whatever `decode` takes, to a float tensor (3, h, w) in -1..1, for `from_tensor`."""
        pixels = torch.from_numpy(self.encode_input(picture, view)[0])
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _open(source: Source) -> PIL.Image.Image:
    """A picture whose pixels are not decoded yet. Pillow itself decodes an icon at once, however large it is."""
    if source.peek(4)[:4] == ICON:
        return PIL.IcoImagePlugin.IcoFile(source).frame(0)
    return PIL.Image.open(source, formats=FORMATS)


def _check_progressive(picture: PIL.Image.Image, source: Source) -> None:
    """Refuses a JPEG of too many pixels, although draft makes it smaller, because all of its coefficients are held, and
    one of too many scans, each of which goes over all of them."""
    _check_size(picture)
    source.seek(0)
    if (scans := source.read().count(b"\xff\xda")) > MAX_SCANS:
        raise BadMedia(f"{scans} scans are more than {MAX_SCANS}")


def _check_size(picture: PIL.Image.Image) -> None:
    """Refuses what would take much memory, before it does."""
    limit = MAX_PIXELS // 2 if picture.format in COSTLY else MAX_PIXELS
    if not 0 < picture.width * picture.height <= limit:
        raise BadMedia(f"{picture.width} x {picture.height} pixels are none or more than {limit}")
