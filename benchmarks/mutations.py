"""Mutated media files: whatever the bytes, decoding neither crashes, nor hangs, nor fills the memory.

    python benchmarks/mutations.py [--files 10000] [--seed 0] [--write]

A small valid file of each format is mutated by flipped bytes, a cut, a repeated or overwritten part, a changed length
field, or the end of another file, and decoded as training and evaluation do. The checksums of a PNG are mended, because
nothing else of it would be looked at; those of FLAC and OGG are not. A file must be decoded, or refused by `BadMedia`.
Another exception, the death of the process that decodes, and more than `PATIENCE` seconds for one file are failures.
The memory is the largest that the decoding process ever held, libraries included. `--write` writes
docs/results/mutations.md.
"""

import argparse
import io
import multiprocessing
import os
import platform
import re
import resource
import shlex
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import soundfile
from rich.progress import track

from openimp.modalities import BadMedia, Modality
from openimp.modalities.audio import Audio
from openimp.modalities.image import Image
from openimp.modalities.video import Video
from openimp.versions import openimp_version, processor

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60
"""Seconds after which a file counts as a hang."""
MOST_MEMORY = 700e6
"""Bytes that decoding may hold, libraries included."""
IMAGE, VIDEO, AUDIO = Image(Image.Config()), Video(Video.Config()), Audio(Audio.Config())
VIEWS = {
    "image": Image.View(size=64),
    "video": Video.View(size=64, frames=4),
    "audio": Audio.View(seconds=1.024),
}
STILLS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF")
FILMS = {"MP4": ("mp4", "h264", "aac"), "AVI": ("avi", "mpeg4", "mp2"), "MKV": ("matroska", "vp9", "libopus")}
SOUNDS = ("WAV", "FLAC", "OGG", "MP3", "AIFF")
FORMATS = (*STILLS, *FILMS, *SOUNDS)


def seeds() -> dict[str, bytes]:
    """A small valid file of each format."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 6, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    sound = (0.3 * np.sin(np.arange(24_000) / 7)).astype(np.float32)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    found = {}
    for form in STILLS:
        out = io.BytesIO()
        moving: dict[str, Any] = {"save_all": True, "append_images": pictures[1:]} if form in ("WebP", "GIF") else {}
        pictures[0].save(out, form, **moving)
        found[form] = out.getvalue()
    for form, options in FILMS.items():
        found[form] = _film(frames, sound, *options)
    for form in SOUNDS:
        out = io.BytesIO()
        soundfile.write(out, sound, 24_000, format=form)
        found[form] = out.getvalue()
    return found


def _film(frames: np.ndarray, sound: np.ndarray, form: str, video: str, audio: str) -> bytes:
    out = io.BytesIO()
    container: Any
    with av.open(out, "w", format=form) as container:
        pictures, samples = container.add_stream(video, rate=10), container.add_stream(audio, rate=48_000)
        pictures.height, pictures.width, pictures.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        container.mux([*pictures.encode(), *samples.encode(frame), *samples.encode()])
    return out.getvalue()


def mutate(raw: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of a file's bytes."""
    data = bytearray(raw)
    for _ in range(int(rng.integers(1, 5))):
        if len(data) < 16:
            break
        at = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 256)))  # headers are more interesting
        size = int(rng.integers(1, 64))
        match rng.choice(["flip", "cut", "repeat", "fill", "length", "splice"], p=[0.4, 0.05, 0.1, 0.1, 0.3, 0.05]):
            case "flip":
                for place in rng.integers(len(data), size=size):
                    data[place] ^= int(rng.integers(1, 256))
            case "cut":
                del data[max(at, 16) :]
            case "repeat":
                data[at:at] = data[at : at + size] * int(rng.integers(1, 200))
            case "fill":
                data[at : at + size] = bytes([int(rng.choice([0, 255]))]) * size
            case "length":
                number = int(rng.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, rng.integers(2**32)]))
                width = int(rng.choice([2, 4]))
                order: Any = str(rng.choice(["little", "big"]))
                data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, order)
            case "splice":
                data[at:] = other[int(rng.integers(len(other))) :]
    return _with_checksums(data) if data[:4] == b"\x89PNG" else bytes(data)


