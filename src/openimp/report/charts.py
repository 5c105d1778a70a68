"""Computes the SVG charts that templates/charts.html draws.

Coordinates are in the units of a chart's viewBox; y grows downward. A curve has a class instead of a color. style.css
gives each class one color for light mode and one for dark mode.
"""

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

from openimp.evaluation import results

WIDTH, HEIGHT = 230, 133
"""Size of the area in which a line chart draws its curves."""
COLORS = 8
"""Number of curve colors in style.css. The ninth curve has the color of the first."""
MAX_POINTS = 240
"""Maximum number of points per curve. In longer curves, neighboring points are averaged."""
MAX_DOTS = 60
"""Maximum number of points up to which each has a tooltip."""
MAX_VALUE = 1e300
"""Larger values are left out, like infinite ones: the arithmetic for the axes would overflow."""


@dataclass(frozen=True)
class Curve:
    """A named series of values over training steps, of which there are as many."""

    name: str
    steps: list[float]
    values: list[float]


def number(value: float) -> str:
    """Formats a number with about three digits: 7.5e-4, 0.012, 3.46, 128, 1234, 5.6e5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):.3g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(share: float) -> str:
    """Formats a share as a percentage: 0.41%, 3.5%, 57.4%."""
    return f"{results.percent(share)}%"


def line_chart(title: str, curves: list[Curve], shares: bool = False, smooth: bool = True) -> dict[str, Any]:
    """Curves over training steps, with axes that span their finite values; other values are left out.

    `shares` are shown as percentages. With `smooth`, curves with 12 or more points get a smoothed version on top.
    """
    form = percent if shares else number
    shown = [(f"c{i % COLORS}", _finite(curve)) for i, curve in enumerate(curves)]
    shown = [(color, curve) for color, curve in shown if len(curve.steps)]
    if not shown:
        return {"title": title, "curves": []}
    all_steps = np.concatenate([curve.steps for _, curve in shown])
    all_values = np.concatenate([curve.values for _, curve in shown])
    first, last = all_steps.min(), all_steps.max()
    low, high = all_values.min(), all_values.max()
    ticks = nice_ticks(0.0 if 0 < low <= high / 2 else low, high)

    def right(steps: Any) -> Any:
        return WIDTH * ((steps - first) / (last - first) if last > first else 0 * steps + 0.5)

    def down(values: Any) -> Any:
        return HEIGHT * (1 - (values - ticks[0]) / (ticks[-1] - ticks[0]))

    drawn = []
    for color, curve in shown:
        x = right(np.asarray(curve.steps))
        y = np.asarray(curve.values)
        line = smoothed(y) if smooth else y
        tips = [f"{curve.name}, step {step:,.0f}: {form(value)}" for step, value in zip(curve.steps, y)]
        span = f"from {form(y[0])} at step {curve.steps[0]:,.0f} to {form(line[-1])} at step {curve.steps[-1]:,.0f}"
        drawn.append(
            {
                "color": color,
                "name": curve.name,
                "raw": None if line is y else path(x, down(y)),
                "path": path(x, down(line)),
                "dots": list(zip(x.round(1), down(y).round(1), tips)) if len(tips) <= MAX_DOTS else [],
                "last": form(line[-1]),
                "span": f"{curve.name} {span}",
            }
        )
    return {
        "title": title,
        "curves": drawn,
        "size": (WIDTH, HEIGHT),
        "steps": [f"{step:,.0f}" for step in ([first, last] if last > first else [first])],
        "ticks": [(round(down(tick), 1), f"{100 * tick:.3g}%" if shares else number(tick)) for tick in ticks],
    }


def series(numbers: np.ndarray) -> list[str]:
    """The paths of small curves without axes in a box of 120 x 60 units, of numbers (N,) or (N, curves).

    There are at most eight; none if the numbers have another shape, or are not finite.
    """
    curves = numbers[:, None] if numbers.ndim == 1 else numbers
    if curves.ndim != 2 or not np.isfinite(curves).all() or len(curves) < 2:
        return []
    x = np.linspace(2, 118, len(curves))
    y = 58 - 56 * (curves - curves.min()) / (np.ptp(curves) or 1)
    return [path(*_thinned(x, column)) for column in y.T[:COLORS]]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Values (N,) smoothed by a centered Hann window over a tenth of them; `values` itself if N < 12."""
    if len(values) < 12:
        return values
    reach = max(1, len(values) // 20)
    weights = np.hanning(2 * reach + 3)[1:-1]
    sums, total = (np.convolve(each, weights)[reach:-reach] for each in (values, np.ones_like(values)))
    return sums / total


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to seven evenly spaced round numbers that span the values; if `low` equals `high`, a range around it."""
    size = max(abs(low), abs(high))
    if size < 1e-200:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * size:
        low, high = low - size / 2, high + size / 2
    raw = (high - low) / 4
    scale = 10.0 ** floor(log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * scale * (1 + 1e-9))
    return [i * step for i in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def path(x: np.ndarray, y: np.ndarray) -> str:
    """The `d` attribute of a path through the points."""
    return "M" + " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))


def _finite(curve: Curve) -> Curve:
    values = np.array(curve.values, float)
    finite = np.abs(values) < MAX_VALUE  # False for NaN.
    steps, values = _thinned(np.array(curve.steps, float)[finite], values[finite])
    return Curve(curve.name, steps.tolist(), values.tolist())


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= MAX_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts
