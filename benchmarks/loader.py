"""Measures the CPU time per batch in the data loader, by task and view of a recipe, and its parts.

    python benchmarks/loader.py recipes/demo.yaml [--set sources.stills.cache=none] [--batches 20]
    python benchmarks/loader.py --webdataset [--repeats 9]

One thread of this process makes the batches one after the other, as a worker does. Waiting for the disk does not
count. `decode`, `augment` and `tokens` are the shares of media. `text` is the share of texts and their templates.
`rest` is the share of reading rows, random draws and stacking. A training waits for data if the time per batch divided
by `train.num_workers` exceeds the time per step.

With `--webdataset` it compares streams with the library webdataset (`pip install webdataset`) on the same tars, in one
process, each with its shuffling and without decoding. They take turns, and the ratio is that of two neighboring turns.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from openimp.data import examples
from openimp.data.sources import open_source
from openimp.data.step_batches import StepBatches
from openimp.data.streams import Stream
from openimp.data.task_data import TaskData
from openimp.encoding.tower import make_teachers
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source

SHARDS, EXAMPLES, PICTURE, BATCH = 64, 100, 20_000, 256
"""Of the comparison with webdataset: tars, examples in each, bytes of a picture on average, and examples of a batch."""
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


def write_tars(folder: Path) -> list[str]:
    """`SHARDS` tars of examples like those of image-text data: a picture, a caption and a JSON object."""
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for i in range(EXAMPLES):
                about = {"width": 256, "height": 256, "url": f"https://example.org/{shard}/{i}.jpg"}
                size = int(rng.integers(PICTURE // 2, 3 * PICTURE // 2))
                members = {
                    "jpg": rng.bytes(size),
                    "txt": b"a caption of some words",
                    "json": json.dumps(about).encode(),
                }
                for ending, content in members.items():
                    member = tarfile.TarInfo(f"{shard:03}{i:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return sorted(map(str, folder.glob("*.tar")))


def stream_rows(files: list[str], turn: int) -> Iterator[Any]:
    """An epoch of openimp's stream, in batches as a worker reads it."""
    stream = open_source("tars", Source(path=f"{Path(files[0]).parent}/*.tar", stream=True), seed=turn)
    assert isinstance(stream, Stream)
    for start in range(0, SHARDS * EXAMPLES, BATCH):
        yield from stream.read(start, range(start, start + BATCH))


def webdataset_rows(files: list[str], turn: int) -> Iterator[Any]:
    """An epoch of webdataset with a shuffle buffer as large as the stream's windows."""
    import webdataset

    data = webdataset.WebDataset(files, shardshuffle=SHARDS, seed=turn, empty_check=False)
    yield from data.shuffle(Source.model_fields["window"].default)


def compare(repeats: int) -> Table:
    """Examples per second of both, and the ratio of neighboring turns: the median, and the quartiles."""
    rates: dict[str, list[float]] = {"openimp": [], "webdataset": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_tars(Path(folder))
        for turn in range(repeats + 1):
            for name, rows in {"openimp": stream_rows, "webdataset": webdataset_rows}.items():
                start = time.perf_counter()
                count = sum(1 for _ in rows(files, turn))
                assert count == SHARDS * EXAMPLES, (name, count)
                rates[name].append(count / (time.perf_counter() - start))
    table = Table("", "median", "quartiles", title=f"examples/s of {SHARDS} tars, {repeats} turns after a warm-up")
    ratios = [ours / theirs for ours, theirs in zip(*rates.values())]
    for name, values in {**rates, "ratio": ratios}.items():
        low, median, high = np.quantile(values[1:], [0.25, 0.5, 0.75])
        shown = "{:.2f}" if name == "ratio" else "{:,.0f}"
        table.add_row(name, shown.format(median), f"{shown.format(low)} to {shown.format(high)}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="a file, or the name of a bundled recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe")
    parser.add_argument("--batches", type=int, default=20, help="batches per task and view")
    parser.add_argument("--webdataset", action="store_true", help="compare streams with webdataset")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each, with --webdataset")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.webdataset:
        Console().print(compare(args.repeats))
        return
    if args.recipe is None:
        parser.error("name a recipe, or give --webdataset")
    parts = [*PARTS.values(), "text"]
    table = Table("task", "view", "ms per batch", *parts, "rest")
    for (task, view), spent in measure(Recipe.load(args.recipe, args.set, Path.cwd()), args.batches).items():
        shares = [spent[part] / max(1, spent["all"]) for part in parts]
        shown = [f"{share:.0%}" for share in [*shares, 1 - sum(shares)]]
        table.add_row(task, str(view), f"{spent['all'] / 1e6:.1f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
