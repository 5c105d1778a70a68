"""How items are shown: media types by content, and thumbnails."""

import io

import numpy as np
import PIL.Image
import pytest
import soundfile

from benchmarks.fuzz import FORMATS
from openimp.common.modality import BadMedia
from openimp.modalities.audio import Audio
from openimp.modalities.image import Image
from openimp.modalities.video import Video
from openimp.search.media_types import UNKNOWN, media_type
from tests.recordings import counting, film

IMAGE, VIDEO, AUDIO = Image(Image.Config()), Video(Video.Config()), Audio(Audio.Config())


@pytest.mark.parametrize("name", FORMATS)
def test_the_type_of_a_file_comes_from_its_content(name):
    expected = {
        "PNG": "image/png", "JPEG": "image/jpeg", "WebP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp",
        "MP4": "{}/mp4", "MKV": "{}/webm", "OGG": "{}/ogg", "WAV": "audio/wav", "FLAC": "audio/flac",
        "MP3": "audio/mpeg",
    }.get(name, UNKNOWN)  # fmt: skip
    for content in FORMATS[name][1]():
        for kind in ("audio", "video"):
            assert media_type(content, kind) == expected.format(kind)
    assert media_type(b"\xff\xfa\x90\x64", "audio") == "audio/mpeg", "MP3 frames with a checksum"


@pytest.mark.parametrize(
    "content", [b"<svg onload=", b"<!doctype html>", b"<html>", b"<?xml ", b"%PDF-1.7", b"\xef\xbb\xbf<script", b""]
)
def test_what_may_contain_scripts_is_displayed_as_nothing(content):
    for kind in ("image", "video", "audio", "text", ""):
        assert media_type(content, kind) == UNKNOWN
    assert media_type(b"\0\0\0\x18ftypheic" + bytes(9), "image") == UNKNOWN


def opened(thumbnail: bytes) -> np.ndarray:
    picture = PIL.Image.open(io.BytesIO(thumbnail))
    assert picture.format == "WEBP"
    assert max(picture.size) <= 64
    return np.asarray(picture.convert("RGBA")).astype(int)


def test_a_thumbnail_shows_the_whole_picture_with_its_transparency():
    pixels = np.zeros((40, 200, 4), np.uint8)
    pixels[:, :100] = 255, 0, 0, 255
    small = opened(IMAGE.thumbnail(pixels, Image.View(), 64))
    assert small.shape[:2] == (13, 64)
    assert abs(small[6, 5] - [255, 0, 0, 255]).max() < 20
    assert small[6, -5, 3] == 0
    with pytest.raises(BadMedia):
        IMAGE.thumbnail(b"no picture", Image.View(), 64)


def test_a_thumbnail_of_a_clip_or_a_segment_is_its_middle(tmp_path):
    (tmp_path / "x.mp4").write_bytes(film(counting(120, 48, 64, step=2), gop=10))
    for segment, level in ((None, 120), ((0.0, 1.6), 40), ((3.2, 4.8), 200)):
        small = opened(VIDEO.thumbnail(tmp_path / "x.mp4", Video.View(), 64, segment))
        assert abs(small[..., :3].mean() - level) < 12, segment


def test_a_thumbnail_of_a_segment_shows_its_own_sound(tmp_path):
    tones = np.concatenate([np.sin(np.arange(6 * 16_000) * rate) for rate in (0.1, 1.5)]) / 2
    soundfile.write(tmp_path / "x.wav", tones, 16_000)
    view = Audio.View(seconds=1.024)
    low, high = (AUDIO.thumbnail(tmp_path / "x.wav", view, 64, segment) for segment in ((0.0, 6.0), (6.0, 12.0)))
    assert low != high
    assert PIL.Image.open(io.BytesIO(low)).size == PIL.Image.open(io.BytesIO(high)).size
