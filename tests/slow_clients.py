"""Clients that hold up the search page: they are idle, slow, or send what takes long. And an index to serve to them."""

import io
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from openimp.recipe.schema import Recipe
from openimp.search import build_index
from tests import little
from tests.made_models import write_untrained
from tests.served import Server

IDLE = 300
"""Connections that send no request."""
SLOW = 24
"""Clients of each other kind."""
BIG_UPLOAD = 60 * 10**6
"""Bytes of a big upload."""
TASK = (
    "source: {}, objectives: [{{type: contrastive}}], batch_size: 6, views: [{{{}: {{size: 16}}, text: {{length: 8}}}}]"
)
CHANGES = [
    "tasks.named.objectives=[{type: contrastive}]",
    "sources.large={path: large.parquet}",
    f"tasks.large={{inputs: {{image: file, text: text}}, {TASK.format('large', 'image')}}}",
    f"tasks.moving={{inputs: {{video: file, text: text}}, {TASK.format('large', 'video')}}}",
]
"""Changes of the tests' small recipe: rows with large pictures, and a model that reads clips, too."""

Clients = Callable[[Server, Sequence[str]], AbstractContextManager[None]]
"""Keeps a server busy. Also takes the ids of large items."""


def write_index(folder: Path) -> Path:
    """Writes an untrained model, and an index of its data: small files, and six rows with pictures of 30 MB."""
    data = folder / "data"
    data.mkdir()
    little.write(data)
    pictures = []
    for shade in range(6):
        buffer = io.BytesIO()
        PIL.Image.fromarray(np.full((3000, 3300, 3), 40 * shade, np.uint8)).save(buffer, "BMP")
        pictures.append(buffer.getvalue())
    table = pa.table({"file": pictures, "text": [f"large {shade}" for shade in range(6)]})
    pq.write_table(table, data / "large.parquet", row_group_size=1)
    recipe = Recipe.load(data / "recipe.yaml", CHANGES, data)
    model = write_untrained(recipe, [["a red square large"]], folder / "model")
    return build_index(model, None, folder / "large.index", allow_sources=True).folder


def seconds_per_query(server: Server, queries: int = 40) -> float:
    """The median time of a query."""
    times = []
    for _ in range(queries):
        start = time.perf_counter()
        answer = server.ask("/?q=red+square")
        times.append(time.perf_counter() - start)
        assert answer.status == 200, answer.text
    return statistics.median(times)


@contextmanager
def idle_connections(server: Server, media: Sequence[str]) -> Iterator[None]:
    with _connected(server, [b""] * IDLE):
        yield


@contextmanager
def slow_uploaders(server: Server, media: Sequence[str]) -> Iterator[None]:
    with _connected(server, [_upload(server, "0.png", 10**6) + bytes(1000)] * SLOW):
        yield


@contextmanager
def slow_readers(server: Server, media: Sequence[str]) -> Iterator[None]:
    with _connected(server, [get(server, media[i % len(media)]) for i in range(SLOW)]):
        yield


@contextmanager
def slow_gifs(server: Server, media: Sequence[str]) -> Iterator[None]:
    with _uploading(server, "slow.gif", slow_gif(), modality="video"):
        yield


@contextmanager
def big_uploads(server: Server, media: Sequence[str]) -> Iterator[None]:
    with _uploading(server, "big.wav", bytes(BIG_UPLOAD), modality="audio"):
        yield


@contextmanager
def all_kinds(server: Server, media: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for clients in (idle_connections, slow_uploaders, slow_readers, slow_gifs, big_uploads):
            stack.enter_context(clients(server, media))
        yield


KINDS: dict[str, Clients] = {
    f"{IDLE} idle connections": idle_connections,
    f"{SLOW} slow uploaders": slow_uploaders,
    f"{SLOW} slow readers": slow_readers,
    f"{SLOW} slow GIFs": slow_gifs,
    f"{SLOW} big uploads": big_uploads,
    "all of these": all_kinds,
}


def slow_gif(side: int = 2000, frames: int = 3000) -> bytes:
    """An animation of few bytes and many pixels: one compressed frame, repeated."""
    pixels = np.random.default_rng(0).integers(0, 2, (side // 40, side // 40), np.uint8).repeat(40, 0).repeat(40, 1)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels * 255).save(buffer, "GIF")
    content = buffer.getvalue()
    start = content.index(b"\x2c\0\0\0\0")  # the descriptor of the frame
    return content[:start] + content[start:-1] * frames + content[-1:]


@contextmanager
def _connected(server: Server, requests: Sequence[bytes]) -> Iterator[None]:
    """Opens a connection for each request, sends it, and neither reads nor sends more."""
    with ExitStack() as stack:
        for request in requests:
            connection = stack.enter_context(connect(server))
            with suppress(OSError):  # The server may refuse it.
                connection.sendall(request)
        yield


@contextmanager
def _uploading(server: Server, name: str, content: bytes, modality: str) -> Iterator[None]:
    """`SLOW` clients upload a file at the same time."""

    def send(connection: socket.socket) -> None:
        with suppress(OSError):  # The server may refuse it, and the end closes it.
            connection.sendall(_upload(server, f"{name}&modality={modality}", len(content)))
            connection.sendall(content)
            connection.recv(1000)

    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(SLOW)]
        threads = [threading.Thread(target=send, args=(connection,), daemon=True) for connection in connections]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(60)


def connect(server: Server) -> socket.socket:
    """A connection whose client buffers little, so that the server soon notices if it reads slowly."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
    return connection


def get(server: Server, id: str) -> bytes:
    """A request for the media of an item."""
    return f"GET /media/{id} HTTP/1.1\r\nHost: {urlsplit(server.url).netloc}\r\n\r\n".encode()


def _upload(server: Server, query: str, size: int) -> bytes:
    """The head of a request that uploads a file."""
    lines = (f"Host: {urlsplit(server.url).netloc}", f"Origin: {server.url}", f"Content-Length: {size}")
    return "\r\n".join((f"POST /uploads?name={query} HTTP/1.1", *lines, "", "")).encode()
