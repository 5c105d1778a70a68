"""How fast a training step is: openimp against timm's ViT, sparse against dense, few tokens against all.

    pip install -e '.[bench]'
    python benchmarks/throughput.py            # about ten minutes on one core; exit code 1 if a bar is missed
    python benchmarks/throughput.py --smoke    # does it run at all; no bars

A step is forward, backward and fused AdamW under bf16 autocast on the CPU: 64 pictures of 128 x 128 pixels, 64 tokens
each, already in memory, with one linear head over 1000 classes. The two sides of a ratio take their steps in turn in
one process, and the order alternates, so that whatever else the machine does hits both; the median over all pairs
counts. Both timm models are held to the bar: on CPUs its fused attention, the default, is the slower one for 64 tokens.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
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

from openimp.common.device import autocast
from openimp.common.versions import openimp_version, processor
from openimp.data.batch import Batch, head_key
from openimp.model.imp import IMP
from openimp.objectives import task_losses
from openimp.recipe.schema import Recipe

SIZE, PATCH, CLASSES = 128, 16, 1000
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "throughput.md"
CPU = torch.device("cpu")


class Step:
    """A model, its optimiser and one batch; called, it takes one training step."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], tokens: int) -> None:
        self.loss, self.tokens = loss, tokens
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> None:
        with autocast(CPU, "bf16"):
            loss = self.loss()
        loss.backward()

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def flops(self) -> int:
        """Of the matrix products, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.backward()
        return int(counter.get_total_flops())


@dataclass
class Comparison:
    """Two steps, and how many times as fast the first one should be as the second.

    Attributes:
        bar: the least median ratio; None: only for information.
        ratios: seconds of the baseline / seconds of the variant, a pair each.
    """

    name: str
    variant: Step
    against: str
    baseline: Step
    bar: float | None = None
    ratios: list[float] = field(default_factory=list)

    def measure(self, swap: bool) -> None:
        """Adds one pair."""
        first, second = (self.variant, self.baseline) if swap else (self.baseline, self.variant)
        ratio = first.seconds() / second.seconds()
        self.ratios.append(1 / ratio if swap else ratio)

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        return self.bar is None or self.median >= self.bar

    def row(self) -> list[str]:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        bar = "" if self.bar is None else f"{self.bar:g}: {'reached' if self.reached else 'MISSED'}"
        size = [f"{self.variant.flops() / 1e9:.1f}", f"{self.variant.tokens}"]
        return [self.name, self.against, *size, f"{self.median:.2f}", f"{low:.2f}-{high:.2f}", bar]


COLUMNS = ["variant", "against", "GFLOPs a step", "tokens a step", "times as fast", "middle half of the pairs", "bar"]


def pictures(batch: int) -> tuple[np.ndarray, Tensor]:
    """Random pixels (B, H, W, 3) and classes (B,), the same for all models."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    return pixels, torch.from_numpy(rng.integers(0, CLASSES, batch))


def openimp_step(batch: int, name: str, drop: float = 0.0, compiled: bool = False, **changes: Any) -> Step:
    """The model of a bundled recipe, with some of its values changed, on what openimp's loader would hand it."""
    model = {**Recipe.load(name).model.model_dump(), **changes}
    task = {
        "source": "pictures",
        "inputs": {"image": "file"},
        "objectives": [{"type": "classification", "label": "label"}],
        "views": [{"image": {"size": SIZE, "drop": drop}}],
    }
    sources = {"pictures": {"path": "."}}
    recipe = Recipe.build({"name": name, "model": model, "sources": sources, "tasks": {"all": task}})
    modalities = recipe.make_modalities()
    torch.manual_seed(0)
    imp = IMP.from_recipe(recipe, modalities, {head_key("pictures", "label"): CLASSES}).train()
    pixels, label = pictures(batch)
    rngs = [np.random.default_rng(i) for i in range(batch)]
    tokens = modalities["image"].tokens(pixels, recipe.tasks["all"].views[0]["image"], rngs)
    data = Batch({"image": tokens}, {"": torch.arange(batch)}, {"label": label}, list(range(batch)))
    encode = torch.compile(imp.encode, dynamic=False) if compiled else None
    count = tokens.coords.shape[0] * tokens.coords.shape[1]
    return Step(imp, lambda: task_losses(imp, recipe.tasks["all"], data, encode).total, count)


