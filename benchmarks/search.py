"""Measures search: how fast files are indexed, and how fast an index is searched.

    pip install -e '.[search]'
    python -m benchmarks.search            # about half an hour on two cores; exit code 1 if a bar is missed
    python -m benchmarks.search --smoke    # checks that the benchmark runs; the bars are ignored

- Indexing: `openimp index` and `openimp embed` take turns on equal numbers of pictures of 256 x 256 pixels, with the
  model of recipes/demo.yaml and random weights. The result is the ratio of their rates, as a median over pairs.
- Indexing again: all pictures into one index, and then once more although nothing has changed. Loading the model counts
  in both; starting Python does not.
- A query over many vectors of 256 features takes turns with numpy's fp32 product of the same vectors and the query. The
  vectors are a random smooth function of 24 normal variables plus noise, because vectors without structure cannot be
  grouped, and those of a trained model can. The queries are new vectors of the same kind. The results are the ratio of
  the times, as a median over pairs, and recall@10 compared with that product.
- Pages: 16 clients ask `openimp serve` for the page of a text, each for another one, and take turns with bare calls of
  `Index.search` with these texts, one after the other. The result is the ratio of pages and calls per second.
"""

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import numpy as np
import PIL.Image
import torch

from benchmarks import results_page
from benchmarks.results_page import Row
from openimp.common.progress import console
from openimp.inference.embed import embed
from openimp.recipe.schema import Recipe
from openimp.search import build_index, open_index
from openimp.search.table import Items, schema
from tests.made_models import write_untrained
from tests.served import serving

SIZE, LATENT = 256, 24


def write_model(folder: Path) -> Path:
    """The model of the demo's recipe with random weights."""
    return write_untrained(Recipe.load("demo"), [["a word"]] * 4, folder)


def write_pictures(folder: Path, number: int) -> list[Path]:
    """Pictures of random gradients, so that no two are equal."""
    folder.mkdir()
    files, rng = [], np.random.default_rng(0)
    for i in range(number):
        small = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        files.append(folder / f"{i}.jpg")
        small.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def seconds(function: Callable[[], object]) -> float:
    """How long a function takes; what it prints is dropped."""
    start, console.quiet = time.perf_counter(), True
    try:
        function()
    finally:
        console.quiet = False
    return time.perf_counter() - start


