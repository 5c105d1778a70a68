"""For what a drafted recipe uses a column, by its name and values."""

import pytest

from openimp.drafting.columns import describe, split_values

SENTENCES = [f"sentence number {i} says something" for i in range(40)]


@pytest.mark.parametrize(
    ("name", "values", "use"),
    [
        ("caption", SENTENCES, "text"),
        ("what it shows", SENTENCES, "text"),
        ("Beschreibung", SENTENCES, "text"),
        ("captions", [[text, "another"] for text in SENTENCES], "text"),
        ("species", ["robin", "wren"] * 20, "label"),
        ("json.colour", ["deep red", "blue"] * 20, "label"),
        ("caption", ["a cat", "a dog"] * 20, "text"),
        ("label", ["0", "1"] * 20, "label"),
        ("cls", [0, 1] * 20, "label"),
        ("category", SENTENCES, "text"),
        ("split", ["train", "test", "train", "val"] * 10, "split"),
    ],
)
def test_texts_classes_and_splits_are_told_apart(name, values, use):
    assert describe(name, values).use == use


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("id", list(range(40)), "holds numbers"),
        ("year", [2020, 2021] * 20, "holds numbers"),
        ("label", list(range(40)), "40 different numbers in 40 rows are no classes"),
        ("label", [0.5, 1.5] * 20, "fractions"),
        ("label", ["cat"] * 40, "same value in every row"),
        ("captions", [["a", "b"]] * 40, "same value in every row"),
        ("caption", [None, "", float("nan")], "is empty"),
        ("photo", [f"https://example.org/{i}" for i in range(40)], "addresses"),
        ("key", [f"x{i}" for i in range(40)], "neither a text nor a class"),
        ("word", [f"x{i}y" for i in range(40)], "look like names of the rows"),
        ("box", [[1, 2]] * 40, "lists of other things"),
        ("meta", [{"a": 1}] * 40, "holds dict values"),
        ("a{b}", SENTENCES, "a template cannot name"),
    ],
)
def test_what_is_neither_is_not_used_and_the_reason_is_given(name, values, why):
    column = describe(name, values)
    assert column.use == "none"
    assert why in column.why


def test_missing_values_are_counted_and_long_texts_are_cut():
    column = describe("text", ["word " * 10**6, None, "two words", ""])
    assert column.use == "text"
    assert column.missing == 0.5
    assert max(len(text) for row in column.texts for text in row) < 1001


def test_numbers_as_classes_make_no_texts():
    assert describe("label", [0, 1] * 20).numeric
    assert not describe("label", ["robin", "wren"] * 20).numeric


def test_names_of_files_are_texts_only_if_they_are_words():
    assert describe("name", ["IMG_0012", "IMG_0013"], file_names=True).use == "none"
    assert describe("name", ["a red bicycle", "two dogs"], file_names=True).use == "text"


def test_the_validation_split_is_measured_and_the_test_split_is_left():
    assert split_values(["Train", "test", "valid", "train", None]) == (["Train", "train"], ["valid"], ["test"])
    assert split_values(["train", "test"]) == (["train"], ["test"], [])
