"""Measures openimp on data of ordinary size, beside what its users would otherwise use.

    pip install -e '.[search]' webdataset
    python benchmarks/size.py            # about half an hour on two cores; exit code 1 if a bar is missed
    python benchmarks/size.py --smoke    # checks that the benchmark runs; the bars are ignored

The data is made in a temporary folder: 1,000,000 rows of captions and classes as Parquet (one row group, and a
hundred), JSON Lines and CSV; 100,000 pictures of 32 x 32 pixels in 100 folders; 100 tars of 1,000 examples.

openimp and the other library take turns in one process, after both are imported, and every second time the other
library is first. A ratio is that of two neighboring turns, and its row shows the median and, in brackets, the smallest
and the largest.

- Opening, first: until the number of rows is known, with empty caches. Again: with the caches of the turn before.
- `where`: the numbers of the rows with one of ten classes; for pyarrow, `equal` and `indices_nonzero`.
- Memory: growth of the private memory of a new process that opens the data again and reads each text once.
- Reading: batches of 256 rows in random order. With pictures, Pillow decodes them in both libraries.
- Training: `openimp train` on the Parquet file for one step, with a tiny model. Beside it: from the start of Python to
  the first shuffled batch of `datasets` in a DataLoader of torch.
- `openimp init` on the folder, beside opening it with `datasets`.
- Indexing: as benchmarks/search.py measures it.
"""

import argparse
import csv
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import webdataset
from search import Row, measure_again, measure_rates, write_model, write_pictures

from openimp.common.versions import openimp_version, processor
from openimp.data.sources import open_source
from openimp.data.streams import Stream
from openimp.data.tables import Table
from openimp.recipe.tasks import Source

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "size.md"
CLASSES = 100
BATCH = 256
RECIPE = """
name: size
model: {{width: 32, layers: 1, heads: 1, mlp_dim: 64, embed_dim: 32}}
sources: {{rows: {{path: {path}}}}}
tasks:
  rows: {{source: rows, inputs: {{text: caption}}, objectives: [{{type: classification, label: label, of: text}}],
         batch_size: 64, views: [{{text: {{length: 16}}}}]}}
train: {{steps: 1}}
"""
PEER_OF_TRAINING = """
import sys, torch, datasets
datasets.disable_progress_bars()
data = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
next(iter(torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)))
"""
MEMORY = """
import sys
from pathlib import Path
import datasets, pyarrow, pyarrow.csv, pyarrow.json
from openimp.data.sources import open_source
from openimp.recipe.tasks import Source
import openimp.data.manifests
datasets.disable_progress_bars()

def private_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))

library, path, cache = sys.argv[1:]
before = private_bytes()
if library == "openimp":
    data = open_source("rows", Source(path=path))
    batches = (data.rows(range(i, min(i + 1000, len(data))), ["caption"]) for i in range(0, len(data), 1000))
else:
    kind = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}[Path(path).suffix]
    data = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=cache)
    batches = (data[i : i + 1000]["caption"] for i in range(0, len(data), 1000))
for batch in batches:
    pass
print(private_bytes() - before)
"""


