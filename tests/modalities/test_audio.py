import io

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from pydantic import ValidationError

from openimp.common.modality import BadMedia
from openimp.modalities.audio import Audio, _at_speed, log_mel, mel_filters
from openimp.modalities.sound import resample
from tests.recordings import counting, film
from tests.recordings import sound_file as file

AUDIO = Audio(Audio.Config())
SHORT = Audio.View(seconds=1.024)
RATE = 16_000


def rng(seed=0):
    return np.random.default_rng(seed)


def sine(hertz, seconds=2.0, rate=RATE, level=0.5):
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def share_at(sound, hertz, rate=RATE):
    """Share of a sound's power within 20 Hz of a frequency."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)))) ** 2
    near = np.abs(np.fft.rfftfreq(len(sound), 1 / rate) - hertz) < 20
    return power[near].sum() / power.sum()


@pytest.mark.parametrize("rate", [8000, 44_100, 11_127])
def test_any_rate_becomes_the_stems(rate):
    out = AUDIO.decode(file(sine(1000, rate=rate), rate), [SHORT])
    assert abs(len(out) - 2 * RATE) <= 2
    assert share_at(out.astype(float), 1000) > 0.999
    assert abs(out[8000:24_000].astype(float).std() / 32767 - 0.5 / np.sqrt(2)) < 0.01


def test_resampling_takes_any_number_of_samples():
    for count in range(6):
        assert len(resample(np.zeros(count, np.float32), 48_000, 8_000)) <= count


def test_resampling_lets_no_higher_frequency_alias():
    sound = sine(10_000, rate=44_100) + sine(3000, rate=44_100)
    assert share_at(resample(sound, 44_100, RATE), 3000) > 0.9999  # 10 kHz would come back as 6 kHz


def test_channels_are_averaged():
    stereo = np.stack([sine(500), sine(2000)], axis=1)
    for raw in (file(stereo), stereo):
        np.testing.assert_allclose(AUDIO.decode(raw, [SHORT]) / 32767, stereo.mean(1), atol=1e-4)


@pytest.mark.parametrize("form", ["FLAC", "film"])
def test_a_training_cut_reads_only_its_part(form):
    samples = rng().integers(-9999, 9999, 8 * RATE).astype(np.int16)
    raw = film(sound=samples / 32767) if form == "film" else file(samples, form=form)
    whole = AUDIO.decode(raw, [SHORT]).astype(float)
    starts = set()
    for seed in range(6):
        part = AUDIO.decode(raw, [SHORT], rng(seed)).astype(float)
        assert 0 <= len(part) - AUDIO.samples(SHORT) <= 2
        start = int(np.correlate(whole, part[:1000], "valid").argmax())
        assert np.abs(whole[start : start + len(part)] - part).max() < 300
        starts.add(start)
    assert len(starts) == 6


def test_samples_may_be_integers_of_larger_types():
    """As lists of numbers in tables become them; and in the full range of int32, as soundfile returns it."""
    samples = rng().integers(-9999, 9999, 2 * RATE).astype(np.int16)
    whole = AUDIO.decode(samples, [SHORT])
    np.testing.assert_array_equal(AUDIO.decode(samples.astype(np.int64), [SHORT]), whole)
    np.testing.assert_allclose(AUDIO.decode(samples.astype(np.int32) * 2**16, [SHORT]), whole, atol=1)
    quiet = samples.astype(np.int32)
    assert not AUDIO.decode(quiet, [SHORT]).any(), "almost silent, and not as loud as the same numbers in int16"


def test_a_sound_in_half_precision_keeps_its_sign_at_full_scale():
    samples = sine(440, level=1.0)
    samples[:9] = 1.0
    found = AUDIO.decode(samples.astype(np.float16), [SHORT]).astype(int)
    assert np.abs(found - AUDIO.decode(samples, [SHORT])).max() < 20


def test_clips_of_a_long_sound_that_ends_before_its_header_claims():
    """The pictures of this film are longer than its sound."""
    samples = rng().integers(-9999, 9999, 305 * 8000).astype(np.int16) / 32767
    raw = film(counting(8, 16, 16), "matroska", "ffv1", "gray", times=[*range(7), 25 * 400], sound=samples,
               audio="pcm_s16le", rate=8000)  # fmt: skip
    view = Audio.View(seconds=1.024, clips=3)
    parts = AUDIO.decode(raw, [view]).reshape(3, -1)
    loudness = np.abs(parts).mean(axis=1)
    assert loudness[:2].min() > 1000
    assert loudness[2] < 1


WAV = file(sine(440, seconds=0.2))


NO_SOUND = {
    "text": b"no sound" * 99,
    "cut": WAV[:20],
    "a silent film": film(counting(1)),
    "no samples": file(np.zeros(0)),
    "NaN": file(np.array([0, np.nan, 0]), subtype="FLOAT"),
    "infinite": np.array([np.inf, 0.0]),
    "large whole numbers": np.full(9, 40_000, np.int64),
    "an empty array": np.zeros(0),
    "channels first": np.zeros((2, 9000)),
    "a WAV cut short": file(sine(440))[:-200],
    "an AIFF cut short": file(sine(440), form="AIFF")[:-200],
}


def test_segments_of_an_mp3_are_parts_of_the_whole(tmp_path, capfd):
    """Also if its bit rate varies: there, libsndfile does not find the exact place, and complains on the terminal."""
    loudness = np.repeat(np.random.default_rng(0).uniform(0, 0.5, 240), RATE // 2)
    noise = np.random.default_rng(1).uniform(-1, 1, len(loudness)) * loudness
    path = tmp_path / "long.mp3"
    soundfile.write(path, noise, RATE, bitrate_mode="VARIABLE")
    whole = AUDIO.decode(path, [Audio.View(seconds=120)])
    five_clips = Audio.View(seconds=1.024, clips=5)
    for start in (0.0, 5.0, 100.0, 50.0, 80.0):
        segment = AUDIO.encode_segment(path, SHORT, start, start + 5)
        expected = AUDIO.transform(whole[int(start * RATE) : int((start + 5) * RATE)], five_clips, None)
        np.testing.assert_allclose(segment, expected, atol=1e-4)
    assert not capfd.readouterr().err


# Named, for a file of floats holds the second at which it was made, and names must not differ between test processes.
@pytest.mark.parametrize("raw", NO_SOUND.values(), ids=NO_SOUND)
def test_what_is_no_sound_is_bad_media(raw):
    with pytest.raises(BadMedia) as error:
        AUDIO.decode(raw, [SHORT])
    assert "\n" not in str(error.value)


def test_a_person_sees_a_spectrogram_with_high_pitch_above_and_silence_dark():
    view = Audio.View(seconds=1.024)
    heights = []
    for hertz in (300, 3000):
        with PIL.Image.open(io.BytesIO(AUDIO.thumbnail(sine(hertz, 0.512), view, 256))) as picture:
            light = np.asarray(picture.convert("L")).astype(float)
        heights.append(light[:, 2:6].mean(1).argmax())
        assert light[:, 10:].max() < 40 < 150 < light[:, 2:6].max()
    assert heights[1] + 30 < heights[0]
    with PIL.Image.open(io.BytesIO(AUDIO.thumbnail(np.zeros(16_000, np.int16), view, 256))) as picture:
        assert np.asarray(picture.convert("L")).max() < 40


def test_short_sounds_are_followed_by_silence():
    item = np.full(5000, 16_384, np.int16)
    expected = np.pad(np.float32(item) / 32767, (0, 16_384 - 5000))
    for out in (AUDIO.transform(item, SHORT, None)[0], AUDIO.transform(item, SHORT, rng())):
        np.testing.assert_array_equal(out, expected)


def test_long_sounds_are_cut_at_random_in_training_and_evenly_in_evaluation():
    item = np.arange(32_000, dtype=np.int16)
    for clips, expected in ((3, [0, 7808, 15_616]), (1, [7808])):
        heard = AUDIO.transform(item, Audio.View(seconds=1.024, clips=clips), None)
        assert np.round(heard[:, 0] * 32767).tolist() == expected
    drawn = {AUDIO.transform(item, SHORT, rng(seed))[0] for seed in range(20)}
    assert len(drawn) > 15


def test_speed_interpolates_as_numpy_does():
    sound = rng().uniform(-1, 1, 40_000).astype(np.float32)
    for speed in (0.7, 1.0, 1.3):
        expected = np.interp(np.arange(16_384) * speed, np.arange(40_000), sound)
        np.testing.assert_allclose(_at_speed(sound, speed, 16_384), expected, rtol=0, atol=2e-7)


def spectra(waves, view, rngs=None):
    """The spectrograms (B, frames, bins) that the tokens make up."""
    values = AUDIO.tokens(waves, view, rngs).values
    frames, bins = AUDIO.frames(view), AUDIO.config.bins
    height, width = AUDIO.config.patch
    grid = values.unflatten(2, (height, width)).unflatten(1, (frames // height, bins // width))
    return grid.permute(0, 1, 3, 2, 4).reshape(len(waves), frames, bins)


def test_masks_hide_one_span_of_frames_and_one_band_of_bins():
    """Of the lengths asked for, at any place, and in training only."""
    waves = rng(1).normal(0, 0.1, (30, AUDIO.samples(SHORT))).astype(np.float32)
    view = SHORT.model_copy(update={"mask_frames": 0.5, "mask_bins": 0.25})
    whole, masked = spectra(waves, view), spectra(waves, view, [rng(seed) for seed in range(30)])
    hidden = masked == 0
    assert torch.equal(masked[~hidden], whole[~hidden])
    for axis, share in ((2, 0.5), (1, 0.25)):
        lines = hidden.all(axis)
        sizes = lines.sum(1)
        assert sizes.max() <= share * lines.shape[1]
        assert len(sizes.unique()) > 5
        starts = torch.nn.functional.pad(lines.int(), (1, 0)).diff(dim=1) == 1
        assert starts.sum(1).max() <= 1


def test_equalizing_changes_all_frames_by_one_smooth_curve_of_the_given_strength():
    waves = rng(1).normal(0, 0.1, (300, AUDIO.samples(SHORT))).astype(np.float32)
    view = SHORT.model_copy(update={"equalize": 6.0})
    whole = spectra(waves, view)
    changes = spectra(waves, view, [rng(seed) for seed in range(300)]) - whole
    assert torch.allclose(changes, changes[:, :1].expand_as(changes), atol=1e-4)
    # A smooth curve: neighboring bins change nearly alike, and no curve is flat.
    curves = changes[:, 0] * AUDIO.config.std * 20 / np.log(10)
    assert curves.diff().abs().mean() < 1
    assert curves[:, [0, -1]].std() == pytest.approx(6, rel=0.1)
    assert torch.equal(spectra(waves, view), whole)


def test_noise_is_relative_to_the_loudest_sample():
    sound = np.zeros(16_000, np.int16)
    sound[100] = 10_000
    view = Audio.View(seconds=1.024, noise=0.1)
    levels = [AUDIO.transform(sound, view, rng(seed))[200:].std() * 32767 for seed in range(40)]
    assert min(levels) < 300
    assert 700 < max(levels) < 1050
    view = view.model_copy(update={"speed": 0.3, "gain": 6.0})
    np.testing.assert_array_equal(AUDIO.transform(sound, view, None), AUDIO.transform(sound, SHORT, None))


def test_gain_is_within_its_decibels():
    item = np.full(20_000, 3277, np.int16)
    levels = [
        20 * np.log10(AUDIO.transform(item, Audio.View(seconds=1.024, gain=6.0), rng(s))[0] / 0.1) for s in range(40)
    ]
    assert -6.01 < min(levels) < -3
    assert 3 < max(levels) < 6.01
    loud = AUDIO.transform(np.full(20_000, 32_767, np.int16), Audio.View(seconds=1.024, gain=20.0), rng(1))
    assert np.abs(loud).max() <= 1


@pytest.mark.parametrize("hertz", [200, 1000, 5000])
def test_a_sine_lights_the_bin_of_its_pitch(hertz):
    config = AUDIO.config
    spectrum = log_mel(torch.from_numpy(sine(hertz, seconds=2.048, level=1.0))[None], config)
    mel = 2595 * np.log10(1 + np.array([config.low, hertz, config.high]) / 700)
    expected = (mel[1] - mel[0]) / (mel[2] - mel[0]) * 129 - 1
    assert abs(spectrum[0, 10].argmax().item() - expected) <= 1
    assert abs(spectrum[0, 10].max()) < 1  # magnitude 1, so 0


@pytest.mark.parametrize(("window", "hop", "bins"), [(2048, 1024, 128), (1024, 256, 64), (400, 200, 40), (64, 64, 16)])
def test_a_spectrogram_is_the_logarithm_of_all_filters_times_the_magnitude(window, hop, bins):
    config = Audio.Config(window=window, hop=hop, bins=bins, patch=(1, bins))
    waves = torch.from_numpy(rng().standard_normal((5, 16_384 // hop * hop)) * 0.1)
    hann = torch.hann_window(window, dtype=torch.float64)
    missing = window - hop
    padded = torch.nn.functional.pad(waves, (missing // 2, missing - missing // 2))
    spectrum = torch.stft(padded, window, hop, window=hann, center=False, return_complex=True)
    magnitude = spectrum.abs() * 2 / hann.sum()
    filters = torch.from_numpy(mel_filters(RATE, window, bins, config.low, config.high)).double()
    expected = torch.log(magnitude.mT @ filters + 1e-6)
    torch.testing.assert_close(log_mel(waves, config).double(), expected, rtol=0, atol=1e-4)


def test_tokens_are_patches_of_the_normalised_spectrogram():
    view = Audio.View(seconds=2.048)
    items = np.stack([sine(300, 2.048), sine(2000, 2.048)])
    tokens = AUDIO.tokens(items, view, None)
    assert tokens.values.shape == (2, AUDIO.length(view), 256) == (2, 16, 256)
    spectrum = (log_mel(torch.from_numpy(items), AUDIO.config) - AUDIO.config.mean) / AUDIO.config.std
    assert torch.equal(tokens.values[1, 8 + 3].view(16, 16), spectrum[1, 16:32, 48:64])
    assert tokens.coords[0, [0, 1, 8, 15]].tolist() == [[0, 0], [0, 8], [32, 0], [32, 56]]


@pytest.mark.parametrize("options", [{"high": 9000.0}, {"low": 8000.0}, {"hop": 4096}, {"bins": 100}, {"bins": 2048}])
def test_spectrograms_that_cannot_be_are_refused(options):
    with pytest.raises(ValidationError):
        Audio.Config(**options)


@pytest.mark.parametrize("form", ["wav", "mp4"])
def test_a_long_sound_is_cut_into_segments_that_cover_it(form):
    """Each of 4 segments of 6 s has its own loudness. Rounding and codecs blur only their borders."""
    levels = (0.1, 0.2, 0.3, 0.4)
    sound = np.concatenate([sine(440, 6.0, level=level) for level in levels])
    raw = film(sound=sound) if form == "mp4" else file(sound)
    found = AUDIO.segments(raw, SHORT)
    assert [start for start, _ in found] == pytest.approx([0, 4.8, 9.6, 14.4, 19.2], abs=0.1)
    assert [end for _, end in found] == pytest.approx([4.8, 9.6, 14.4, 19.2, 24], abs=0.1)
    for i, level in enumerate(levels):
        clips = AUDIO.encode_segment(raw, SHORT, 6.0 * i, 6.0 * i + 6.0)
        assert clips.shape == (6, 16384), "as many clips as cover the segment"
        assert np.abs(clips[1:-1]).max(axis=1) == pytest.approx(level, abs=0.03)


def test_a_short_sound_an_array_and_a_lying_header_are_not_cut():
    assert AUDIO.segments(file(sine(440, 4.0)), SHORT) == [], "the four clips of the view cover it"
    assert AUDIO.segments(file(sine(440, 7.0)), SHORT) == [(0, 7)], "so that no part of it goes unheard"
    assert AUDIO.segments(sine(440, 60.0), SHORT) == []
    lying = bytearray(file(np.zeros(1600)))
    lying[24:28] = (1).to_bytes(4, "little")  # One sample per second makes 1,600 s of 3,244 bytes.
    assert len(AUDIO.segments(bytes(lying), SHORT)) <= 3
