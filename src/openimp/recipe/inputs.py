"""Building blocks of the recipe's schema: the strict base model, number types, inputs, views, and validation."""

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from openimp.common.errors import UserError, nearest
from openimp.common.schema import Count, Positive, Strict, checked
from openimp.recipe.registry import modality_class


class Input(Strict):
    """Where a modality's raw value stands in a row. A plain string or list is short for `column`."""

    column: str | list[str]
    """A column, or a text template such as "{name}, {keywords*}": `{x}` takes one value of x (of a list: one at
    random in training, the first in evaluation), `{x*}` joins all of a list by commas (in training some, in any
    order). Of several columns or templates one is drawn in training, and the first is used in evaluation."""
    draw: Count = 1
    """How many are drawn in training; more than one makes several positives an item (MIL-NCE)."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if data == []:
            raise ValueError("names no column")
        return {"column": data} if isinstance(data, str | list) else data

    @property
    def columns(self) -> list[str]:
        """The columns or templates, in order of preference."""
        return [self.column] if isinstance(self.column, str) else self.column


Inputs = Annotated[dict[str, Input], Field(min_length=1)]


class View(Strict):
    """How an example is seen at one step. Beside these keys: one key a modality, with that modality's own options."""

    renamed = {"batch": "batch_size", "share": "weight"}

    model_config = ConfigDict(extra="allow")

    weight: Positive = 1.0
    """How often this view is drawn, against the task's other views."""
    batch_size: Count | None = None
    """Examples a step in this view; left out: the task's."""
    sync: bool = False
    """In training, clip and sound of an example start at the same moment; false: each modality draws its own part."""

    def __getitem__(self, modality: str) -> Any:
        """The checked options of one modality, an instance of its `View`."""
        return (self.model_extra or {})[modality]

    def bind(self, modalities: Iterable[str], where: str) -> "View":
        """Checks the options of each modality against its `View` and fills in its defaults."""
        extra, known = dict(self.model_extra or {}), {}
        for name in modalities:
            options = extra.pop(name, {})
            known[name] = checked(modality_class(name).View, options, f"{where}.{name}")
        if extra:
            key = next(iter(extra))
            if key in self.renamed:
                raise UserError(f"{where}: key {key!r} is now called {self.renamed[key]!r}")
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, [*modalities, *View.model_fields])}")
        self.__pydantic_extra__ = known
        return self
