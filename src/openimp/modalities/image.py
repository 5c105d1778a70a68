"""Pictures, read with Pillow, as one frame of patches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, ClassVar

import numpy as np
import PIL.AvifImagePlugin
import PIL.Image
import PIL.ImageOps
import torch
from PIL import ExifTags
from torch import Tensor

from openimp.common.modality import BadMedia, Rng
from openimp.common.protocols import Recorded
from openimp.modalities.media import (
    MAX_PIXELS,
    MediaFile,
    decoder_errors,
    encode_webp,
    open_media,
    valid_place,
)
from openimp.modalities.vision import Vision, check_pixels, decoded_size, shrink, to_rgb

try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)

PIL.Image.init()
PIXEL_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")
"""Formats that contain only pixels. Pillow passes others, such as EPS, to an external program."""
FORMATS = tuple(name for name in PIXEL_FORMATS if name in PIL.Image.OPEN)
"""Those that this build of Pillow reads."""
HEIC = (b"ftyphe", b"ftypmif1", b"ftypmsf1")
"""What HEIC files, which most phones write, have from byte 4 on."""
COSTLY = ("WEBP", "AVIF", "JPEG2000")
"""Formats whose decoders need at least twice the memory per pixel that others need."""
EXIF_DATES = (ExifTags.Base.DateTimeOriginal, ExifTags.Base.DateTimeDigitized, ExifTags.Base.DateTime)
"""Tags with the time of a picture, the best first."""
RAW_SIDE = 32
"""Pixels per side of the pictures that are compared without an encoder."""
MAX_SCANS = 100
"""Most scans of a progressive JPEG; encoders write about ten."""
PIL.AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # The workers of the loader are parallel already.


class Image(Vision):
    """A picture. It counts as a clip whose frames are all equal; its tokens hold the values of one frame."""

    name = "image"
    tensor_axes = ("B", "3", "H", "W")
    extensions = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2",
                  ".ppm", ".pgm", ".pbm", ".tga")  # fmt: skip
    other_extensions = (".gif",)
    decoders: ClassVar[tuple[str, ...]] = ("pillow",)
    raw_features_name = "pixels"

    @property
    def patch(self) -> tuple[int, ...]:
        return (1, *self.config.patch[1:])

    @decoder_errors()
    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """Decodes a picture to (H, W, 3) uint8, or to (H, W, 4) if any of it is transparent.

        `raw` is bytes, a path, a Pillow picture, or an array of 0..255, (H, W) or (H, W, 1 to 4).
        """
        with upright(raw, views) as picture:
            return shrink(to_rgb(picture), views)

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """Crops and augments pixels (H, W, C) to (h, w, 3), or (1, h, w, 3) in evaluation; uint8."""
        frames = self._render(item[None], view, rng)
        return frames if rng is None else frames[0]

    @decoder_errors()
    def thumbnail(self, value: Any, view: Any, side: int, segment: tuple[float, float] | None = None) -> bytes:
        """The whole picture."""
        return encode_webp(self.decode(value, [Image.View(size=side)]), side)

    @decoder_errors()
    def recorded(self, value: Any) -> Recorded:
        """The time and place in the EXIF data of a file. The time is that of the camera's clock."""
        with open_media(value) as media_file:
            picture = open_picture(media_file)
            if picture.format != "TIFF" and "exif" not in picture.info:
                return Recorded()  # Otherwise Pillow would decode a whole PNG to look for EXIF data behind its pixels.
            exif = picture.getexif()
            dates = exif.get_ifd(ExifTags.IFD.Exif)
            texts = (dates.get(tag) or exif.get(tag) for tag in EXIF_DATES)
            time = next(filter(None, map(_exif_time, texts)), None)
            place = None
            with suppress(BadMedia), decoder_errors():  # A place that cannot be read says nothing about the time.
                place = _exif_place(exif.get_ifd(ExifTags.IFD.GPSInfo))
            return Recorded(time, place)

    def raw_features(self, item: np.ndarray, view: Any) -> np.ndarray:
        """The pixels of a small square, in -1..1."""
        picture = PIL.Image.fromarray(self.transform(item, view, None)[0])
        small = picture.resize((RAW_SIDE, RAW_SIDE), PIL.Image.Resampling.BILINEAR)
        return np.asarray(small, np.float32).ravel() / 127.5 - 1

    def preprocess(self, picture: Any, view: Any) -> Tensor:
        """Converts a Pillow picture, or whatever `decode` takes, to a float tensor (3, h, w) for `from_tensor`."""
        pixels = torch.from_numpy(self.encode_input(picture, view)[0])
        return pixels.permute(2, 0, 1).float() / 127.5 - 1


