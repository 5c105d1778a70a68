"""What a model can do: figures beside chance, who is taken for whom, and queries with their answers, to look at."""

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import PIL.Image

from openimp.data.tables import Table
from openimp.evaluation.classes import Classified
from openimp.evaluation.figures import first_figure
from openimp.evaluation.retrieval import Retrieved
from openimp.report.charts import Curve, heat, line_chart, matrix, nice_ticks, percent, series, share_bar
from openimp.report.markup import Child, Markup, join, table, tag

LABELLED = 25
"""Classes up to which a confusion matrix is a table of numbers."""
SQUARES = 200
"""Classes up to which a larger one is drawn."""
LISTED = 12
"""The most frequent confusions that are named."""
CASES = 2
"""Queries of each kind: the best, the median and the worst by rank."""
ANSWERS = 5
"""Answers of a query."""
LEGEND = tag(
    "p",
    "Some queries of each set and direction, chosen by the rank of their best right answer: the best, the median and "
    "the worst. Beside each stand its first five answers with their similarity, and, if none of these is right, the "
    "best right one at its rank.",
    class_="note",
)
Show = Callable[[str, int], "str | bytes | np.ndarray"]
"""What a person sees of a modality in a row of the set's source."""


def figures(results: list[dict[str, Any]]) -> Markup:
    """The figures of the evaluation sets, beside chance."""
    top = min(1.0, nice_ticks(0, max(max(result["interval"][1], result["chance"]) for result in results))[-1])
    steps = {result["step"] for result in results}
    rows: list[list[Child]] = []
    for result in results:
        retrieval = result["type"] == "retrieval"
        first, (low, high), chance = first_figure(result), result["interval"], result["chance"]
        fifth = "r5" if retrieval else "top5"  # Nearest neighbours rank no classes, so a probe has none.
        task = arrow(result["task"]) + ("" if len(steps) == 1 else f", step {result['step']}")
        rows.append(
            [
                [_breakable(result["set"]), tag("small", task)],
                [tag("b", percent(first)), tag("small", f"{percent(low)} to {percent(high)}")],
                share_bar(first, low, high, chance, top),
                percent(chance),
                f"{first / chance:.1f}×" if chance else "",
                percent(result[fifth]) if fifth in result else "",
                percent(result["r10"]) if retrieval else "",
                f"{result['median_rank']:g}" if retrieval else "",
                f"{result['mrr']:.3f}" if retrieval else "",
                [f"{result['n']:,}", tag("small", f"of {result['candidates']:,}")],
            ]
        )
    scale = f"0 to {100 * top:.3g}%"
    head = ["set", "R@1, top-1 or mAP", scale, "chance", "× chance", "at 5", "at 10", "median rank", "MRR", "items"]
    caption = "" if steps == {None} or len(steps) > 1 else f"At step {steps.pop():,}. "
    caption += (
        "R@1 of retrieval, top-1 of classes, or mAP where a row has any number of them, with the 95% bootstrap "
        "interval over the items, which says nothing of other seeds; the red mark is chance. At the end, the items and "
        "the candidates for each."
    )
    skipped = {result["set"]: result["skipped"] for result in results if result["skipped"]}
    if skipped:
        caption += " Unreadable rows left out: " + ", ".join(f"{name} {n:,}" for name, n in skipped.items()) + "."
    return table(caption, head, rows, class_="figures")


def history(results: list[dict[str, Any]]) -> Markup | None:
    """How R@1, top-1 and mAP came to be, a chart for each set, where a run was measured more than once."""
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for result in results:
        of_set = points.setdefault(result["set"], {})
        of_set.setdefault(arrow(result["task"]), []).append((result["step"] or 0, first_figure(result)))
    charts = []
    for name, tasks in points.items():
        curves = [Curve(task, [x for x, _ in found], [y for _, y in found]) for task, found in tasks.items()]
        if len(curves[0].steps) > 1:
            charts.append(line_chart(name, curves, shares=True, smooth=False))
    return join(tag("h3", "Results over the training"), tag("div", charts, class_="charts")) if charts else None


