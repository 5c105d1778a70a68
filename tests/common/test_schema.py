"""What the recipe's own keys do not show: types of error that no key of a bundled modality has."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from openimp.common.errors import UserError
from openimp.common.schema import Strict, checked


class Options(Strict):
    every: Annotated[int, Field(ge=1)] | Literal["end"] = "end"
    share: Annotated[float, Field(gt=0.5, lt=1)] = 0.75
    code: Annotated[str, Field(pattern="^[a-z]+$")] = "x"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"every": "day"}, "every: expected a whole number or 'end', found 'day'"),
        ({"every": 0}, "every: must be at least 1, found 0"),
        ({"share": 0.5}, "share: must be above 0.5, found 0.5"),
        ({"share": 1.0}, "share: must be below 1, found 1.0"),
        ({"share": None}, "share: expected a number, found null"),
        ({"share": True}, "share: expected a number, found true"),
        ({"code": "{x}"}, "code: String should match pattern '^[a-z]+$', found '{x}'"),
        ([], "expected a mapping, found []"),
    ],
)
def test_mistakes_are_told_in_plain_words(data, message):
    """Also where one of several types is expected; for what openimp does not know, in pydantic's words."""
    with pytest.raises(UserError) as error:
        checked(Options, data, "file")
    assert str(error.value) == f"file: {message}"
