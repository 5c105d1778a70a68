"""Broken and malicious media files for benchmarks/faults.py."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import soundfile

from tests.little import write_tar
from tests.recordings import film

SIDES = {"large": 10_000, "huge": 40_000}
"""Claimed side lengths in pixels: 0.3 and 4.8 GB when decoded. openimp refuses the first, Pillow the second."""


def tasks(data: Path) -> list[str]:
    """The changes that train on the clips and the tar in `data`, too."""
    return [
        f"sources.clips={{path: {data / 'clips'}}}",
        f"sources.packed={{path: {data / 'packed.tar'}, stream: true}}",
        'tasks.seen={source: clips, inputs: {video: file, text: "a {label}"}, batch_size: 8, weight: 2,'
        " objectives: [{type: contrastive, positives_by: label}],"
        " views: [{video: {size: 16, frames: 4, stride: 1}, text: {length: 8}}]}",
        "tasks.packed={source: packed, inputs: {image: png, text: txt}, batch_size: 8, weight: 2,"
        " objectives: [{type: contrastive, positives_by: txt}], views: [{image: {size: 16}, text: {length: 8}}]}",
    ]


def more_data(little: Path, folder: Path) -> Path:
    """Copies the tests' data, and adds 24 clips and a tar of the images."""
    shutil.copytree(little, folder)
    rng = np.random.default_rng(0)
    for i in range(24):
        file = folder / "clips" / ("dark", "light")[i % 2] / f"{i}.avi"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(film(rng.integers(0, 128, (5, 32, 48, 3), np.uint8) + np.uint8(120 * (i % 2)), "avi"))
    members = {}
    for file in sorted((folder / "pictures").rglob("*.png")):
        key = f"{file.parent.name}-{file.stem}"
        members |= {f"{key}.png": file.read_bytes(), f"{key}.txt": file.parent.name.encode()}
    write_tar(folder / "packed.tar", members)
    return folder


def _picture(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    """Returns a function that writes a damaged copy of an image and returns its name."""

    def write(data: Path) -> str:
        file = data / "pictures" / "red" / name
        file.write_bytes(change((data / "pictures" / "red" / "0.png").read_bytes()))
        return name

    return write


def _corrupt(picture: bytes) -> bytes:
    return picture[:60] + bytes(byte ^ 0x55 for byte in picture[60:])


def _claiming(side: int, picture: bytes) -> bytes:
    """Replaces the header of a PNG by one that claims `side` x `side` pixels, with a correct checksum."""
    header = b"IHDR" + struct.pack(">II", side, side) + picture[24:29]
    return picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]


def _no_frames(data: Path) -> str:
    (data / "clips" / "dark" / "none.avi").write_bytes(film(np.empty((0, 32, 48, 3), np.uint8), "avi"))
    return "none.avi"


def _cut_clip(data: Path) -> str:
    whole = (data / "clips" / "dark" / "0.avi").read_bytes()
    (data / "clips" / "dark" / "cut.avi").write_bytes(whole[: len(whole) // 8])
    return "cut.avi"


def _not_numbers(data: Path) -> str:
    soundfile.write(data / "nan.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    with (data / "sounds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"sound": "nan.wav", "caption": "a low tone"}) + "\n")
    return "sounds.jsonl[15]"


def _outside(data: Path) -> str:
    picture = (data / "pictures" / "red" / "0.png").read_bytes()
    write_tar(data / "packed.tar", {"../outside.png": picture, "../outside.txt": b"red"}, mode="a")
    return "packed.tar[../outside]"


FILES: dict[str, Callable[[Path], str]] = {
    "a picture with corrupt bytes": _picture("corrupt.png", _corrupt),
    "a picture cut in the middle": _picture("cut.png", lambda picture: picture[: len(picture) // 2]),
    "a picture of no bytes": _picture("empty.png", lambda _: b""),
    **{
        f"a picture whose header claims {side:,} x {side:,} pixels": _picture(f"{name}.png", partial(_claiming, side))
        for name, side in SIDES.items()
    },
    "a clip cut short": _cut_clip,
    "a clip of no frames": _no_frames,
    "a sound of NaN": _not_numbers,
    "a member of a tar named ../outside": _outside,
}
"""By description, a function that adds the file to the data and returns the end of its name in skipped.jsonl."""
