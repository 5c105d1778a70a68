"""Compares the speed of training steps: openimp with timm's ViT, sparse with dense, dropped tokens with all tokens, the
demo's model on two threads with one.

    pip install -e '.[bench]'
    python -m benchmarks.throughput            # about ten minutes on one core; exit code 1 if a speedup is too small
    python -m benchmarks.throughput --smoke    # checks that the benchmark runs; required speedups are ignored

A step is forward, backward and fused AdamW under bf16 autocast on the CPU. It takes 64 images of 128 x 128 pixels, 64
tokens each, which are already in memory, and has one linear head over 1000 classes. The two models of a comparison take
their steps alternately in one process, so that other load on the machine affects both. The order within a pair of steps
alternates too. The result is the median over all pairs. timm's ViT is measured with fused and with plain attention,
because fused attention, the default, is the slower one on CPUs for 64 tokens. The demo's step is a whole update, with
Muon, of its most frequent task and view.
"""

import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm.layers
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import results_page
from openimp.common.device import autocast, keep_freed_memory, product_speed
from openimp.common.objective import head_key
from openimp.common.progress import console
from openimp.data.batch import Batch
from openimp.data.loaded_batch import LoadedBatch
from openimp.model.imp import IMP
from openimp.objectives.losses import task_losses
from openimp.recipe.schema import Recipe
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer

SIZE, PATCH, CLASSES = 128, 16, 1000
CPU = torch.device("cpu")


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def peak(threads: int) -> float:
    """FLOP/s of a large matrix product in bf16."""
    with use_threads(threads):
        return product_speed.__wrapped__(CPU, "bf16")


class Step(ABC):
    """A training step on one batch of some number of tokens, with some number of threads."""

    def __init__(self, tokens: int, threads: int) -> None:
        self.tokens, self.threads, self.measured = tokens, threads, list[float]()

    @abstractmethod
    def run(self) -> None:
        """Makes a step."""

    @abstractmethod
    def flops(self) -> int:
        """FLOPs of the matrix products, forward and backward."""

    def seconds(self) -> float:
        """Makes a step and returns its time."""
        with use_threads(self.threads):
            start = time.perf_counter()
            self.run()
            self.measured.append(time.perf_counter() - start)
        return self.measured[-1]

    def mfu(self) -> float:
        """FLOPs per second, as a share of those of a large matrix product."""
        return self.flops() / statistics.median(self.measured) / peak(self.threads)


class ModelStep(Step):
    """A step of a model with AdamW."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], tokens: int) -> None:
        super().__init__(tokens, torch.get_num_threads())
        self.loss = loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def run(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        with autocast(CPU, "bf16"):
            loss = self.loss()
        loss.backward()

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.backward()
        return int(counter.get_total_flops())


class DemoStep(Step):
    """An update of the demo's model."""

    def __init__(self, trainer: Trainer, loaded: LoadedBatch, threads: int) -> None:
        self.trainer, self.loaded = trainer, loaded
        self.cost = trainer.log.step_costs[loaded.visit.task, loaded.visit.view]
        super().__init__(self.cost.tokens, threads)

    def run(self) -> None:
        self.trainer.make_step(self.loaded)

    def flops(self) -> int:
        return self.cost.model_flops


def demo_steps(smoke: bool, folder: Path) -> tuple[DemoStep, DemoStep]:
    """The demo's most frequent step on one thread and on two."""
    small = ["sources.stills.limit=64", "tasks.stills.batch_size=8", "sources.stills.cache=none"]
    others = [f"tasks.{name}.weight=0" for name in ("icons", "clips", "notes")]
    changes = [*others, "train.num_workers=0", "train.precision=bf16"]
    with console.capture():
        trainer = Trainer(set_up(Recipe.load("demo", [*changes, *(small if smoke else [])]), folder))
    step = next(i for i, visit in enumerate(trainer.batches.schedule) if visit.view == 1)
    loaded = trainer.batches[step]
    return DemoStep(trainer, loaded, 1), DemoStep(trainer, loaded, 2)


@dataclass
class Comparison:
    """The speedup of one step over another.

    Attributes:
        required: the smallest acceptable median speedup, or None for no requirement.
        ratios: seconds of the baseline / seconds of the variant, one per pair of steps.
    """

    name: str
    variant: Step
    against: str
    baseline: Step
    required: float | None = None
    ratios: list[float] = field(default_factory=list)

    def measure(self, swap: bool) -> None:
        """Measures one pair of steps."""
        first, second = (self.variant, self.baseline) if swap else (self.baseline, self.variant)
        ratio = first.seconds() / second.seconds()
        self.ratios.append(1 / ratio if swap else ratio)

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        return self.required is None or self.median >= self.required

    def row(self) -> list[str]:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        required = "" if self.required is None else f"{self.required:g}: {'reached' if self.reached else 'MISSED'}"
        size = [f"{self.variant.flops() / 1e9:.1f}", f"{self.variant.tokens}"]
        mfu = [f"{self.variant.mfu():.0%}", f"{self.baseline.mfu():.0%}"]
        return [self.name, self.against, *size, *mfu, f"{self.median:.2f}", f"{low:.2f}-{high:.2f}", required]


