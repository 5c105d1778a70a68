"""The plots on a study's page. They need matplotlib (`pip install openimp[plots]`)."""

import os
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from openimp.common.errors import UserError
from openimp.study.outcome import Outcomes, mean_and_deviation, scores_by_set

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
        end = 1.18 * axis.get_xlim()[1]  # The text needs space on the right.
        axis.set_xlim(0, end)
        axis.set_xticks([tick for tick in axis.get_xticks() if tick <= min(end, 100)])
    axes[0][0].invert_yaxis()
    figure.supxlabel(f"{score}, %; each dot is one seed", fontsize=8)
    return figure


def draw_against_flops(outcomes: Outcomes, curves: Sequence[Sequence[str]], score: str) -> Figure:
    """The mean score of each arm against its training FLOPs on a logarithmic axis, with the standard deviation.

    A line connects the arms of each of the `curves`. The line's label is the common beginning of its arms' names.
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