def timm_step(batch: int, fused: bool, **changes: Any) -> Step:
    """timm's ViT of the size of IMP-S, on normalised pictures; all else (GELU, biases) as timm has it."""
    size = Recipe.load("imp_s").model.model_copy(update=changes)
    timm.layers.set_fused_attn(fused)
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, num_classes=CLASSES, class_token=False, global_pool="avg",
        embed_dim=size.width, depth=size.layers, num_heads=size.heads, mlp_ratio=size.mlp / size.width,
    ).train()  # fmt: skip
    pixels, label = pictures(batch)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    return Step(vit, lambda: F.cross_entropy(vit(x).float(), label), batch * (SIZE // PATCH) ** 2)


def comparisons(smoke: bool, compiled: bool) -> list[Comparison]:
    """What the table shows, in its order."""
    batch, fewer = (2, {"layers": 2}) if smoke else (64, {})
    experts = {**Recipe.load("imp_moe_s").model.model_dump()["moe"], **({"layers": 1} if smoke else {})}

    def dense(drop: float = 0.0, compiled: bool = False) -> Step:
        return openimp_step(batch, "imp_s", drop, compiled, **fewer)

    def sparse(routing: str, compiled: bool = False, **changes: Any) -> Step:
        moe = {**experts, "routing": routing}
        return openimp_step(batch, "imp_moe_s", compiled=compiled, moe=moe, **fewer, **changes)

    base = dense()
    found = [
        Comparison("IMP-S", base, "timm ViT, fused attention", timm_step(batch, fused=True, **fewer), 0.9),
        Comparison("IMP-S", base, "timm ViT, plain attention", timm_step(batch, fused=False, **fewer), 0.9),
        Comparison("IMP-MoE-S, expert choice", sparse("expert_choice"), "IMP-S", base, 0.8),
        Comparison("the same without QK-norm", sparse("expert_choice", qk_norm=False), "IMP-S", base),
        Comparison("IMP-MoE-S, expert choice across the batch", sparse("expert_choice_batch"), "IMP-S", base),
        Comparison("IMP-MoE-S, token choice", sparse("token_choice"), "IMP-S", base),
        Comparison("IMP-S, 75% of tokens dropped", dense(0.75), "IMP-S", base, 3.0),
    ]
    if compiled:
        both = dense(compiled=True), sparse("expert_choice", compiled=True)
        found += [
            Comparison(f"{name}, compiled", step, "IMP-S", base) for name, step in zip(("IMP-S", "IMP-MoE-S"), both)
        ]
    return found


def report(found: list[Comparison]) -> str:
    """The results page."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(item.row() for item in found)]
    return f"""# Throughput of a training step

Written by `benchmarks/throughput.py`, whose head says what is measured and how.

- Command: `{shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]])}`
- openimp: {openimp_version()}
- Versions: Python {platform.python_version()}, torch {torch.__version__}, timm {version("timm")}
- Hardware: {processor()}, {os.cpu_count()} cores; threads used: {torch.get_num_threads()}
- Pairs a row: {len(found[0].ratios)}; bf16 autocast; seed 0

{chr(10).join("| " + " | ".join(cells) + " |" for cells in rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="pairs of steps for each row")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch computes with")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which takes minutes")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps; no bars")
    parser.add_argument("--write", action="store_true", help="also write docs/results/throughput.md")
    args = parser.parse_args()
    # Asked for here, and kept from now on: the checkout may move on meanwhile.
    if args.write and "-dirty" in openimp_version():
        parser.error("--write: the checkout was changed since its commit, which the page names; commit first")
    torch.set_num_threads(args.threads)
    pairs = 2 if args.smoke else max(2, args.pairs)
    found = [replace(item, bar=None if args.smoke else item.bar) for item in comparisons(args.smoke, args.compile)]
    for step in {id(step): step for item in found for step in (item.variant, item.baseline)}.values():
        step()
        step()
    for i in track(range(pairs), "pairs", console=Console(stderr=True)):
        for item in found:
            item.measure(swap=i % 2 == 1)
    text = report(found)
    print(text)
    if args.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if all(item.reached for item in found) else 1


if __name__ == "__main__":
    sys.exit(main())
