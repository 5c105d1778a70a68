"""`openimp serve`: a web server for the search page."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from openimp.common.errors import UserError, counted
from openimp.common.progress import console
from openimp.search.guard import Guard, is_loopback
from openimp.search.index import Index
from openimp.search.page import Page


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
    console.print("Stop it with Ctrl-C.")
    options = uvicorn.Config(
        create_app(index, host, names),
        log_level="error",
        server_header=False,
        limit_concurrency=256,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=2,  # A paused clip or a sleeping phone would keep the server for ever.
    )
    logging.getLogger("uvicorn.error").addFilter(_is_an_error)
    # After its shutdown, uvicorn raises the signal again. As an exit, it lets temporary files be removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with suppress(KeyboardInterrupt):
        uvicorn.Server(options).run([listener])


def _is_an_error(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's log tells of more than requests that end because the server stops."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and not str(record.msg).startswith("Cancel %s running task")
