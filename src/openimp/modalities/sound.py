"""Reads sounds with libsndfile, or with FFmpeg if libsndfile does not know the format, such as the sound of a film."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import ceil
from numbers import Real
from typing import Any, TypeVar

import av
import numpy as np
import soundfile

from openimp.common.modality import BadMedia
from openimp.modalities.media import LARGEST, MediaFile, narrowed, open_container, parts_to_read

MAX_SECONDS = 300
"""Longest sound that is read as a whole."""
MAX_CHANNELS = 255
"""FFmpeg's limit."""
MAX_SAMPLES = 2**25
"""Most samples of a sound in memory: 300 s at up to 111 kHz."""
BLOCK = 2**22
"""Most samples times channels per read."""
SOUNDFILE = re.compile(rb"RIFF|RIFX|RF64|riff|FORM|fLaC|OggS|caff|\.snd|ID3|\xff[\xe0-\xff]")
"""First bytes of the files that libsndfile may read: WAV, W64, AIFF, FLAC, Ogg, CAF, AU and MP3. It knows many more."""


def array_samples(raw: np.ndarray) -> np.ndarray:
    """Checks an array of samples, and converts it to float in -1..1.

    int64, as of lists in tables, must fit int16. int32 is in full range, as soundfile returns it, also if it is quiet.
    """
    raw = narrowed(raw, np.int16) if raw.dtype == np.int64 else raw
    if raw.ndim not in (1, 2) or not (raw.dtype in (np.int16, np.int32) or np.issubdtype(raw.dtype, np.floating)):
        found = f"{raw.dtype} {list(raw.shape)}"
        raise BadMedia(f"expected int16, int32 or float samples (N,) or (N, channels), found {found}")
    if raw.ndim == 2 and raw.shape[1] > MAX_CHANNELS:
        raise BadMedia(f"expected samples (N, channels), found {raw.shape[1]} channels; transpose (channels, N)")
    if raw.dtype.kind == "i":
        return raw.astype(np.float32) / np.iinfo(raw.dtype).max
    return raw.astype(np.float32) if raw.dtype == np.float16 else raw  # float16 cannot hold 32767.


def sampled_array(raw: dict[str, Any], target: int) -> tuple[np.ndarray, int]:
    """The samples and the rate of {"array": ..., "sampling_rate": ...}, if they can be resampled to `target`."""
    if raw.get("array") is None or not isinstance(raw.get("sampling_rate"), Real):
        raise BadMedia(f'expected {{"array": samples, "sampling_rate": a number}}, found the keys {list(raw)}')
    sound = array_samples(np.asarray(raw["array"]))
    rate = float(raw["sampling_rate"])
    if not rate.is_integer() or rate < 1 or len(sound) * target / rate > MAX_SAMPLES:
        raise BadMedia(f"{len(sound)} samples at a sampling rate of {rate:g}")
    return sound, int(rate)


def mono(sound: np.ndarray) -> np.ndarray:
    """The mean over channels of samples (N,) or (N, channels). Refuses samples that are not in about -1..1."""
    sound = sound.mean(axis=1) if sound.ndim == 2 else sound
    if not np.isfinite(sound).all():
        raise BadMedia("samples that are not finite")
    if (largest := np.abs(sound).max(initial=0)) > LARGEST:
        raise BadMedia(f"expected samples in -1..1, found {largest:g}")
    return sound


def resample(sound: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Resamples (N,) from one rate to another with FFmpeg's windowed sinc; fp32."""
    if rate == target_rate or not sound.size:
        return sound
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[None], np.float32), format="fltp", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler("fltp", "mono", target_rate)
    parts = [part.to_ndarray()[0] for part in [*resampler.resample(frame), *resampler.resample(None)]]
    return np.concatenate([np.empty(0, np.float32), *parts])  # A few samples may become none.


class _Quiet:
    """A file for soundfile, which prints an exception of `seek` with its traceback and goes on.

    A broken file may ask for a place before its start. The file then stays where it is, as a failed `lseek` does.
    """

    def __init__(self, media_file: MediaFile) -> None:
        self._media_file = media_file
        self.tell = media_file.tell
        self.readinto = media_file.readinto

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with suppress(OSError, ValueError):
            self._media_file.seek(offset, whence)
        return self.tell()


T = TypeVar("T")
ReadPlan = Callable[[int, int], list[tuple[int, int]]]
"""Maps the number of samples of a sound (0: unknown) and its sample rate to the parts to read, as (start, count)."""


