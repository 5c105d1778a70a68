"""Attacks a search page with hostile uploads and requests.

    python -m benchmarks.hostile_requests [--uploads 2000] [--requests 200] [--seed 0] [--write]

It starts `openimp serve` on an index of small files, with an untrained model. The uploads are media files of 14 formats
that benchmarks/fuzz.py has changed, under their own extension or another one. The requests have hostile hosts, origins,
ids, paths, ranges, methods and parameters. An upload must be encoded, or refused in a sentence. No request may cause an
error of the server, or return bytes of a file that is not indexed. Afterwards, the page must still answer a search, its
process must have printed no traceback, and its peak memory must be below the limit.

The exit code is 1 if anything failed. `--write` writes docs/results/serve.md.
"""

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from benchmarks import results_page
from benchmarks.fuzz import FORMATS, mutated
from benchmarks.trainings import most_memory
from openimp.common.progress import track
from openimp.recipe.schema import Recipe
from openimp.search import build_index
from tests import little
from tests.made_models import write_untrained
from tests.served import Answer, Server, serving

MEMORY = 1500 * 10**6
"""Limit on the peak memory of the server, in bytes. Python, torch and LanceDB use about 600 MB of it."""
LIBRARIES = ("starlette", "uvicorn", "lancedb", "pillow", "av", "soundfile", "torch")
SECRET = b"bytes of a file that is not indexed"
CHANGES = [
    "tasks.named.objectives=[{type: contrastive}]",
    "tasks.moving={source: sounds, inputs: {video: sound, text: caption}, objectives: [{type: contrastive}], "
    "batch_size: 6, views: [{video: {size: 16, frames: 2}, text: {length: 8}}]}",
]
"""Changes of the tests' small recipe: no classes, which training would find, and a model that reads clips, too."""
ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "MKV": "webm", "AIFF": "aif"}


def prepare(folder: Path) -> Path:
    """Writes an untrained model, an index of its data, and a file beside it; returns the index."""
    data = folder / "data"
    data.mkdir()
    recipe = Recipe.load(little.write(data) / "recipe.yaml", CHANGES, data)
    model = write_untrained(recipe, [["a red square"]], folder / "model")
    (folder / "secret.txt").write_bytes(SECRET)
    build_index(model, [data], folder / "x.index")
    return folder / "x.index"


def upload(server: Server, seed: int, number: int) -> Answer:
    """Uploads the `number`-th changed file."""
    rng = np.random.default_rng([seed, number])
    names = list(FORMATS)
    name, other = names[number % len(names)], names[rng.integers(len(names))]
    content = mutated(name, SEEDS[name], seed, number)
    ending = ENDINGS.get(other if rng.random() < 0.1 else name, name.lower())
    return server.upload(f"{quote(chr(rng.integers(1, 0xD000)))}x.{ending}", content)


SEEDS = {name: make() for name, (_, make) in FORMATS.items()}


def requests(server: Server, folder: Path, known: str, seed: int, count: int) -> Iterator[Answer]:
    """Sends hostile requests that are drawn at random from the kinds below."""
    rng = np.random.default_rng([seed, 1])
    secret = str(folder / "secret.txt")
    names = [secret, f"../{secret}", "..%2f" * 8 + secret, f"{known}/../../{secret}", "%00", "%", known[:-1],
             known.upper(), "' OR '1'='1", f"{known}' OR path LIKE '%", "é" * 300, "x" * 9000, "-1", "~",
             "....//" * 9 + secret, "file:" + secret]  # fmt: skip
    hosts = ["evil.example", "127.0.0.1.evil.example", "[", "[::1", "0", "@127.0.0.1", "127.0.0.1@evil", "localhost:x",
             " ", "2130706433"]  # fmt: skip
    ranges = ["bytes=", "bytes=-", "bytes=5-2", "bytes=9999999-", "bytes=-99999999999999999999", "bytes=a-b",
              "lines=1-2", "bytes=" + ",".join(f"{i}-{i}" for i in range(5000)), "bytes=0-0," * 90 + "1-1",
              "bytes=" + "9" * 4000 + "-"]  # fmt: skip
    values = ["nan", "inf", "-1e400", "9" * 5000, "%00", "<script>", "é", "' OR 1=1", secret, "[]", "1e3", "\U0001f3b8"]
    keys = ["q", "file", "more", "less", "modality", "under", "min", "k", "since", "until", "by"]

    def one(values: list[str]) -> str:
        return values[rng.integers(len(values))]

    for _ in range(count):
        place = one(["media", "thumbnails", "uploads", "static", ""])
        query = "&".join(f"{one(keys)}={quote(one(values))}" for _ in range(rng.integers(1, 9)))
        match int(rng.integers(6)):
            case 0:
                yield server.ask(f"/{place}/{quote(one(names), safe=one(['', '/', '%/']))}")
            case 1:
                yield server.ask(f"/media/{known}", Host=one(hosts))
            case 2:
                yield server.ask(f"/media/{known}", Range=one(ranges))
            case 3:
                yield server.ask(f"/?{query}")
            case 4:
                yield server.ask(
                    f"/{place}",
                    one(["POST", "PUT", "DELETE", "TRACE", "OPTIONS", "X"]),
                    b"x",
                    Origin=one([server.url, "null"]),
                )
            case _:
                yield server.ask(
                    f"/uploads?name={quote(one(values))}&{query}",
                    "POST",
                    SECRET,
                    Origin=one([server.url, "http://evil.example", "http://["]),
                )


def main() -> int:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--uploads", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = results_page.parse(parser)
    uploads, asked, failures, slowest = Counter[str](), Counter[int](), [], 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(prepare(folder)) as server:  # It raises if the server has printed a traceback.
            (known, *_) = server.items("q=red")
            for number in track(range(args.uploads), "uploads"):
                begin = time.perf_counter()
                answer = upload(server, args.seed, number)
                slowest = max(slowest, time.perf_counter() - begin)
                outcome = {200: "encoded", 400: "refused"}.get(answer.status, f"failed: {answer.status}")
                if outcome == "refused" and not answer.json["error"].endswith("."):
                    outcome = "refused without a sentence"
                uploads[outcome] += 1
            for answer in track(requests(server, folder, known, args.seed, args.requests), "requests"):
                asked[answer.status] += 1
                if answer.status >= 500 or SECRET in answer.body:
                    failures.append(f"{answer.status}: {answer.body[:80]!r}")
            if server.items("q=red")[0] != known:
                failures.append("the page answers no search any more")
            memory = most_memory(server.process)
    failures += [
        f"{count} uploads {outcome}" for outcome, count in uploads.items() if outcome not in ("encoded", "refused")
    ]
    if memory > MEMORY:
        failures.append(f"the server used {memory:,} bytes")
    rows = [
        *([f"uploads that were {outcome}", f"{count:,}"] for outcome, count in sorted(uploads.items())),
        ["slowest upload", f"{slowest:.2f} s"],
        *([f"requests that were answered with {status}", f"{count:,}"] for status, count in sorted(asked.items())),
        ["peak memory of the server", f"{memory / 1e6:.0f} MB"],
        ["failures", str(len(failures))],
    ]
    explanation = """
A failure is an upload that is neither encoded nor refused in a sentence, a status of 500 or above, bytes of
a file that is not indexed, a page that no longer answers, a traceback, or more than 1,500 MB of memory.
"""
    head = results_page.head("Hostile uploads and requests to the search page", *LIBRARIES)
    head += f"- Seed: {args.seed}\n"
    results_page.publish(f"{head}\n{results_page.table(['', ''], *rows)}{explanation}", "serve", args.write)
    print(*failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
