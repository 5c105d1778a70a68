"""benchmarks/size.py runs; its figures depend on the machine."""

import pytest

pytest.importorskip("lancedb")
pytest.importorskip("webdataset")
from benchmarks import size

pytestmark = pytest.mark.slow


def test_the_benchmark_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["size.py", "--smoke"])
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path))
    assert size.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    measured = [row.split(" (")[0].removeprefix("| ") for row in rows]
    for kind in ("Parquet, one row group", "Parquet, 100 row groups", "JSON Lines", "CSV", "folder"):
        assert {f"{kind}: opening, first", f"{kind}: opening, again"} <= {*measured}
    assert {"where", "tars: a shuffled pass over a stream", "Parquet: openimp train, one step"} <= {*measured}
