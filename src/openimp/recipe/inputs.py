"""The schema of inputs and views, which tasks and evaluation sets share."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from openimp.common.errors import UserError
from openimp.common.modality import Modalities
from openimp.common.schema import Count, Positive, Strict, unknown_key
from openimp.recipe.model_config import checked_view


class Input(Strict):
    """The column of a row that holds a modality's raw value. A plain string or list is short for `column`."""

    column: str | list[str]
    """A column, or a text template such as "{name}, {keywords*}". `{x}` is replaced with one value of column x (if it
    is a list, a random one in training and the first in evaluation), `{x*}` with all values joined by commas (in
    training often a random subset, in random order). If there are several columns or templates, training draws one, and
    evaluation uses the first."""
    draw: Count = 1
    """Number of values drawn per example in training. More than one gives several positives per item."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        if data == []:
            raise ValueError("names no column")
        return {"column": data} if isinstance(data, str | list) else data

    @property
    def columns(self) -> list[str]:
        """The columns or templates in order of preference."""
        return [self.column] if isinstance(self.column, str) else self.column


Inputs = Annotated[dict[str, Input], Field(min_length=1)]


class View(Strict):
    """How an example is presented to the model. Besides these keys, it has one key per modality with its options."""

    model_config = ConfigDict(extra="allow")

    weight: Positive = 1.0
    """How often this view is drawn, relative to the task's other views."""
    batch_size: Count | None = None
    """Examples per step in this view. Default: the task's `batch_size`."""
    sync: bool = False
    """In training, clip and sound of an example start at the same moment. false: each modality draws its own start."""

    def __getitem__(self, modality: str) -> Any:
        """The options of a modality, an instance of its `View`."""
        return (self.model_extra or {})[modality]

    def fill(self, modalities: Modalities, location: str) -> None:
        """Validates the options of each modality in place, and adds defaults. `location` is that of the view."""
        options = self.model_extra
        assert options is not None  # Because extra keys are allowed.
        for name, modality in modalities.items():
            options[name] = checked_view(modality, options.get(name, {}), f"{location}.{name}")
        for key in options:
            if key not in modalities:
                raise UserError(f"{location}: {unknown_key(key, [*modalities, *View.model_fields])}")
