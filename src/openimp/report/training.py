"""What metrics.jsonl tells of a training: losses, pace, the mixture of tasks, and who uses which expert."""

from math import ceil
from typing import Any

import numpy as np

from openimp.planning.ledger import UNITS, short
from openimp.report.charts import Curve, heat, line_chart, percent
from openimp.report.markup import Child, Markup, join, table, tag

Lines = list[dict[str, Any]]
ROUTER = "router"
"""The part of a loss that gets a chart of its own, for beside the others it is small."""
EVEN = 0.01
"""Shares that differ from an even split by at most this much of it count as even."""


def losses(lines: Lines) -> Markup:
    """A chart for each task: its loss and, where it has several, their parts; and the routers' losses by task."""
    tasks = list(dict.fromkeys(task for line in lines for task in line["tasks"]))
    charts, routers = [], []
    for task in tasks:
        told = [line for line in lines if task in line["tasks"]]
        steps = [line["step"] for line in told]
        names = list(dict.fromkeys(name for line in told for name in line["tasks"][task] if name != "steps"))
        values = {name: [line["tasks"][task].get(name, np.nan) for line in told] for name in names}
        if ROUTER in values:
            routers.append(Curve(task, steps, values.pop(ROUTER)))
        if len(values) == 2:  # the loss and its only part
            values = {"loss": values["loss"]}
        charts.append(line_chart(task, [Curve(name, steps, found) for name, found in values.items()]))
    if routers:
        charts.append(line_chart("router losses", routers))
    note = "The light line is what was logged, each point the mean since the one before; the strong line is smoothed."
    return join(tag("p", note, class_="note"), tag("div", charts, class_="charts"))


def pace(lines: Lines) -> Markup:
    """Charts of the learning rate, the gradient's norm, examples a second, the time of a step, and the share of time
    spent on waiting."""
    steps = [line["step"] for line in lines]

    def chart(title: str, key: str, **options: Any) -> Markup:
        return line_chart(title, [Curve(title, steps, [line[key] for line in lines])], **options)

    charts = [
        chart("learning rate", "lr", smooth=False),
        chart("examples per second", "examples_per_s"),
        chart("waiting for data", "data_wait", shares=True),
        chart("gradient norm", "grad_norm"),
    ]
    if "step_p95" in lines[-1]:  # Runs of older versions do not say.
        curves = [
            Curve(name, steps, [line.get(key, np.nan) for line in lines])
            for name, key in (("median", "step_p50"), ("95th percentile", "step_p95"))
        ]
        charts.insert(2, line_chart("seconds a step", curves))
    return tag("div", charts, class_="charts")


def mixture(lines: Lines) -> Markup:
    """What each task had of the steps, examples, tokens and FLOPs."""
    totals = lines[-1]["totals"]
    whole = {unit: sum(units[unit] for units in totals.values()) for unit in UNITS}

    def cells(units: dict[str, int]) -> list[Child]:
        return [[short(units[unit]), " ", tag("small", percent(units[unit] / (whole[unit] or 1)))] for unit in UNITS]

    rows: list[list[Child]] = [[task, *cells(units)] for task, units in totals.items()]
    rows.append(["in all", *(short(whole[unit]) for unit in UNITS)])
    head = ["task", *("FLOPs" if unit == "flops" else unit for unit in UNITS)]
    return table(f"Spent up to step {lines[-1]['step']:,}, and the share of each task", head, rows)


def experts(lines: Lines) -> Markup | None:
    """Who uses which expert, averaged over the last quarter of the lines: a heat map for each sparse layer."""
    last = lines[-ceil(len(lines) / 4) :]
    names = list(dict.fromkeys(name for line in last for name in line["experts"]))
    if not names:
        return None
    usage = {name: _mean([line["experts"][name] for line in last if name in line["experts"]]) for name in names}
    loads = np.concatenate([layer["load"] for layers in usage.values() for layer in layers])
    even = all(
        np.abs(layer["load"] * len(layer["load"]) - 1).max() <= EVEN for layers in usage.values() for layer in layers
    )
    span = f"steps {last[0]['step']:,} to {last[-1]['step']:,}" if len(last) > 1 else f"step {last[0]['step']:,}"
    note = (
        f"Each row is a modality; its cells say how its gate weight is shared among the experts, over {span}. The "
        "darkest blue is twice the even share, or more; beside it, the share of the tokens that no expert took. "
    )
    if even:
        note += f"The load itself is even, {percent(float(loads.mean()))} each: here experts choose their tokens."
    maps = [
        _heat_map(usage, kind, layer)
        for kind in (("gate",) if even else ("gate", "load"))
        for layer in range(len(next(iter(usage.values()))))
    ]
    return join(tag("p", note, class_="note"), tag("div", maps, class_="maps"))


def _mean(told: list[list[dict[str, Any]]]) -> list[dict[str, np.ndarray]]:
    """By sparse layer, the mean over the lines of each of its figures."""
    return [{key: np.mean([layer[key] for layer in layers], axis=0) for key in layers[0]} for layers in zip(*told)]


def _heat_map(usage: dict[str, list[dict[str, np.ndarray]]], kind: str, layer: int) -> Markup:
    what = {"gate": "share of the gate weight", "load": "share of the filled slots"}[kind]
    rows: list[list[Child]] = []
    for name, layers in usage.items():
        shares = layers[layer][kind].tolist()
        # Of twice the even share, so that a colour means the same in every layer.
        cells = [heat(f"{100 * share:.0f}", share * len(shares) / 2, percent(share)) for share in shares]
        rows.append([name, *cells, percent(float(layers[layer]["dropped"]))])
    head = ["", *map(str, range(len(rows[0]) - 2)), "no expert"]
    return table(f"Sparse layer {layer + 1}: {what} by expert, per cent", head, rows, class_="heat")
