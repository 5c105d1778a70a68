"""Charts as inline SVG: curves over steps, a share beside chance, a matrix of counts, a small series of numbers.

Colours come from the page's style sheet, by class, so that they suit its light and its dark mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

from openimp.report.markup import Markup, join, tag

WIDTH, HEIGHT = 290, 165
LEFT, RIGHT, TOP, BOTTOM = 54, 6, 8, 24
COLOURS = 8
"""Colours of curves in the style sheet; more curves begin anew."""
POINTS = 240
"""Points of a curve at most; of more, neighbours are averaged."""
MARKED = 60
"""Points up to which each is marked, and tells its value."""


@dataclass(frozen=True)
class Curve:
    """A named series (N,) of numbers over steps (N,)."""

    name: str
    steps: list[float]
    values: list[float]


def number(value: float) -> str:
    """A number in as few digits as a chart needs: 7.5e-4, 0.012, 3.46, 128, 1234, 5.6e5."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):.3g}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(share: float) -> str:
    """A share in per cent: 0.41%, 3.5%, 57.4%."""
    return f"{100 * share:.2f}%" if 0 < share < 0.01 else f"{100 * share:.1f}%"


def line_chart(title: str, curves: list[Curve], shares: bool = False, smooth: bool = True) -> Markup:
    """Curves over the steps in one frame: a light line as they are, and a strong one smoothed, if they have 12 points.

    Args:
        title: what is drawn.
        curves: values that are not finite are left out.
        shares: the values are shares, told in per cent.
        smooth: whether there is anything to smooth.
    """
    form = percent if shares else number
    drawn = [(f"c{i % COLOURS}", curve.name, *_points(curve)) for i, curve in enumerate(curves)]
    drawn = [curve for curve in drawn if len(curve[2])]
    if not drawn:
        return tag("figure", tag("figcaption", title), tag("p", "No finite values."), class_="chart")
    frame = _Frame(np.concatenate([x for _, _, x, _ in drawn]), np.concatenate([y for *_, y in drawn]))
    parts = [frame.axes((lambda tick: f"{100 * tick:.3g}%") if shares else number)]
    told, legend = [], []
    for colour, name, x, y in drawn:
        even = smoothed(y) if smooth else y
        curved = even is not y
        parts.append(tag("path", d=frame.path(x, y), class_=f"{'raw' if curved else 'curve'} {colour}"))
        for step, value in zip(x, y) if len(x) <= MARKED else ():
            across, down = frame.place(step, value)
            tip = tag("title", f"{name}, step {step:,.0f}: {form(value)}")
            parts.append(tag("circle", tip, cx=f"{across:.1f}", cy=f"{down:.1f}", r=2.2, class_=f"dot {colour}"))
        if curved:
            parts.append(tag("path", d=frame.path(x, even), class_=f"curve {colour}"))
        told.append(f"{name} from {form(y[0])} at step {x[0]:,.0f} to {form(even[-1])} at step {x[-1]:,.0f}")
        key = [tag("span", class_=f"key {colour}"), name, " "] if len(curves) > 1 else []
        legend.append(tag("span", key, tag("b", form(even[-1]))))
    label = f"{title}: {'; '.join(told)}"
    drawing = tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)
    caption = tag("figcaption", tag("span", title, class_="title"), tag("span", legend, class_="legend"))
    return tag("figure", caption, drawing, class_="chart")


