"""A search page that is served by `openimp serve`, as a process of its own, for tests with HTTP and with a browser."""

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.processes import Process


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    process: Process

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        """Sends a request as it is. In names of headers, _ stands for -."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            given = {"Host": urlsplit(self.url).netloc, **{name.replace("_", "-"): headers[name] for name in headers}}
            for name, value in given.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def upload(self, name: str, content: bytes, modality: str = "") -> Answer:
        """Uploads a file as the page does."""
        path = f"/uploads?name={name}&modality={modality}"
        return self.ask(path, "POST", content, Origin=self.url)

    def items(self, query: str) -> list[str]:
        """The ids of the results of a query, in order."""
        link = (
            r'href="[^"]*more=([0-9a-f]{32})(?:&amp;(?:less|modality|under|min|by|k|since|until)=[^"&]*)*" data-go>More'
        )
        return re.findall(link, self.ask(f"/?{query}").text)


@contextmanager
def serving(what: Path, *options: object, setup: str = "") -> Iterator[Server]:
    """Starts the command on a free port, after the code `setup`. At the end, it must not have printed a traceback."""
    command = ("-c", f"{setup}; from openimp.cli import main; main()") if setup else ("-m", "openimp")
    process = Process(*command, "serve", what, "--port", 0, *options, merge=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.match(r"(http://\S+) searches", line):
            break
    else:
        raise AssertionError("".join(lines))
    try:
        yield Server(found[1], process)
    finally:
        if process.poll() is None:
            process.terminate()
        rest = process.stdout.read()
        process.wait(60)
    assert "Traceback" not in rest, rest
