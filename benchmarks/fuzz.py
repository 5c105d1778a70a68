"""Fuzzes the decoding of media files.

    python -m benchmarks.fuzz [--files 10000] [--seed 0] [--only FORMAT ...] [--write]

It makes small files of 14 formats in the variants that common programs write. It changes random bytes, truncates and
splices the files, and sets possible lengths, sizes and counts to extreme values. Each modality that reads a format
decodes the file as in training (a random part) or as in evaluation, in one process per format. A file fails if the
process dies, exceeds the time limit, uses more than 700 MB of memory, or raises anything but BadMedia. Seed, format and
number determine a file. Failing files are kept, and the exit code is 1 if there are any. `--write` writes the table to
docs/results/hostile.md.
"""

import io
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.ExifTags
import PIL.Image
import soundfile

from benchmarks import results_page
from benchmarks.trainings import most_memory
from openimp.common.modality import BadMedia, Modality
from openimp.common.progress import track
from openimp.common.protocols import Dated
from openimp.modalities.audio import Audio
from openimp.modalities.image import Image
from openimp.modalities.video import Video

SECONDS = 120
"""Limit on the wall-clock time of one file, in seconds."""
MEMORY = 700 * 10**6
"""Limit on the peak memory of the process, in bytes. Python and its libraries use about 260 MB of it."""
EXTREMES = (0, 1, 2**7 - 1, 2**7, 2**8 - 1, 2**15 - 1, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
VIEWS: dict[str, tuple[Modality, Any]] = {
    "image": (Image(Image.Config()), Image.View()),
    "video": (Video(Video.Config()), Video.View()),
    "audio": (Audio(Audio.Config()), Audio.View()),
}


def picture(form: str, mode: str = "RGB", size: int = 48, **options: Any) -> bytes:
    """An image of noise over a gradient, which compresses like a photograph."""
    noise = np.random.default_rng(0).integers(0, 64, (size, size + 16, 4)) + np.arange(size)[:, None, None] * 3
    out = io.BytesIO()
    PIL.Image.fromarray(noise.astype(np.uint8)).convert("RGB").convert(mode).save(out, form, **options)
    return out.getvalue()


def animation(form: str, **options: Any) -> bytes:
    frames = [PIL.Image.new("RGBA", (40, 32), (40 * i, 9, 200 - 40 * i, 128 + 60 * (i % 2))) for i in range(5)]
    out = io.BytesIO()
    frames[0].save(out, form, save_all=True, append_images=frames[1:], duration=40, **options)
    return out.getvalue()


def film(form: str, codec: str, sound: str, **options: str) -> bytes:
    """A video of 16 frames and 0.6 s of a tone."""
    out = io.BytesIO()
    with av.open(out, "w", format=form, options=options) as container:
        pictures, noise = (
            container.add_stream(codec, rate=25),
            container.add_stream(sound, rate=48_000, layout="stereo"),
        )
        pictures.height, pictures.width, pictures.codec_context.gop_size = 48, 64, 8
        pictures.codec_context.thread_count = 1
        pictures.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(16):
            pixels = np.roll(np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3) // 40, 3 * i, axis=1)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
        wave = np.sin(np.arange(28_800) / 20).astype(np.float32)[None].repeat(2, axis=0) / 2
        tone = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        tone.sample_rate = 48_000
        container.mux([*pictures.encode(), *noise.encode(tone), *noise.encode()])
    return out.getvalue()


def sound(form: str, subtype: str, channels: int = 2, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    wave = np.sin(np.arange(4000 * channels) / 9).reshape(-1, channels) / 2
    soundfile.write(out, wave, rate, format=form, subtype=subtype)
    return out.getvalue()


def exif() -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[274], found[305], found[306] = 6, "a program", "2024:05:31 18:30:00"
    gps = found.get_ifd(PIL.ExifTags.IFD.GPSInfo)
    gps[1], gps[2], gps[3], gps[4] = "N", (48.0, 51.0, 30.0), "E", (2.0, 17.0, 40.0)
    return found


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[], list[bytes]]]] = {
    "PNG": (
        ("image", "video"),
        lambda: [
            *(picture("PNG", mode) for mode in ("RGB", "RGBA", "P", "1", "L")),
            picture("PNG", exif=exif(), icc_profile=bytes(range(256))),
            animation("PNG"),
        ],
    ),
    "JPEG": (
        ("image",),
        lambda: [picture("JPEG", exif=exif()), picture("JPEG", progressive=True), picture("JPEG", "CMYK")],
    ),
    "WebP": (
        ("image", "video"),
        lambda: [picture("WEBP", exif=exif()), picture("WEBP", "RGBA", lossless=True), animation("WEBP")],
    ),
    "GIF": (("image", "video"), lambda: [picture("GIF", "P"), animation("GIF", disposal=2)]),
    "BMP": (("image",), lambda: [picture("BMP", mode) for mode in ("RGB", "P", "1")]),
    "TIFF": (
        ("image",),
        lambda: [
            picture("TIFF", exif=exif()),
            *(picture("TIFF", "RGB", compression=f"tiff_{name}") for name in ("lzw", "adobe_deflate", "jpeg")),
            *(picture("TIFF", mode, compression="packbits") for mode in ("I", "CMYK", "1")),
        ],
    ),
    "MP4": (
        ("video", "audio"),
        lambda: [
            film("mp4", "libx264", "aac"),
            film("mp4", "mpeg4", "alac"),
            film("mp4", "libx264", "libopus", movflags="frag_keyframe+empty_moov"),
        ],
    ),
    "AVI": (("video", "audio"), lambda: [film("avi", "mjpeg", "pcm_s16le"), film("avi", "msmpeg4v2", "mp2")]),
    "MKV": (
        ("video", "audio"),
        lambda: [
            film("webm", "libvpx-vp9", "libopus"),
            film("matroska", "ffv1", "pcm_s16le"),
            film("matroska", "libx264", "ac3"),
        ],
    ),
    "WAV": (("audio",), lambda: [sound("WAV", name) for name in ("PCM_16", "FLOAT", "MS_ADPCM", "ULAW")]),
    "FLAC": (("audio",), lambda: [sound("FLAC", "PCM_16"), sound("FLAC", "PCM_24", 3, 48_000)]),
    "OGG": (("audio",), lambda: [sound("OGG", "VORBIS"), sound("OGG", "OPUS")]),
    "MP3": (("audio",), lambda: [sound("MP3", "MPEG_LAYER_III", n) for n in (1, 2)]),
    "AIFF": (("audio",), lambda: [sound("AIFF", name) for name in ("PCM_16", "FLOAT", "ULAW")]),
}
"""By format, the modalities that read it, and a function that makes intact files."""