class _Frame:
    """Where values at steps are drawn."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        low, high = float(y.min()), float(y.max())
        self.first, self.last = float(x.min()), float(x.max())
        self.ticks = nice_ticks(0.0 if 0 < low <= high / 2 else low, high)

    def place(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Right and down, in the drawing's units."""
        right = (x - self.first) / (self.last - self.first) if self.last > self.first else 0 * x + 0.5
        up = (y - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(self, x: np.ndarray, y: np.ndarray) -> str:
        return _path(*self.place(x, y))

    def axes(self, form: Callable[[float], str]) -> Markup:
        """A line for each round value, and the first and the last step."""
        parts = []
        for tick in self.ticks:
            down = self.place(self.first, tick)[1]
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{down:.1f}", y2=f"{down:.1f}", class_="grid"))
            parts.append(tag("text", form(tick), x=LEFT - 6, y=f"{down + 4:.1f}", class_="tick", text_anchor="end"))
        ends = [(f"step {self.first:,.0f}", LEFT, "start")]
        if self.last > self.first:
            ends.append((f"{self.last:,.0f}", WIDTH - RIGHT, "end"))
        parts += [tag("text", text, x=x, y=HEIGHT - 6, class_="tick", text_anchor=anchor) for text, x, anchor in ends]
        return join(*parts)


def share_bar(share: float, low: float, high: float, chance: float, top: float) -> Markup:
    """A share as a bar, with its interval as a line and chance as a mark, on a scale that ends at `top`."""
    label = f"{percent(share)}, 95% interval {percent(low)} to {percent(high)}, chance {percent(chance)}"
    share, low, high, chance = (round(100 * x / top, 2) for x in (share, low, high, chance))
    parts = [
        tag("title", label),
        tag("rect", x=0, y=3, width=100, height=10, class_="track"),
        tag("rect", x=0, y=3, width=share, height=10, class_="bar"),
        tag("line", x1=low, x2=high, y1=8, y2=8, class_="interval"),
        tag("line", x1=chance, x2=chance, y1=0, y2=16, class_="chance"),
    ]
    form = {"viewBox": "0 0 100 16", "preserveAspectRatio": "none", "class_": "share"}
    return tag("svg", parts, role="img", aria_label=label, **form)


def heat(text: str, share: float, tip: str) -> Markup:
    """The content of a table's cell that is the darker, the nearer a share is to 1."""
    style = f"--share:{100 * min(share, 1):.0f}%"
    return tag("span", text, class_="cell dark" if share > 0.78 else "cell", style=style, title=tip)


def matrix(counts_KK: np.ndarray, names: list[str], label: str) -> Markup:
    """A matrix of counts, row against column, as squares that tell what they count; the darker, the more of a row."""
    size = len(names)
    shares = counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    cells = [
        tag(
            "rect",
            tag("title", f"{names[i]} taken for {names[j]}: {counts_KK[i, j]}"),
            x=int(j),
            y=int(i),
            width=1,
            height=1,
            class_="hit" if i == j else "miss",
            opacity=f"{0.25 + 0.75 * shares[i, j]:.2f}",
        )
        for i, j in np.argwhere(counts_KK)
    ]
    frame = [tag("rect", x=0, y=0, width=size, height=size, class_="track"),
             tag("line", x1=0, y1=0, x2=size, y2=size, class_="grid")]  # fmt: skip
    return tag("svg", frame, cells, viewBox=f"0 0 {size} {size}", role="img", aria_label=label, class_="matrix")


def series(numbers: np.ndarray, label: str) -> Markup:
    """Numbers (N,) or (N, curves) as small curves without axes; of any other shape, in words."""
    curves = numbers[:, None] if numbers.ndim == 1 else numbers
    if curves.ndim != 2 or not np.isfinite(curves).all() or len(curves) < 2:
        return tag("p", f"{' × '.join(map(str, numbers.shape))} numbers", class_="words")
    x = np.linspace(2, 118, len(curves))
    y = 58 - 56 * (curves - curves.min()) / (np.ptp(curves) or 1)
    columns = range(min(COLOURS, y.shape[1]))
    paths = [tag("path", d=_path(*_thinned(x, y[:, i])), class_=f"curve c{i}") for i in columns]
    return tag("svg", tag("title", label), paths, viewBox="0 0 120 60", role="img", aria_label=label, class_="series")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Values (N,) averaged under a window of a tenth of them, which looks as far ahead as back; itself if N < 12."""
    if len(values) < 12:
        return values
    reach = max(1, len(values) // 20)
    weights = np.hanning(2 * reach + 3)[1:-1]
    sums, whole = (np.convolve(each, weights)[reach:-reach] for each in (values, np.ones_like(values)))
    return sums / whole


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers, evenly spaced, that span the values; more than that, if they are all alike."""
    size = max(abs(low), abs(high))
    if size < 1e-200:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * size:
        low, high = low - size / 2, high + size / 2
    raw = (high - low) / 4
    scale = 10.0 ** floor(log10(raw))
    step = scale * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * scale * (1 + 1e-9))
    return [i * step for i in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The finite values and their steps, few enough to draw."""
    x, y = np.array(curve.steps, float), np.array(curve.values, float)
    finite = np.isfinite(y)
    return _thinned(x[finite], y[finite])


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + " ".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y))
