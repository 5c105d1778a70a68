"""The part of the recipe that says what is measured: `evaluation` and its sets."""

from typing import Annotated, Literal

from pydantic import Field

from openimp.recipe_types import Count, Input, Inputs, Strict, View


class Retrieval(Strict):
    """R@1/5/10, median rank and mean reciprocal rank, both ways, between two modalities of a source."""

    type: Literal["retrieval"]
    """What kind of evaluation this is."""
    source: str
    """The name of one of `sources`; it may not be a stream."""
    inputs: Inputs
    """Two modalities. Items with equal text, or equal raw value, are one."""
    view: View = Field(default_factory=View)
    """How the items are seen. Nothing is augmented and no token dropped, whatever the options of training say."""


class ZeroShot(Strict):
    """Top-1 and top-5 of classes that are named only by text."""

    type: Literal["zero_shot"]
    """What kind of evaluation this is."""
    source: str
    """The name of one of `sources`; it may not be a stream."""
    inputs: Annotated[dict[str, Input], Field(min_length=1, max_length=1)]
    """The one modality to classify."""
    label: str
    """The column with the class."""
    prompts: Annotated[list[str], Field(min_length=1)] = ["{}"]
    """Templates; a class embedding is the mean over all of them."""
    texts: dict[str, str] | None = None
    """What a class is called in the prompts, where its label is not its name."""
    reader: str = "text"
    """The modality that reads the prompts, in its first training view."""
    view: View = Field(default_factory=View)
    """How the items are seen. Nothing is augmented and no token dropped, whatever the options of training say."""


class Evaluation(Strict):
    """What is measured during training, at its end, and by `openimp eval`."""

    every: Count | None = None
    """Steps between two evaluations; null: at the end only."""
    batch: Count = 128
    """Examples encoded at once."""
    sets: dict[str, Annotated[Retrieval | ZeroShot, Field(discriminator="type")]] = {}
    """What is measured, by name."""
