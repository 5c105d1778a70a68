"""Attacks by media files: each is carried out, on real files."""

import io
import os
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest

from openimp.modalities import BadMedia, media
from openimp.modalities.audio import Audio
from openimp.modalities.image import Image
from openimp.modalities.video import Video

IMAGE, VIDEO, AUDIO = Image(Image.Config()), Video(Video.Config()), Audio(Audio.Config())
PICTURE, CLIP, SOUND = Image.View(size=64), Video.View(size=32, frames=4), Audio.View(seconds=1.024)


def film(frames=8, form="mp4", codec="mpeg4", audio="aac", height=32, width=48):
    """A film with a sound of half a second."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        video, sound = container.add_stream(codec, rate=25), container.add_stream(audio, rate=16_000, layout="mono")
        video.height, video.width = height, width
        video.pix_fmt = video.codec.video_formats[0].name
        for i in range(frames):
            pixels = np.full((height, width, 3), 20 * i % 256, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(np.full((1, 8000), 0.5, np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16_000
        container.mux([*video.encode(), *sound.encode(samples), *sound.encode()])
    return out.getvalue()


def encoded(picture, form, **options):
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, *chunks):
    """An empty RGBA picture, a thousandth of the size of its pixels."""
    packer = zlib.compressobj()
    pixels = b"".join(packer.compress(bytes(1 + 4 * width)) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")])


@pytest.mark.parametrize(("modality", "view"), [(VIDEO, CLIP), (AUDIO, SOUND)], ids=["video", "audio"])
def test_a_relative_path_that_looks_like_a_url_sends_no_request(modality, view, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        address = server.getsockname()
        path = f"http:/127.0.0.1:{address[1]}/x.mp4"
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(film())

        def first_client():
            connection, client = server.accept()
            connection.close()
            return client

        client = pool.submit(first_client)
        try:
            out = modality.decode(path, [view])
        finally:
            with socket.create_connection(address) as mine:
                assert client.result() == mine.getsockname()
    np.testing.assert_array_equal(out, modality.decode(film(), [view]))


@pytest.mark.parametrize("name", ["concat:secret.ts", "subfile,,start,0,end,0,,:secret.ts", "file:secret.ts", "pipe:0"])
def test_a_path_that_looks_like_a_protocol_reads_its_own_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(film(8, "mpegts", "mpeg2video", "mp2"))
    (tmp_path / name).write_bytes(film(3))
    assert len(VIDEO.decode(name, [CLIP])) == 3


def test_no_container_may_open_another_file(tmp_path, monkeypatch):
    """A playlist is refused as a format, and could not open what it names if FFmpeg took it for another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.ts").write_bytes(film(8, "mpegts", "mpeg2video", "mp2"))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for formats in (media.CONTAINERS, f"{media.CONTAINERS},concat"):
        monkeypatch.setattr(media, "CONTAINERS", formats)
        with pytest.raises(BadMedia):
            VIDEO.decode("list.mp4", [CLIP])


def test_a_rare_codec_is_not_decoded():
    with pytest.raises(BadMedia, match="codec that is not read: flashsv"):
        VIDEO.decode(film(form="flv", codec="flashsv"), [CLIP])
    with pytest.raises(BadMedia, match="codec that is not read: tta"):
        AUDIO.decode(film(form="matroska", audio="tta"), [SOUND])


def test_an_info_list_that_claims_a_gigabyte_is_refused_before_ffmpeg_sets_it_aside():
    raw = bytearray(film(form="avi", audio="mp2"))
    at = raw.index(b"INFO")
    raw[at - 4 : at] = (2**30).to_bytes(4, "little")
    raw[at + 8 : at + 12] = (2**30 - 64).to_bytes(4, "little")
    with pytest.raises(BadMedia, match="INFO list of 1,073,741,824 bytes"):
        VIDEO.decode(bytes(raw), [CLIP])
