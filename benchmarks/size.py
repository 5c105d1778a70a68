"""Measures openimp on data of ordinary size, beside what its users would otherwise use.

    pip install -e '.[search]' webdataset
    python -m benchmarks.size            # about half an hour on two cores; exit code 1 if a bar is missed
    python -m benchmarks.size --smoke    # checks that the benchmark runs; the bars are ignored

The data is made in a temporary folder: 1,000,000 rows of captions and classes as Parquet (one row group, and a
hundred), JSON Lines and CSV; 100,000 pictures of 32 x 32 pixels in 100 folders; 100 tars of 1,000 examples.

openimp and the other library take turns in one process, after both are imported, and every second time the other
library is first. A ratio is that of two neighboring turns, and its row shows the median and, in brackets, the smallest
and the largest.

- Opening, first: until the number of rows is known, with empty caches. Again: with the caches of the turn before.
- `where`: the numbers of the rows with one of a hundred classes; for pyarrow, `equal` and `indices_nonzero`.
- Memory: growth of the private memory of a new process that opens the data again and reads each text once.
- Reading: batches of 256 rows in random order. With pictures, Pillow decodes them in both libraries.
- Training: `openimp train` on the Parquet file for one step, with a tiny model. Beside it: from the start of Python to
  the first shuffled batch of `datasets` in a DataLoader of torch.
- `openimp init` on the folder, beside opening it with `datasets`.
- Indexing: as benchmarks/search.py measures it.
"""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import webdataset

from benchmarks import results_page
from benchmarks.results_page import Row
from benchmarks.search import measure_again, measure_rates, write_model, write_pictures
from openimp.data.sources import open_source
from openimp.data.streams import Stream
from openimp.data.tables import Table
from openimp.recipe.tasks import Source

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


def new_cache(folder: Path) -> str:
    """Gives both libraries empty caches in `folder`, and returns that of `datasets`."""
    cache = mkdtemp(dir=folder)
    os.environ["OPENIMP_CACHE"] = f"{cache}/openimp"
    return f"{cache}/datasets"


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


def measure_opening(name: str, path: Path, folder: Path, turns: int, most: float) -> list[Row]:
    """Opening with empty caches, and again."""
    first: tuple[list[float], list[float]] = ([], [])
    again: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns):
        cache = new_cache(folder)
        libraries = [lambda: len(open_table(path)), lambda cache=cache: len(load_peer(path, cache))]
        for times in (first, again):
            for library in (1, 0) if turn % 2 else (0, 1):
                times[library].append(seconds(libraries[library]))
    return [
        ratio_row(f"{name}: opening, first", *first, "datasets", most=most),
        ratio_row(f"{name}: opening, again", *again, "datasets", most=most),
    ]


def measure_where(path: Path, turns: int) -> Row:
    data = pq.read_table(path)
    label = "class 7"

    def ours() -> float:
        table = open_table(path)
        return seconds(lambda: table.keep_where({"label": label}))

    times = in_turns(ours, lambda: seconds(lambda: pc.indices_nonzero(pc.equal(data["label"], label))), turns)
    return ratio_row("where", *times, "pyarrow.compute", most=3)


def measure_memory(name: str, path: Path, folder: Path, rows: int) -> Row:
    cache = new_cache(folder)
    open_table(path)
    load_peer(path, cache)
    ours, theirs = (
        float(subprocess.check_output([sys.executable, "-c", MEMORY, library, path, cache])) / rows
        for library in ("openimp", "datasets")
    )
    return ratio_row(f"{name}: memory per row", [ours], [theirs], "datasets", unit=" bytes")


def measure_reading(path: Path, folder: Path, examples: int, turns: int, decode: bool) -> Row:
    """Rows in random order. Both libraries read the same rows."""
    table = open_table(path)
    peer = load_peer(path, new_cache(folder))
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


def measure_training(path: Path, folder: Path, turns: int) -> Row:
    """`openimp train` for one step, with empty caches."""
    recipe = folder / "size.yaml"
    recipe.write_text(RECIPE.format(path=path))

    def ours() -> float:
        new_cache(folder)
        return seconds(lambda: run("-m", "openimp", "train", recipe, "--run", mkdtemp(dir=folder)))

    def theirs() -> float:
        cache = new_cache(folder)
        return seconds(lambda: run("-c", PEER_OF_TRAINING, path, cache))

    times = in_turns(ours, theirs, turns)
    return ratio_row("Parquet: openimp train, one step", *times, "first batch of datasets")


def measure_init(pictures: Path, folder: Path) -> Row:
    cache = new_cache(folder)
    ours = seconds(lambda: run("-m", "openimp", "init", pictures))
    theirs = seconds(lambda: load_peer(pictures, cache))
    return ratio_row("folder: openimp init", [ours], [theirs], "datasets opens it")


def measure_all(folder: Path, rows: int, files: int, shards: int, indexed: int, turns: int) -> Iterator[Row]:
    """The rows of the report, one after the other, because all take half an hour."""
    tables = write_tables(folder, rows)
    for kind, path in tables.items():
        yield from measure_opening(kind, path, folder, turns, 1.5)
        yield measure_memory(kind, path, folder, rows)
    parquet = tables["Parquet, 100 row groups"]
    yield measure_where(parquet, turns)
    yield measure_reading(parquet, folder, min(rows, 100_000), turns, decode=False)
    yield measure_training(parquet, folder, turns)
    pictures = write_folder(folder / "pictures", files)
    yield from measure_opening("folder", pictures, folder, max(1, turns // 2), 1.0)
    yield measure_init(pictures, folder)
    yield measure_reading(pictures, folder, min(files, 10_000), turns, decode=True)
    yield measure_tars(write_tars(folder / "tars", shards, 1000), shards * 1000, max(1, turns // 2))
    model = write_model(folder / "model")
    indexed_pictures = write_pictures(folder / "indexed pictures", indexed)
    yield measure_rates(model, indexed_pictures, pairs=max(2, indexed // 1000), folder=folder)
    yield measure_again(model, folder / "indexed pictures", indexed, folder)


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=5, help="of each library")
    parser.add_argument("--smoke", action="store_true", help="little data, to check that the benchmark runs")
    args = results_page.parse(parser)
    datasets.disable_progress_bars()
    cells = []
    reached = True
    with TemporaryDirectory() as name:
        folder = Path(name)
        if args.smoke:
            rows = measure_all(folder, rows=2000, files=200, shards=2, indexed=40, turns=1)
        else:
            rows = measure_all(folder, rows=1_000_000, files=100_000, shards=100, indexed=10_000, turns=args.turns)
        for row in rows:
            print(f"{row.what}: {row.figure}", file=sys.stderr, flush=True)
            cells.append(row.cells())
            reached &= row.reached
    columns = ["what (openimp; the other library)", "ratio; median (smallest to largest)", "bar"]
    libraries = ("torch", "datasets", "pyarrow", "webdataset", "lancedb")
    head = results_page.head("Data of ordinary size: openimp beside other libraries", *libraries)
    results_page.publish(f"{head}\n{results_page.table(columns, *cells)}", "size", args.write)
    return 0 if args.smoke or reached else 1


if __name__ == "__main__":
    sys.exit(main())
