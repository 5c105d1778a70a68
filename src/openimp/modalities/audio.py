"""Sounds: mono samples to patches of a log-mel spectrogram."""

from functools import lru_cache
from math import ceil
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens
from openimp.common.schema import Count, Pair, Positive, Share, Strict
from openimp.modalities.media import (
    SHOWN,
    PatchGrid,
    batch_coordinates,
    clip_starts,
    drop_tokens,
    kept,
    patchify,
    random_start,
    readable,
    reason,
    webp,
)
from openimp.modalities.sound import mono, read_sound, resample, samples_of

FLOOR = 1e-6
"""Added to the magnitude before the logarithm. A full-scale sine has magnitude 1, so this is -120 dB."""
RANGE = 3.5 * np.log(10)
"""Range of log-magnitudes that a picture of a spectrogram shows: 70 dB."""
BAND = 16
"""Mel bins that are computed in one product: neighbours, which hear but a part of the spectrum."""
COLOURS = ((10, 8, 30), (80, 18, 110), (185, 45, 100), (245, 125, 50), (252, 240, 165))
"""Of a spectrogram, red, green and blue, from what is silent to what is loud; the luminance rises evenly."""


class Audio(Modality):
    """A sound, seen as the log-mel spectrogram of its mono mix."""

    name = "audio"
    stem = "audio"
    extensions = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".caf", ".wma")
    decoders = ("soundfile", "av")

    class Config(PatchGrid):
        """The spectrogram, its patches and their position tables."""

        axes = ("frames", "bins")

        sample_rate: Count = 16_000
        """Samples a second that every sound is resampled to."""
        window: Count = 2048
        """Samples of the Hann window of a Fourier transform."""
        hop: Count = 1024
        """Samples from one frame of the spectrogram to the next."""
        bins: Count = 128
        """Mel bins a frame; a multiple of the patch's."""
        low: Annotated[float, Field(ge=0)] = 80.0
        """Hz, where the lowest mel filter starts."""
        high: Positive = 7600.0
        """Hz, where the highest mel filter ends; at most half the sample rate."""
        patch: Pair = (16, 16)
        """Frames and bins of a patch."""
        tables: Pair = (64, 64)
        """Rows of the position table of each axis. A patch's row is its relative place along the axis. A table must
        have at least as many rows as the longest input has patches."""
        absolute: dict[Literal["frames", "bins"], Count] = Field({})
        """Axes with absolute positions, and the number of frames or bins that each table spans. With `{frames: 1024}`
        the third second has the same position in a short sound as in a long one. The positions along other axes are
        relative, as in the paper."""
        mean: float = -9.2
        """Mean that is subtracted from the logarithm of the mel magnitude, measured on 2.048 s of each
        bundled note."""
        std: Positive = 3.5
        """Standard deviation by which the difference is divided, measured on the same notes."""

        @model_validator(mode="after")
        def _fits(self) -> "Audio.Config":
            if not self.low < self.high <= self.sample_rate / 2:
                raise ValueError(f"low {self.low} and high {self.high} must ascend up to {self.sample_rate / 2} Hz")
            if self.hop > self.window:
                raise ValueError(f"hop {self.hop} is longer than window {self.window}: samples would be skipped")
            if self.bins % self.patch[1] or self.bins > self.limit(1):
                raise ValueError(f"bins {self.bins} is no multiple of {self.patch[1]} up to {self.limit(1)}")
            return self

    class View(Strict):
        """How a sound is heard."""

        renamed = {"drop": "drop_tokens"}

        seconds: Positive = 8.192
        """Length; rounded to frames it is a multiple of the patch's. Longer sounds are cut, at random in training;
        shorter ones are followed by silence. The paper: 8.192."""
        drop_tokens: Share = 0.0
        """Share of tokens dropped in training (DropToken)."""
        gain: Annotated[float, Field(ge=0)] = 0.0
        """Largest random change of loudness in training, in dB, up or down."""
        speed: Share = 0.0
        """A sound is at most this much faster or slower in training, and so higher or lower (speed perturbation, Ko et
        al., Interspeech 2015)."""
        clips: Count = 4
        """Clips in evaluation, linearly spaced, whose embeddings are averaged; a single one is from the middle."""

    def frames(self, view: Any) -> int:
        """Frames of the spectrogram: seconds * sample_rate / hop, rounded."""
        return round(view.seconds * self.config.sample_rate / self.config.hop)

    def samples(self, view: Any) -> int:
        """Samples of a sound as long as the view."""
        return self.frames(view) * self.config.hop

    def stem_spec(self) -> StemSpec:
        return StemSpec(values=self.config.patch[0] * self.config.patch[1], axes=tuple(self.config.tables))

    def check(self, view: Any) -> None:
        frames, side = self.frames(view), self.config.patch[0]
        largest = self.config.limit(0)
        if not frames or frames % side or frames > largest:
            below = min(max(side, frames // side * side), largest)
            fits = sorted({below, min(below + side, largest)}) if frames <= largest else [largest]
            seconds = " or ".join(f"{n * self.config.hop / self.config.sample_rate:.6g}" for n in fits)
            raise ValueError(
                f"seconds: {view.seconds} s are {frames} frames, no multiple of {side} up to {largest}; "
                f"{seconds} s would do"
            )

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (1, self.frames(view), self.config.bins, 1)

    def whole(self, view: Any) -> "Audio":
        return Audio(self.config.model_copy(update={"patch": self.shape(view)[1:3]}))

    def length(self, view: Any) -> int:
        return kept(
            self.frames(view) // self.config.patch[0] * (self.config.bins // self.config.patch[1]), view.drop_tokens
        )

    def decode(self, raw: Any, views: list[Any], rng: np.random.Generator | None = None) -> np.ndarray:
        """A sound to mono samples (N,) int16 at the stem's sample rate.

        `raw` is bytes, a path, or an array at that rate: (N,) or (N, channels), int16 or float in -1..1. Of more than
        300 s, only what evaluation hears is read.
        """
        rate = self.config.sample_rate
        view = views[0] if rng is not None else max(views, key=lambda view: view.seconds)
        try:
            if isinstance(raw, np.ndarray):
                sound, found = samples_of(raw), rate
            else:
                # What is played faster is longer before.
                longest = self.samples(view) * (1 + view.speed if rng is not None else 1)
                sound, found = read_sound(readable(raw), longest / rate, view.clips, rng)
            sound = resample(mono(sound), found, rate)
        except BadMedia:
            raise
        except Exception as error:  # broken files raise nearly anything
            raise BadMedia(reason(error)) from None
        if not sound.size:
            raise BadMedia("no samples")
        return np.round(sound.clip(-1, 1) * 32767).astype(np.int16)

    def transform(self, item: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Samples (N,) to one random cut (samples,), or (clips, samples) in evaluation; float32 in -1..1."""
        count = self.samples(view)
        if rng is None:
            return np.stack([_cut(item, start, count) for start in clip_starts(len(item), count, view.clips)])
        speed = 1 + rng.uniform(-view.speed, view.speed) if view.speed else 1.0
        heard = ceil(count * speed)
        start = random_start(len(item), heard, rng)
        gain = 10 ** (rng.uniform(-view.gain, view.gain) / 20)
        sound = _cut(item, start, heard)
        if view.speed:
            sound = _at_speed(sound, speed, count)
        return (sound * np.float32(gain)).clip(-1, 1)

    def tokens(self, items: np.ndarray, view: Any, rngs: list[np.random.Generator] | None) -> Tokens:
        """Samples (B, samples) to patches of the normalised spectrogram, (B, L, frames * bins of a patch) float32."""
        return self._tokens(torch.from_numpy(items), view.drop_tokens, rngs)

    def show(self, value: Any, view: Any) -> bytes:
        """The spectrogram of the first clip that evaluation hears, as a small WebP file: time goes right and pitch up,
        louder is brighter, over the loudest 70 dB."""
        spectrum = log_mel(torch.from_numpy(self.encode_input(value, view)[:1]), self.config)[0].T.numpy()[::-1]
        loudness = (1 + (spectrum - spectrum.max()) / RANGE).clip(0, 1)
        shades = [np.interp(loudness, np.linspace(0, 1, len(COLOURS)), channel) for channel in zip(*COLOURS)]
        return webp(np.stack(shades, axis=-1).round().astype(np.uint8), 2 * SHOWN)

    def from_tensor(self, batch: torch.Tensor) -> Tokens:
        """Mono samples (B, N) in -1..1 at the stem's sample rate to tokens; N is a whole number of patches."""
        if batch.ndim != 2 or not batch.is_floating_point():
            raise TypeError(f"expected float samples (B, N) in -1..1, found {batch.dtype} {list(batch.shape)}")
        self.check(self.View(seconds=batch.shape[1] / self.config.sample_rate))
        return self._tokens(batch, 0.0, None)

    def _tokens(self, waves: torch.Tensor, drop: float, rngs: list[np.random.Generator] | None) -> Tokens:
        config = self.config
        spectrum = log_mel(waves, config)
        counts = (spectrum.shape[1] // config.patch[0], spectrum.shape[2] // config.patch[1])
        coords = config.coordinates(counts).to(waves.device)
        keep = drop_tokens(len(coords), drop, rngs)
        values = (patchify(spectrum[..., None], config.patch, keep) - config.mean) / config.std
        return Tokens(values, batch_coordinates(coords, len(waves), keep))


def log_mel(waves: torch.Tensor, config: Audio.Config) -> torch.Tensor:
    """Samples (B, N) in -1..1 to the log-mel spectrogram (B, N // hop, bins): natural logarithm of the magnitude,
    float32.

    Frame i is centered on the i-th hop. A sine of full scale has magnitude 1, whatever the window.
    """
    missing = config.window - config.hop
    window = torch.hann_window(config.window, device=waves.device)
    window *= 2 / window.sum()
    filters = torch.from_numpy(mel_filters(config.sample_rate, config.window, config.bins, config.low, config.high))
    bands = [_band(part, waves.device) for part in filters.split(BAND, dim=1)]
    mels = []
    for some in waves.float().split(2):  # few at a time stay in the processor's cache
        padded = torch.nn.functional.pad(some, (missing // 2, missing - missing // 2))
        spectrum = torch.fft.rfft(padded.unfold(1, config.window, config.hop) * window)
        squares = torch.view_as_real(spectrum).square()
        magnitude = (squares[..., 0] + squares[..., 1]).sqrt()  # Three times as fast as `abs` or `sum`.
        mels.append(torch.log(torch.cat([magnitude[..., heard] @ band for heard, band in bands], dim=-1) + FLOOR))
    return torch.cat(mels)


def _band(filters: torch.Tensor, device: torch.device) -> tuple[slice, torch.Tensor]:
    """The range of frequencies in which some neighboring filters are not zero, and the filters in that range."""
    heard = filters.any(1).nonzero()[:, 0]
    first, last = int(heard[0]), int(heard[-1]) + 1
    return slice(first, last), filters[first:last].to(device)


@lru_cache(maxsize=8)
def mel_filters(sample_rate: int, window: int, bins: int, low: float, high: float) -> np.ndarray:
    """Triangular filters (window // 2 + 1, bins) on the HTK mel scale, with peaks of 1; float32.

    Where the mel scale is finer than the Fourier transform a filter is widened to one of its steps on either side, so
    none is empty.
    """
    lowest, highest = 2595 * np.log10(1 + np.array([low, high]) / 700)
    mel = np.linspace(float(lowest), float(highest), bins + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    step, centres = sample_rate / window, edges[1:-1]
    rise, fall = np.maximum(np.diff(edges)[:-1], step), np.maximum(np.diff(edges)[1:], step)
    offset = np.arange(window // 2 + 1)[:, None] * step - centres
    return np.clip(1 + np.minimum(offset / rise, -offset / fall), 0, None).astype(np.float32)


def _at_speed(sound: np.ndarray, speed: float, count: int) -> np.ndarray:
    """`count` float32 samples `speed` apart, each on the line between its two neighbours, as `np.interp` gives them."""
    samples, places = torch.from_numpy(sound), torch.arange(count, dtype=torch.float64) * speed
    before = places.int()
    left = samples.index_select(0, before)
    right = samples.index_select(0, (before + 1).clamp_(max=len(sound) - 1))
    return torch.lerp(left, right, places.sub_(before).float()).numpy()


def _cut(sound: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` samples of an int16 sound from `start` on as float32, zeros behind its end."""
    out = np.zeros(count, np.float32)
    part = sound[start : start + count]
    out[: len(part)] = part
    out /= 32767
    return out
