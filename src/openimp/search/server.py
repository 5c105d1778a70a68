"""`openimp serve`: a web server for the search page."""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from openimp.common.device import return_freed_memory
from openimp.common.errors import UserError, counted
from openimp.common.progress import console
from openimp.search.guard import Guard, is_loopback
from openimp.search.index import Index
from openimp.search.page import Page
from openimp.search.temporary import MAX_BYTES

CONNECTIONS = 1024
"""Maximum number of open connections, idle ones included. Beyond it, every request is answered with 503."""
OPEN_FILES = 4 * CONNECTIONS
"""Each connection may have a file open besides. Systems allow a process some 1,000 files unless it asks for more."""
HEAD_SECONDS = 5
"""Time for the whole head of a request to arrive, since the connection was opened or the last answer was sent."""
STALLED_SECONDS = 60
"""Time after which a connection is closed whose client takes nothing of an answer. Browsers ask again for the rest."""


def create_app(index: Index, host: str = "127.0.0.1", names: Sequence[str] = ()) -> Guard:
    """The page as an ASGI application. `host` is the address that it is served at; for `names` see `Guard`."""
    page = Page(index)
    routes = [
        Route("/", page.search),
        Route("/api/search", page.api_search),
        Route("/api/items/{id}", page.api_item),
        Route("/media/{id}", page.media),
        Route("/thumbnails/{id}", page.item_thumbnail),
        Route("/uploads/{id}", page.upload_thumbnail),
        Route("/uploads", page.upload, methods=["POST"]),
        Mount("/static", StaticFiles(packages=[("openimp.search", "static")])),
    ]
    app = Starlette(routes=routes, exception_handlers={UserError: page.refuse, HTTPException: page.refuse})
    app.router.redirect_slashes = False
    return Guard(app, host, names)


def serve(index: Index, host: str, port: int, names: Sequence[str] = ()) -> None:
    """Serves the page until Ctrl-C."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        # The error's own text names the address once more.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"{host}, port {port}: {reason}; choose another with --port or --host") from None
    url_host = f"[{host}]" if ":" in host else host
    used_port = listener.getsockname()[1]
    console.print(f"http://{url_host}:{used_port} searches {counted(sum(index.counts.values()), 'item')}.")
    if not is_loopback(host):
        console.print("Everybody who reaches this machine over the network can see all indexed items.")
    console.print(f"Temporary files take at most {MAX_BYTES // 2**20:,} MiB of {tempfile.gettempdir()}.")
    console.print("Stop it with Ctrl-C.")
    return_freed_memory()
    _allow_open_files(OPEN_FILES)
    options = uvicorn.Config(
        create_app(index, host, names),
        log_level="error",
        server_header=False,
        http=Connection,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=HEAD_SECONDS,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=2,  # A paused clip or a sleeping phone would keep the server for ever.
    )
    logging.getLogger("uvicorn.error").addFilter(_is_an_error)
    # After its shutdown, uvicorn raises the signal again. As an exit, it lets temporary files be removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with suppress(KeyboardInterrupt):
        uvicorn.Server(options).run([listener])


class Connection(H11Protocol):
    """A connection that is closed if the head of a request is late, or if its client takes nothing of an answer.

    uvicorn has no setting for either: it waits without end for the first request, for the rest of a head of which one
    byte has arrived, and for a client to read.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        # As in uvicorn, except that the clock stops with a whole head instead of with any byte.
        self.conn.receive_data(data)
        self.handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.abort_task = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.abort_task.cancel()


def _allow_open_files(count: int) -> None:
    """Lets this process have `count` files open, or as many as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _is_an_error(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log tells of more than requests that end because the server stops."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and not str(record.msg).startswith("Cancel %s running task")
