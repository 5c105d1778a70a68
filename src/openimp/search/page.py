"""The request handlers of the search page. Items are served by id, and only those that are indexed."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import anyio
from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.progress import clock
from openimp.common.protocols import Pictured
from openimp.common.threads import core_count
from openimp.inference.files import modality_by_extension
from openimp.search.answers import Answer, answer
from openimp.search.index import Index
from openimp.search.media_types import UNKNOWN, kind_of, media_type
from openimp.search.query import Hit, Query
from openimp.search.temporary import TemporaryFiles
from openimp.search.uploads import MAX_UPLOAD_BYTES, Upload, Uploads

TEMPLATES = Environment(
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=PackageLoader("openimp.search"),
)
TEMPLATES.filters["clock"] = clock
TEMPLATES.filters["place"] = lambda name: os.path.basename(name) if os.path.isabs(name) else name
THUMBNAIL = 256
"""Maximum number of pixels of the longer side of a thumbnail."""
PUBLISHED = ("id", "modality", "path", "text", "start", "end", "part", "parts", "source", "row", "date", "latitude",
             "longitude", "score", "found_by")  # fmt: skip
"""What programs are told of an item."""
UPLOAD_SECONDS = 90
"""Maximum number of seconds for an upload to wait, to arrive and to be encoded."""


class Page:
    """The handlers, and what they share: the index, the uploads and a cache of thumbnails.

    The event loop must stay responsive, so slow work runs in threads. Each kind of work has its own limit of threads,
    so slow work of one kind does not delay the others. Of each modality, one upload is decoded at a time: slow clips do
    not delay pictures, and the decoded media of two never take memory at once. Other work has anyio's limit.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self.uploads = Uploads()
        self.searching = CapacityLimiter(max(2, core_count()))
        self.drawing = CapacityLimiter(2)
        self.reading = CapacityLimiter(1)  # A row's media are in memory until they are in a temporary file.
        self.temporary_files = TemporaryFiles()
        self.cached_thumbnail = lru_cache(maxsize=4096)(self._draw_item)
        self.index_values = self._index_values()
        modalities = index.model.modalities
        files = {name: modality for name, modality in modalities.items() if not modality.reads_text}
        self.modality_of = modality_by_extension(files)
        self.encoding = {name: CapacityLimiter(1) for name in files}
        self.shared: dict[str, Any] = {
            "folder": index.folder,
            "colors": {name: f"c{i % 6}" for i, name in enumerate(modalities)},
            "reads_text": len(files) < len(modalities),
            "readable": list(files),
            "accepted": list(self.modality_of),
            "recordable": next((name for name in files if kind_of(files[name]) == "audio"), ""),
            "limit": MAX_UPLOAD_BYTES,
        }

    async def search(self, request: Request) -> Response:
        """The form with the results of the query in the URL."""
        return self._render("search.html", **vars(await self._answer(request)))

    async def api_search(self, request: Request) -> Response:
        """The results of the query in the URL as JSON; static/openapi.json describes them."""
        page = await self._answer(request)
        if page.code != 200:
            return JSONResponse({"error": page.status}, page.code)
        if page.is_incomplete:  # A program would not notice that parts of the query are missing.
            return JSONResponse({"error": " ".join(page.notes)}, 404)
        results = [self._described(item.hit) for item in page.items]
        return JSONResponse({"status": page.status, "notes": page.notes, "results": results})

    def api_item(self, request: Request) -> Response:  # Starlette runs it in a thread, because it is not async.
        """An item as JSON."""
        return JSONResponse(self._described(self.index.hit(request.path_params["id"])))

    async def item_thumbnail(self, request: Request) -> Response:
        """A small picture of an item."""
        id = request.path_params["id"]
        return _picture(await to_thread.run_sync(self._thumbnail, id, limiter=self.drawing))

    async def upload_thumbnail(self, request: Request) -> Response:
        """A small picture of an upload."""
        upload = self.uploads.get(request.path_params["id"])
        return _picture(upload.thumbnail if upload else None)

    async def upload(self, request: Request) -> Response:
        """Encodes a file, the body of the request, and returns its id."""
        filename = Path(request.query_params.get("name", "")).name
        name = filename[:200] or "file"
        try:
            if request.headers.get("content-type", "").startswith("multipart/"):
                raise UserError("send the bytes of the file as the body, not as a form")
            modality = request.query_params.get("modality") or self.modality_of.get(Path(filename).suffix.lower(), "")
            if modality not in self.shared["readable"]:
                raise UserError(f"choose a file of {' or '.join(self.shared['readable'])}")
            # An upload is on disk until its turn has come, so those that arrive slowly delay no other.
            with (
                anyio.fail_after(UPLOAD_SECONDS),
                self.temporary_files.reservation() as reserve,
                tempfile.TemporaryFile(dir=self.temporary_files.folder) as file,
            ):
                await _receive(request, file, reserve)
                # A thread cannot be stopped. It counts towards the limit until it is done.
                upload = await to_thread.run_sync(
                    self._read, name, modality, file, limiter=self.encoding[modality], abandon_on_cancel=True
                )
            return JSONResponse({"id": self.uploads.add(upload)})
        except TimeoutError:
            return _cannot_search(name, "reading it takes too long, or the server is busy", 408)
        except HTTPException as error:
            return _cannot_search(name, error.detail, error.status_code)
        except (UserError, ClientDisconnect) as error:  # If the client is gone, nobody receives the answer.
            return _cannot_search(name, str(error))

    async def _answer(self, request: Request) -> Answer:
        def find() -> Answer:
            page = answer(self.index, self.uploads, request.query_params)
            with suppress(UserError):  # `page` tells of it.
                self.index_values = self._index_values()
            return page

        return await to_thread.run_sync(find, limiter=self.searching)

    def _index_values(self) -> dict[str, Any]:
        """What all pages show of the index. It may have been opened again, and have newer items."""
        index = self.index
        return {
            "counts": index.counts,
            "folders": index.folders,
            "has_words": index.has_words,
            "has_dates": index.has_dates,
        }

    def _read(self, name: str, modality: str, file: IO[bytes]) -> Upload:
        try:
            file.seek(0)
            content = file.read()
            return Upload(name, self.index.encode(Query(modality, content)), self._draw(modality, content))
        except UserError as error:
            problem = str(error)
        # The original error refers to itself by way of its frames, which hold the content. Raised on, it would keep the
        # content of each refused upload in memory until Python looks for such circles.
        del content
        raise UserError(problem)

    async def media(self, request: Request) -> Response:
        """The file of an item, or the range of it that the Range header asks for."""
        return await to_thread.run_sync(self._media, request.path_params["id"], limiter=self.reading)

    def _media(self, id: str) -> Response:
        hit = self.index.hit(id)
        media = self.index.read(id)
        kind = kind_of(self.index.model.modalities[hit.modality])
        if kind == "text":
            return PlainTextResponse(hit.text or "")
        try:
            displayed_type = media_type(media, kind)
        except OSError as error:  # The file is gone or forbidden now.
            raise UserError(f"{Path(hit.path).name}: {error.strerror}") from None
        # The media may be untrusted, so a browser that displays them must run and load nothing.
        headers = {"Content-Security-Policy": "default-src 'none'; sandbox", "Cache-Control": "private, no-cache"}
        name = Path(hit.path).name if displayed_type == UNKNOWN else None  # With a name, the browser saves the file.
        if isinstance(media, Path):
            return FileResponse(media, headers=headers, media_type=displayed_type, filename=name)
        # Only files are served in ranges, which browsers need to play sounds and clips.
        with ExitStack() as cleanup:
            cleanup.enter_context(self.temporary_files.reservation())(len(media))
            with tempfile.NamedTemporaryFile(dir=self.temporary_files.folder, delete=False) as file:
                cleanup.callback(os.unlink, file.name)
                file.write(media)
            os.utime(file.name, (0, 0))  # All ranges need the same ETag.
            options = {"headers": headers, "media_type": displayed_type, "filename": name}
            return TemporaryResponse(file.name, cleanup.pop_all(), **options)

    def _thumbnail(self, id: str) -> bytes | None:
        hit = self.index.hit(id)
        self.index.check(hit)
        return self.cached_thumbnail(hit)

    def _draw_item(self, hit: Hit) -> bytes | None:
        segment = None if hit.start is None or hit.end is None else (hit.start, hit.end)
        return self._draw(hit.modality, self.index.read(hit.id), segment)

    def _draw(self, name: str, media: bytes | Path, segment: tuple[float, float] | None = None) -> bytes | None:
        model = self.index.model
        modality = model.modalities[name]
        if not isinstance(modality, Pictured):
            return None
        try:
            return modality.thumbnail(media, model.views[name], THUMBNAIL, segment)
        except BadMedia:
            return None

    def _described(self, hit: Hit) -> dict[str, Any]:
        """An item for programs. Its URLs are relative to the server's."""
        has_picture = isinstance(self.index.model.modalities[hit.modality], Pictured)
        urls = {"media": f"/media/{hit.id}", "thumbnail": f"/thumbnails/{hit.id}" if has_picture else None}
        return {name: getattr(hit, name) for name in PUBLISHED} | urls

    def _render(self, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        page = TEMPLATES.get_template(template).render(self.shared | self.index_values | values)
        return HTMLResponse(page.encode(errors="replace"), code, {"Cache-Control": "no-store"})

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Answers an error with one sentence: a page for browsers, plain text otherwise."""
        code = 404
        headers = None
        text = str(error)
        if isinstance(error, HTTPException):
            code = error.status_code
            headers = error.headers
            text = "There is no such page" if code == 404 else error.detail
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, code, headers)
        if "text/html" in request.headers.get("accept", ""):
            return self._render("error.html", code=code, status=text)
        return PlainTextResponse(text.encode(errors="replace"), code, headers)


class TemporaryResponse(FileResponse):
    """A file that is removed after the response, also if the request is refused or the client is gone."""

    def __init__(self, path: str | Path, cleanup: ExitStack, **options: Any) -> None:
        super().__init__(path, **options)
        self.cleanup = cleanup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.cleanup:
            await super().__call__(scope, receive, send)


async def _receive(request: Request, file: IO[bytes], reserve: Callable[[int], None]) -> None:
    """Writes the body of a request, up to `MAX_UPLOAD_BYTES` bytes, to a file."""
    too_large = UserError(f"it is larger than {MAX_UPLOAD_BYTES // 2**20} MiB")
    if int(request.headers.get("content-length", 0)) > MAX_UPLOAD_BYTES:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_UPLOAD_BYTES:
            raise too_large
        reserve(len(chunk))
        await to_thread.run_sync(file.write, chunk)  # A disk may be slow.


def _cannot_search(name: str, reason: str, code: int = 400) -> JSONResponse:
    return JSONResponse({"error": f"Cannot search with {name}: {reason}."}, code)


def _picture(picture: bytes | None) -> Response:
    if picture is None:
        return Response(status_code=404)
    return Response(picture, media_type="image/webp", headers={"Cache-Control": "private, max-age=300"})
