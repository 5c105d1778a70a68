"""Compares the speed of embedding pictures with a wrapped model of open_clip with that of the library's own loop.

    pip install -e '.[peers]'
    python benchmarks/wrapped.py                  # 1,000 pictures; exit code 1 if the ratio is below 0.95
    python benchmarks/wrapped.py --pictures 64    # checks that it works

Both load a ViT-B with random weights from its folder and embed the same JPEG files in fp32, in batches of one size.
openimp decodes in threads; the library's loop has as many worker processes. openimp has converted the model before, as
it does once for every model. They take turns in one process, so that other load on the machine affects both, and the
result is the median ratio of a pair.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import openimp
from openimp.common.threads import THREADS
from openimp.common.versions import openimp_version, processor
from openimp.encoding.engine import chunks_on_cpu

BATCH, REQUIRED = 64, 0.95


def write_model(folder: Path, name: str) -> None:
    """Writes a model with random weights, as the library does."""
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(open_clip.create_model(name).state_dict(), folder / "open_clip_model.safetensors")


def write_pictures(folder: Path, count: int) -> list[Path]:
    """Writes JPEG files of 500 x 375 pixels, the size of many pictures of ImageNet."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        files.append(folder / f"{i:04d}.jpg")
        small.resize((500, 375), PIL.Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


class Files(Dataset[Tensor]):
    """The pictures as the library's transform makes them."""

    def __init__(self, files: list[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(PIL.Image.open(self.files[i]))


@torch.no_grad()
def embed_with_library(folder: Path, files: list[Path]) -> Tensor:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    loader = DataLoader(Files(files, transform), BATCH, num_workers=THREADS)
    return torch.cat([model.eval().encode_image(images, normalize=True) for images in loader])


def embed_with_openimp(folder: Path, files: list[Path]) -> Tensor:
    model = openimp.load(f"open_clip:local-dir:{folder}", "cpu", "fp32")
    encoder = model.item_encoder("image", "text", BATCH, "embed")
    chunks = chunks_on_cpu(encoder.encode((file, partial(encoder.read, file)) for file in files))
    return torch.from_numpy(np.stack([vector for chunk in chunks for _, vector in chunk]))


def compare(folder: Path, files: list[Path], pairs: int) -> tuple[list[float], dict[str, float]]:
    """The ratios of the speeds in each pair, openimp's divided by the library's, and pictures per second of both."""
    embed_with_openimp(folder, files[:1])  # Converts the model.
    seconds: dict[Any, list[float]] = {embed_with_openimp: [], embed_with_library: []}
    for pair in range(pairs):
        found = {}
        for embed in [*seconds][:: -1 if pair % 2 else 1]:
            start = time.perf_counter()
            found[embed] = embed(folder, files)
            seconds[embed].append(time.perf_counter() - start)
        torch.testing.assert_close(*found.values(), atol=1e-5, rtol=1e-5)
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    return ratios, {embed.__name__: len(files) / statistics.median(took) for embed, took in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-16", help="an architecture of open_clip")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        os.environ["OPENIMP_CACHE"] = f"{folder}/cache"
        for name in ("model", "pictures"):
            (Path(folder) / name).mkdir()
        write_model(Path(folder) / "model", options.model)
        files = write_pictures(Path(folder) / "pictures", options.pictures)
        ratios, speeds = compare(Path(folder) / "model", files, options.pairs)
    ratio = statistics.median(ratios)
    for name, speed in speeds.items():
        print(f"{name}: {speed:.1f} pictures/s")
    print(f"openimp has {ratio:.3f} of the library's speed (pairs: {', '.join(f'{each:.3f}' for each in ratios)})")
    print(f"{options.model}, {options.pictures} pictures, batches of {BATCH}, {THREADS} threads or workers")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch", "pillow"))
    where = f"{processor()}, {torch.get_num_threads()} threads"
    print(f"{where}; openimp {openimp_version()}, {versions}, Python {platform.python_version()}")
    return 0 if ratio >= REQUIRED else 1


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
