"""What a model can do: its metrics next to chance, its confusions, and example queries with their answers."""

from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image

from openimp.data.tables import Table
from openimp.evaluation.classification import Classified
from openimp.evaluation.results import main_metric, row_notes
from openimp.evaluation.retrieval import RetrievalResult
from openimp.report.charts import Curve, line_chart, nice_ticks

MAX_TABLE = 25
"""Maximum number of classes for which the confusion matrix is a table of numbers."""
MAX_MATRIX = 200
"""Maximum number of classes for which the confusion matrix is drawn as squares."""
MAX_CONFUSIONS = 12
"""Number of most frequent confusions that are listed."""
CASES = 2
"""Number of queries per kind: best, median and worst rank."""
ANSWERS = 5
"""Number of answers per query."""
Show = Callable[[str, int], "str | bytes | np.ndarray"]
"""Returns what a person sees of a modality's value in a row of the evaluation set's source."""


def section(results: list[dict[str, Any]], recorded: list[dict[str, Any]], notes: list[str]) -> dict[str, Any] | None:
    """The data of the section with the results; None if there is nothing to say.

    The `results` are in the table, the `notes` above it, and all `recorded` lines of results.jsonl in the charts.
    """
    if not results and not notes:
        return None
    values = []
    for result in results:
        values += [main_metric(result), *(result["interval"] or ()), result["chance"] or 0]
    notes = notes + [f"{result['set']}: {result['note']}" for result in results if "note" in result]
    return {
        "notes": notes,
        "results": results,
        "steps": list({result["step"] for result in results}),
        "scale": min(1.0, nice_ticks(0, max(values, default=1.0))[-1]),
        "row_notes": row_notes(results),
        "history": _history(recorded),
    }


def _history(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chart per evaluation set that was measured at several steps, with one curve per task."""
    sets: dict[str, dict[str, Curve]] = {}
    for result in recorded:
        task = result["task"].replace("->", "→")
        curve = sets.setdefault(result["set"], {}).setdefault(task, Curve(task, [], []))
        curve.steps.append(result["step"] or 0)
        curve.values.append(main_metric(result))
    return [
        line_chart(name, list(curves.values()), shares=True)
        for name, curves in sets.items()
        if any(len(curve.steps) > 1 for curve in curves.values())
    ]


def confusion(name: str, classified: Classified) -> dict[str, Any]:
    """The confusion matrix and the most frequent confusions. With many classes, there is no matrix."""
    classes = [str(label) for label in classified.classes]
    total_K = np.bincount(classified.truth, minlength=len(classes))
    wrong = classified.truth != classified.predicted
    wrong_pairs = zip(classified.truth[wrong].tolist(), classified.predicted[wrong].tolist())
    frequent = sorted(Counter(wrong_pairs).items(), key=lambda pair_and_count: (-pair_and_count[1], pair_and_count[0]))
    shown = {
        "title": f"{name}: {classified.query} → {classified.target}",
        "classes": classes,
        "form": None,
        "correct": int((~wrong).sum()),
        "total": len(wrong),
        "frequent": [(classes[i], classes[j], count, total_K[i]) for (i, j), count in frequent[:MAX_CONFUSIONS]],
    }
    if len(classes) > MAX_MATRIX:  # A matrix of 10,000 classes would need gigabytes.
        return shown
    counts_KK = classified.confusion()
    return shown | {
        "form": "table" if len(classes) <= MAX_TABLE else "squares",
        "counts": counts_KK.tolist(),
        "shares": (counts_KK / np.maximum(1, total_K[:, None])).tolist(),
        "cells": np.argwhere(counts_KK).tolist(),
    }


def retrieval(name: str, result: RetrievalResult, source: Table, show: Show) -> dict[str, Any]:
    """Example queries of one direction: those with the best, the median and the worst rank."""
    order = np.argsort(result.rank, kind="stable")
    middle = max(0, (len(result.rank) - CASES) // 2)
    kinds = {"best": order[:CASES], "median": order[middle : middle + CASES], "worst": order[-CASES:]}
    chosen: dict[int, str] = {}
    for kind, queries in kinds.items():
        for query in queries.tolist():
            chosen.setdefault(query, kind)  # If there are few queries, one may be of two kinds.

    def value(modality: str, row: int) -> dict[str, Any]:
        return display(show(modality, row), f"{modality}: {source.row_name(row)}")

    def case(query: int, kind: str) -> dict[str, Any]:
        rank = int(result.rank[query])
        answers = [
            {
                "rank": place if place <= ANSWERS else rank,  # Behind the first answers comes the best correct one.
                "late": place > ANSWERS,
                "correct": answer.correct,
                "similarity": answer.similarity,
                "value": value(result.target, int(result.candidate_row[answer.candidate])),
            }
            for place, answer in enumerate(result.answers(query, ANSWERS), 1)
        ]
        query_value = value(result.query, int(result.query_row[query]))
        return {"kind": kind, "rank": rank, "query": query_value, "answers": answers}

    cases = [case(query, kind) for query, kind in chosen.items()]
    return {"title": f"{name}: {result.query} → {result.target}", "metrics": result.metrics(), "cases": cases}


def display(shown: str | bytes | np.ndarray, label: str) -> dict[str, Any]:
    """What the page shows of a text, an encoded WebP picture, or an array, with a label for the tooltip."""
    if isinstance(shown, str):
        return {"label": label, "text": shown}
    if isinstance(shown, np.ndarray):
        return {"label": label, "text": f"{' × '.join(map(str, shown.shape))} numbers"}
    with PIL.Image.open(BytesIO(shown)) as picture:
        data = b64encode(shown).decode()
        return {"label": label, "size": picture.size, "picture": f"data:image/webp;base64,{data}"}
