"""Reading sounds: files through libsndfile, and through FFmpeg what that does not know, such as the sound of a film."""

import re
from collections.abc import Iterator
from math import ceil
from typing import Any

import av
import numpy as np
import soundfile

from openimp.common.modality import BadMedia
from openimp.modalities.media import Source, opened, segments

MAX_SECONDS = 300
"""Length up to which a sound is read whole."""
MAX_CHANNELS = 255
"""As FFmpeg counts them at most."""
MAX_SAMPLES = 2**25
"""Samples that are held of a sound: 300 s at up to 111 kHz."""
BLOCK = 2**22
"""Samples times channels that are read at once."""
SOUNDFILE = re.compile(rb"RIFF|RIFX|RF64|riff|FORM|fLaC|OggS|caff|\.snd|ID3|\xff[\xe0-\xff]")
"""How the files begin that libsndfile reads: WAV, W64, AIFF, FLAC, Ogg, CAF, AU and MP3, of the many that it knows."""


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


def read_sound(source: Source, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    """The parts (N,) of a sound that are heard, float32, the mean of its channels, and their sample rate."""
    if SOUNDFILE.match(source.peek(4)):
        try:
            return _read_soundfile(source, seconds, clips, rng)
        except soundfile.LibsndfileError:
            source.seek(0)
    return _read_container(source, seconds, clips, rng)


def _plan(total: int, rate: int, seconds: float, clips: int, rng: Any) -> list[tuple[int, int]]:
    """Which samples to read, as (start, count): see `segments`."""
    if not 1000 <= rate <= 768_000:
        raise BadMedia(f"a sample rate of {rate} Hz")
    span = ceil(seconds * rate) + 1
    parts = segments(total, span, clips, min(MAX_SECONDS * rate, MAX_SAMPLES), rng)
    if sum(min(count, total or count) for _, count in parts) > MAX_SAMPLES:
        raise BadMedia(f"more than {MAX_SAMPLES} samples at {rate} Hz are too many to read")
    return parts


def _read_soundfile(source: Source, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    parts = []
    with soundfile.SoundFile(source) as file:
        block = BLOCK // file.channels
        for start, count in _plan(file.frames, file.samplerate, seconds, clips, rng):
            if start:
                file.seek(start)
            for begin in range(start, min(start + count, file.frames), block):
                length = min(block, start + count - begin, file.frames - begin)
                parts.append(file.read(length, dtype="float32", always_2d=True).mean(axis=1))
                source.spend(length * file.channels)
        return np.concatenate(parts) if parts else np.empty(0, np.float32), file.samplerate


def _read_container(source: Source, seconds: float, clips: int, rng: Any) -> tuple[np.ndarray, int]:
    with opened(source, "audio") as (container, stream):
        length = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        plan = _plan(int(length * stream.rate), stream.rate, seconds, clips, rng)
        parts = [piece for start, count in plan for piece in _part(source, container, stream, start, count)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32), stream.rate


def _part(source: Source, container: Any, stream: Any, start: int, count: int) -> Iterator[np.ndarray]:
    """`count` samples from the `start`-th on, as far as there are, in pieces (n,)."""
    first = None
    if start:
        first = (stream.start_time or 0) + int(start / stream.rate / stream.time_base)
        # Lossy codecs need what came before, Opus 80 ms of it.
        container.seek(max(0, first - int(0.1 / stream.time_base)), stream=stream)
    planar = av.AudioResampler("fltp")
    for frame in container.decode(stream):
        source.spend(frame.samples * stream.channels)
        early = 0 if first is None or frame.pts is None else max(0, first - frame.pts)
        skip = round(early * stream.time_base * stream.rate)
        for part in planar.resample(frame):
            piece = part.to_ndarray().T[skip:][:count]
            yield piece.mean(axis=1)
            count -= len(piece)
        if count <= 0:
            return