def flip(content: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """Changes a few bytes anywhere, or only near the start, where headers are."""
    end = len(content) if rng.random() < 0.5 else min(len(content), 256)
    for at in rng.integers(0, end, rng.integers(1, 9)):
        content[at] ^= 1 << rng.integers(8) if rng.random() < 0.5 else rng.integers(1, 256)


def set_number(content: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """Overwrites possible lengths, sizes and counts with extreme or random numbers, mostly near the start."""
    end = len(content) if rng.random() < 0.3 else min(len(content), 512)
    for at in rng.integers(0, end - 4, rng.integers(1, 4)):
        value, size = (
            int(rng.choice(EXTREMES) if rng.random() < 0.7 else rng.integers(2**32)),
            int(rng.choice([1, 2, 4])),
        )
        content[at : at + size] = (value % 256**size).to_bytes(size, "little" if rng.random() < 0.5 else "big")


def truncate(content: bytearray, other: bytes, rng: np.random.Generator) -> None:
    del content[rng.integers(len(content)) :]


def splice(content: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """Inserts a piece of another file of the format, or overwrites a piece with it."""
    start, at = rng.integers(len(other)), rng.integers(len(content))
    piece = other[start : start + rng.integers(1, len(other))]
    content[at : at + (len(piece) if rng.random() < 0.5 else 0)] = piece


def repeat(content: bytearray, other: bytes, rng: np.random.Generator) -> None:
    """Repeats a piece up to a hundred times, or removes it."""
    start, end = sorted(rng.integers(0, len(content) + 1, 2))
    content[start:end] = content[start:end] * int(rng.choice([0, 2, 3, 100]))


def mend_png(content: bytearray) -> None:
    """Corrects the checksums of the chunks."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


def mend_ogg(content: bytearray) -> None:
    """Corrects the checksums of the pages. They are zlib's CRC with all bits reversed."""
    at = content.find(b"OggS")
    while at >= 0 and at + 27 <= len(content):
        sizes = content[at + 27 : at + 27 + content[at + 26]]
        page = content[at : at + 27 + len(sizes) + sum(sizes)]
        page[22:26] = bytes(4)
        reverse = bytes(int(f"{byte:08b}"[::-1], 2) for byte in page)
        # Undoes the inversions at the start and end of zlib's CRC.
        value = zlib.crc32(reverse, 0xFFFFFFFF) ^ 0xFFFFFFFF
        content[at + 22 : at + 26] = int(f"{value:032b}"[::-1], 2).to_bytes(4, "little")
        at = content.find(b"OggS", at + 4)


def mend_flac(content: bytearray) -> None:
    """Corrects the checksums of the header and of the only frame. The files here have one frame."""
    at = content.find(b"\xff\xf8", 42)
    if 0 <= at < len(content) - 16:
        block, rate = content[at + 2] >> 4, content[at + 2] & 15
        end = at + 5 + {6: 1, 7: 2}.get(block, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)
        content[end] = crc(content[at:end], 8, 0x07)
        content[-2:] = crc(content[at:-2], 16, 0x8005).to_bytes(2, "big")


def crc(content: bytes, bits: int, polynomial: int) -> int:
    value = 0
    for byte in content:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) else 0)
            value &= 2**bits - 1
    return value


MEND: dict[str, Callable[[bytearray], None]] = {"PNG": mend_png, "OGG": mend_ogg, "FLAC": mend_flac}
"""Functions that correct checksums. Without them, the libraries refuse nearly all changed files at once."""


def mutated(name: str, seeds: list[bytes], seed: int, number: int) -> bytes:
    """The `number`-th file of a format: an intact file, changed once or twice."""
    rng = np.random.default_rng([seed, list(FORMATS).index(name), number])
    content, other = bytearray(seeds[rng.integers(len(seeds))]), seeds[rng.integers(len(seeds))]
    for change in rng.choice(
        [flip, flip, set_number, set_number, set_number, truncate, splice, repeat], rng.integers(1, 3)
    ):
        if len(content) > 8:
            change(content, other, rng)
    if name in MEND and rng.random() < 0.7:
        MEND[name](content)
    return bytes(content)


def serve(pipe: Any) -> None:
    """Decodes each file that it receives from the pipe, and sends back the outcome and the seconds of CPU time."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints warnings to stderr.
    while True:
        kind, content, number = pipe.recv()
        modality, view = VIEWS[kind]
        begin, outcome = time.process_time(), "decoded"
        try:
            if isinstance(modality, Dated):  # Indexing reads the header, and ignores one that is refused.
                with suppress(BadMedia):
                    modality.recorded(content)
            modality.decode(content, [view], np.random.default_rng(number) if number % 2 else None)
        except BadMedia:
            outcome = "refused"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        pipe.send((outcome, time.process_time() - begin))


class Worker:
    """A process that decodes files. It is restarted if it dies or hangs."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def decode(self, kind: str, content: bytes, number: int) -> tuple[str, float, int]:
        """Returns the outcome, the seconds of CPU time, and the peak memory of the process in bytes."""
        try:
            self.pipe.send((kind, content, number))
            if self.pipe.poll(SECONDS):
                return *self.pipe.recv(), most_memory(self.process)
            outcome = f"hung for {SECONDS} s"
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = f"died: exit code {self.process.exitcode}"
        self.restart()
        return outcome, 0.0, 0

    def restart(self) -> None:
        self.stop()
        self.__init__()  # type: ignore[misc]

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class Row:
    """The results of one format."""

    name: str
    files: int = 0
    decoded: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: int = 0

    def __str__(self) -> str:
        counts = f"{self.files:,} | {self.decoded:,} | {self.refused:,} | {self.files - self.decoded - self.refused}"
        return f"| {self.name} | {counts} | {self.slowest:.2f} s | {self.memory / 1e6:.0f} MB |"


def fuzz(name: str, files: int, seed: int, worker: Worker, failures: Path) -> Row:
    """Decodes `files` changed files of a format, and writes those that fail into the folder `failures`.

    A file counts as decoded if at least one modality decodes it and none fails, and as refused if all refuse it.
    """
    row, (kinds, make) = Row(name, files), FORMATS[name]
    seeds = make()
    for content in seeds:
        if all(worker.decode(kind, content, 0)[0] != "decoded" for kind in kinds):
            raise AssertionError(f"{name}: an intact file cannot be decoded")
    for number in track(range(files), name):
        content, outcomes = mutated(name, seeds, seed, number), set()
        for kind in kinds:
            outcome, seconds, memory = worker.decode(kind, content, number)
            row.slowest, row.memory = max(row.slowest, seconds), max(row.memory, memory)
            if memory > MEMORY:
                outcome = f"used {memory:,} bytes"
                worker.restart()  # The peak memory of a process never decreases.
            outcomes.add(outcome)
            if outcome not in ("decoded", "refused"):
                failures.mkdir(exist_ok=True)
                (failures / f"{name}-{kind}-{number}").write_bytes(content)
                print(f"{failures}/{name}-{kind}-{number}: {outcome}", file=sys.stderr, flush=True)
        row.refused += outcomes == {"refused"}
        row.decoded += "decoded" in outcomes and outcomes <= {"decoded", "refused"}
    return row


def page(rows: list[Row], seed: int) -> str:
    """The text of docs/results/hostile.md."""
    total = Row("all", *(sum(getattr(row, key) for row in rows) for key in ("files", "decoded", "refused")))
    total.slowest = max(row.slowest for row in rows)
    total.memory = max(row.memory for row in rows)
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    lines = [
        f"- Decoders: libavcodec {ffmpeg}, libsndfile {soundfile.__libsndfile_version__}",
        f"- Seed: {seed}",
        "",
        "| format | files | decoded | refused | failed | maximum CPU time | peak memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *map(str, [*rows, total]),
        "",
        "A file failed if the process crashed, exceeded the time limit, used more than 700 MB, or raised anything but",
        "BadMedia. The peak memory is that of the whole process, including Python, torch and the decoders.",
    ]
    libraries = ("pillow", "av", "soundfile", "numpy", "torch")
    return results_page.head("Fuzzing of media files", *libraries) + "\n".join(lines) + "\n"


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--files", type=int, default=10_000, help="number of files, over all formats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="FORMAT")
    args = results_page.parse(parser)
    failures = Path(tempfile.gettempdir()) / f"openimp-fuzz-{os.getpid()}"
    rows = []
    for i, name in enumerate(args.only):
        # As equally as possible.
        files = args.files * (i + 1) // len(args.only) - args.files * i // len(args.only)
        worker = Worker()  # One per format, so that its peak memory is that of the format.
        rows.append(fuzz(name, files, args.seed, worker, failures))
        worker.stop()
    results_page.publish(page(rows, args.seed), "hostile", args.write)
    return int(any(row.decoded + row.refused < row.files for row in rows))


if __name__ == "__main__":
    sys.exit(main())
