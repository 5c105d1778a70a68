import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openimp.report.charts import MAX_POINTS, Curve, line_chart, nice_ticks, number
from openimp.report.page import TEMPLATES
from openimp.report.results import display

MACROS = TEMPLATES.get_template("charts.html").module


def draw(title: str, *curves: Curve) -> str:
    return MACROS.line_chart(line_chart(title, list(curves)))


def elements(chart: str, name: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart).iter(name))


def points(path: ElementTree.Element) -> np.ndarray:
    return np.array(re.findall(r"-?[\d.]+", path.get("d")), float).reshape(-1, 2)


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
@example(5e-324, 5e-324)
@example(1e8, 1e8 + 1e-7)
def test_ticks_are_few_evenly_spaced_and_span_the_values(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0], atol=slack)


def test_a_curve_has_correct_points_and_tooltips():
    chart = draw("loss", Curve("loss", [10, 20, 30], [4.0, 3.0, 2.0]))
    (path,) = elements(chart, "path")
    right, down = points(path).T
    assert right[1] - right[0] == pytest.approx(right[2] - right[1])
    assert right[0] < right[2]
    assert down[1] - down[0] == pytest.approx(down[2] - down[1], abs=0.11)
    assert down[0] < down[2], "larger values are higher"
    assert [tip.text for tip in elements(chart, "title")] == [
        "loss, step 10: 4", "loss, step 20: 3", "loss, step 30: 2"
    ]  # fmt: skip
    (drawing,) = elements(chart, "svg")
    assert drawing.get("aria-label") == "loss: loss from 4 at step 10 to 2 at step 30"


def test_many_points_are_averaged_and_values_that_are_not_finite_are_left_out():
    values = np.linspace(5, 1, 10_000)
    values[::7] = np.nan
    chart = draw("loss", Curve("loss", list(range(10_000)), values.tolist()))
    (path,) = elements(chart, "path")
    assert len(points(path)) == MAX_POINTS
    assert "nan" not in chart
    for value in (np.inf, 1e308):
        assert "No finite values" in draw("loss", Curve("loss", [1], [value]))


def test_one_point_and_equal_values_are_drawn():
    for values in ([0.0], [2.0], [-3.0, -3.0], [0.0, 0.0]):
        chart = draw("x", Curve("x", list(range(len(values))), values))
        assert np.isfinite(points(elements(chart, "path")[0])).all()


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.1e-7, "1.1e-7"), (7.5e-4, "7.5e-4"), (0.0123, "0.0123"), (3.456, "3.46"),
                        (128.4, "128"), (1234.5, "1234"), (560_000, "5.6e5"), (-2.5, "-2.5")]
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_numbers_are_counted():
    assert "2 × 3 × 4 numbers" in MACROS.value(display(np.zeros((2, 3, 4)), "x"))
