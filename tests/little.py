"""A small recipe and its data, which tests and benchmarks/faults.py train."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import soundfile

PICTURES = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (240, 240, 240)}
TONES = {"low": 200, "middle": 800, "high": 3000}
RECIPE = """
name: little
model:
  {width: 32, layers: 2, heads: 2, mlp_dim: 64, embed_dim: 32, moe: {experts: 2, layers: 1}}
modalities:
  vision: {patch: [2, 8, 8]}
  audio: {window: 512, hop: 256, bins: 32}
  text: {vocab_size: 300, positions: 16}
sources:
  pictures: {path: pictures}
  sounds: {path: sounds.jsonl}
tasks:
  named:
    source: pictures
    inputs: {image: file, text: "a {label} square"}
    objectives:
      - {type: contrastive, positives_by: label}
      - {type: classification, label: label, weight: 0.5}
    batch_size: 8
    weight: 2
    views:
      - {image: {size: 16, crop: 1, jitter: 0}, text: {length: 8}}
      - {image: {size: 32, drop_tokens: 0.5, jitter: 0.1}, text: {length: 12}, batch_size: 6, weight: 0.5}
  heard:
    source: sounds
    inputs: {audio: sound, text: caption}
    objectives: [{type: contrastive, positives_by: caption}]
    batch_size: 6
    views: [{audio: {seconds: 0.512}, text: {length: 8}}]
optimizer: {lr: 3e-3, warmup_steps: 5, ema_decay: 0.9}
train: {steps: 12, num_workers: 0, log_every: 1, save_every: 5}
evaluation:
  sets:
    colours: {type: zero_shot, source: pictures, inputs: {image: file}, label: label, prompts: ["a {} square"],
              view: {image: {size: 16}}}
    tones: {type: retrieval, source: sounds, inputs: {audio: sound, text: caption},
            view: {audio: {seconds: 0.512}, text: {length: 8}}}
"""


def write(folder: Path) -> Path:
    """Writes recipe.yaml of two tasks, and their data: 24 pictures by class and 15 captioned sounds."""
    rng = np.random.default_rng(0)
    for name, colour in PICTURES.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            pixels = (np.array(colour) + rng.integers(-15, 16, (24 + i, 26, 3))).clip(0, 255).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    lines = []
    for i in range(15):
        name, pitch = list(TONES.items())[i % 3]
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(8000 + 400 * i) / 16_000) + rng.normal(
            0, 0.01, 8000 + 400 * i
        )
        soundfile.write(folder / f"{i}.wav", wave, 16_000)
        lines.append(json.dumps({"sound": f"{i}.wav", "caption": f"a {name} tone"}) + "\n")
    (folder / "sounds.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


def write_tars(folder: Path, into: Path) -> list[str]:
    """Writes the pictures of a folder that `write` made into two tars, and returns the changes of the recipe that
    stream them."""
    files = sorted((folder / "pictures").rglob("*.png"))
    for shard in range(2):
        members = {}
        for file in files[12 * shard : 12 * shard + 12]:
            key = f"{file.parent.name}-{file.stem}"
            members |= {f"{key}.png": file.read_bytes(), f"{key}.txt": f"a {file.parent.name} square".encode()}
        write_tar(into / f"{shard}.tar", members)
    inputs = "tasks.named.inputs={image: png, text: txt}"
    objectives = "tasks.named.objectives=[{type: contrastive, positives_by: txt}]"
    return [inputs, objectives, f"sources.pictures={{path: '{into}/*.tar', stream: true, window: 5}}", "evaluation={}"]


def write_tar(file: Path, members: dict[str, bytes], mode: Literal["w", "a"] = "w", **options: Any) -> Path:
    """Writes a tar with the contents of its members by their names, or appends them to one."""
    with tarfile.open(file, mode, **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def png(seed: int) -> bytes:
    """A small picture of noise."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