class Caches:
    """Cache folders for both libraries, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count()
        self.renew()

    def renew(self) -> None:
        """Empty ones, for the next opening."""
        number = next(self._numbers)
        self.datasets = str(self.folder / f"datasets-{number}")
        os.environ["OPENIMP_CACHE"] = str(self.folder / f"openimp-{number}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], turns: int) -> tuple[list[float], list[float]]:
    """What both functions return, `turns` times each. Every second turn, the other library is first."""
    our_figures, their_figures = [], []
    for turn in range(turns):
        if turn % 2:
            their_figures.append(theirs())
        our_figures.append(ours())
        if not turn % 2:
            their_figures.append(theirs())
    return our_figures, their_figures


def ratio_row(
    what: str,
    ours: list[float],
    theirs: list[float],
    peer: str,
    *,
    unit: str = " s",
    most: float | None = None,
    least: float | None = None,
) -> Row:
    """A row about figures of neighboring turns. Their ratio may have a largest or a smallest good value."""
    ratios = [our / their for our, their in zip(ours, theirs)]
    median = statistics.median(ratios)
    precision = ",.0f" if unit == "/s" else ",.3g"
    shown = f"{statistics.median(ours):{precision}}{unit}; {peer} {statistics.median(theirs):{precision}}{unit}"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ", measured once"
    bar = f"at most {most}" if most is not None else f"at least {least}" if least is not None else ""
    reached = (most is None or median <= most) and (least is None or median >= least)
    return Row(f"{what} ({shown})", f"{median:.2f}{spread}", bar, reached)


def write_tables(folder: Path, number: int) -> dict[str, Path]:
    """`number` rows in each format, by a name for the report."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice([*"abcdefghijklmnopqrstuvwxyz"], 6)) for _ in range(5000)])
    captions = [" ".join(words[row]) for row in rng.integers(0, len(words), (number, 12))]
    labels = [f"class {label}" for label in rng.integers(0, CLASSES, number)]
    columns = {"file": [f"{i:07}.jpg" for i in range(number)], "caption": captions, "label": labels}
    table = pa.table(columns)
    files = {
        "Parquet, one row group": folder / "one.parquet",
        "Parquet, 100 row groups": folder / "many.parquet",
        "JSON Lines": folder / "rows.jsonl",
        "CSV": folder / "rows.csv",
    }
    pq.write_table(table, files["Parquet, one row group"], row_group_size=number)
    pq.write_table(table, files["Parquet, 100 row groups"], row_group_size=max(1, number // 100))
    with files["JSON Lines"].open("w") as lines, files["CSV"].open("w", newline="") as cells:
        writer = csv.writer(cells)
        writer.writerow(columns)
        for row in zip(*columns.values()):
            lines.write(json.dumps(dict(zip(columns, row))) + "\n")
            writer.writerow(row)
    return files


def jpeg(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    small = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    small.resize((32, 32), PIL.Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write_folder(folder: Path, number: int) -> Path:
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class {label:02}").mkdir(parents=True)
    for i in range(number):
        (folder / f"class {i % CLASSES:02}" / f"{i}.jpg").write_bytes(jpeg(rng))
    return folder


def write_tars(folder: Path, shards: int, examples: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    picture = jpeg(rng)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for i in range(examples):
                for ending, content in {"jpg": picture, "txt": b"a caption of some words"}.items():
                    member = tarfile.TarInfo(f"{shard:03}{i:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def load_peer(path: Path, cache: str) -> datasets.Dataset:
    if path.is_dir():
        return datasets.load_dataset("imagefolder", data_dir=str(path), split="train", cache_dir=cache)
    kind = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}[path.suffix]
    return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache)


def open_table(path: Path, **options: Any) -> Table:
    table = open_source("rows", Source(path=str(path), **options))
    assert isinstance(table, Table)
    return table


def measure_opening(name: str, path: Path, caches: Caches, turns: int, most: float) -> list[Row]:
    """Opening with empty caches, and again."""
    first: tuple[list[float], list[float]] = ([], [])
    again: tuple[list[float], list[float]] = ([], [])
    libraries = [lambda: len(open_table(path)), lambda: len(load_peer(path, caches.datasets))]
    for turn in range(turns):
        caches.renew()
        for times in (first, again):
            for library in (1, 0) if turn % 2 else (0, 1):
                times[library].append(seconds(libraries[library]))
    return [
        ratio_row(f"{name}: opening, first", *first, "datasets", most=most),
        ratio_row(f"{name}: opening, again", *again, "datasets", most=most),
    ]


def measure_walk(path: Path, turns: int) -> Row:
    """Opening a folder again, beside listing it."""

    def walk(folder: str) -> int:
        entries = [*os.scandir(folder)]
        return sum(walk(entry.path) if entry.is_dir() else 1 for entry in entries)

    times = in_turns(lambda: seconds(lambda: len(open_table(path))), lambda: seconds(lambda: walk(str(path))), turns)
    return ratio_row("folder: opening", *times, "an os.scandir walk")


def measure_where(path: Path, turns: int) -> Row:
    data = pq.read_table(path)
    label = "class 7"

    def ours() -> float:
        table = open_table(path)
        return seconds(lambda: table.keep_where({"label": label}))

    times = in_turns(ours, lambda: seconds(lambda: pc.indices_nonzero(pc.equal(data["label"], label))), turns)
    return ratio_row("where", *times, "pyarrow.compute", most=3)


def measure_memory(name: str, path: Path, caches: Caches, rows: int) -> Row:
    open_table(path)
    load_peer(path, caches.datasets)
    ours, theirs = (
        float(subprocess.check_output([sys.executable, "-c", MEMORY, library, path, caches.datasets])) / rows
        for library in ("openimp", "datasets")
    )
    return ratio_row(f"{name}: memory per row", [ours], [theirs], "datasets", unit=" bytes")


def measure_reading(path: Path, caches: Caches, examples: int, turns: int, decode: bool) -> Row:
    """Rows in random order. Both libraries read the same rows."""
    table = open_table(path)
    peer = load_peer(path, caches.datasets)
    order = np.random.default_rng(0).permutation(len(table))[:examples]
    batches = np.array_split(order, max(1, examples // BATCH))

    def read_ours() -> None:
        for batch in batches:
            for row in table.rows(batch.tolist()):
                if decode:
                    PIL.Image.open(table.media(row["file"])).load()

    def read_theirs() -> None:
        for batch in batches:
            for value in peer[batch]["image" if decode else "caption"]:
                if decode:
                    value.load()

    rates = in_turns(lambda: examples / seconds(read_ours), lambda: examples / seconds(read_theirs), turns)
    what = "folder: reading in random order, decoded" if decode else "Parquet: reading in random order"
    return ratio_row(what, *rates, "datasets", unit="/s", least=0.9)


def measure_tars(folder: Path, examples: int, turns: int) -> Row:
    """A shuffled pass over a stream."""
    files = sorted(map(str, folder.glob("*.tar")))

    def read_ours() -> None:
        rows = open_source("tars", Source(path=f"{folder}/*.tar", stream=True))
        assert isinstance(rows, Stream)
        for start in range(0, examples, BATCH):
            rows.read(start, range(start, min(start + BATCH, examples)))

    def read_theirs() -> None:
        data = webdataset.WebDataset(files, shardshuffle=len(files), seed=0, empty_check=False)
        assert sum(1 for _ in data.shuffle(Source.model_fields["window"].default)) == examples

    rates = in_turns(lambda: examples / seconds(read_ours), lambda: examples / seconds(read_theirs), turns)
    return ratio_row("tars: a shuffled pass over a stream", *rates, "webdataset", unit="/s", least=0.9)


def run(*command: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)


def measure_training(path: Path, folder: Path, caches: Caches, turns: int) -> Row:
    """`openimp train` for one step, with empty caches."""
    recipe = folder / "size.yaml"
    recipe.write_text(RECIPE.format(path=path))
    run_numbers = count()

    def ours() -> float:
        caches.renew()
        return seconds(lambda: run("-m", "openimp", "train", recipe, "--run", folder / f"run-{next(run_numbers)}"))

    def theirs() -> float:
        caches.renew()
        return seconds(lambda: run("-c", PEER_OF_TRAINING, path, caches.datasets))

    times = in_turns(ours, theirs, turns)
    return ratio_row("Parquet: openimp train, one step", *times, "first batch of datasets")


def measure_init(folder: Path, caches: Caches) -> Row:
    caches.renew()
    ours = seconds(lambda: run("-m", "openimp", "init", folder))
    theirs = seconds(lambda: load_peer(folder, caches.datasets))
    return ratio_row("folder: openimp init", [ours], [theirs], "datasets opens it")


class Rows(list[Row]):
    """The rows of the report. Each is printed as soon as it is known, because all take half an hour."""

    def add(self, *rows: Row) -> None:
        for row in rows:
            print(f"{row.what}: {row.figure}", file=sys.stderr, flush=True)
            self.append(row)


def report(rows: list[Row], command: str) -> str:
    """The page of results."""
    libraries = ("torch", "datasets", "pyarrow", "webdataset", "lancedb")
    lines = [
        "# Data of ordinary size: openimp beside other libraries",
        "",
        "Written by `benchmarks/size.py`; its docstring describes the data and the measurements.",
        "",
        f"- Command: `{command}`",
        f"- openimp: {openimp_version()}",
        f"- Versions: Python {sys.version.split()[0]}, {', '.join(f'{name} {version(name)}' for name in libraries)}",
        f"- Hardware: {processor()}, {os.cpu_count()} cores",
        "",
        "| what (openimp; the other library) | ratio; median (smallest to largest) | bar |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        verdict = f"{row.bar}: {'reached' if row.reached else 'NOT reached'}" if row.bar else "none"
        lines.append(f"| {row.what} | {row.figure} | {verdict} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each library")
    parser.add_argument("--smoke", action="store_true", help="little data, to check that the benchmark runs")
    parser.add_argument("--write", action="store_true", help="also write docs/results/size.md")
    args = parser.parse_args()
    # Checked first, because the checkout may change during the measurement. `openimp_version` caches its result.
    if args.write and "-dirty" in openimp_version():
        parser.error("--write: the page names a commit, but the checkout has uncommitted changes; commit them first")
    rows_number, files, tars, pictures = (2000, 200, 2, 40) if args.smoke else (1_000_000, 100_000, 100, 10_000)
    turns = 1 if args.smoke else args.turns
    with TemporaryDirectory() as name, quiet():
        folder = Path(name)
        caches = Caches(folder / "caches")
        caches.folder.mkdir()
        report_rows = Rows()
        tables = write_tables(folder, rows_number)
        for kind, path in tables.items():
            report_rows.add(*measure_opening(kind, path, caches, turns, 1.5))
            report_rows.add(measure_memory(kind, path, caches, rows_number))
        parquet = tables["Parquet, 100 row groups"]
        report_rows.add(measure_where(parquet, turns))
        report_rows.add(measure_reading(parquet, caches, min(rows_number, 100_000), turns, decode=False))
        report_rows.add(measure_training(parquet, folder, caches, turns))
        picture_folder = write_folder(folder / "pictures of classes", files)
        report_rows.add(*measure_opening("folder", picture_folder, caches, max(1, turns // 2), 1.0))
        report_rows.add(measure_init(picture_folder, caches))
        report_rows.add(measure_walk(picture_folder, turns))
        report_rows.add(measure_reading(picture_folder, caches, min(files, 10_000), turns, decode=True))
        report_rows.add(measure_tars(write_tars(folder / "tars", tars, 1000), tars * 1000, max(1, turns // 2)))
        model = write_model(folder / "model")
        paths = write_pictures(folder / "pictures", pictures)
        report_rows.add(measure_rates(model, paths, 2 if args.smoke else 10, folder))
        report_rows.add(measure_again(model, folder / "pictures", pictures, folder))
    text = report(report_rows, shlex.join(["python", "benchmarks/size.py", *sys.argv[1:]]))
    print(text)
    if args.write:
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if args.smoke or all(row.reached for row in report_rows) else 1


if __name__ == "__main__":
    sys.exit(main())