def _with_checksums(data: bytearray) -> bytes:
    """A PNG whose chunks have the right checksums, so that a decoder looks at what is in them."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") if end + 4 <= len(data) else b""
        at = end + 4
    return bytes(data)


def readers(form: str) -> list[Modality]:
    """The modalities that read files of a format."""
    if form in FILMS:
        return [VIDEO, AUDIO]
    return [AUDIO] if form in SOUNDS else [IMAGE, VIDEO] if form in ("WebP", "GIF", "PNG") else [IMAGE]


def decode(form: str, raw: bytes, number: int) -> str:
    """Decodes a file as evaluation and training do: "decoded" if any modality can, "refused", or what was raised."""
    outcome = "refused"
    for modality in readers(form):
        view = VIEWS[modality.name]
        for rng in (None, np.random.default_rng(number)):
            try:
                modality.transform(modality.decode(raw, [view], rng), view, rng)
                outcome = "decoded"
            except BadMedia:
                continue
            except Exception as error:
                return f"{type(error).__name__}: {error}"[:200]
    return outcome


def _work(first: int, last: int, seed: int, pipe: Any) -> None:
    """Decodes the files from `first` to `last`, and sends (what happened, bytes held at most) of each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Decoders print their complaints.
    valid = seeds()
    for number in range(first, last):
        form = FORMATS[number % len(FORMATS)]
        rng = np.random.default_rng([seed, number])
        raw = mutate(valid[form], valid[FORMATS[int(rng.integers(len(FORMATS)))]], rng)
        outcome = decode(form, raw, number)
        pipe.send((outcome, most_memory()))


def most_memory() -> int:
    """Bytes that this process ever held. On Linux getrusage would also count what its parent held at the start."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Report:
    """What became of the files.

    Attributes:
        outcomes: how often each format was decoded and refused.
        slowest: the most seconds that one file of each format took.
        memory: bytes that a decoding process held at most.
        failures: what went wrong, by the file's number.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: {form: Counter() for form in FORMATS})
    slowest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FORMATS, 0.0))
    memory: int = 0
    failures: dict[int, str] = field(default_factory=dict)


def run(files: int, seed: int = 0, progress: Callable[..., Any] = lambda numbers, **_: numbers) -> Report:
    """Decodes so many mutated files in a process of their own, which is replaced when it dies or hangs."""
    report, process, pipe = Report(), None, None
    context = multiprocessing.get_context("spawn")
    for number in progress(range(files), description="mutated files"):
        if process is None:
            pipe, other = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(number, files, seed, other), daemon=True)
            process.start()
            other.close()
            patience = 10 * PATIENCE  # It imports and makes the valid files first.
        begin, form = time.monotonic(), FORMATS[number % len(FORMATS)]
        try:
            outcome, memory = pipe.recv() if pipe.poll(patience) else ("hang", 0)
        except EOFError:
            process.join()
            outcome, memory = f"the process died with {process.exitcode}", 0
        report.memory = max(report.memory, memory)
        if patience == PATIENCE:
            report.slowest[form] = max(report.slowest[form], time.monotonic() - begin)
        patience = PATIENCE
        if outcome in ("decoded", "refused"):
            report.outcomes[form][outcome] += 1
            continue
        report.failures[number] = f"{form}: {outcome}"
        if not memory:
            process.kill()
            process = None
    return report


def page(report: Report, seed: int) -> str:
    files = sum(counts.total() for counts in report.outcomes.values()) + len(report.failures)
    lines = [
        "# Mutated media files",
        "",
        "Written by `benchmarks/mutations.py`, whose head says what is mutated and what counts as a failure.",
        "",
        f"- Command: `{shlex.join(['python', 'benchmarks/mutations.py', *sys.argv[1:]])}`, seed {seed}",
        f"- openimp: {openimp_version()}",
        f"- Versions: Python {platform.python_version()}, Pillow {version('pillow')}, PyAV {version('av')}, "
        f"soundfile {version('soundfile')}",
        f"- Hardware: {processor()}, {os.cpu_count()} cores",
        f"- Result: {files:,} files, {len(report.failures)} failures (crashes, hangs, other exceptions); at most "
        f"{report.memory / 1e6:.0f} MB held, of {MOST_MEMORY / 1e6:.0f}",
        "",
        "| format | decoded | refused | slowest file, s |",
        "|---|---:|---:|---:|",
    ]
    for form, counts in report.outcomes.items():
        lines.append(f"| {form} | {counts['decoded']:,} | {counts['refused']:,} | {report.slowest[form]:.2f} |")
    lines += ["", *(f"- file {number}: {failure}" for number, failure in report.failures.items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/results/mutations.md")
    args = parser.parse_args()
    if args.write and "-dirty" in openimp_version():
        parser.error("--write: the checkout was changed since its commit, which the page names; commit first")
    report = run(args.files, args.seed, track)
    text = page(report, args.seed)
    print(text)
    if args.write:
        (ROOT / "docs" / "results" / "mutations.md").write_text(text, encoding="utf-8")
    return 1 if report.failures or report.memory > MOST_MEMORY else 0


if __name__ == "__main__":
    sys.exit(main())
