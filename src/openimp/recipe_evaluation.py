"""The part of the recipe that says what is measured: `evaluation` and its sets."""

from typing import Annotated, Literal

from pydantic import Field

from openimp.recipe_types import Count, Input, Inputs, Strict, View

OneInput = Annotated[dict[str, Input], Field(min_length=1, max_length=1)]


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
    inputs: OneInput
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


class Probe(Strict):
    """Top-1 of a linear classifier and of nearest neighbours on features of the frozen encoder, before any projection.

    It needs scikit-learn: `pip install 'openimp[probe]'`.
    """

    type: Literal["probe"]
    """What kind of evaluation this is."""
    train: str
    """The name of one of `sources`, whose rows the classifiers learn from; it may not be a stream."""
    source: str
    """The name of another one, whose rows are classified."""
    inputs: OneInput
    """The one modality to classify."""
    label: str
    """The column with the class, in both sources."""
    k: Count = 20
    """Nearest neighbours that vote; DINO's choice."""
    view: View = Field(default_factory=View)
    """How the items are seen. Nothing is augmented and no token dropped, whatever the options of training say."""


class Evaluation(Strict):
    """What is measured during training, at its end, and by `openimp eval`."""

    every: Count | None = None
    """Steps between two evaluations; null: at the end only."""
    batch: Count = 128
    """Examples encoded at once."""
    best: str | None = None
    """The name of one of `sets`. Of the steps at which it is measured, the best so far is saved and its checkpoint kept
    besides the last ones: the highest R@1, as the mean of both ways, or top-1. `checkpoints/best` leads to it."""
    sets: dict[str, Annotated[Retrieval | ZeroShot | Probe, Field(discriminator="type")]] = {}
    """What is measured, by name."""
