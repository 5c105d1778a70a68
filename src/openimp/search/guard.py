"""Refuses requests that do not come from the page itself, and adds the headers that limit what a browser may do.

Any website can make a browser send requests to this machine. With DNS rebinding, a site binds its name to 127.0.0.1, so
that it could also read the answers. But its requests have its own name in their Host header.
"""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: nothing inline, and nothing from other hosts."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware. `host` is the address that the server listens on. Browsers may also use the `names`."""

    def __init__(self, app: ASGIApp, host: str, names: Iterable[str] = ()) -> None:
        self.app = app
        self.host_names = {*LOOPBACK, host.lower(), *(name.lower() for name in names)}
        self.is_public = not is_loopback(host)
        if self.is_public:
            self.host_names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                response_headers = MutableHeaders(scope=message)
                response_headers.update(HEADERS)
                response_headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        app = self.app
        if not self._is_known(headers.get("host", "")):
            advice = "Start it with --name and the name of the page's address."
            app = PlainTextResponse(f"This server does not go by the name in the Host header. {advice}", 421)
        elif scope["method"] not in ("GET", "HEAD") and not _is_same_origin(headers):
            advice = "A program that sends files needs the header Origin with the address of the page."
            app = PlainTextResponse(f"This request does not come from the page of this server. {advice}", 403)
        await app(scope, receive, send_with_headers)

    def _is_known(self, host: str) -> bool:
        """Whether a Host header names this server."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            if name in self.host_names:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.is_public  # DNS cannot rebind an address, and this machine may have several.


def _is_same_origin(headers: Headers) -> bool:
    """Whether a request comes from a page of this server: browsers send the page's origin with every POST."""
    try:
        return urlsplit(headers.get("origin", "")).netloc == headers["host"]
    except ValueError:
        return False