def clips_of(seconds: float, clips: int, rng: Any) -> ReadPlan:
    """Plans to read what clips of a sound need; see `media.parts_to_read`."""

    def plan(total: int, rate: int) -> list[tuple[int, int]]:
        return parts_to_read(total, ceil(seconds * rate) + 1, clips, min(MAX_SECONDS * rate, MAX_SAMPLES), rng)

    return plan


def between(start: float, end: float) -> ReadPlan:
    """Plans to read a sound between two times in seconds."""
    return lambda _, rate: [(int(start * rate), ceil((end - start) * rate))]


def read_sound(media_file: MediaFile, plan: ReadPlan) -> tuple[np.ndarray, int]:
    """Reads the parts of a sound that are used: the mean of its channels (N,) fp32, and the sample rate."""
    sound_and_rate = _try_libsndfile(media_file, lambda file: _read_soundfile(media_file, file, plan))
    return _read_container(media_file, plan) if sound_and_rate is None else sound_and_rate


def length_in_seconds(media_file: MediaFile) -> float:
    """The length of a sound in seconds, according to its header; 0 if it is unknown."""
    seconds = _try_libsndfile(media_file, lambda file: file.frames / file.samplerate)
    if seconds is not None:
        return seconds
    with open_container(media_file, "audio") as (_, _, container_seconds):
        return float(container_seconds)


def _try_libsndfile(media_file: MediaFile, use: Callable[[soundfile.SoundFile], T]) -> T | None:
    """What `use` returns for an opened file; None if libsndfile cannot read it."""
    if not SOUNDFILE.match(media_file.peek(4)):
        return None
    try:
        with soundfile.SoundFile(_Quiet(media_file)) as file:
            return use(file)
    except soundfile.LibsndfileError:
        media_file.seek(0)
        return None


def _checked(plan: ReadPlan, total: int, rate: int) -> list[tuple[int, int]]:
    if not 1000 <= rate <= 768_000:
        raise BadMedia(f"a sample rate of {rate} Hz")
    parts = plan(total, rate)
    if sum(min(count, total or count) for _, count in parts) > MAX_SAMPLES:
        raise BadMedia(f"more than {MAX_SAMPLES} samples at {rate} Hz are too many to read")
    return parts


def _read_soundfile(media_file: MediaFile, file: soundfile.SoundFile, plan: ReadPlan) -> tuple[np.ndarray, int]:
    parts = [np.empty(0, np.float32)]
    block = BLOCK // file.channels
    for start, count in _checked(plan, file.frames, file.samplerate):
        if file.tell() != start:
            if file.format == "MP3":  # libsndfile would decode it from its start, and inexactly. FFmpeg seeks.
                raise soundfile.LibsndfileError(0)
            file.seek(start)
        end = min(start + count, file.frames)
        for begin in range(start, end, block):
            samples = file.read(min(block, end - begin), dtype="float32", always_2d=True)
            parts.append(samples.mean(axis=1))
            media_file.spend(samples.size)
    return np.concatenate(parts), file.samplerate


def _read_container(media_file: MediaFile, plan: ReadPlan) -> tuple[np.ndarray, int]:
    with open_container(media_file, "audio") as (container, stream, seconds):
        blocks = [np.empty(0, np.float32)]
        parts = _checked(plan, int(seconds * stream.rate), stream.rate)
        for start, count in parts:
            part = [*_samples_from(media_file, container, stream, start, count)]
            if len(parts) > 1:  # The header may claim too much. Several parts are cut where they should end.
                part.append(np.zeros(max(0, count - sum(map(len, part))), np.float32))
            blocks += part
        return np.concatenate(blocks), stream.rate


def _samples_from(media_file: MediaFile, container: Any, stream: Any, start: int, count: int) -> Iterator[np.ndarray]:
    """Up to `count` samples from index `start` on, in blocks (n,)."""
    start_pts = None
    if start:
        start_pts = (stream.start_time or 0) + round(start / stream.rate / stream.time_base)
        # Lossy codecs need earlier samples; Opus needs 80 ms, and MP3 up to 0.3 s.
        container.seek(max(0, start_pts - int(0.3 / stream.time_base)), stream=stream)
    planar = av.AudioResampler("fltp")
    for frame in container.decode(stream):
        media_file.spend(frame.samples * stream.channels)
        early = 0 if start_pts is None or frame.pts is None else max(0, start_pts - frame.pts)
        skip = round(early * stream.time_base * stream.rate)
        for part in planar.resample(frame):
            block = part.to_ndarray().T[skip:][:count]
            yield block.mean(axis=1)
            count -= len(block)
        if count <= 0:
            return
