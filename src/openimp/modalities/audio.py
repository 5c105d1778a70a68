"""Sounds: mono samples, as patches of a log-mel spectrogram."""

from functools import lru_cache
from math import ceil, log
from typing import Annotated, Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from pydantic import Field, model_validator
from torch import Tensor

from openimp.common.modality import BadMedia, Modality, Rng, StemSpec, Tokens
from openimp.common.protocols import TensorInput
from openimp.common.schema import Count, NotNegative, Pair, PartialShare, Positive, Share, Strict
from openimp.modalities import media
from openimp.modalities.sound import (
    ReadPlan,
    array_samples,
    between,
    clips_of,
    length_in_seconds,
    mono,
    read_sound,
    resample,
    sampled_array,
)

CURVE_POINTS = 5
"""Control points of a random change of the spectrum, evenly spaced on the mel scale."""
ROUNDING = 4
"""Samples by which the length of a part may differ after resampling."""
TINY = 1e-30
"""Least squared magnitude. Its root is far too small to change FLOOR in fp32."""
FLOOR = 1e-6
"""Added to the magnitude before the logarithm. A full-scale sine has magnitude 1, so this is -120 dB."""
RANGE = 3.5 * np.log(10)
"""Range of log-magnitudes in the preview of a spectrogram: 70 dB."""
BAND = 16
"""Neighboring mel bins per matrix product; together they cover only a part of the spectrum."""
COLORS = ("#0a081e", "#fcf0a5", "#b92d64")
"""Colors of the preview of silence, of what is loudest, and of the middle between them."""


