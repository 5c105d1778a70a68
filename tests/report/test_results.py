from xml.etree import ElementTree

import numpy as np
import pytest

from openimp.evaluation.classification import Classified
from openimp.report.page import TEMPLATES
from openimp.report.results import MAX_MATRIX, MAX_TABLE, confusion, section


def rendered(template: str, data: object) -> ElementTree.Element:
    html = TEMPLATES.get_template(template).render(data=data)
    return ElementTree.fromstring(f"<section>{html.replace('<wbr>', '')}</section>")


def classified(counts: np.ndarray) -> Classified:
    """Answers with this confusion matrix."""
    truth, predicted = (np.repeat(index.ravel(), counts.ravel()) for index in np.indices(counts.shape))
    names = [f"<{i:03}>" for i in range(len(counts))]
    return Classified("a", "b", names, truth, predicted, np.where(truth == predicted, 1, 2))


def rows(table: ElementTree.Element) -> list[list[str]]:
    return [["".join(cell.itertext()).strip() for cell in row] for row in table.iter("tr")]


@pytest.mark.parametrize(("classes", "drawn"), [(MAX_TABLE + 1, True), (MAX_MATRIX, True), (MAX_MATRIX + 1, False)])
def test_many_classes_are_drawn_and_of_more_the_frequent_confusions_are_listed(classes, drawn):
    counts = 2 * np.eye(classes, dtype=int)
    counts[3, 1] = 7
    root = rendered("confusions.html", [confusion("set", classified(counts))])
    (frequent,) = root.iter("table")
    assert rows(frequent)[1:] == [["<003>", "<001>", "7", "9"]]
    squares = [(rect.get("x"), rect.get("y")) for rect in root.iter("rect") if rect.get("class") == "miss"]
    assert squares == ([("1", "3")] if drawn else [])
    tips = [tip.text for tip in root.iter("title")]
    assert ("<003> predicted as <001>: 7" in tips) == drawn


def test_chance_stays_on_the_scale_of_a_model_that_does_worse():
    found = classified(np.array([[0, 9], [9, 0]]))
    result = {"set": "s", "type": "zero_shot", "task": "a -> b", "step": None, "skipped": 2, **found.metrics()}
    root = rendered("results.html", section([result], [], []))
    _, _, scale, _ = root.find(".//svg").get("viewBox").split()
    assert 0 < float(root.find(".//line[@class='chance']").get("x1")) <= float(scale)
    assert "Unreadable rows left out: s 2." in "".join(root.find(".//caption").itertext())
