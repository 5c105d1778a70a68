"""What all kinds of evaluation report: which rows counted, accuracy, an interval, a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from openimp.common.errors import UserError
from openimp.data.files import stable_hash
from openimp.data.tables import Table, Unreadable
from openimp.encoding.items import Encoded

RESAMPLES = 10_000
"""Bootstrap samples of an interval of accuracies."""
RANKED_RESAMPLES = 200
"""The same of average precisions, for each of which all scores are summed up again."""
WEIGHTS = 2**20
"""Weights of examples that are drawn at once, which limits the memory of an interval of average precisions."""
FIRST = ("r1", "top1", "map")
"""The figure that stands for a result: of retrieval, of one class a row, of any number of classes."""
NAMED = 20
"""Unreadable rows that a result names; it counts them all."""


@dataclass(frozen=True)
class Readable:
    """The rows of a source that count.

    Attributes:
        row: (R,) int64, their numbers.
        skipped: "row: reason" of each other one.
        content: names all that was read of them, 32 digits: other bytes, texts, labels or rows, another name.
    """

    row: np.ndarray
    skipped: list[str]
    content: str


def readable_rows(table: Table, sides: list[Encoded], where: str, labels: Sequence[Any] | None = None) -> Readable:
    """The rows whose every side, and label where there are labels, can be read.

    Raises:
        UserError: there is none.
    """
    bad: dict[int, str] = {}
    for side in sides:
        bad = side.bad | bad
    bad |= {row: label.reason for row, label in enumerate(labels or ()) if isinstance(label, Unreadable)}
    skipped = [f"{table.row_name(row)}: {bad[row]}" for row in sorted(bad)]
    rows = np.setdiff1d(np.arange(len(table)), list(bad))
    if not len(rows):
        raise UserError(f"{where}: none of the {len(table)} rows can be read; the first: {skipped[0]}")
    content = stable_hash((*(side.keys[row] for side in sides), labels and labels[row]) for row in rows)
    return Readable(rows, skipped, content)


def classes_in(labels: Sequence[Any], column: str) -> list[Any]:
    """The distinct labels that can be read, in the order that classification heads have.

    Raises:
        UserError: a row has a list, or no row can be read; the message begins with `column`.
    """
    try:
        classes = {label for label in labels if not isinstance(label, Unreadable)}
    except TypeError:
        raise UserError(f"{column} holds lists; it needs one class a row") from None
    if not classes:
        raise UserError(f"{column} cannot be read in any row")
    return sorted(classes, key=lambda label: (str(type(label)), label))


def accuracy(hit: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Any]:
    """Top-1 with its 95 % interval, the mean over the classes of their top-1, and chance.

    Args:
        hit: (N,) bool, whether an example's class was found.
        truth: (N,) int64, its class.
        classes: how many there are to choose from.
    """
    return {
        "n": len(hit),
        "candidates": classes,
        "top1": float(hit.mean()),
        "interval": interval(hit),
        "per_class": float(np.mean([hit[truth == i].mean() for i in np.unique(truth)])),
        "chance": 1 / classes,
    }


def interval(hit: np.ndarray, weight: np.ndarray | None = None) -> list[float]:
    """The 95 % bootstrap interval [low, high] of the mean of hits (N,) bool, with a fixed seed.

    N hits or misses drawn with replacement are a binomial draw, so no index is drawn. It tells how much hangs on the
    choice of queries, nothing of the training's seed, and takes queries for independent; with all
    hits or none it has no width.

    Args:
        hit: whether a query was answered.
        weight: (N,) how much each counts; those of equal weight are drawn from among themselves.
    """
    rng, weight = np.random.default_rng(0), np.ones(len(hit)) if weight is None else weight
    found = np.zeros(RESAMPLES)
    for value in np.unique(weight):
        some = hit[weight == value]
        found += value * rng.binomial(len(some), some.mean(), RESAMPLES)
    return [float(x) for x in np.quantile(found / weight.sum(), [0.025, 0.975])]


def average_precision(score_NK: np.ndarray, hot_NK: np.ndarray) -> dict[str, Any]:
    """The mean over the classes of their average precision, its 95 % interval over the examples, and chance.

    A class' average precision is the mean, over its examples, of the share of them among all examples with at least
    the same score: scikit-learn's `average_precision_score`. A class without an example does not count. The interval is
    the Bayesian bootstrap's (Rubin, 1981): weights drawn for the examples leave no class without any, as draws would.

    Args:
        score_NK: how much each example is like each class; NaN stands last.
        hot_NK: bool, the classes of each.
    """
    columns = [(score, hot) for score, hot in zip(score_NK.T, hot_NK.T) if hot.any()]
    rng, found = np.random.default_rng(0), np.ones(0)
    while (left := 1 + RANKED_RESAMPLES - len(found)) > 0:
        weight_NR = rng.standard_exponential((len(hot_NK), min(left, max(1, WEIGHTS // len(hot_NK)))))
        if not len(found):
            weight_NR[:, 0] = 1
        means_R = np.mean([_average_precision(score, hot, weight_NR) for score, hot in columns], axis=0)
        found = np.append(found, means_R)
    return {
        "n": len(hot_NK),
        "candidates": hot_NK.shape[1],
        "map": float(found[0]),
        "interval": [float(x) for x in np.quantile(found[1:], [0.025, 0.975])],
        # Of examples in random order it is about the share that has the class.
        "chance": float(np.mean([hot.mean() for _, hot in columns])),
    }


def _average_precision(score_N: np.ndarray, hot_N: np.ndarray, weight_NR: np.ndarray) -> np.ndarray:
    """(R,) of one class, with each of several weights of the examples. P of them have the class."""
    order = np.argsort(-score_N, kind="stable")
    cost_N, hot_N, weight_NR = -score_N[order], hot_N[order], weight_NR[order]
    cost_P, own_PR = cost_N[hot_N], weight_NR[hot_N]
    # Those that tie are all among the first.
    right_PR = own_PR.cumsum(0)[np.searchsorted(cost_P, cost_P, side="right") - 1]
    seen_PR = weight_NR.cumsum(0)[np.searchsorted(cost_N, cost_P, side="right") - 1]
    return (own_PR * right_PR / seen_PR).sum(0) / own_PR.sum(0)


def skipped_fields(skipped: list[str]) -> dict[str, Any]:
    """How many rows could not be read, and which, for a result."""
    return {"skipped": len(skipped), "skipped_rows": skipped[:NAMED]}


def first_figure(result: dict[str, Any]) -> float:
    """The figure of a result that is compared: R@1, top-1, or the mean average precision."""
    found: float = next(result[key] for key in FIRST if key in result)
    return found


def table(results: list[dict[str, Any]]) -> RichTable:
    """Results of `evaluate` as a table of at most 80 columns, figures in per cent but rank and MRR.

    A line names the set, and one for each of its tasks follows, and one for each split of it.
    """
    out = RichTable(
        title="Evaluation", title_justify="left", caption=_caption(results), caption_justify="left",
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
        for split, figures in result.get("splits", {}).items():
            out.add_row(f"    split {split}", *_cells(figures))
    return out


def _cells(result: dict[str, Any]) -> list[str]:
    low, high = result["interval"]
    first = f"{_percent(first_figure(result))} [{_percent(low)}, {_percent(high)}]"
    shares = [_percent(result[key]) if key in result else "" for key in ("r5" if "r5" in result else "top5", "r10")]
    rank = [f"{result['median_rank']:g}", f"{result['mrr']:.3f}"] if "mrr" in result else ["", ""]
    return [str(result["n"]), first, *shares, *rank, _percent(result["chance"])]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}" if 0 < share < 0.01 else f"{100 * share:.1f}"


def _caption(results: list[dict[str, Any]]) -> str:
    text = "per cent, with a 95 % interval; 5, 10: top-5 or R@5, R@10; rank: the median"
    skipped = {result["set"]: result["skipped"] for result in results if result["skipped"]}
    if skipped:
        text += "\nunreadable rows left out: " + ", ".join(f"{name} {count}" for name, count in skipped.items())
    return text
