"""Results as lines of results.jsonl and as a table in the terminal."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines

MAIN = ("r1", "top1", "map", "score")
"""The main metric of retrieval, of one class per row, of any number of classes per row, and of other tasks of mteb."""
FEW = 50
"""Number of queries below which the table warns: if none or all are answered, the interval has no width."""

ROW_NOTES = {
    "unreadable rows left out": "skipped",
    "texts without a word that the model knows": "unknown",
    "rows of training, so the figures are no test": "trained",
}
"""What is noted about rows that are no ordinary items, and the result's field with their number."""


def main_metric(result: dict[str, Any]) -> float:
    """R@1, top-1, mAP or another library's score: the metric by which results are compared."""
    return float(next(result[key] for key in MAIN if key in result))


def read_results(file: Path) -> list[dict[str, Any]]:
    """Reads the results in a file. A line that is not a result is a UserError."""
    results = read_lines(file)
    for number, result in enumerate(results, 1):
        if not _is_result(result):
            raise UserError(f"{file}: line {number} is not a result of an evaluation")
    return results


def _is_result(result: Any) -> bool:
    try:
        table([result])
        other_library = "library" in result  # It may not tell all, and may have scores below 0.
        shares = [main_metric(result), result["chance"], *(result["interval"] or [None])]
        return (
            all(type(result[key]) is str for key in ("set", "task", "type"))
            and all(type(result.get(key, 0)) is int for key in ROW_NOTES.values())
            and all(type(result[key]) is int or (other_library and result[key] is None) for key in ("n", "candidates"))
            and all(other_library if share is None else -other_library <= share <= 1 for share in shares)
            and (other_library or result["type"] != "retrieval" or {"r10", "mrr"} <= result.keys())
        )
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        return False


def latest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of the last step."""
    last = max((result["step"] or 0 for result in results), default=0)
    return [result for result in results if (result["step"] or 0) == last]


def measured_sets(file: Path, step: int) -> set[str]:
    """The names of the evaluation sets that have a result of this step in the file."""
    return {line["set"] for line in read_lines(file) if line["step"] == step and "set" in line}


def best_step(file: Path, name: str, steps: Collection[int]) -> int:
    """The first of these steps with the highest main metric of an evaluation set, averaged over the set's tasks."""
    metrics = defaultdict(list)
    for line in read_lines(file):
        if line["set"] == name and line["step"] in steps:
            metrics[line["step"]].append(main_metric(line))
    return max(metrics, key=lambda step: fmean(metrics[step]))


def row_notes(results: list[dict[str, Any]]) -> list[str]:
    """Sentences that count unreadable rows, and texts that the model does not know, by evaluation set."""
    notes = []
    for note, key in ROW_NOTES.items():
        if counts := {result["set"]: result[key] for result in results if result.get(key)}:
            notes.append(f"{note}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return notes


def table(results: list[dict[str, Any]]) -> Table:
    """A table of at most 80 columns: a line per evaluation set, then a line per task and per test split.

    Metrics are in per cent, except for rank and MRR.
    """
    caption = "per cent, with a 95 % interval; 5, 10: top-5 or R@5, R@10; rank: the median"
    for result in results:
        if "note" in result:
            caption += f"\n{result['set']}: {result['note']}"
    few = dict.fromkeys(result["set"] for result in results if result["n"] is not None and result["n"] < FEW)
    if few:
        caption += f"\nn is below {FEW}, so results and intervals are unreliable: {', '.join(few)}"
    caption = "\n".join([caption, *row_notes(results)])
    title = "Evaluation"
    if results and results[0].get("step") is not None:
        title += f" at step {results[0]['step']:,}"  # A run that starts from weights also has a table at step 0.
    out = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False,
    )  # fmt: skip
    out.add_column("set and task", overflow="fold")
    for head in ("n", "top-1 / R@1", "5", "10", "rank", "MRR", "chance"):
        out.add_column(head, justify="right", no_wrap=True)
    previous = None
    for result in results:
        if result["set"] != previous:
            out.add_row(Text(result["set"], "bold"))
        previous = result["set"]
        out.add_row(f"  {result['task']}", *_cells(result))
        for split, metrics in result.get("splits", {}).items():
            out.add_row(f"    split {split}", *_cells(metrics))
    return out


def _cells(result: dict[str, Any]) -> list[str]:
    main = percent(main_metric(result))
    if result["interval"] is not None:
        low, high = result["interval"]
        main += f" [{percent(low)}, {percent(high)}]"
    shares = [percent(result[key]) if key in result else "" for key in ("r5" if "r5" in result else "top5", "r10")]
    rank = f"{result['median_rank']:g}" if "median_rank" in result else ""
    mrr = f"{result['mrr']:.3f}" if "mrr" in result else ""
    chance = "" if result["chance"] is None else percent(result["chance"])
    return ["" if result["n"] is None else str(result["n"]), main, *shares, rank, mrr, chance]


def percent(share: float) -> str:
    """A share in per cent, with a decimal more if it is below 1 %."""
    return f"{100 * share:.2f}" if 0 < share < 0.01 else f"{100 * share:.1f}"
