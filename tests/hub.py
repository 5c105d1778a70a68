"""A stand-in for the Hugging Face Hub: a local HTTP server that keeps what is committed to it in memory."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789" * 4
TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """The repositories by name: whether each is private, and its files. Every request must carry the token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.branches: dict[str, set[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.private
            self.server.private.setdefault(name, asked.get("visibility") == "private")
            self.server.files.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}"}, 409 if known else 200)
        elif "/branch/" in path:
            name, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            self.server.branches.setdefault(name, set()).add(branch)
            self._answer({}, 201)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self._answer({"files": files})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    self.server.messages.append(line["value"]["summary"])
                else:
                    self.server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"error": f"unknown: {path}"}, 404)

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.removeprefix("/api/models/")
        if name in self.server.private:
            self._answer({"id": name, "private": self.server.private[name]})
        else:
            self._answer({"error": f"unknown: {self.path}"}, 404)

    def _answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs a hub while the block runs."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
