"""Measures the search page under load: many clients at once, idle ones, slow ones, and ones that send what takes long.

    python -m benchmarks.load [--write]

It starts `openimp serve` on an index of small files and of six rows with pictures of 30 MB, with an untrained model.
First, 1 and 16 clients ask for pages. Then one more client asks for pages while others hold up the server
(tests/slow_clients.py): one kind after the other and all at once, each with a new server. The times of a page, alone
and under load, are medians of 40. Temporary files are measured meanwhile; those of uploads have no name and are not
seen.

`--write` writes docs/results/load.md.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from urllib.parse import quote

from benchmarks import results_page
from benchmarks.trainings import most_memory
from openimp.search import open_index
from tests import little, slow_clients
from tests.served import Server, serving

LIBRARIES = ("starlette", "uvicorn", "lancedb", "pillow", "av", "soundfile", "torch")


@contextmanager
def peak_of(measure: Callable[[], int]) -> Iterator[list[int]]:
    """Measures again and again; the list has the largest value."""
    peak, done = [0], Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], measure())

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def temporary_bytes(folders: set[Path]) -> int:
    """Bytes of the files in temporary folders of servers."""
    sizes = 0
    for file in (file for folder in folders for file in folder.iterdir()):
        with suppress(FileNotFoundError):
            sizes += file.stat().st_size
    return sizes


def temporary_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("openimp-serve-*"))


def measure_load(index: Path) -> Iterator[list[str]]:
    """Yields the rows of the table of clients that hold up the server."""
    media = [hit.id for hit in open_index(index, allow_sources=True).search("large", under="large")]
    for kind, clients in slow_clients.KINDS.items():
        others = temporary_folders()
        with serving(index, "--allow-sources") as server:
            quiet = slow_clients.seconds_per_query(server)
            folders = temporary_folders() - others
            with peak_of(lambda: temporary_bytes(folders)) as peak, clients(server, media):  # noqa: B023
                loaded = slow_clients.seconds_per_query(server)
            memory = most_memory(server.process)
            server.process.kill()  # It need not end what it decodes.
        times = [f"{1e3 * quiet:.0f} ms", f"{1e3 * loaded:.0f} ms", f"{loaded / quiet:.1f}"]
        yield [kind, *times, f"{memory / 1e6:.0f} MB", f"{peak[0] / 1e6:.0f} MB"]


def pages_per_second(server: Server, clients: int) -> float:
    """How many pages several clients get."""
    texts = [f"a {name} {noun}" for name in little.PICTURES for noun in ("square", "tone", "circle", "line")] * 4
    with ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        answers = list(pool.map(lambda text: server.ask(f"/?q={quote(text)}"), texts))
    assert all(answer.status == 200 for answer in answers)
    return len(texts) / (time.perf_counter() - begin)


def main() -> None:
    args = results_page.parse(results_page.make_parser(__doc__))
    with tempfile.TemporaryDirectory() as folder:
        index = slow_clients.write_index(Path(folder))
        with serving(index) as server:
            rates = {clients: pages_per_second(server, clients) for clients in (1, 16)}
        rows = list(measure_load(index))
    head = results_page.head("The search page under load", *LIBRARIES)
    sentence = ", and ".join(f"{rate:.0f} pages per second with {clients} at once" for clients, rate in rates.items())
    header = ["clients", "page alone", "under load", "ratio", "peak memory", "temporary files"]
    table = results_page.table(header, *rows)
    results_page.publish(f"{head}\nThe server answers {sentence}.\n\n{table}", "load", args.write)


if __name__ == "__main__":
    main()
