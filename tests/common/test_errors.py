import pytest

from openimp.common.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "row", "0 rows"), (1, "row", "1 row"), (2, "class", "2 classes"), (1, "class", "1 class"),
     (2, "batch", "2 batches"), (1234, "step", "1,234 steps")],
)  # fmt: skip
def test_a_number_agrees_with_its_noun(number, noun, text):
    assert counted(number, noun) == text