COLUMNS = [
    "variant", "baseline", "GFLOPs per step", "tokens per step", "MFU", "MFU of the baseline", "speedup",
    "interquartile range", "required speedup",
]  # fmt: skip


def images(batch: int) -> tuple[np.ndarray, Tensor]:
    """Random pixels (B, H, W, 3) and classes (B,), equal for all models."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    return pixels, torch.from_numpy(rng.integers(0, CLASSES, batch))


def openimp_step(batch: int, name: str, drop: float = 0.0, **changes: Any) -> Step:
    """The model of a bundled recipe with some values changed, on a batch as openimp's loader returns it."""
    model = {**Recipe.load(name).model.model_dump(), **changes}
    task = {
        "source": "pictures",
        "inputs": {"image": "file"},
        "objectives": [{"type": "classification", "label": "label"}],
        "views": [{"image": {"size": SIZE, "drop_tokens": drop}}],
    }
    sources = {"pictures": {"path": "."}}
    recipe = Recipe.build({"name": name, "model": model, "sources": sources, "tasks": {"all": task}})
    modalities = recipe.make_modalities()
    torch.manual_seed(0)
    imp = IMP(recipe.to_config({head_key("pictures", "label"): [*range(CLASSES)]}), modalities).train()
    pixels, label = images(batch)
    rngs = [np.random.default_rng(i) for i in range(batch)]
    tokens = modalities["image"].tokens(pixels, recipe.tasks["all"].views[0]["image"], rngs)
    data = Batch({"image": tokens}, [{"label": label}])
    count = tokens.coords.shape[0] * tokens.coords.shape[1]
    return ModelStep(imp, lambda: task_losses(imp, recipe.tasks["all"], data).total, count)


def timm_step(batch: int, fused: bool, **changes: Any) -> Step:
    """timm's ViT with the size of IMP-S on normalized images. GELU, biases and all else are timm's defaults."""
    size = Recipe.load("imp_s").model.model_copy(update=changes)
    timm.layers.set_fused_attn(fused)
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, num_classes=CLASSES, class_token=False, global_pool="avg",
        embed_dim=size.width, depth=size.layers, num_heads=size.heads, mlp_ratio=size.mlp_dim / size.width,
    ).train()  # fmt: skip
    pixels, label = images(batch)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    return ModelStep(vit, lambda: F.cross_entropy(vit(x).float(), label), batch * (SIZE // PATCH) ** 2)


def comparisons(smoke: bool, folder: Path) -> list[Comparison]:
    """The rows of the table. `folder` is an empty one."""
    batch, fewer = (2, {"layers": 2}) if smoke else (64, {})
    moe = {**Recipe.load("imp_moe_s").model.model_dump()["moe"], **({"layers": 1} if smoke else {})}
    by_stem = {**moe, "experts": {"vision": moe["experts"]}}

    def dense(drop: float = 0.0) -> Step:
        return openimp_step(batch, "imp_s", drop, **fewer)

    def sparse(**changes: Any) -> Step:
        return openimp_step(batch, "imp_moe_s", **{"moe": moe, **fewer, **changes})

    base = dense()
    one_thread, two_threads = demo_steps(smoke, folder)
    return [
        Comparison("IMP-S", base, "timm ViT, fused attention", timm_step(batch, fused=True, **fewer), 0.9),
        Comparison("IMP-S", base, "timm ViT, plain attention", timm_step(batch, fused=False, **fewer), 0.9),
        Comparison("IMP-MoE-S", sparse(), "IMP-S", base, 0.8),
        Comparison("IMP-MoE-S without QK-norm", sparse(qk_norm=False), "IMP-S", base),
        Comparison("IMP-MoE-S, experts by stem", sparse(moe=by_stem), "IMP-S", base),
        Comparison("IMP-S, 75% of tokens dropped", dense(0.75), "IMP-S", base, 3.0),
        Comparison("demo, two threads", two_threads, "demo, one thread", one_thread),
    ]


def report(found: list[Comparison]) -> str:
    """The results page."""
    head = results_page.head("Throughput of a training step", "torch", "timm")
    return f"""{head}- Pairs per row: {len(found[0].ratios)}; bf16 autocast; seed 0
- Threads used: {torch.get_num_threads()}
- FLOPs are those of forward and backward passes. MFU (model FLOPs utilization) is FLOPs per second as a share of those
  of a large matrix product

{results_page.table(COLUMNS, *(item.row() for item in found))}"""


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps per row")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps, to check that the benchmark runs")
    args = results_page.parse(parser)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # As in training.
    pairs = 2 if args.smoke else max(2, args.pairs)
    with TemporaryDirectory() as folder:
        found = comparisons(args.smoke, Path(folder))
    if args.smoke:
        found = [replace(item, required=None) for item in found]
    for step in {id(step): step for item in found for step in (item.variant, item.baseline)}.values():
        with use_threads(step.threads):
            step.run()
            step.run()
    for i in track(range(pairs), "pairs", console=Console(stderr=True)):
        for item in found:
            item.measure(swap=i % 2 == 1)
    results_page.publish(report(found), "throughput", args.write)
    return 0 if all(item.reached for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
