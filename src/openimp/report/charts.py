"""Computes the SVG charts that templates/charts.html draws.

Coordinates are in the units of a chart's viewBox; y grows downward. A curve has a class instead of a color. style.css
gives each class one color for light mode and one for dark mode.
"""

from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

from openimp.evaluation import results

WIDTH = 230
"""Width of the area in which a line chart draws its curves."""
HEIGHT = 133
"""Height of that area."""
COLORS = 8
"""Number of curve colors in style.css. The ninth curve has the color of the first."""
MAX_POINTS = 240
"""Maximum number of points per curve. In longer curves, neighboring points are averaged."""
MAX_DOTS = 60
"""Maximum number of points of a curve whose points have tooltips."""
MAX_VALUE = 1e300
"""Larger values are left out, like infinite ones: the arithmetic for the axes would overflow."""


@dataclass(frozen=True)
class Curve:
    """A named series of values, one per entry of `steps`."""

    name: str
    steps: list[float]
    values: list[float]


def number(value: float) -> str:
    """Formats a number with about three digits: 7.5e-4, 0.012, 3.46, 128, 1234, 5.6e5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):.3g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def percent(share: float) -> str:
    """Formats a share as a percentage: 0.41%, 3.5%, 57.4%."""
    return f"{results.percent(share)}%"


def line_chart(title: str, curves: list[Curve], shares: bool = False) -> dict[str, Any]:
    """Curves over training steps, with axes that span their finite values; other values are left out.

    `shares` are shown as percentages.
    """
    form = percent if shares else number
    colored = [(f"c{i % COLORS}", _finite(curve)) for i, curve in enumerate(curves)]
    colored = [(color, curve) for color, curve in colored if len(curve.steps)]
    if not colored:
        return {"title": title, "curves": []}
    all_steps = np.concatenate([curve.steps for _, curve in colored])
    all_values = np.concatenate([curve.values for _, curve in colored])
    first_step = all_steps.min()
    last_step = all_steps.max()
    low = all_values.min()
    high = all_values.max()
    ticks = nice_ticks(0.0 if 0 < low <= high / 2 else low, high)

    def y_of(values: Any) -> Any:
        return HEIGHT * (1 - (values - ticks[0]) / (ticks[-1] - ticks[0]))

    drawn = []
    for color, curve in colored:
        x = WIDTH * (np.asarray(curve.steps) - first_step) / max(last_step - first_step, 1)
        values = np.asarray(curve.values)
        tips = [f"{curve.name}, step {step:,.0f}: {form(value)}" for step, value in zip(curve.steps, values)]
        start = f"{form(values[0])} at step {curve.steps[0]:,.0f}"
        end = f"{form(values[-1])} at step {curve.steps[-1]:,.0f}"
        drawn.append(
            {
                "color": color,
                "name": curve.name,
                "path": path(x, y_of(values)),
                "dots": list(zip(x.round(1), y_of(values).round(1), tips)) if len(tips) <= MAX_DOTS else [],
                "last": form(values[-1]),
                "span": f"{curve.name} from {start} to {end}",
            }
        )
    return {
        "title": title,
        "curves": drawn,
        "size": (WIDTH, HEIGHT),
        "steps": [f"{step:,.0f}" for step in sorted({first_step, last_step})],
        "ticks": [(round(y_of(tick), 1), f"{100 * tick:.3g}%" if shares else number(tick)) for tick in ticks],
    }


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to six evenly spaced round numbers that span the values; if `low` equals `high`, a range around it."""
    size = max(abs(low), abs(high))
    if size < 1e-200:
        low = 0.0
        high = 1.0
    elif high - low <= 1e-9 * size:
        low -= size / 2
        high += size / 2
    quarter = (high - low) / 4
    power_of_ten = 10.0 ** floor(log10(quarter))
    step = power_of_ten * next(f for f in (1, 2, 2.5, 5, 10) if quarter <= f * power_of_ten * (1 + 1e-9))
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