def confusion(found: Classified) -> Markup:
    """Which classes are taken for which: all counts as a table, or for many classes a drawing, and the commonest."""
    counts, names = found.confusion(), [str(name) for name in found.classes]
    parts: list[Child] = []
    if len(names) <= LABELLED:
        shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
        rows = [
            [name, *(heat(str(count), share, f"{name} taken for {other}: {count}") if count else "0"
                     for other, count, share in zip(names, counts[i].tolist(), shares[i].tolist()))]
            for i, name in enumerate(names)
        ]  # fmt: skip
        caption = "Confusion matrix: how many of a class (row) were taken for each class (column)"
        head = ["", *(tag("span", name, title=name) for name in names)]
        parts.append(table(caption, head, rows, class_="heat confusion"))
    elif len(names) <= SQUARES:
        label = f"Confusion matrix of {len(names)} classes: {counts.trace():,} of {counts.sum():,} on the diagonal"
        note = "Rows are the classes, columns what they were taken for, in the same order; the diagonal is right."
        drawing, told = matrix(counts, names, label), tag("figcaption", label, ". ", note)
        parts.append(tag("figure", drawing, told, class_="squares"))
    wrong = counts - np.diag(counts.diagonal())
    order = [divmod(int(i), len(names)) for i in np.argsort(-wrong, axis=None, kind="stable")[:LISTED]]
    rows = [[names[i], names[j], f"{wrong[i, j]:,}", f"{counts[i].sum():,}"] for i, j in order if wrong[i, j]]
    if rows:
        parts.append(table("The most frequent confusions", ["class", "taken for", "times", "of"], rows, words=2))
    return tag("div", parts, class_="confusions")


def retrieval(found: Retrieved, source: Table, show: Show) -> Markup:
    """Some queries of one direction with their first answers: the best, the median and the worst by rank."""
    order, middle = np.argsort(found.rank, kind="stable"), max(0, (len(found.rank) - CASES) // 2)
    kinds = {"best": order[:CASES], "median": order[middle : middle + CASES], "worst": order[-CASES:]}
    chosen: dict[int, str] = {}
    for kind, queries in kinds.items():
        for query in queries.tolist():
            chosen.setdefault(query, kind)  # Of few queries, one may be of two kinds.
    cases = [_case(found, source, show, query, kind) for query, kind in chosen.items()]
    said = found.figures()
    note = (
        f"Rank of the best right answer among {said['candidates']:,}: median {said['median_rank']:g}. "
        f"R@1 {percent(said['r1'])}, chance {percent(said['chance'])}."
    )
    return tag("div", tag("p", note, class_="note"), tag("div", cases, class_="cases"))


def _case(found: Retrieved, source: Table, show: Show, query: int, kind: str) -> Markup:
    rank = int(found.rank[query])

    def thing(modality: str, row: int) -> Markup:
        return display(show(modality, row), f"{modality}: {source.where(row)}")

    items = []
    for place, answer in enumerate(found.answers(query, ANSWERS), 1):
        late = place > ANSWERS
        position = rank if late else place
        told = tag("span", f"{position:,}", " ✓ right" if answer.right else None, class_="place")
        head = tag("div", told, tag("span", f"{answer.similarity:.2f}", title="similarity"), class_="about")
        state = "late" if late else "right" if answer.right else None
        shown = thing(found.target, int(found.target_row[answer.candidate]))
        items.append(tag("li", head, shown, value=position, class_=state))
    about = tag("div", tag("span", kind, class_="kind"), tag("span", f"rank {rank:,}"), class_="about")
    asked = tag("div", about, thing(found.query, int(found.query_row[query])), class_="query")
    answers = tag("ol", items, aria_label="answers")
    return tag("article", asked, answers, class_="case", aria_label=f"{kind}, rank {rank:,}")


def display(shown: str | bytes | np.ndarray, label: str) -> Markup:
    """A text, a picture or numbers, as a modality shows a value."""
    if isinstance(shown, np.ndarray):
        return series(shown, label)
    if isinstance(shown, str):
        return tag("p", shown, class_="words", title=label)
    with PIL.Image.open(BytesIO(shown)) as picture:
        width, height = picture.size
    data = f"data:image/webp;base64,{b64encode(shown).decode()}"
    class_ = "wide" if width > 2 * height else None
    return tag("img", src=data, alt=label, title=label, width=width, height=height, class_=class_)


def arrow(task: str) -> str:
    """`image -> text` with an arrow."""
    return task.replace(" -> ", " → ")


def _breakable(name: str) -> Markup:
    """A name that a narrow column breaks behind its underscores."""
    first, *rest = name.split("_")
    return join(first, [["_", tag("wbr"), piece] for piece in rest])