class Audio(Modality):
    """A sound, as the log-mel spectrogram of its mono mix."""

    name = "audio"
    stem = "audio"
    extensions = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".m4b", ".aac", ".aif", ".aiff", ".aifc",
                  ".caf", ".wma", ".mka", ".weba")  # fmt: skip
    other_extensions = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".ts", ".wmv")  # with or without video
    decoders = ("soundfile", "av")
    raw_features_name = "averaged log-mel spectra"

    class Config(media.PatchGrid):
        """The spectrogram, its patches and their position tables."""

        axes = ("frames", "bins")

        sample_rate: Count = 16_000
        """Samples per second to which every sound is resampled."""
        window: Annotated[int, Field(ge=1, le=2**16)] = 2048
        """Samples of the Hann window of a Fourier transform."""
        hop: Count = 1024
        """Samples between two frames of the spectrogram."""
        bins: Count = 128
        """Mel bins per frame; a multiple of the patch's bins."""
        low: NotNegative = 80.0
        """Lower edge of the lowest mel filter, in Hz."""
        high: Positive = 7600.0
        """Upper edge of the highest mel filter, in Hz; at most half the sample rate."""
        patch: Pair = (16, 16)
        """Frames and bins of a patch."""
        tables: Pair = (64, 64)
        """Rows of the position table of each axis. A patch's row is its relative place along the axis. Unless the axis
        is absolute, a table must have at least as many rows as the longest input has patches."""
        absolute: dict[Literal["frames", "bins"], Count] = Field({})
        """Axes with absolute positions, and the number of frames or bins that each table spans. With `{frames: 1024}`
        the third second has the same position in a short sound as in a long one. The positions along other axes are
        relative, as in the paper."""
        mean: float = -9.2
        """Mean that is subtracted from the log-mel magnitudes, measured on 2.048 s of each bundled note."""
        std: Positive = 3.5
        """Standard deviation by which the difference is divided, measured on the same notes."""

        @model_validator(mode="after")
        def _fits(self) -> "Audio.Config":
            if not self.low < self.high <= self.sample_rate / 2:
                raise ValueError(
                    f"low {self.low} must be below high {self.high}, and high at most {self.sample_rate / 2} Hz"
                )
            if self.hop > self.window:
                raise ValueError(f"hop {self.hop} is longer than window {self.window}: samples would be skipped")
            self.check(1, self.bins, f"bins {self.bins} is")
            return self

    class View(Strict):
        """Length, tokens and augmentation of a sound."""

        seconds: Positive = 8.192
        """Length in seconds. Rounded to frames, it must be a multiple of the patch's frames. Longer sounds are cut, at
        random in training, and silence is appended to shorter ones. The paper: 8.192."""
        drop_tokens: PartialShare = 0.0
        """Share of tokens dropped in training (DropToken)."""
        gain: NotNegative = 0.0
        """Largest random change of loudness in training, in dB, up or down."""
        speed: Share = 0.0
        """Largest random change of speed in training, as a fraction; it changes the pitch too (speed perturbation, Ko
        et al., Interspeech 2015)."""
        noise: Share = 0.0
        """Largest amplitude of white noise that is added in training, relative to the loudest sample."""
        equalize: NotNegative = 0.0
        """Standard deviation, in dB, of a random smooth change of the spectrum in training, as another microphone or
        room would cause."""
        mask_frames: Share = 0.0
        """Largest share of consecutive frames that are hidden in training, one span per sound (SpecAugment, arXiv
        1904.08779)."""
        mask_bins: Share = 0.0
        """Largest share of neighboring mel bins that are hidden in training, one band per sound."""
        clips: media.Clips = 4
        """Most clips in evaluation, linearly spaced, whose embeddings are averaged; a single clip is from the middle. A
        sound that is not longer than a clip has only one clip."""

    def frames(self, view: Any) -> int:
        """Frames of the spectrogram: seconds * sample_rate / hop, rounded."""
        return round(view.seconds * self.config.sample_rate / self.config.hop)

    def samples(self, view: Any) -> int:
        """Samples per clip."""
        return self.frames(view) * self.config.hop

    def stem_spec(self) -> StemSpec:
        patch = (1, *self.config.patch, 1)
        return StemSpec(
            values=self.config.token_values(*patch),
            axes=tuple(self.config.tables),
            patch=patch,
            conv_channels=self.config.conv_channels,
        )

    def check(self, view: Any) -> None:
        frames = self.frames(view)
        seconds = self.config.hop / self.config.sample_rate
        self.config.check(0, frames, f"seconds: {view.seconds} s are {frames} frames,", seconds, " s")

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (1, self.frames(view), self.config.bins, 1)

    def length(self, view: Any) -> int:
        return media.tokens_kept(media.patch_count(self.shape(view)[1:], self.config.patch), view.drop_tokens)

    @media.decoder_errors()
    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """Decodes a sound to mono samples (N,) int16 at the stem's sample rate.

        `raw` is bytes, a path, an array at that rate, or {"array": array, "sampling_rate": rate}, as `datasets` decodes
        sounds. Arrays are (N,) or (N, channels), int16, int32 or float in -1..1. With `rng`, only one random part of a
        file is read. Without `rng`, a file of more than 300 s is read only where evaluation has clips.
        """
        view = views[0] if rng is not None else max(views, key=lambda view: view.seconds)
        # A clip that is played faster needs more samples.
        fastest = 1 + view.speed if rng is not None else 1
        longest = self.samples(view) * fastest
        return self._read(raw, clips_of(longest / self.config.sample_rate, view.clips, rng))

    def segments(self, value: Any, view: Any) -> list[tuple[float, float]]:
        if isinstance(value, np.ndarray):
            return []
        with media.decoder_errors(), media.open_media(value) as media_file:
            seconds = length_in_seconds(media_file)
            segments = media.equal_segments(media_file, seconds, view.seconds)
        # The view's clips could skip parts; the clips of `encode_segment` skip none.
        if not segments and view.clips * view.seconds < seconds < 2 * max(view.seconds, media.SEGMENT_SECONDS):
            return [(0.0, seconds)]
        return segments

    def encode_segment(self, value: Any, view: Any, start: float, end: float) -> np.ndarray:
        """The segment's clips (clips, samples): as many as cover all of it, whatever the view's `clips`."""
        with media.decoder_errors():
            sound = self._read(value, between(start, end))
        clips = max(1, ceil((len(sound) - ROUNDING) / self.samples(view)))
        return self.transform(sound, view.model_copy(update={"clips": clips}), None)

    def _read(self, raw: Any, plan: ReadPlan) -> np.ndarray:
        """Mono samples (N,) int16, at the stem's sample rate, of the parts of a sound that are used."""
        rate = source_rate = self.config.sample_rate
        if isinstance(raw, np.ndarray):
            sound = array_samples(raw)
        elif isinstance(raw, dict):
            sound, source_rate = sampled_array(raw, rate)
        else:
            with media.open_media(raw) as media_file:
                sound, source_rate = read_sound(media_file, plan)
        sound = resample(mono(sound), source_rate, rate)
        if not sound.size:
            raise BadMedia("no samples")
        return np.round(sound.clip(-1, 1) * 32767).astype(np.int16)

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """From samples (N,): one random clip (samples,) in training, and up to `view.clips` clips (clips, samples) in
        evaluation; fp32 in -1..1."""
        count = self.samples(view)
        if rng is None:
            return np.stack([_cut(item, start, count) for start in media.clip_starts(len(item), count, view.clips)])
        speed = 1 + rng.uniform(-view.speed, view.speed) if view.speed else 1.0
        needed = ceil(count * speed)
        start = media.random_start(len(item), needed, rng)
        is_cut = abs(len(item) - count * (1 + view.speed)) <= ROUNDING
        if getattr(rng, "sync_start", None) is not None and is_cut:
            start = 0  # `decode` has cut the sound at this moment.
        gain = 10 ** (rng.uniform(-view.gain, view.gain) / 20)
        sound = _cut(item, start, needed)
        if view.speed:
            sound = _at_speed(sound, speed, count)
        sound = sound * np.float32(gain)
        if view.noise:
            amplitude = np.float32(rng.uniform(0, view.noise) * np.abs(sound).max(initial=0))
            sound = sound + amplitude * rng.standard_normal(count, dtype=np.float32)
        return sound.clip(-1, 1)

    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """Cuts the normalized spectrogram of samples (B, samples) into patches: values (B, L, P) fp32."""
        spectra = log_mel(torch.from_numpy(items), self.config)
        if rngs is not None and (view.equalize or view.mask_frames or view.mask_bins):
            for spectrum, rng in zip(spectra, rngs):
                if view.equalize:
                    _equalize(spectrum, view.equalize, rng)
                _hide(spectrum, view.mask_frames, rng, self.config.mean)
                _hide(spectrum.T, view.mask_bins, rng, self.config.mean)
        return self._normalized_patches(spectra, view.drop_tokens, rngs)

    def thumbnail(self, value: Any, view: Any, side: int, segment: tuple[float, float] | None = None) -> bytes:
        """The spectrogram of the first clip. It shows the loudest 70 dB.

        Time runs to the right and pitch upward; louder is brighter.
        """
        clips = self.encode_segment(value, view, *segment) if segment else self.encode_input(value, view)
        spectrum = log_mel(torch.from_numpy(clips[:1]), self.config)[0].T.numpy()[::-1]
        loudest = max(spectrum.max(), log(FLOOR) + RANGE)  # So that silence is dark.
        loudness = (255 * (1 + (spectrum - loudest) / RANGE)).clip(0, 255).round().astype(np.uint8)
        picture = PIL.ImageOps.colorize(PIL.Image.fromarray(loudness), *COLORS)
        return media.encode_webp(np.asarray(picture), side)

    def raw_features(self, item: np.ndarray, view: Any) -> np.ndarray:
        """The log-mel spectrogram of the clips of evaluation, normalized and averaged over the frames: (bins,)."""
        spectrum = log_mel(torch.from_numpy(self.transform(item, view, None)), self.config)
        return ((spectrum.mean((0, 1)) - self.config.mean) / self.config.std).numpy()

    def from_tensor(self, batch: Tensor) -> Tokens:
        """Converts mono samples (B, N) in -1..1 at the stem's sample rate. The N // hop whole frames must be a whole
        number of patches."""
        if batch.ndim != 2 or not batch.is_floating_point():
            raise TypeError(f"expected float samples (B, N) in -1..1, found {batch.dtype} {list(batch.shape)}")
        frames = batch.shape[1] // self.config.hop
        if not frames:
            raise ValueError(f"{batch.shape[1]} samples are less than a frame of {self.config.hop}")
        self.check(self.View(seconds=frames * self.config.hop / self.config.sample_rate))
        media.check_range(batch)
        return self._normalized_patches(log_mel(batch, self.config), 0.0, None)

    def tensor_input(self, view: Any) -> TensorInput:
        samples = self.samples(view)
        return TensorInput(
            (samples,),
            torch.float32,
            f"{samples} mono samples in -1..1 at {self.config.sample_rate} Hz. Append zeros to a shorter sound. Of a "
            f"longer one, take {view.clips} such parts, evenly spaced from the beginning of the sound to its "
            "end (round starts down; take a single part from the middle), and average their unit vectors.",
        )

    def _normalized_patches(self, spectra: Tensor, drop: float, rngs: list[Rng] | None) -> Tokens:
        """Cuts log-mel spectra (B, frames, bins) into patches, and normalizes their values."""
        tokens = self.config.cut(spectra[..., None], self.config.patch, drop, rngs)
        return tokens._replace(values=(tokens.values - self.config.mean) / self.config.std)


