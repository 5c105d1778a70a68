"""What both kinds of evaluation report: which rows counted, an interval, a table."""

from typing import Any

import numpy as np
from rich.table import Table as RichTable

from openimp.data.sources import Table
from openimp.errors import UserError
from openimp.evaluation.encoding import Encoded

RESAMPLES = 10_000
"""Bootstrap samples of an interval."""
NAMED = 20
"""Unreadable rows that a result names; it counts them all."""


def readable_rows(table: Table, sides: list[Encoded], where: str) -> tuple[np.ndarray, list[str]]:
    """The rows (R,) int64 that every side can read, and "row: reason" of each other one.

    Raises:
        UserError: there is none.
    """
    bad: dict[int, str] = {}
    for side in sides:
        bad = side.bad | bad
    skipped = [f"{table.where(row)}: {bad[row]}" for row in sorted(bad)]
    rows = np.flatnonzero(np.all([side.item >= 0 for side in sides], axis=0))
    if not len(rows):
        raise UserError(f"{where}: none of the {len(table)} rows can be read; the first: {skipped[0]}")
    return rows, skipped


def interval(hit: np.ndarray) -> list[float]:
    """The 95 % bootstrap interval [low, high] of the mean of hits (N,) bool, with a fixed seed.

    N hits or misses drawn with replacement are a binomial draw, so no index is drawn. It tells how much hangs on the
    choice of queries, nothing of the training's seed, and takes queries for independent; with all
    hits or none it has no width.
    """
    means = np.random.default_rng(0).binomial(len(hit), hit.mean(), RESAMPLES) / len(hit)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def skipped_fields(skipped: list[str]) -> dict[str, Any]:
    """How many rows could not be read, and which, for a result."""
    return {"skipped": len(skipped), "skipped_rows": skipped[:NAMED]}


def table(results: list[dict[str, Any]]) -> RichTable:
    """Results of `evaluate` as a table of at most 100 columns, a row each; figures in per cent but rank and MRR."""
    out = RichTable(title="Evaluation", caption=_caption(results), caption_justify="left")
    for head in ("set", "task"):
        out.add_column(head, overflow="fold")
    for head in ("n", "top-1 / R@1", "5", "10", "rank", "MRR", "chance"):
        out.add_column(head, justify="right", no_wrap=True)
    previous = None
    for result in results:
        if result["type"] == "retrieval":
            first, rest = "r1", [_percent(result[f"r{k}"]) for k in (5, 10)]
            rest += [f"{result['median_rank']:g}", f"{result['mrr']:.3f}"]
        else:
            first, rest = "top1", [_percent(result["top5"]), "", "", ""]
        low, high = result["interval"]
        cell = f"{_percent(result[first])} [{_percent(low)}, {_percent(high)}]"
        name = result["set"] if result["set"] != previous else ""
        previous = result["set"]
        out.add_row(name, result["task"], str(result["n"]), cell, *rest, _percent(result["chance"]))
    return out


def _percent(share: float) -> str:
    return f"{100 * share:.2f}" if 0 < share < 0.01 else f"{100 * share:.1f}"


def _caption(results: list[dict[str, Any]]) -> str:
    text = "per cent, with the 95 % interval of the first; 5, 10: top-5, R@5, R@10; rank: median"
    skipped = {result["set"]: result["skipped"] for result in results if result["skipped"]}
    if skipped:
        text += "\nunreadable rows left out: " + ", ".join(f"{name} {count}" for name, count in skipped.items())
    return text
