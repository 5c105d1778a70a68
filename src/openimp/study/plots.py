"""The plots on a study's page. They need matplotlib (`pip install openimp[plots]`)."""

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from openimp.common.errors import UserError
from openimp.study.outcome import Outcomes, mean_and_deviation, scores_by_set
from openimp.training.metrics_file import LayerUsage

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator
except ImportError:
    raise UserError("studies draw with matplotlib, which is not installed: pip install 'openimp[plots]'") from None

INK = "#222222"
MUTED = "#8a8a8a"
ACCENT = "#1f6f8b"


def plot_style() -> AbstractContextManager[None]:
    """The context to draw and save plots in."""
    style: Any = dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 8)
    style |= {"axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 130}
    return matplotlib.rc_context(style | {"figure.constrained_layout.use": True})


def draw_scores(outcomes: Outcomes, score: str) -> Figure:
    """A panel for the mean and for each evaluation set. Each bar is an arm's mean, each dot one seed.

    `score` names what is measured.
    """
    panels = scores_by_set(outcomes)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.2 + 2.6 * columns, rows * (0.75 + 0.3 * len(outcomes)) + 0.3))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, by_arm) in zip(axes.flat, panels.items()):
        for row, scores in enumerate(by_arm.values()):
            if scores:
                mean = statistics.mean(scores)
                axis.barh(row, mean, height=0.62, color=MUTED if title else ACCENT, alpha=0.35)
                axis.plot(scores, [row] * len(scores), "o", color=INK, markersize=3)
                axis.text(max(scores), row, f"  {mean:.1f}", va="center", color=INK)
        axis.set_title((title or "mean").replace("_", " "))
        axis.set_yticks(range(len(by_arm)), list(by_arm))
        axis.set_xlim(0, 1.18 * axis.get_xlim()[1])  # The text needs space on the right.
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"{score}, %; each dot is one seed", fontsize=8)
    return figure


def draw_against_flops(outcomes: Outcomes, curves: Sequence[Sequence[str]], score: str) -> Figure:
    """The mean score of each arm against its training FLOPs on a logarithmic axis, with the standard deviation.

    A line connects the arms of each of the `curves`. Its label has the parts that the names of its arms begin with.
    """
    figure = Figure(figsize=(9, 4.4))
    axis = figure.subplots()
    means = scores_by_set(outcomes)[""]
    for curve in curves:
        if arms := [arm for arm in curve if means[arm]]:
            flops = [statistics.mean(outcome.flops for outcome in outcomes[arm]) / 1e12 for arm in arms]
            shared_parts = os.path.commonprefix([arm.split(", ") for arm in arms])  # noqa: RUF071 (of lists)
            label = ", ".join(shared_parts) or min(arms, key=len)
            mean_scores, deviations = zip(*(mean_and_deviation(means[arm]) for arm in arms))
            axis.errorbar(flops, mean_scores, yerr=deviations, fmt="o-", linewidth=1, capsize=3, label=label)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_xlabel("training TFLOPs (logarithmic)")
    axis.set_ylabel(f"{score} over all sets, %")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def draw_cosines(cosines_by_arm: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """A heat map per arm of the mean cosine between the gradients of each pair of tasks."""
    figure = Figure(figsize=(1 + 2.9 * len(cosines_by_arm), 3))
    axes = figure.subplots(1, len(cosines_by_arm), squeeze=False)
    means_by_arm = {}
    for arm, cosines_by_pair in cosines_by_arm.items():
        means_by_arm[arm] = {pair: statistics.mean(cosines) for pair, cosines in cosines_by_pair.items()}
    largest = max(abs(mean) for means in means_by_arm.values() for mean in means.values())
    for axis, (arm, means) in zip(axes[0], means_by_arm.items()):
        tasks = list(dict.fromkeys(name for pair in means for name in pair.split("|")))
        grid = np.full((len(tasks), len(tasks)), np.nan)
        for pair, mean in means.items():
            a, b = map(tasks.index, pair.split("|"))
            for x, y in {(a, b), (b, a)}:
                grid[y, x] = mean
                ink = "white" if abs(mean) > 0.6 * largest else INK
                axis.text(x, y, f"{mean:.2f}", ha="center", va="center", fontsize=9, color=ink)
        image = axis.imshow(grid, cmap="RdBu", vmin=-largest, vmax=largest)
        axis.set_title(arm)
        axis.set_xticks(range(len(tasks)), tasks)
        axis.set_yticks(range(len(tasks)), tasks)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def draw_experts(usage: Mapping[str, Sequence[LayerUsage]]) -> Figure:
    """A heat map per sparse layer of the share of its gate weight that each modality gives to each expert."""
    layers = len(next(iter(usage.values())))
    figure = Figure(figsize=(1 + 3.2 * layers, 0.9 + 0.4 * len(usage)))
    axes = figure.subplots(1, layers, squeeze=False)
    for i, axis in enumerate(axes[0]):
        grid = np.array([modality[i].gate for modality in usage.values()])
        image = axis.imshow(grid, cmap="Blues", vmin=0, aspect="auto")
        axis.set_title(f"sparse layer {i + 1}")
        axis.set_yticks(range(len(usage)), list(usage))
        axis.set_xticks(range(grid.shape[1]), range(1, grid.shape[1] + 1))
        axis.set_xlabel("expert")
        figure.colorbar(image, ax=axis)
    return figure