def quartiles(ratios: list[float]) -> str:
    """The median and, in brackets, the interquartile range."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def measure_rates(model: Path, files: list[Path], pairs: int, folder: Path) -> Row:
    """Indexing compared with embedding."""
    size, ratios, rates = len(files) // pairs, [], []
    for i in range(pairs):
        some = files[i * size : (i + 1) * size]
        runs = {
            "index": lambda some=some, i=i: build_index(model, some, folder / f"{i}.index"),
            "embed": lambda some=some, i=i: embed(model, some, folder / f"{i}.parquet"),
        }
        times = {name: seconds(runs[name]) for name in (sorted(runs) if i % 2 else sorted(runs, reverse=True))}
        ratios.append(times["embed"] / times["index"])
        rates.append(size / times["index"])
    what = f"indexing / embedding, {pairs} pairs of {size:,} pictures ({statistics.median(rates):.0f} pictures/s)"
    return Row(what, quartiles(ratios), "at least 0.9", statistics.median(ratios) >= 0.9)


def measure_again(model: Path, pictures: Path, number: int, folder: Path) -> Row:
    """Indexing again although nothing has changed."""
    first, again = (seconds(lambda: build_index(model, [pictures], folder / "all.index")) for _ in range(2))
    what = f"indexing {number:,} unchanged files again / for the first time ({again:.1f} s / {first:.1f} s)"
    return Row(what, f"{again / first:.1%}", "less than 5 %", again / first < 0.05)


def measure_pages(index: Path, clients: int, turns: int) -> Row:
    """The search page compared with bare searches."""
    texts = [f"word {i}" for i in range(4 * clients)]
    opened = open_index(index)
    ratios, pages, calls = [], [], []
    with serving(index) as server, ThreadPoolExecutor(clients) as pool:

        def ask(text: str) -> None:
            answer = server.ask(f"/?q={quote(text)}")
            assert answer.status == 200, answer.text

        def ask_all() -> None:
            list(pool.map(ask, texts))

        def search_all() -> None:
            for text in texts:
                opened.search(text)

        ask_all()
        search_all()
        for _ in range(turns):
            pages.append(len(texts) / seconds(ask_all))
            calls.append(len(texts) / seconds(search_all))
            ratios.append(pages[-1] / calls[-1])
    what = (f"pages per second for {clients} clients / bare searches per second "
            f"({statistics.median(pages):.0f} / {statistics.median(calls):.0f})")  # fmt: skip
    return Row(what, quartiles(ratios), "at least 0.5", statistics.median(ratios) >= 0.5)


def measure_queries(number: int, queries: int, folder: Path) -> list[Row]:
    """Queries compared with numpy's product."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((LATENT, SIZE), (SIZE, SIZE))]

    def draw(count: int) -> np.ndarray:
        latent = rng.normal(size=(count, LATENT)).astype(np.float32)
        made = np.tanh(latent @ weights[0] / 4) @ weights[1] / 8 + 0.1 * rng.normal(size=(count, SIZE))
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)

    folder.mkdir()
    items = Items(folder, SIZE)
    empty = {field.name: None for field in schema(SIZE)}
    matrix = np.concatenate([draw(min(10_000, number - start)) for start in range(0, number, 10_000)])
    for start in range(0, number, 10_000):
        rows = enumerate(matrix[start : start + 10_000], start)
        items.replace([], [{**empty, "id": str(i), "path": str(i), "modality": "image", "vector": v} for i, v in rows])
    matrix = matrix.astype(np.float16).astype(np.float32)  # As they are stored.
    made = seconds(items.compact)
    ratios, ours, theirs, recalls = [], [], [], []
    for query in draw(queries + 5):
        start = time.perf_counter()
        hits = items.nearest(query, 10)
        middle = time.perf_counter()
        scores = matrix @ query
        end = time.perf_counter()
        ours.append(1e3 * (middle - start))
        theirs.append(1e3 * (end - middle))
        ratios.append(ours[-1] / theirs[-1])
        nearest = {str(i) for i in np.argpartition(-scores, 10)[:10]}
        recalls.append(len(nearest & {hit["id"] for hit in hits}) / 10)
    ratios, recall = ratios[5:], statistics.mean(recalls)  # The first queries fill the caches.
    how = "approximate" if items.approximate else "exact"
    times = f"{statistics.median(ours):.1f} ms / {statistics.median(theirs):.1f} ms; {how}, built in {made:.0f} s"
    what = f"a query over {number:,} vectors / numpy's fp32 product ({times})"
    return [
        Row(what, quartiles(ratios), "at most 1", statistics.median(ratios) <= 1),
        Row("recall@10 of these queries", f"{recall:.3f}", "at least 0.98", recall >= 0.98),
    ]


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="little data, to check that the benchmark runs")
    args = results_page.parse(parser)
    files, vectors, turns, queries = (40, 2000, 2, 5) if args.smoke else (10_000, 1_000_000, 10, 200)
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        pictures = folder / "pictures"
        paths = write_pictures(pictures, files)
        rows = [
            measure_rates(model, paths, turns, folder),
            measure_again(model, pictures, files, folder),
            measure_pages(folder / "all.index", 16, turns),
            *measure_queries(vectors, queries, folder / "vectors.index"),
        ]
    table = results_page.table(
        ["what", "measured; median (interquartile range)", "bar"], *(row.cells() for row in rows)
    )
    head = results_page.head("Search: speed of indexing and queries", "torch", "lancedb")
    threads = f"- Threads used by torch: {torch.get_num_threads()}\n\n"
    results_page.publish(head + threads + table, "search", args.write)
    return 0 if args.smoke or all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
