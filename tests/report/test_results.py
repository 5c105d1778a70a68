from xml.etree import ElementTree

import numpy as np
import pytest

from openimp.evaluation.classes import Classified
from openimp.report.results import LABELLED, SQUARES, confusion, figures


def classified(counts: np.ndarray) -> Classified:
    """Answers with this confusion matrix."""
    truth, predicted = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    names = [f"<{i:03}>" for i in range(len(counts))]
    return Classified("a", "b", names, np.arange(len(truth)), truth, predicted, np.where(truth == predicted, 1, 2))


def rows(table: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]


def test_rows_are_classes_and_columns_what_they_were_taken_for():
    counts = np.array([[5, 2, 0], [0, 1, 3], [0, 0, 4]])
    matrix, commonest = ElementTree.fromstring(confusion(classified(counts))).iter("table")
    assert rows(matrix) == [
        ["", "<000>", "<001>", "<002>"],
        ["<000>", "5", "2", "0"],
        ["<001>", "0", "1", "3"],
        ["<002>", "0", "0", "4"],
    ]
    assert rows(commonest)[1:] == [["<001>", "<002>", "3", "4"], ["<000>", "<001>", "2", "7"]]


@pytest.mark.parametrize(("classes", "drawn"), [(LABELLED + 1, True), (SQUARES, True), (SQUARES + 1, False)])
def test_many_classes_are_drawn_and_more_are_told_by_their_commonest_confusions(classes, drawn):
    counts = 2 * np.eye(classes, dtype=int)
    counts[3, 1] = 7
    root = ElementTree.fromstring(confusion(classified(counts)))
    (commonest,) = root.iter("table")
    assert rows(commonest)[1:] == [["<003>", "<001>", "7", "9"]]
    squares = [(rect.get("x"), rect.get("y")) for rect in root.iter("rect") if rect.get("class") == "miss"]
    assert squares == ([("1", "3")] if drawn else [])


def test_a_model_without_a_mistake_has_no_confusions_to_list():
    (matrix,) = ElementTree.fromstring(confusion(classified(np.eye(4, dtype=int)))).iter("table")
    assert len(rows(matrix)) == 5


def test_chance_stays_on_the_scale_of_a_model_that_does_worse():
    found = classified(np.array([[0, 9], [9, 0]]))
    result = {"set": "s", "type": "zero_shot", "task": "a -> b", "step": None, "skipped": 2, **found.figures()}
    root = ElementTree.fromstring(figures([result]))
    assert 0 < float(root.find(".//line[@class='chance']").get("x1")) <= 100
    assert "Unreadable rows left out: s 2." in "".join(root.find(".//caption").itertext())
