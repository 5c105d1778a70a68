"""Checks and measures on a machine with GPUs what a machine without them cannot run.

    pip install -e .
    python -m benchmarks.gpu [--write]    # about ten minutes

It makes pictures with captions, and trains IMP-B and IMP-MoE-B on them in bf16 for a few steps: eager, compiled, with
gradient caching, and with activation checkpointing; if there are several GPUs, also on all of them in each layout. A
training on one GPU starts with the same weights and batch as the eager one, so their first losses must agree. That of
gradient caching has a larger batch, and must only be finite. The page has, for each training, its throughput, MFU, data
wait, and peak memory compared with `openimp plan`; how long a checkpoint stops the training and how long writing it
takes; and how fast `openimp embed` embeds the pictures. A training that fails is a row with its error. `--write` writes
docs/results/gpu.md and needs CUDA. The exit code is 1 if anything failed or losses disagree. Without CUDA, a small
version runs on the CPU, which tests the script.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from benchmarks import results_page
from openimp.common.json_lines import read_lines
from openimp.common.progress import console, track
from openimp.inference.embed import embed
from openimp.parallel import distributed
from openimp.planning.plan import plans
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

CUDA = torch.cuda.is_available()
PICTURES, SIDE, STEPS, SKIPPED = (4096, 256, 40, 10) if CUDA else (32, 32, 4, 2)
"""Number of pictures, their pixels per side, steps, and steps that are not measured."""
BYTES_PER_EXAMPLE = 41 * 2**30 // 256
"""Planned peak memory per example of the largest training here."""
BATCH = 8
"""Examples per rank and step: on GPUs, the largest power of two, up to 256, that fits into 90 % of the memory."""
if CUDA:
    memory = torch.cuda.get_device_properties(0).total_memory
    BATCH = max(8, min(256, 2 ** int(math.log2(0.9 * memory / BYTES_PER_EXAMPLE))))
TOLERANCE = 0.03
"""Largest relative difference of first losses, which are computed in bf16."""
WORDS = ["red", "green", "blue", "old", "new", "small", "large", "round", "flat", "bright", "dark", "plain"]


@dataclass
class Setting:
    """One training."""

    name: str
    recipe: str  # the published recipe that defines the model
    ranks: int = 1
    batch: int = BATCH  # examples per rank
    changes: dict[str, Any] = field(default_factory=dict)  # sections of the recipe


@dataclass
class Measured:
    """What a training came to."""

    first_loss: float
    examples_per_s: float  # over all ranks
    tokens_per_s: float
    mfu: float
    data_wait: float
    step: float  # seconds, median
    memory: int  # bytes at the peak of the first rank; 0 without CUDA
    planned: int  # bytes that the plan expects there
    save_blocks: float  # seconds for which a checkpoint stops the training
    save: float  # seconds until it is written
    saved: int  # bytes of it


def settings(gpus: int) -> list[Setting]:
    """All trainings on a machine with this many GPUs."""
    found, again = [], {"memory": {"activation_checkpointing": True}}
    for kind, recipe in (("IMP-B", "imp_b"), ("IMP-MoE-B", "imp_moe_b")):
        found += [
            Setting(kind, recipe),
            Setting(f"{kind}, compiled", recipe, changes={"train": {"compile": True}}),
            Setting(f"{kind}, activation checkpointing", recipe, changes=again),
        ]
        if gpus > 1:
            layouts = {"replicas": {"shard_degree": 1}, "sharded": {"shard_degree": gpus}}
            if recipe == "imp_moe_b":
                layouts["experts on different GPUs"] = {"shard_degree": 1, "expert_degree": gpus}
            for name, parallel in layouts.items():
                found.append(Setting(f"{kind}, {name}", recipe, gpus, changes={"parallel": parallel}))
    chunks = {"memory": {"chunk_size": BATCH}}
    return [*found, Setting("IMP-B, gradient caching", "imp_b", batch=4 * BATCH, changes=chunks)]


def make_data(folder: Path) -> Path:
    """Pictures with captions, and the manifest that lists them."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    lines = []
    for i in range(PICTURES):
        small = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        name = f"pictures/{i}.jpg"
        small.resize((SIDE * 5 // 4, SIDE), PIL.Image.Resampling.BICUBIC).save(folder / name, quality=90)
        lines.append(json.dumps({"file": name, "caption": " ".join(rng.choice(WORDS, 6))}))
    manifest = folder / "pictures.jsonl"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return manifest


def write_recipe(setting: Setting, manifest: Path, file: Path) -> None:
    """The recipe of a training: the model of a published recipe, smaller without CUDA, and one task."""
    model = Recipe.load(setting.recipe).model.model_dump(mode="json")
    if not CUDA:
        model |= {"width": 32, "layers": 2, "heads": 2, "mlp_dim": 64, "embed_dim": 32}
        model |= {"moe": model["moe"] and {**model["moe"], "experts": 4, "layers": 1}}
    task = {
        "source": "pictures",
        "inputs": {"image": "file", "text": "caption"},
        "objectives": [{"type": "contrastive"}],
        "batch_size": setting.batch * setting.ranks,
        "views": [{"image": {"size": SIDE}, "text": {"length": 16}}],
    }
    workers = max(1, (os.cpu_count() or 1) // setting.ranks - 1) if CUDA else 0
    train = {"steps": STEPS, "precision": "bf16", "num_workers": workers, "log_every": SKIPPED, "save_every": 10**6}
    recipe: dict[str, Any] = {
        "name": "gpu", "model": model, "sources": {"pictures": {"path": str(manifest)}}, "tasks": {"pictures": task},
        "train": train, "optimizer": {"warmup_steps": 1},
    }  # fmt: skip
    for section, values in setting.changes.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML.


def train_once(file: Path, run: Path) -> None:
    """Trains a recipe on this rank, and writes what was measured beside it. `measure` starts this in processes."""
    device = distributed.start()
    recipe = Recipe.load(file)
    trainer, saves = Trainer(set_up(recipe, run)), list[tuple[float, float]]()
    save, make_step, losses = trainer.save, trainer.make_step, list[float]()

    def timed_save(wait: bool = False) -> None:
        begin = time.perf_counter()
        save(wait)
        saves.append((begin, time.perf_counter()))

    def watched_step(loaded: Any) -> Any:
        found = make_step(loaded)
        if not losses:
            losses.append(float(distributed.all_reduce_mean(found.total.detach())))
        return found

    trainer.save, trainer.make_step = timed_save, watched_step  # type: ignore[method-assign]
    trainer.train()
    end = time.perf_counter()
    ranks = distributed.world_size()
    plan_layouts = plans(recipe, trainer.data.modalities, trainer.data.classes, gpus=ranks, gpu="h100", utilization=0.4)
    planned = distributed.run_on_rank_zero(lambda: next(plan_layouts).memory_bytes)
    if distributed.rank() == 0:
        lines = read_lines(run / "metrics.jsonl")[1:]
        seconds = sum(line["seconds"] for line in lines)

        def mean(key: str) -> float:
            return float(sum(line[key] * line["seconds"] for line in lines) / seconds)

        folder = next((run / "checkpoints").glob("step-*"))
        found = Measured(
            first_loss=losses[0],
            examples_per_s=mean("examples_per_s"),
            tokens_per_s=mean("tokens_per_s"),
            mfu=mean("mfu"),
            data_wait=mean("data_wait"),
            step=statistics.median(line["step_p50"] for line in lines),
            memory=torch.cuda.max_memory_allocated(device) if CUDA else 0,
            planned=planned,
            save_blocks=saves[0][1] - saves[0][0],
            save=end - saves[0][0],
            saved=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        )
        run.with_suffix(".json").write_text(json.dumps(asdict(found)), encoding="utf-8")
    distributed.shut_down()


def measure(setting: Setting, manifest: Path, folder: Path) -> Measured | str:
    """Trains in processes of their own; what was measured, or the last line of the error."""
    folder.mkdir()
    file, run = folder / "recipe.yaml", folder / "run"
    write_recipe(setting, manifest, file)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
    command = [
        sys.executable,
        *(torchrun if setting.ranks > 1 else []),
        "-m",
        "benchmarks.gpu",
        "--train",
        str(file),
        str(run),
    ]
    environment = os.environ if CUDA else {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1].strip()[:200] if lines else f"exit code {done.returncode}"
    return Measured(**json.loads(run.with_suffix(".json").read_text(encoding="utf-8")))


def embedding_rate(run: Path, pictures: Path, out: Path) -> float:
    """Pictures per second of `openimp embed`, which includes loading the model."""
    console.quiet, begin = True, time.perf_counter()
    try:
        embed(run, [pictures], out)
    finally:
        console.quiet = False
    return PICTURES / (time.perf_counter() - begin)


def agrees(setting: Setting, found: Measured | str, eager: Measured | str) -> bool:
    """Whether a training worked, and its first loss is that of the eager training where both see the same batch."""
    if isinstance(found, str) or not math.isfinite(found.first_loss):
        return False
    if setting.batch != BATCH or setting.ranks > 1 or isinstance(eager, str):
        return True
    return abs(found.first_loss - eager.first_loss) <= TOLERANCE * abs(eager.first_loss)


def row(setting: Setting, found: Measured | str, fine: bool) -> list[str]:
    """A row of the table."""
    if isinstance(found, str):
        return [setting.name, str(setting.ranks), f"FAILED: {found.replace('|', '/')}", *[""] * 9]
    gib = f"{found.memory / 2**30:.1f}" if found.memory else ""
    ratio = f"{found.memory / found.planned:.2f}" if found.memory else ""
    cells = [
        setting.name, setting.ranks, f"{setting.batch * setting.ranks:,}", f"{found.examples_per_s:,.0f}",
        f"{found.tokens_per_s:,.0f}", f"{found.mfu:.0%}", f"{found.data_wait:.0%}", f"{1e3 * found.step:,.0f}",
        gib, ratio,
        f"{found.save_blocks:.2f} / {found.save:.1f} ({found.saved / 2**30:.2f} GiB)",
        f"{found.first_loss:.3f}" + ("" if fine else " DIFFERS"),
    ]  # fmt: skip
    return [*map(str, cells)]


def report(rows: list[list[str]], gpus: int, rate: float | None) -> str:
    """The page."""
    hardware = f"{gpus} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if CUDA else "no GPU"
    columns = ["model", "GPUs" if CUDA else "ranks", "batch", "examples/s", "tokens/s", "MFU", "data wait",
               "ms per step", "peak GiB", "peak / plan", "s per checkpoint: training waits / written",
               "first loss"]  # fmt: skip
    speed = "" if rate is None else f"\n`openimp embed` embeds {rate:,.0f} pictures/s, loading the model included.\n"
    small = "" if CUDA else " Without CUDA the models and batches are tiny; the figures only test the script."
    return f"""{results_page.head("Training on GPUs", "torch")}- GPUs: {hardware}.{small}
- {PICTURES:,} JPEG pictures of {SIDE * 5 // 4} x {SIDE} pixels; {STEPS} steps, of which the first {SKIPPED} are not
  measured; bf16; seed 0. MFU is the `mfu` of docs/metrics.md.

{results_page.table(columns, *rows)}{speed}"""


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--train", nargs=2, type=Path, metavar=("RECIPE", "RUN"), help=argparse.SUPPRESS)
    args = results_page.parse(parser)
    if args.write and not CUDA:
        parser.error("--write: needs CUDA")
    if args.train:
        train_once(*args.train)
        return 0
    gpus = torch.cuda.device_count() if CUDA else 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make_data(folder)
        todo, eager, rows, fine, rate = settings(gpus), dict[str, Measured | str](), list[list[str]](), True, None
        for i, setting in enumerate(track(todo, "trainings")):
            found = measure(setting, manifest, folder / str(i))
            eager.setdefault(setting.recipe, found)
            same = agrees(setting, found, eager[setting.recipe])
            rows.append(row(setting, found, same))
            print(*rows[-1], sep=" | ", flush=True)
            fine &= same
        if not isinstance(eager["imp_b"], str):
            rate = embedding_rate(folder / "0" / "run", folder / "pictures", folder / "vectors.parquet")
    results_page.publish(report(rows, gpus, rate), "gpu", args.write)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
