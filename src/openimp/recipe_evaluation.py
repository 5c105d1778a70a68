"""The part of the recipe that says what is measured: `evaluation` and its sets."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from openimp.recipe_types import Count, Input, Inputs, Strict, View, text_lines


def _class_names(value: Any, info: ValidationInfo) -> Any:
    """Names of classes by label, from a mapping, a list of names, or a text file of names or of `label<TAB>name`."""
    if isinstance(value, str):
        pairs = [line.partition("\t")[::2] for line in text_lines(value, info)]
    elif isinstance(value, dict | list):
        pairs = list(value.items()) if isinstance(value, dict) else [(name, name) for name in value]
    else:
        return value
    names = {str(label): name or label for label, name in pairs}
    if len(names) < len(pairs):
        ((twice, _),) = Counter(str(label) for label, _ in pairs).most_common(1)
        raise ValueError(f"class {twice!r} is named twice")
    return names


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
    """Top-1 and top-5 of classes that are named only by text, or mean average precision where rows hold lists."""

    type: Literal["zero_shot"]
    """What kind of evaluation this is."""
    source: str
    """The name of one of `sources`; it may not be a stream."""
    inputs: OneInput
    """The one modality to classify."""
    label: str
    """The column with the class; where it holds lists, a row has any number of classes."""
    classes: Annotated[dict[str, str], Field(min_length=1), BeforeValidator(_class_names)] | None = None
    """All classes, also those that no row has, and what they are called in the prompts: a mapping from label to name,
    or a list of names that are the labels, or a text file in the recipe's folder with a name a line, or a label, a tab
    and a name. null: the classes of the rows, called by their labels."""
    words: bool = False
    """Call a class whose name is its label by the words in it: both `brush_hair` and `BrushHair` are "brush hair"."""
    prompts: Annotated[list[str], Field(min_length=1), BeforeValidator(text_lines)] = ["{}"]
    """Templates, or a text file in the recipe's folder with one a line; a class embedding is the mean over all."""
    splits: str | None = None
    """A column with the test split of each row, or a list of them where splits overlap; figures are then means over the
    splits. null: all rows are one."""
    reader: str = "text"
    """The modality that reads the prompts, in its first training view."""
    view: View = Field(default_factory=View)
    """How the items are seen. Nothing is augmented and no token dropped, whatever the options of training say."""


class ClassHead(Strict):
    """Top-1 and top-5 of a head that a classification objective trained, or mean average precision if it is a sigmoid.

    Its classes are those of the training.
    """

    type: Literal["classification"]
    """What kind of evaluation this is."""
    task: str
    """The name of one of `tasks`, whose classification of `label` trained the head."""
    source: str
    """The name of one of `sources`, with other rows than the task's; it may not be a stream."""
    inputs: OneInput
    """The one modality to classify."""
    label: str
    """The column with the class, or (sigmoid) with a list of classes, in both sources."""
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


EvaluationSet = Retrieval | ZeroShot | ClassHead | Probe


class Evaluation(Strict):
    """What is measured during training, at its end, and by `openimp eval`."""

    every: Count | None = None
    """Steps between two evaluations; null: at the end only."""
    batch: Count = 128
    """Examples encoded at once."""
    best: str | None = None
    """The name of one of `sets`. Of the steps at which it is measured, the best so far is saved and its checkpoint kept
    besides the last ones: the highest R@1, as the mean of both ways, top-1 or mAP. `checkpoints/best` leads to it."""
    sets: dict[str, Annotated[EvaluationSet, Field(discriminator="type")]] = {}
    """What is measured, by name."""
