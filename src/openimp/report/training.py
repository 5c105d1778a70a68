"""What metrics.jsonl says about a training run: losses, throughput, the mixture of tasks, and the use of experts."""

from typing import Any

import numpy as np

from openimp.report.charts import Curve, line_chart
from openimp.training.metrics_file import MetricsLine

ROUTER = "router"
"""The name of the router loss. It gets its own chart, because it is much smaller than the other parts of a loss."""


def sections(metrics: list[MetricsLine]) -> dict[str, Any]:
    """The data of the sections about the training; None for the experts of a dense model."""
    if not metrics:
        return {}
    return {
        "Losses": losses(metrics),
        "Training": optimization(metrics),
        "Mixture": {"step": metrics[-1].step, "tasks": metrics[-1].totals},
        "Experts": experts(metrics),
    }


def losses(metrics: list[MetricsLine]) -> list[dict[str, Any]]:
    """One chart per task with its loss and, if it has several parts, these; and one chart of all router losses."""
    charts = []
    routers = []
    for task in dict.fromkeys(task for line in metrics for task in line.tasks):
        lines = [line for line in metrics if task in line.tasks]
        steps: list[float] = [line.step for line in lines]
        names = dict.fromkeys(name for line in lines for name in line.tasks[task] if name != "steps")
        values_by_name = {name: [line.tasks[task].get(name, np.nan) for line in lines] for name in names}
        if ROUTER in values_by_name:
            routers.append(Curve(task, steps, values_by_name.pop(ROUTER)))
        if len(values_by_name) == 2 and "loss" in values_by_name:  # A single part shows nothing more than the loss.
            values_by_name = {"loss": values_by_name["loss"]}
        charts.append(line_chart(task, [Curve(name, steps, values) for name, values in values_by_name.items()]))
    return [*charts, line_chart("router losses", routers)] if routers else charts


def optimization(metrics: list[MetricsLine]) -> list[dict[str, Any]]:
    """Charts of the learning rate, the gradient norm and the speed of training."""
    steps: list[float] = [line.step for line in metrics]

    def curve(name: str, key: str) -> Curve:
        return Curve(name, steps, [getattr(line, key) for line in metrics])

    return [
        line_chart("learning rate", [curve("learning rate", "lr")]),
        line_chart("gradient norm", [curve("gradient norm", "grad_norm")]),
        line_chart("examples per second", [curve("examples per second", "examples_per_s")]),
        line_chart("seconds per step", [curve("median", "step_p50"), curve("95th percentile", "step_p95")]),
        line_chart("waiting for data", [curve("waiting for data", "data_wait")], shares=True),
    ]


def experts(metrics: list[MetricsLine]) -> dict[str, Any] | None:
    """How each modality uses the experts of each sparse layer, averaged over the last lines.

    The maps are of the gate weights, because all loads are equal if experts choose tokens (expert choice).
    """
    # Those that end in the last quarter of the steps.
    last_lines = [line for line in metrics if line.step > 0.75 * metrics[-1].step]
    modalities = list(dict.fromkeys(name for line in last_lines for name in line.experts))
    if not modalities:
        return None

    def mean(key: str) -> np.ndarray:
        """Over the lines: (modalities, layers, experts), or (modalities, layers) of `dropped`."""
        means = []
        for name in modalities:
            usages = [line.experts[name] for line in last_lines if name in line.experts]
            means.append(np.mean([[getattr(layer, key) for layer in usage] for usage in usages], axis=0))
        return np.stack(means)

    gate = mean("gate")
    dropped = mean("dropped")
    used_experts = (mean("load") > 0).sum(-1)  # With experts by stem, only those of one stem.
    maps = []
    for i in range(gate.shape[1]):
        rows = list(zip(modalities, gate[:, i].tolist(), used_experts[:, i].tolist(), dropped[:, i].tolist()))
        maps.append({"layer": i + 1, "rows": rows})
    return {"first": last_lines[0].step, "last": last_lines[-1].step, "maps": maps}
