"""benchmarks/throughput.py runs; its figures depend on the machine."""

import pytest

pytest.importorskip("timm")
from benchmarks.throughput import comparisons, report

pytestmark = pytest.mark.slow


def test_every_comparison_is_measured(tmp_path):
    rows = comparisons(smoke=True, folder=tmp_path)
    for row in rows:
        for swap in (False, True):
            row.measure(swap)
    assert all(row.median > 0 for row in rows)
    assert all(0 < step.mfu() < 1 for row in rows for step in (row.variant, row.baseline))
    demo = next(row for row in rows if row.name.startswith("demo"))
    assert (demo.variant.threads, demo.baseline.threads) == (2, 1)
    assert demo.variant.flops() == demo.baseline.flops() > 0
    dropped = next(row for row in rows if "dropped" in row.name)
    assert dropped.variant.tokens * 4 == dropped.baseline.tokens
    assert sum(line.startswith(("| IMP", "| demo")) for line in report(rows).splitlines()) == len(rows)