def open_picture(media_file: MediaFile) -> PIL.Image.Image:
    """Opens a picture without decoding it."""
    head = media_file.peek(12)
    try:
        return PIL.Image.open(media_file, formats=FORMATS)
    except PIL.UnidentifiedImageError:
        if head[4:12].startswith(HEIC) and "HEIF" not in FORMATS:
            raise BadMedia("a HEIC picture, which needs pillow-heif: pip install 'openimp[heif]'") from None
        raise


def _exif_time(text: Any) -> datetime | None:
    try:
        return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S")
    except ValueError:  # A camera writes spaces or zeros before its clock is set.
        return None


def _exif_place(tags: Mapping[int, Any]) -> tuple[float, float] | None:
    if ExifTags.GPS.GPSLatitude not in tags or ExifTags.GPS.GPSLongitude not in tags:
        return None
    latitude = _degrees(tags[ExifTags.GPS.GPSLatitude], tags.get(ExifTags.GPS.GPSLatitudeRef) == "S")
    longitude = _degrees(tags[ExifTags.GPS.GPSLongitude], tags.get(ExifTags.GPS.GPSLongitudeRef) == "W")
    return valid_place(latitude, longitude)


def _degrees(parts: Sequence[Any], is_negative: bool) -> float:
    degrees, minutes, seconds = map(float, parts)
    value = degrees + minutes / 60 + seconds / 3600
    return -value if is_negative else value


@contextmanager
def upright(raw: Any, views: Sequence[Any] = ()) -> Iterator[PIL.Image.Image]:
    """Opens whatever `Image.decode` takes, turned as its EXIF data say.

    With `views`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size.
    """
    if isinstance(raw, np.ndarray):
        yield PIL.Image.fromarray(check_pixels(raw, axes=2))
    elif isinstance(raw, PIL.Image.Image):
        check_size(raw)
        yield _turned(raw.copy())
    else:
        with open_media(raw) as media_file:
            picture = open_picture(media_file)
            if "progressive" in picture.info:
                _check_progressive(picture, media_file)
            if views:  # The picture may be turned, so both orientations count.
                height, width = decoded_size((picture.height, picture.width), views)
                turned_width, turned_height = decoded_size((picture.width, picture.height), views)
                picture.draft(None, (max(width, turned_width), max(height, turned_height)))
            check_size(picture)
            yield _turned(picture)


def _turned(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Turns a picture in place, as its EXIF data say. EXIF data that cannot be read are ignored, but for TIFF."""
    picture.load()  # Pillow turns a TIFF when it loads it, and forgets the orientation.
    with suppress(Exception):  # Pillow raises many kinds, also if it has turned the picture and cannot write new data.
        PIL.ImageOps.exif_transpose(picture, in_place=True)
    picture.info.pop("exif", None)  # Nothing may turn it again.
    return picture


def _check_progressive(picture: PIL.Image.Image, media_file: MediaFile) -> None:
    """Refuses a progressive JPEG with too many pixels or scans.

    Pillow holds the coefficients of all pixels even if `draft` reduces the size, and each scan passes over all of them.
    """
    check_size(picture)
    media_file.seek(0)
    if (scans := media_file.read().count(b"\xff\xda")) > MAX_SCANS:
        raise BadMedia(f"{scans} scans are more than {MAX_SCANS}")


def check_size(picture: PIL.Image.Image) -> None:
    """Refuses a picture with too many pixels."""
    limit = MAX_PIXELS // 4 if picture.format in COSTLY else MAX_PIXELS
    if not 0 < picture.width * picture.height <= limit:
        raise BadMedia(f"a picture of {picture.width} x {picture.height} pixels; expected 1 to {limit:,} pixels")
