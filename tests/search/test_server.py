"""The server of the search page: what it serves to whom, and that hostile requests harm neither it nor its users."""

import html
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import anyio
import numpy as np
import PIL.Image
import pytest
import soundfile
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.testclient import TestClient

from openimp.commands import run_serve
from openimp.common.errors import UserError
from openimp.search import Index, build_index, open_index
from openimp.search.guard import HEADERS, POLICY
from openimp.search.page import Page, TemporaryResponse
from openimp.search.query import EncodedQuery
from openimp.search.server import serve
from openimp.search.state import MAX_PARTS, State
from openimp.search.uploads import Upload, Uploads
from tests.messages import refuses
from tests.served import Server, serving

MARKUP = """<script>document.title="owned"</script><svg onload="document.title='owned'">"""


@pytest.fixture(scope="module")
def folder(media_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of each modality, a sound of 12 s, texts of markup and of lines, and files that are not indexed."""
    top = tmp_path_factory.mktemp("served")
    shutil.copytree(media_folder, top / "media")
    soundfile.write(top / "media" / "long.wav", np.sin(np.arange(12 * 8000) / 9), 8000)
    (top / "media" / "markup.txt").write_text(MARKUP, encoding="utf-8")
    (top / "media" / "lines.txt").write_text("a red square\n\na green circle\n", encoding="utf-8")
    (top / "media" / "named").mkdir()
    PIL.Image.new("RGB", (40, 40), (9, 99, 199)).save(top / "media" / "named" / "a_blue-square.png")
    (top / "media" / "changed").mkdir()
    shutil.copy(top / "media" / "1.png", top / "media" / "changed" / "changed.png")
    (top / "media" / "drawing.svg").write_text(f"<svg>{MARKUP}</svg>", encoding="utf-8")
    (top / "secret.txt").write_text("secret", encoding="utf-8")
    return top


@pytest.fixture(scope="module")
def index(folder: Path, tiny_model_folder: Path) -> Path:
    return build_index(tiny_model_folder, str(folder / "media"), folder / "media.index").folder


@pytest.fixture(scope="module")
def server(index: Path):
    with serving(index) as server:
        yield server


@pytest.fixture(scope="module")
def ids(index: Path) -> dict[str, str]:
    """The ids of the indexed items, by their path; of segments the last."""
    return {Path(hit.path).name: hit.id for hit in open_index(index).sample(1000)}


def test_the_page_allows_nothing_from_elsewhere_and_nothing_inline(server: Server):
    answer = server.ask("/?q=noise")
    assert answer.status == 200
    expected = HEADERS | {"Content-Security-Policy": POLICY}
    assert {name: answer.headers[name.lower()] for name in expected} == expected
    assert "default-src 'none'; script-src 'self';" in POLICY
    assert not re.search(r"<script(?! src=\"/static/)|<style| style=| on\w+=\"", answer.text)
    assert not re.search(r"(?:src|href|action)=\"(?!/|#)", answer.text)


def test_names_texts_and_queries_are_text_and_not_markup(server: Server):
    page = server.ask(f"/?{urlencode({'q': MARKUP + ' noise', 'modality': 'text'})}").text
    assert page.count("&lt;script&gt;") >= 2, "in the field and among the results"
    assert "<script>" not in page
    assert "<svg onload" not in page


@pytest.mark.parametrize("query", ["", "q=noise&"])
def test_filters_apply_with_and_without_a_query(server: Server, folder: Path, ids, query):
    clips = {ids[f"{i}.mp4"] for i in range(3)}
    assert set(server.items(f"{query}modality=video&since=2001-01-01")) == clips
    assert server.items(f"{query}modality=video&until=2001-01-01") == []
    if not query:
        assert "3 items. Search them" in server.ask("/?modality=video&since=2001-01-01").text
    assert server.items(f"{query}under={folder / 'media' / 'named'}") == [ids["a_blue-square.png"]]
    assert "Nothing is indexed that matches these filters" in server.ask(f"/?{query}under=/nowhere").text
    assert "expected a day, such as" in server.ask(f"/?{query}since=tomorrow").text
    assert server.ask(f"/?{query}modality=smell").status == 400


def test_other_names_of_the_server_are_refused(server: Server):
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:8000", "[::1", "", "localhost@evil"):
        assert server.ask("/", Host=host).status == 421, host
    port = urlsplit(server.url).port
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert server.ask("/", Host=host).status == 200, host


def test_uploads_from_other_sites_are_refused(server: Server, media_folder: Path):
    for origin in (None, "null", "http://evil.example", "http://127.0.0.1:1", "http://[", "file://"):
        headers = {} if origin is None else {"Origin": origin}
        answer = server.ask("/uploads?name=0.png", "POST", (media_folder / "0.png").read_bytes(), **headers)
        assert answer.status == 403, origin


def test_media_are_served_whole_and_in_ranges(server: Server, folder: Path, ids):
    for name, kind in {"0.png": "image/png", "0.mp4": "video/mp4", "0.wav": "audio/wav"}.items():
        content = (folder / "media" / name).read_bytes()
        url = f"/media/{ids[name]}"
        whole = server.ask(url)
        assert (whole.status, whole.headers["content-type"], whole.body) == (200, kind, content)
        part = server.ask(url, Range="bytes=5-9")
        assert (part.status, part.body) == (206, content[5:10])
        assert part.headers["content-range"] == f"bytes 5-9/{len(content)}"
        assert server.ask(url, Range="bytes=-7").body == content[-7:]
        assert server.ask(url, Range=f"bytes={len(content)}-").status == 416
        for headers in (whole.headers, part.headers):
            assert headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in headers["content-security-policy"]
    text = server.ask(f"/media/{ids['markup.txt']}")
    assert (text.text, text.headers["content-type"]) == (MARKUP, "text/plain; charset=utf-8")


def test_media_of_rows_leave_no_files_behind(tmp_path: Path):
    """They are in a temporary file while they are served, because only files are served in ranges."""
    file = tmp_path / "media"
    for headers, status in (
        ({}, 200),
        ({"Range": "bytes=0-1"}, 206),
        ({"Range": "bytes=9-"}, 416),
        ({"Range": "bytes=x-y"}, 400),
    ):
        file.write_bytes(b"media")
        cleanup = ExitStack()
        cleanup.callback(file.unlink)
        assert TestClient(TemporaryResponse(file, cleanup)).get("/", headers=headers).status_code == status
        assert not file.exists()


def test_only_indexed_items_are_served(server: Server, folder: Path, ids):
    known = ids["0.png"]
    secret = folder / "secret.txt"
    names = ["", known[:-1], known + "0", known.upper(), f"{known}/..", "0.png", "' OR 1=1 --", "\0", "%", "é" * 500,
             str(secret), f"../../{secret}", "..", "/etc/passwd", "....//....//etc/passwd"]  # fmt: skip
    for name in names:
        for place in ("media", "thumbnails", "uploads", "static"):
            for path in (f"/{place}/{quote(name, safe='')}", f"/{place}/{quote(name)}"):
                answer = server.ask(path)
                assert answer.status in (400, 404, 405), path
                assert b"secret" not in answer.body.replace(str(secret).encode(), b"")
    assert server.ask(f"/media/{known}").status == 200


def test_an_item_that_has_changed_is_not_served(server: Server, folder: Path, ids):
    """Nor is its thumbnail, which the server keeps."""
    media, thumbnail = (f"/{place}/{ids['changed.png']}" for place in ("media", "thumbnails"))
    assert server.ask(thumbnail).status == 200
    changed = folder / "media" / "changed" / "changed.png"
    changed.unlink()
    changed.symlink_to(folder / "secret.txt")
    assert server.ask(thumbnail).status == 404
    answer = server.ask(media)
    assert answer.status == 404
    assert "is in no folder that you indexed" in answer.text
    changed.unlink()
    changed.write_bytes((folder / "media" / "2.png").read_bytes())
    answer = server.ask(media)
    assert answer.status == 404
    assert "has changed since it was indexed" in answer.text
    page = server.ask(f"/?under={quote(str(folder / 'media' / 'changed'))}").text
    assert "has changed since it was indexed" in page, "the page says so in place of a picture"


def test_an_item_that_disappears_while_it_is_served_is_one_sentence(index: Path, ids, monkeypatch):
    monkeypatch.setattr(Index, "read", lambda *_: Path("gone"))
    request = Request({"type": "http", "path_params": {"id": ids["0.png"]}})
    with refuses():
        anyio.run(Page(open_index(index)).media, request)


def test_an_uploaded_file_finds_itself_by_type_content_or_choice(server: Server, media_folder: Path, ids):
    for name in ("0.png", "1.mp4", "2.wav"):
        answer = server.upload(name, (media_folder / name).read_bytes())
        assert answer.status == 200, answer.text
        id = answer.json["id"]
        assert server.items(f"file={id}")[0] == ids[name]
        assert server.ask(f"/uploads/{id}").headers["content-type"] == "image/webp"
    assert server.upload("a" * 210 + ".png", (media_folder / "0.png").read_bytes()).status == 200
    recording = (media_folder / "2.wav").read_bytes()
    id = server.upload("recording", recording, "audio").json["id"]
    assert server.items(f"file={id}")[0] == ids["2.wav"]


def test_a_bad_upload_is_refused_in_one_sentence(server: Server):
    for name, content, modality, message in (
        ("Thumbs.db", b"?", "", "choose a file of image or video or audio."),
        ("a.png", b"?", "", "cannot be read as image"),
        ("a.png", b"", "", "cannot be read as image: an empty file"),
        ("a.wav", b"RIFF\xff\xff\0\0WAVE", "", "cannot be read as audio: truncated"),
    ):
        answer = server.upload(name, content, modality)
        assert answer.status == 400
        error = answer.json["error"]
        assert error.startswith(f"Cannot search with {name}: {message}")
        assert error.endswith(".")
        assert "\n" not in error
    form = {"Origin": server.url, "Content_Type": "multipart/form-data; boundary=x"}
    answer = server.ask("/uploads?name=0.png", "POST", b"--x", **form)
    assert (answer.status, "not as a form" in answer.text) == (400, True)


def test_uploads_that_never_end_keep_nobody_waiting(server: Server, media_folder: Path, ids):
    stalled = [HTTPConnection(urlsplit(server.url).netloc) for _ in range(12)]
    for connection in stalled:
        headers = {"Origin": server.url, "Content-Length": "1000000"}
        connection.request("POST", "/uploads?name=0.png", bytes(1000), headers)
    assert server.items("q=noise")
    assert server.ask(f"/thumbnails/{ids['0.png']}").headers["content-type"] == "image/webp"
    for connection in stalled:
        connection.close()
    assert server.upload("0.png", (media_folder / "0.png").read_bytes()).status == 200


def test_a_file_that_is_too_large_is_refused_before_it_is_read(server: Server):
    answer = server.ask("/uploads?name=0.png", "POST", Origin=server.url, Content_Length=str(10**15))
    assert (answer.status, "it is larger than 64 MiB" in answer.text) == (400, True)


def test_a_query_without_results_says_why(server: Server):
    for query, message in (
        ("min=high", "the URL: min: Input should be a valid number"),
        ("min=nan&q=noise", "the URL: min: expected a finite number"),
        ("k=100000&q=noise", "the URL: k: must be at most 480"),
        ("q=" + "x" * 2000, "the URL: q: String should have at most 1000 characters"),
        ("&".join(f"more={i}" for i in range(20)), f"the URL: more: takes at most {MAX_PARTS} items, found 20"),
        ("q=noise&modality=smell", "no items of modality"),
        ("q=noise&under=/nowhere", "Nothing is indexed that matches these filters"),
        ("q=noise&min=1", "No result with a score of at least 1.00"),
        ("q=noise&since=2026-02-01&until=2026-01-31", "since 2026-02-01 is after until 2026-01-31"),
        ("q=noise&modalty=image", "the URL: unknown key &#39;modalty&#39;; did you mean &#39;modality&#39;?"),
    ):
        answer = server.ask(f"/?{query}")
        assert answer.status in (200, 400)
        assert message in answer.text, query


def test_a_query_of_which_nothing_is_left_scores_nothing(server: Server):
    for query, notes in (("more=999999", 1), ("file=abc&less=0&less=1", 2)):
        page = server.ask(f"/?{query}").text
        assert "Nothing is left of this query" in page
        assert "<title>Search" in page
        assert 'class="score"' not in page
        assert page.count("no longer") == notes
        links = re.findall(r'href="([^"]*)" data-go', page)
        assert links
        assert not re.search(r"=(?:999999|abc|0|1)\b", " ".join(links)), "they do not keep what is gone"


def test_a_text_finds_items_by_meaning_by_words_or_by_both(server: Server, ids):
    assert set(server.items("q=circle&by=words&modality=image")) == {ids["1.png"]}
    assert server.items("q=circle&modality=image")[0] == ids["1.png"]
    page = server.ask("/?q=circle&by=words").text
    assert re.search(r'value="words" checked', page)
    assert page.count(">words</span>") == len(server.items("q=circle&by=words"))
    assert "No item has these words" in server.ask("/?q=piano&by=words").text
    assert server.ask("/?q=circle&by=smell").status == 400


def test_programs_search_as_the_page_does(server: Server, media_folder: Path, ids):
    """The description of the interface, at /static/openapi.json, has the parameters and fields that there are."""
    described = server.ask("/static/openapi.json").json
    parameters = described["paths"]["/api/search"]["get"]["parameters"]
    schemas = {parameter["name"]: parameter["schema"] for parameter in parameters}
    assert schemas.keys() == State.model_fields.keys()
    for name in ("min", "by", "k"):
        assert schemas[name]["default"] == getattr(State(), name)

    found = server.ask("/api/search?q=a+red+square&k=5").json
    assert [item["id"] for item in found["results"]] == server.items("q=a+red+square&k=5")
    for item in found["results"]:
        assert item.keys() == described["components"]["schemas"]["Item"]["properties"].keys()
        assert server.ask(f"/api/items/{item['id']}").json["path"] == item["path"]
        assert server.ask(item["media"]).status == 200
        assert (item["thumbnail"] is None) == (item["modality"] == "text")
    examples = server.ask("/api/search?q=&k=2").json["results"]
    assert [(item["score"], item["found_by"]) for item in examples] == [(None, None)] * 2

    upload = server.upload("0.png", (media_folder / "0.png").read_bytes()).json["id"]
    (best,) = server.ask(f"/api/search?file={upload}&modality=image&k=1").json["results"]
    assert (best["id"], best["score"]) == (ids["0.png"], pytest.approx(1, abs=1e-3))

    gone = (f"items/{'0' * 32}", "nothing", "search?q=noise&file=abc", "search?more=999999")
    for path, code in (("search?k=0", 400), ("search?x=1", 400), *((path, 404) for path in gone)):
        refused = server.ask(f"/api/{path}", Accept="text/html")
        assert refused.status == code
        assert refused.json.keys() == {"error"}
    refused = server.ask("/api/search", "POST", b"", Origin=server.url)
    assert (refused.status, refused.json) == (405, {"error": "Method Not Allowed"})


def test_a_long_recording_is_one_result_that_leads_to_its_segments(server: Server, folder: Path, index: Path):
    opened = open_index(index)
    path = str(folder / "media" / "long.wav")
    segments = opened.search("noise", 100, under=path)
    assert len(segments) > 1
    assert {hit.path for hit in segments} == {path}
    for k in (1, 5, 100):
        shown = server.items(f"q=noise&modality=audio&k={k}")
        expected = dict.fromkeys(hit.path for hit in opened.search("noise", 100, ["audio"]))
        assert [opened.hit(id).path for id in shown] == list(expected)[:k]
    assert set(shown) & {hit.id for hit in segments} == {segments[0].id}, "the best one"
    page = server.ask("/?q=noise&modality=audio").text
    (link,) = re.findall(rf'href="([^"]*)">Best of {len(segments)} segments', page)
    assert server.items(html.unescape(link).partition("?")[2]) == [hit.id for hit in segments]
    assert f'title="{path}" selected>long.wav</option>' in server.ask(html.unescape(link)).text, "and can be left"


def test_a_line_has_its_number_and_a_medium_its_caption(server: Server, folder: Path, ids):
    page = server.ask("/?q=circle&modality=text").text
    assert re.search(r"a green circle</blockquote>.*?text, line 3<", page, re.DOTALL)
    page = server.ask("/?q=noise&modality=image").text
    title = rf"{folder / 'media' / '0.png'}, \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(f'<h3 title="{title}">a red square</h3>', page)
    assert "0.txt" not in ids


def test_uploads_are_kept_for_a_limited_number_and_time(monkeypatch):
    monkeypatch.setattr("openimp.search.uploads.KEPT_UPLOADS", 2)
    upload = Upload("a.png", EncodedQuery("image", {}), None)
    uploads = Uploads()
    ids = [uploads.add(upload) for _ in range(3)]
    assert [uploads.get(id) for id in ids] == [None, upload, upload]
    monkeypatch.setattr("openimp.search.uploads.KEPT_SECONDS", 0)
    assert uploads.get(uploads.add(upload)) is None


def test_the_url_holds_the_whole_state():
    state = State(
        q="a cat & dog",
        file=("f",),
        more=("a", "b"),
        less=("c",),
        modality=("image",),
        under="/my photos",
        min=0.25,
        by="words",
        k=96,
    )
    path, _, query = state.link(k=96).partition("?")
    assert path == "/"
    assert State.parse(QueryParams(query)) == state


def test_a_missing_library_is_one_sentence(index: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "openimp.search.server", raising=False)
    with refuses():
        run_serve(index, "127.0.0.1", 0)


def test_a_port_that_is_taken_is_one_sentence(server: Server, index: Path):
    with pytest.raises(UserError, match=r"^127\.0\.0\.1, port \d+: Address already in use; choose another with .*$"):
        serve(open_index(index), "127.0.0.1", urlsplit(server.url).port)


@pytest.mark.slow
def test_a_server_for_other_machines_warns_and_ends_with_ctrl_c(index: Path):
    with serving(index, "--host", "0.0.0.0", "--name", "Search.Example.org") as server:
        assert "Everybody who reaches this machine" in server.process.stdout.readline()
        local = Server(server.url.replace("0.0.0.0", "127.0.0.1"), server.process)
        assert local.ask("/", Host="192.168.0.7:8000").status == 200, "an address of this machine cannot be rebound"
        for host in ("search.example.org", "search.example.org:8000"):
            assert local.ask("/", Host=host).status == 200
        for host in ("evil.example", "evil.example.org"):
            assert local.ask("/", Host=host).status == 421
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
