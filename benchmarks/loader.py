"""Measures the CPU time per batch in the data loader, by task and view of a recipe, and its parts.

    python -m benchmarks.loader recipes/demo.yaml [--set sources.stills.cache=none] [--batches 20]

One thread of this process makes the batches one after the other, as a worker does. Waiting for the disk does not
count. `decode`, `augment` and `tokens` are the shares of media. `text` is the share of texts and their templates.
`rest` is the share of reading rows, random draws and stacking. A training waits for data if the time per batch divided
by `train.num_workers` exceeds the time per step.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from openimp.data import examples
from openimp.data.step_batches import StepBatches
from openimp.data.task_data import TaskData
from openimp.encoding.tower import make_teachers
from openimp.recipe.schema import Recipe

PARTS = {"decode": "decode", "transform": "augment", "tokens": "tokens"}


def timed(function: Callable[..., Any], part: str, spent: Counter[str]) -> Callable[..., Any]:
    """Wraps a function so that each call adds its nanoseconds to `spent[part]`."""

    def call(*args: Any, **options: Any) -> Any:
        start = time.thread_time_ns()
        try:
            return function(*args, **options)
        finally:
            spent[part] += time.thread_time_ns() - start

    return call


def measure(recipe: Recipe, count: int) -> dict[tuple[str, int], Counter[str]]:
    """The mean nanoseconds per batch of each (task, view), in total ("all") and by part, after one warm-up batch."""
    batches = StepBatches(TaskData(recipe, recipe.make_modalities()))
    batches.data.fit()
    batches.data.prepare(None, make_teachers(recipe))
    spent: Counter[str] = Counter()
    for modality in batches.data.modalities.values():
        for method, part in PARTS.items():
            part = "text" if modality.reads_text else part
            setattr(modality, method, timed(getattr(modality, method), part, spent))
    examples.fill = timed(examples.fill, "text", spent)
    steps: dict[tuple[str, int], list[int]] = {}
    for step in range(len(batches)):
        steps.setdefault((batches.schedule[step].task, batches.schedule[step].view), []).append(step)
    found = {}
    for key, (first, *others) in sorted(steps.items()):
        batches[first]
        spent.clear()
        for step in others[:count]:
            timed(batches.__getitem__, "all", spent)(step)
        found[key] = Counter({part: ns // max(1, len(others[:count])) for part, ns in spent.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file, or the name of a bundled recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--batches", type=int, default=20, help="batches per task and view")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = [*PARTS.values(), "text"]
    table = Table("task", "view", "ms per batch", *parts, "rest")
    for (task, view), spent in measure(Recipe.load(args.recipe, args.set, Path.cwd()), args.batches).items():
        shares = [spent[part] / max(1, spent["all"]) for part in parts]
        shown = [f"{share:.0%}" for share in [*shares, 1 - sum(shares)]]
        table.add_row(task, str(view), f"{spent['all'] / 1e6:.1f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
