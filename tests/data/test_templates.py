"""Templates: the text of a row."""

import itertools
import math
import re

import numpy as np
import pytest

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.data.templates import all_texts, columns_of, fill
from tests.messages import refuses

ROW = {"name": "red panda", "tags": ["animal", "red", "cute"], "year": 2020, "none": None, "blank": " ", "empty": []}


def drawn(columns: list[str], row: dict, times: int = 300) -> set[str]:
    rng = np.random.default_rng(0)
    return {fill(columns, row, rng) for _ in range(times)}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("name", "red panda"),
        ("tags", "animal"),
        ("year", "2020"),
        ("{name}", "red panda"),
        ("{name}, {tags*}", "red panda, animal, red, cute"),
        ("a {tags} {name} of {year}", "a animal red panda of 2020"),
        ("{name*}", "red panda"),
        ("{{{name}}}", "{red panda}"),
        ("{tags} {tags*}", "animal animal, red, cute"),
    ],
)
def test_evaluation_is_deterministic(template, text):
    assert fill([template], ROW) == text
    assert fill([template, "name"], ROW) == text


def test_columns():
    templates = ["name", "{tags*} by {name}", "{json.a}{{x}}", "a column"]
    assert columns_of(templates) == ["name", "tags", "json.a", "a column"]


def test_training_draws_a_template_and_a_value():
    assert drawn(["tags"], ROW) == drawn(["{tags}"], ROW) == {"animal", "red", "cute"}
    assert drawn(["name", "{year}"], ROW) == {"red panda", "2020"}


def test_training_draws_some_values_in_any_order():
    expected = {", ".join(order) for n in (1, 2, 3) for order in itertools.permutations(ROW["tags"], n)}
    assert drawn(["{tags*}"], ROW, 1000) == expected
    rng = np.random.default_rng(0)
    whole = sum(fill(["{tags*}"], ROW, rng).count(",") == 2 for _ in range(1000))
    assert 600 < whole < 730  # half of the time, and a third of the other half


@pytest.mark.parametrize("column", ["none", "blank", "empty", "absent"])
def test_an_empty_column_gives_way(column):
    template = f"{{name}} {{{column}*}}"
    for rng in (None, np.random.default_rng(0)):
        with refuses(BadMedia):
            fill([template], ROW, rng)
        assert {fill([template, "name"], ROW, rng) for _ in range(20)} == {"red panda"}


def test_empty_items_of_a_list_are_no_values():
    row = {"tags": ["", None, "x ", "  ", math.nan]}
    assert fill(["{tags*}"], row) == "x"
    assert drawn(["tags", "{tags*}"], row) == {"x"}


def test_bytes_are_text_if_they_can_be():
    assert fill(["x"], {"x": "é".encode()}) == "é"
    with refuses(BadMedia):
        fill(["x"], {"x": b"\xff"})


@pytest.mark.parametrize("cell", [{"raw": "a dog"}, [{"raw": "a dog"}], [["a dog"]]])
def test_objects_are_no_texts(cell):
    """Otherwise a model would learn the text of a Python dict."""
    with refuses():
        fill(["x"], {"x": cell})


@pytest.mark.parametrize("template", ["{", "a }", "{}", "{*}", "{a{b}}", "{a**}", "{ a }", "{a} {", "{{a}}", "{a}}"])
def test_malformed(template):
    with pytest.raises(UserError, match=re.escape(repr(template))):
        columns_of([template])


def test_all_texts():
    rows = [ROW, {"name": "owl", "tags": []}, {"name": None, "tags": []}, {"name": None, "tags": ["x"]}]
    assert list(all_texts(["name", "{tags*}", "{tags} {name}"], rows)) == [
        ["red panda", "animal, red, cute", "animal red panda", "red red panda", "cute red panda"],
        ["owl"],
        ["x"],
    ]
