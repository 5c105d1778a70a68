"""Reads the headers of media: whether they are a picture, a clip or a sound, and their size and length."""

from dataclasses import dataclass
from typing import Any, Literal

import PIL.Image
import soundfile

from openimp.common.modality import BadMedia
from openimp.modalities.image import open_picture
from openimp.modalities.media import Source, decoder_errors, open_container, open_source
from openimp.modalities.sound import SOUNDFILE

Kind = Literal["image", "video", "audio"]
FRAME_SECONDS = 0.1
"""Assumed duration of a frame of an animation."""


@dataclass(frozen=True)
class Probed:
    """Kind, size and length of a media value. Fields that do not apply to the kind are 0."""

    kind: Kind
    side: int = 0  # pixels of the shorter side
    frames: int = 0
    seconds: float = 0.0


@decoder_errors()
def probe(raw: Any) -> Probed:
    """Probes bytes or a path. Only headers are read, so a broken file may pass.

    Raises:
        BadMedia: no modality can read it.
    """
    with open_source(raw) as source:
        for attempt in (_picture, _sound, _clip):
            source.seek(0)
            if found := attempt(source):
                return found
    raise BadMedia("neither a picture nor a clip nor a sound")


def _picture(source: Source) -> Probed | None:
    try:
        with open_picture(source) as picture:
            side, frames = min(picture.size), getattr(picture, "n_frames", 1)
            moves = frames > 1 and picture.format in ("GIF", "PNG", "WEBP")  # The frames of a TIFF are pages.
    except (PIL.UnidentifiedImageError, SyntaxError):
        return None
    return Probed("video", side, frames, frames * FRAME_SECONDS) if moves else Probed("image", side)


def _sound(source: Source) -> Probed | None:
    if not SOUNDFILE.match(source.peek(4)):
        return None
    try:
        with soundfile.SoundFile(source) as file:
            return Probed("audio", seconds=file.frames / file.samplerate)
    except soundfile.LibsndfileError:
        return None


def _clip(source: Source) -> Probed | None:
    """A container that FFmpeg reads: a clip, or a sound, whose only pictures may be its cover."""
    try:
        with open_container(source, "video") as (_, stream, seconds):
            rate = float(stream.average_rate or 0)
            frames = stream.frames or int(seconds * rate)
            if frames > 1 or (stream.codec_context.codec.name not in ("mjpeg", "png") and not frames):
                return Probed("video", min(stream.width, stream.height), frames, float(seconds))
    except BadMedia:
        pass
    source.seek(0)
    with open_container(source, "audio") as (_, _, seconds):
        return Probed("audio", seconds=float(seconds))
