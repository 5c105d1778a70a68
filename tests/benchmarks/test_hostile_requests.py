"""benchmarks/hostile_requests.py runs a few attacks, and the server withstands them."""

import pytest

from benchmarks import hostile_requests

pytestmark = pytest.mark.slow


def test_hostile_uploads_and_requests_do_no_harm(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hostile_requests.py", "--uploads", "14", "--requests", "60", "--seed", "3"])
    assert hostile_requests.main() == 0
    assert "| failures | 0 |" in capsys.readouterr().out
