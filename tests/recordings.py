"""Files of pictures, films and sounds, as the tests of modalities make them."""

import io
from typing import Any

import av
import numpy as np
import PIL.Image
import soundfile


def picture_file(picture: PIL.Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def sound_file(samples: np.ndarray, rate: int = 16_000, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def counting(count: int, height: int = 32, width: int = 48, step: int = 5) -> np.ndarray:
    """Frames of one grey each: frame i has value i * step."""
    grey = np.arange(count)[:, None, None, None] * step
    return np.broadcast_to(grey, (count, height, width, 3)).astype(np.uint8)


def animation(frames: np.ndarray, form: str) -> bytes:
    """An animated picture of pixels (T, H, W, 3 or 4), without loss."""
    first, *rest = map(PIL.Image.fromarray, frames)
    options = {"lossless": True} if form == "WEBP" else {"disposal": 2} if form == "GIF" else {}
    return picture_file(first, form, save_all=True, append_images=rest, duration=40, **options)


def film(
    frames: np.ndarray | None = None,
    form: str = "mp4",
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    rotation: int | None = None,
    gop: int = 12,
    bit_rate: int | None = 4_000_000,
    sound: np.ndarray | None = None,
    audio: str = "aac",
    rate: int = 16_000,
) -> bytes:
    """A film of pixels (T, H, W, 3 or 4), of samples (N,) or (2, N), or of both."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        pictures = noise = None
        if frames is not None:
            pictures = container.add_stream(codec, rate=25)
            pictures.height, pictures.width = frames.shape[1:3]
            pictures.pix_fmt = pix_fmt
            pictures.codec_context.gop_size = gop
            if bit_rate is not None:
                pictures.bit_rate = bit_rate
            if rotation is not None:
                pictures.set_display_rotation(rotation)
        if sound is not None:
            layout = "mono" if sound.ndim == 1 else "stereo"
            noise = container.add_stream(audio, rate=rate, layout=layout)
        container.start_encoding()  # Without it, a film of no frames would have no bytes.
        for i, pixels in enumerate(() if frames is None else frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[-1] == 4 else "rgb24")
            if times is not None:
                frame.pts = times[i]
            container.mux(pictures.encode(frame))
        if pictures is not None:
            container.mux(pictures.encode())
        if sound is not None:
            wave = av.AudioFrame.from_ndarray(np.atleast_2d(sound).astype(np.float32), format="fltp", layout=layout)
            wave.sample_rate = rate
            container.mux([*noise.encode(wave), *noise.encode()])
    return out.getvalue()
