"""Attacks by media files: each is carried out, on real files."""

import io
import struct
import zlib

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
import soundfile

from benchmarks.fuzz import FORMATS
from openimp.modalities import BadMedia, media, sound, video
from openimp.modalities.audio import Audio
from openimp.modalities.image import Image, upright
from openimp.modalities.video import Video
from openimp.modalities.vision import decoded_size
from tests import recordings
from tests.messages import refuses
from tests.recordings import picture_file as encoded
from tests.recordings import sound_file

IMAGE, VIDEO, AUDIO = Image(Image.Config()), Video(Video.Config()), Audio(Audio.Config())
PICTURE, CLIP, SOUND = Image.View(size=64), Video.View(size=32, frames=4), Audio.View(seconds=1.024)


def film(count=8, form="mp4", codec="mpeg4", audio="aac", height=32, width=48, samples=8000):
    """A film of one key frame with a sound."""
    frames = recordings.counting(count, height, width, step=1)
    pix_fmt = av.Codec(codec, "w").video_formats[0].name
    sound = np.full(samples, 0.5)
    return recordings.film(frames, form, codec, pix_fmt, gop=600, bit_rate=None, sound=sound, audio=audio)


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    """An empty RGBA picture, a thousandth of the size of its pixels."""
    packer = zlib.compressobj()
    pixels = b"".join(packer.compress(bytes(1 + 4 * width)) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    "name",
    [
        "http:/127.0.0.1:9/x.mp4",
        *("concat:secret.ts", "subfile,,start,0,end,0,,:secret.ts", "file:secret.ts", "pipe:0"),
    ],
)
def test_a_path_that_looks_like_a_url_or_a_protocol_reads_its_own_file(name, tmp_path, monkeypatch):
    """A request would be refused, because nothing listens there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(film(8, "mpegts", "mpeg2video", "mp2"))
    own = tmp_path / name
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(film(3))
    for modality, view in ((VIDEO, CLIP), (AUDIO, SOUND)):
        np.testing.assert_array_equal(modality.decode(name, [view]), modality.decode(film(3), [view]))


def test_no_container_may_open_another_file(tmp_path, monkeypatch):
    """A playlist is refused as a format, and could not open what it names if FFmpeg took it for another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(film(8, "mpegts", "mpeg2video", "mp2"))
    assert len(VIDEO.decode("secret.ts", [CLIP])) == 8
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for formats in (media.CONTAINERS, f"{media.CONTAINERS},concat"):
        monkeypatch.setattr(media, "CONTAINERS", formats)
        with pytest.raises(BadMedia):
            VIDEO.decode("list.mp4", [CLIP])


def test_a_rare_codec_is_not_decoded():
    with refuses(BadMedia):
        VIDEO.decode(film(form="flv", codec="flashsv"), [CLIP])
    with refuses(BadMedia):
        AUDIO.decode(film(form="matroska", audio="tta"), [SOUND])


def test_pictures_that_unpack_to_gigabytes_are_refused_before_they_do():
    flat = PIL.Image.new("P", (8200, 8200))
    picture = encoded(flat, "GIF")
    assert len(picture) < 60_000
    for modality, view in ((IMAGE, PICTURE), (VIDEO, CLIP)):
        with refuses(BadMedia):
            modality.decode(picture, [view])
    with refuses(BadMedia):
        IMAGE.decode(encoded(flat.convert("L"), "JPEG", progressive=True), [PICTURE])
    # `decode` reads a baseline JPEG at a fraction of its size, but towers read it whole.
    baseline = encoded(flat.convert("L"), "JPEG")
    assert IMAGE.decode(baseline, [PICTURE]).shape == (74, 74, 3)
    with refuses(BadMedia), upright(baseline):
        pass
    with refuses(BadMedia):
        IMAGE.decode(encoded(PIL.Image.new("RGB", (4200, 4200)), "JPEG2000"), [PICTURE])


