"""Reading sounds: files through libsndfile, and through FFmpeg what that does not know, such as the sound of a film."""

import io
from math import ceil
from typing import Any

import av
import numpy as np
import soundfile

from openimp.modalities import BadMedia
from openimp.modalities.media import CONTAINERS, segments

MAX_SECONDS = 300
"""Length up to which a sound is read whole."""
MAX_CHANNELS = 255
"""As FFmpeg counts them at most."""
MAX_VALUES = 2**27
"""Samples times channels that are read at once."""


def samples_of(raw: np.ndarray) -> np.ndarray:
    """An array that stands for a sound, as float in -1..1."""
    if raw.ndim not in (1, 2) or not (raw.dtype == np.int16 or np.issubdtype(raw.dtype, np.floating)):
        raise BadMedia(f"expected int16 or float samples (N,) or (N, channels), found {raw.dtype} {list(raw.shape)}")
    if raw.ndim == 2 and raw.shape[1] > MAX_CHANNELS:
        raise BadMedia(
            f"expected samples (N, channels), found {raw.shape[1]} channels; transpose channels that come first"
        )
    return raw.astype(np.float32) / 32767 if raw.dtype == np.int16 else raw


def mono(sound: np.ndarray) -> np.ndarray:
    """The mean of the channels (N, channels), checked."""
    sound = sound.mean(axis=1) if sound.ndim == 2 else sound
    if not np.isfinite(sound).all():
        raise BadMedia("samples that are not finite")
    return sound


def resample(sound: np.ndarray, source: int, target: int) -> np.ndarray:
    """Float32 samples (N,) from one rate to another, by FFmpeg's windowed sinc."""
    if source == target or not sound.size:
        return sound
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[None], np.float32), format="fltp", layout="mono")
    frame.sample_rate = source
    resampler = av.AudioResampler("fltp", "mono", target)
    parts = [part.to_ndarray()[0] for part in [*resampler.resample(frame), *resampler.resample(None)]]
    return np.concatenate(parts)


def read_sound(source: io.BytesIO | str, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    """The parts (N, channels) of a sound that are heard, float32, and their sample rate."""
    try:
        return _read_soundfile(source, seconds, clips, rng)
    except soundfile.LibsndfileError:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return _read_container(source, seconds, clips, rng)


def _plan(total: int, rate: int, channels: int, seconds: float, clips: int, rng: Any) -> list[tuple[int, int]]:
    """Which samples to read, as (start, count): see `segments`."""
    if not 1000 <= rate <= 768_000:
        raise BadMedia(f"a sample rate of {rate} Hz")
    span = ceil(seconds * rate) + 1
    parts = segments(total, span, clips, MAX_SECONDS * rate, rng)
    if sum(min(count, total or count) for _, count in parts) * channels > MAX_VALUES:
        raise BadMedia(f"{channels} channels of {rate} Hz are too many to read")
    return parts


def _read_soundfile(source: io.BytesIO | str, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    parts = []
    with soundfile.SoundFile(source) as file:
        for start, count in _plan(file.frames, file.samplerate, file.channels, seconds, clips, rng):
            if start:
                file.seek(start)
            parts.append(file.read(min(count, file.frames - start), dtype="float32", always_2d=True))
        return np.concatenate(parts), file.samplerate


def _read_container(source: io.BytesIO | str, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    container: Any
    with av.open(source, options={"format_whitelist": CONTAINERS}, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise BadMedia("no sound in it")
        stream = container.streams.audio[0]
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        plan = _plan(int(length * stream.rate), stream.rate, stream.channels, seconds, clips, rng)
        parts = [piece for start, count in plan for piece in _part(container, stream, start, count)]
        return np.concatenate(parts) if parts else np.empty((0, 1), np.float32), stream.rate


def _part(container: Any, stream: Any, start: int, count: int) -> list[np.ndarray]:
    """`count` samples from the `start`-th on, as far as there are, in pieces (n, channels)."""
    first = None
    if start:
        first = (stream.start_time or 0) + int(start / stream.rate / stream.time_base)
        # Lossy codecs need what came before, Opus 80 ms of it.
        container.seek(max(0, first - int(0.1 / stream.time_base)), stream=stream)
    planar = av.AudioResampler("fltp")
    pieces: list[np.ndarray] = []
    for frame in container.decode(stream):
        early = 0 if first is None or frame.pts is None else max(0, first - frame.pts)
        skip = round(early * stream.time_base * stream.rate)
        for part in planar.resample(frame):
            pieces.append(part.to_ndarray().T[skip:][:count])
            count -= len(pieces[-1])
        if count <= 0:
            break
    return pieces
