"""Reads the headers of media: whether they are a picture, a clip or a sound, and their size and length."""

from typing import Any, Literal, NamedTuple

import PIL.Image

from openimp.modalities import sound
from openimp.modalities.image import open_picture
from openimp.modalities.media import decoder_errors, open_container, open_media

Kind = Literal["image", "video", "audio"]
FRAME_SECONDS = 0.1
"""Assumed duration of a frame of an animation."""
COVERS = ("mjpeg", "png")
"""Codecs of a single frame that is the cover of a sound."""


class MediaInfo(NamedTuple):
    """Kind, size and length of a media value. Fields that do not apply to the kind are 0."""

    kind: Kind
    side: int = 0  # pixels of the shorter side
    frames: int = 0
    seconds: float = 0.0


@decoder_errors()
def probe(raw: Any) -> MediaInfo:
    """Probes bytes or a path. Only headers are read, so a broken file may pass.

    Raises:
        BadMedia: no modality can read it.
    """
    with open_media(raw) as source:
        try:
            with open_picture(source) as picture:
                frames = getattr(picture, "n_frames", 1)
                moves = frames > 1 and picture.format in ("GIF", "PNG", "WEBP")  # The frames of a TIFF are pages.
                kind: Kind = "video" if moves else "image"
                return MediaInfo(kind, min(picture.size), frames, frames * FRAME_SECONDS)
        except (PIL.UnidentifiedImageError, SyntaxError):
            source.seek(0)
        try:
            with open_container(source, "video") as (_, stream, seconds):
                frames = stream.frames or int(seconds * float(stream.average_rate or 0))
                if frames > 1 or (not frames and stream.codec_context.codec.name not in COVERS):
                    return MediaInfo("video", min(stream.width, stream.height), frames, float(seconds))
        except Exception:  # FFmpeg raises nearly anything. Then the file is a sound, or `length` tells what is wrong.
            pass
        source.seek(0)
        return MediaInfo("audio", seconds=sound.length_in_seconds(source))
