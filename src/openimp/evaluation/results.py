"""Reading results.jsonl: the figures of a run's evaluations."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.evaluation.figures import first_figure, table

NEEDED = {"set": str, "task": str, "type": str, "n": int, "candidates": int, "skipped": int}
"""Keys that every result has, beside its figures."""


def read_results(file: Path) -> list[dict[str, Any]]:
    """The results in a file, with all that a table or a report of them needs.

    Raises:
        UserError: a line is not a result, or as in `read_lines`.
    """
    results = read_lines(file)
    for number, result in enumerate(results, 1):
        try:
            table([result])
            shares = [first_figure(result), result["chance"], *result["interval"]]
            whole = all(type(result[key]) is kind for key, kind in NEEDED.items()) and all(0 <= x <= 1 for x in shares)
            whole = whole and (result["type"] != "retrieval" or {"r10", "mrr"} <= result.keys())
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            whole = False
        if not whole:
            raise UserError(f"{file}: line {number} is not a result of an evaluation")
    return results


def best_step(file: Path, name: str, steps: Collection[int]) -> int:
    """Which of these steps has the highest first figure of a set, as the mean over its tasks; the first of equals."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in read_lines(file):
        if line["set"] == name and line["step"] in steps:
            found[line["step"]].append(first_figure(line))
    return max(found, key=lambda step: fmean(found[step]))