def log_mel(waves: Tensor, config: Audio.Config) -> Tensor:
    """The log-mel spectrogram (B, N // hop, bins) of samples (B, N) in -1..1: natural logarithm of the magnitude, fp32.

    Frame i is centered on the i-th hop. A full-scale sine has magnitude 1, whatever the window.
    """
    padding = config.window - config.hop
    window = torch.hann_window(config.window, device=waves.device)
    window *= 2 / window.sum()
    filters = mel_filters(config.sample_rate, config.window, config.bins, config.low, config.high)
    bands = [_band(filters[:, i : i + BAND], waves.device) for i in range(0, config.bins, BAND)]
    mels = []
    # Two at a time fit into the processor's cache. An exported graph cannot loop over a batch of unknown size.
    pairs = [waves] if torch.compiler.is_exporting() else waves.split(2)
    for pair in pairs:
        padded = torch.nn.functional.pad(pair.float(), (padding // 2, padding - padding // 2))
        spectrum = torch.fft.rfft(padded.unfold(1, config.window, config.hop) * window)
        squares = torch.view_as_real(spectrum).square()
        # Three times as fast as `abs` or `sum`. At 0, a square root has no finite gradient.
        magnitude = (squares[..., 0] + squares[..., 1]).clamp(min=TINY).sqrt()
        mel = torch.cat([magnitude[..., frequencies] @ weights for frequencies, weights in bands], dim=-1)
        mels.append(torch.log(mel + FLOOR))
    return torch.cat(mels)


def _band(filters: np.ndarray, device: torch.device) -> tuple[slice, Tensor]:
    """The range of frequencies in which neighboring filters are not all zero, and the filters in that range."""
    nonzero = np.flatnonzero(filters.any(1))
    frequencies = slice(int(nonzero[0]), int(nonzero[-1]) + 1)
    return frequencies, torch.from_numpy(filters[frequencies]).to(device)


@lru_cache(maxsize=8)
def mel_filters(sample_rate: int, window: int, bins: int, low: float, high: float) -> np.ndarray:
    """Triangular filters (window // 2 + 1, bins) on the HTK mel scale, with peaks of 1; float32.

    Where the mel scale is finer than the Fourier transform, filters are widened to one frequency step on each side, so
    that none is empty.
    """
    lowest_mel, highest_mel = 2595 * np.log10(1 + np.array([low, high]) / 700)
    mels = np.linspace(float(lowest_mel), float(highest_mel), bins + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)  # in Hz; the filter of bin i has its peak at edge i + 1
    frequency_step = sample_rate / window
    rise = np.maximum(np.diff(edges)[:-1], frequency_step)
    fall = np.maximum(np.diff(edges)[1:], frequency_step)
    offset = np.arange(window // 2 + 1)[:, None] * frequency_step - edges[1:-1]
    return np.clip(1 + np.minimum(offset / rise, -offset / fall), 0, None).astype(np.float32)


def _at_speed(sound: np.ndarray, speed: float, count: int) -> np.ndarray:
    """`count` samples at a distance of `speed`, linearly interpolated like `np.interp`; fp32."""
    samples = torch.from_numpy(sound)
    positions = torch.arange(count, dtype=torch.float64) * speed
    before = positions.int()
    left = samples.index_select(0, before)
    right = samples.index_select(0, (before + 1).clamp_(max=len(sound) - 1))
    return torch.lerp(left, right, positions.sub_(before).float()).numpy()


def _equalize(spectrum: Tensor, decibels: float, rng: Rng) -> None:
    """Adds the same random smooth curve over the bins to each frame of a log-mel spectrogram (frames, bins)."""
    control_points = decibels * rng.standard_normal(CURVE_POINTS)
    places = np.linspace(0, CURVE_POINTS - 1, spectrum.shape[1])
    curve = np.interp(places, np.arange(CURVE_POINTS), control_points)
    spectrum += torch.from_numpy(curve * (log(10) / 20))


def _hide(spectrum: Tensor, share: float, rng: Rng, value: float) -> None:
    """Overwrites a random span of at most `share` of the rows of a spectrogram (frames, bins) or its transpose."""
    rows = len(spectrum)
    count = int(rng.integers(int(share * rows) + 1))
    start = int(rng.integers(rows - count + 1))
    spectrum[start : start + count] = value


def _cut(sound: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` samples of an int16 sound from `start` on, as fp32, with zeros after its end."""
    out = np.zeros(count, np.float32)
    part = sound[start : start + count]
    out[: len(part)] = part
    out /= 32767
    return out
