"""The search page while many clients are idle, slow, or send what takes long."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.exceptions import HTTPException

from benchmarks.trainings import most_memory
from openimp.search import open_index
from openimp.search.temporary import TemporaryFiles
from tests import little, slow_clients
from tests.served import Server, serving


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return slow_clients.write_index(tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def media(index: Path) -> list[str]:
    """The ids of large media in rows."""
    return [hit.id for hit in open_index(index, allow_sources=True).search("large", under="large")]


@pytest.fixture
def server(index: Path) -> Iterator[Server]:
    with serving(index, "--allow-sources") as server:
        yield server


@pytest.mark.slow
def test_slow_clients_keep_nobody_waiting_and_take_little_memory(server: Server, media):
    """300 idle connections and 24 clients of each slow kind. benchmarks/load.py has one kind at a time."""
    quiet = slow_clients.seconds_per_query(server)
    with slow_clients.all_kinds(server, media):
        loaded = slow_clients.seconds_per_query(server)
        assert server.upload("0.png", little.png(1)).status == 200
    assert loaded < 10 * quiet
    assert most_memory(server.process) < 1.1e9


@pytest.mark.slow
def test_a_request_whose_head_is_late_is_given_up(server: Server):
    """The first of a connection, or a later one."""
    host = server.url.removeprefix("http://")
    for sent in (b"", b"GET / HTTP/1.1\r\n", f"GET /uploads/x HTTP/1.1\r\nHost: {host}\r\n\r\nGET / HT".encode()):
        with slow_clients.connect(server) as connection:
            connection.sendall(sent)
            while connection.recv(1000):  # Until the server closes it; at most 60 s.
                pass


@pytest.mark.slow
def test_a_client_that_takes_nothing_is_disconnected(index: Path, media):
    """Its temporary file is removed, so that another client gets the item, although there is room for only one."""
    setup = "from openimp.search import server, temporary; server.STALLED_SECONDS = 1; temporary.MAX_BYTES = 40_000_000"
    with serving(index, "--allow-sources", setup=setup) as server, slow_clients.connect(server) as connection:
        connection.sendall(slow_clients.get(server, media[0]))
        connection.recv(1)  # The file exists.
        statuses = {server.ask(f"/media/{media[1]}").status}
        end = time.monotonic() + 30  # Half of the usual time.
        while 200 not in statuses and time.monotonic() < end:
            statuses.add(server.ask(f"/media/{media[1]}").status)
        assert statuses == {503, 200}


def test_temporary_files_have_limited_bytes_together(monkeypatch):
    monkeypatch.setattr("openimp.search.temporary.MAX_BYTES", 10)
    files = TemporaryFiles()
    with files.reservation() as reserve:
        reserve(4)
        reserve(4)
        with files.reservation() as reserve_more:
            reserve_more(2)
            with pytest.raises(HTTPException, match="too many large files"):
                reserve_more(1)
        reserve(2)
    with files.reservation() as reserve:
        reserve(10)
