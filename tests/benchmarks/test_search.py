"""benchmarks/search.py runs; its figures depend on the machine."""

import pytest

pytest.importorskip("lancedb")
from benchmarks import search

pytestmark = pytest.mark.slow


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["search.py", "--smoke"])
    assert search.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 5