def test_text_and_profiles_that_unpack_to_gigabytes_are_refused():
    packed = zlib.compress(bytes(2**26))
    for bomb in (chunk(b"zTXt", b"k\0\0" + packed), chunk(b"iCCP", b"k\0\0" + packed)):
        with refuses(BadMedia):
            IMAGE.decode(png(16, 16, bomb), [PICTURE])


def test_a_jpeg_of_many_scans_is_refused():
    picture = encoded(PIL.Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)), "JPEG", progressive=True)
    assert IMAGE.decode(picture, [PICTURE]).shape == (64, 64, 3)
    scan = picture[picture.rindex(b"\xff\xda") : -2]
    with refuses(BadMedia):
        IMAGE.decode(picture[:-2] + 100 * scan + picture[-2:], [PICTURE])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_gif_may_not_grow_behind_its_header():
    small = encoded(PIL.Image.new("P", (16, 16)), "GIF")
    frame = small[small.index(b",") : -1]
    grown = frame[:5] + struct.pack("<HH", 13_000, 13_000) + frame[9:]
    assert VIDEO.decode(small[:-1] + frame + b";", [CLIP]).shape == (2, 16, 16, 3)
    with refuses(BadMedia):
        VIDEO.decode(small[:-1] + grown + b";", [CLIP])


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_an_animation_of_too_many_pixels_in_all_is_refused(form, monkeypatch):
    monkeypatch.setattr(media, "MAX_WORK", 40 * 256 * 256)
    frames = recordings.counting(60, 256, 256, step=1)
    assert VIDEO.decode(recordings.animation(frames[:30], form), [CLIP]).shape == (30, 37, 37, 3)
    with refuses(BadMedia):
        VIDEO.decode(recordings.animation(frames, form), [CLIP])


def test_frames_before_those_that_are_read_count_too(monkeypatch):
    """A long film of a single key frame is decoded from its start, whatever part of it is seen."""
    monkeypatch.setattr(media, "MAX_WORK", 200 * 32 * 48)
    late = film(400)
    with refuses(BadMedia):
        VIDEO.decode(late, [CLIP])


@pytest.mark.parametrize(
    ("modality", "view", "raw"),
    [
        (IMAGE, PICTURE, encoded(PIL.Image.effect_noise((600, 600), 90), "PNG")),
        (VIDEO, CLIP, film(90)),
        (AUDIO, SOUND, film(samples=90_000)),
        (AUDIO, SOUND, sound_file(np.sin(np.arange(90_000)), form="FLAC")),
    ],
    ids=["image", "video", "sound of a film", "sound"],
)
def test_what_takes_too_long_is_given_up(modality, view, raw, monkeypatch):
    modality.decode(raw, [view])
    monkeypatch.setattr(media, "MAX_CPU", -1)
    with refuses(BadMedia):
        modality.decode(raw, [view])


def test_frames_that_take_too_much_memory_together_are_refused(monkeypatch):
    """Of long frames, each as small as it may be: fewer are read, and those that are may not take too much either."""
    monkeypatch.setattr(video, "MAX_CLIP_BYTES", 20 * 32 * 640 * 4)
    raw = film(60, width=640)
    view = Video.View(size=32, frames=4, clips=2)
    assert len(VIDEO.decode(raw, [view])) == 2 * view.span  # what evaluation sees, not the whole clip
    monkeypatch.setattr(video, "MAX_CLIP_BYTES", 10 * 32 * 640 * 3)
    with refuses(BadMedia):
        VIDEO.decode(raw, [view])


def test_a_film_larger_than_any_is_refused():
    with refuses(BadMedia):
        VIDEO.decode(film(1, codec="mjpeg", height=1200, width=16_000), [CLIP])


def test_a_film_that_grows_is_refused_by_the_decoder():
    """Its header is right about the first frame only; the decoder itself refuses the next before it takes memory."""
    small, large = (encoded(PIL.Image.new("L", (size, size)), "JPEG") for size in (32, 5000))
    assert len(VIDEO.decode(small + small, [CLIP])) == 2
    with refuses(BadMedia):
        VIDEO.decode(small + large, [CLIP])


def test_a_sound_of_many_channels_is_read_in_blocks(monkeypatch):
    samples = np.random.default_rng(0).uniform(-1, 1, (5000, 7))
    raw = sound_file(samples)
    whole = AUDIO.decode(raw, [SOUND])
    monkeypatch.setattr(sound, "BLOCK", 1000)
    np.testing.assert_array_equal(AUDIO.decode(raw, [SOUND]), whole)


def test_a_sound_of_more_samples_than_fit_is_read_where_it_is_heard(monkeypatch):
    """FLAC packs silence by a factor of a thousand, at rates that nobody hears."""
    raw = sound_file(np.zeros(200_000, np.int16), 655_350, "FLAC", "PCM_16")
    monkeypatch.setattr(sound, "MAX_SAMPLES", 150_000)
    view = Audio.View(seconds=0.128, clips=1)
    assert abs(len(AUDIO.decode(raw, [view])) - AUDIO.samples(view)) <= 2
    monkeypatch.setattr(sound, "MAX_SAMPLES", 50_000)
    with refuses(BadMedia):
        AUDIO.decode(raw, [view])


def test_what_libsndfile_reads_besides_is_left_to_ffmpeg():
    """libsndfile has readers for formats that hardly anybody has; a file that needs one is no sound."""
    with pytest.raises(BadMedia):
        AUDIO.decode(sound_file(np.zeros(5000), form="VOC", subtype="PCM_16"), [SOUND])


def test_an_info_list_that_claims_a_gigabyte_is_refused_before_ffmpeg_sets_it_aside():
    raw = bytearray(film(form="avi", audio="mp2"))
    at = raw.index(b"INFO")
    raw[at - 4 : at] = (2**30).to_bytes(4, "little")
    raw[at + 8 : at + 12] = (2**30 - 64).to_bytes(4, "little")
    with refuses(BadMedia):
        VIDEO.decode(bytes(raw), [CLIP])


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF"])
def test_pictures_are_the_ones_that_pillow_reads(name):
    for raw in FORMATS[name][1]():
        picture = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(raw)))
        if picture.mode == "I":
            picture = PIL.Image.fromarray(np.asarray(picture).clip(0, 255).astype(np.uint8))
        pixels = np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
        pixels = pixels[..., :3] if pixels[..., 3:].min(initial=255) == 255 else pixels
        np.testing.assert_array_equal(IMAGE.decode(raw, [Image.View(size=256)]), pixels)
        height, width = decoded_size(pixels.shape[:2], [Image.View(size=32)])
        resized = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BILINEAR, reducing_gap=2.0)
        np.testing.assert_array_equal(IMAGE.decode(raw, [Image.View(size=32)]), resized)


@pytest.mark.parametrize("name", ["MP4", "AVI", "MKV"])
def test_films_are_the_ones_that_ffmpeg_reads(name, tmp_path):
    for raw in FORMATS[name][1]():
        path = tmp_path / f"film.{name.lower()}"
        path.write_bytes(raw)
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for source in (raw, path):
            np.testing.assert_array_equal(VIDEO.decode(source, [Video.View(size=256)]), np.stack(frames))


@pytest.mark.parametrize("name", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_sounds_are_the_ones_that_libsndfile_reads(name, tmp_path):
    for raw in FORMATS[name][1]():
        path = tmp_path / f"sound.{name.lower()}"
        path.write_bytes(raw)
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        expected = np.round(samples.mean(axis=1).clip(-1, 1) * 32767).astype(np.int16)
        for source in (raw, path):
            heard = Audio(Audio.Config(sample_rate=rate)).decode(source, [Audio.View(seconds=1.024)])
            np.testing.assert_array_equal(heard, expected)
