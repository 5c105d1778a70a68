"""The schema of `evaluation` in the recipe and of its sets."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from openimp.common.schema import Count, Strict, as_text, text_lines
from openimp.recipe.inputs import Input, Inputs, View


def _class_names(value: Any, info: ValidationInfo) -> Any:
    """Class names by label, from a mapping, a list of names, or a text file with lines `name` or `label<TAB>name`."""
    if isinstance(value, str):
        pairs = [line.partition("\t")[::2] for line in text_lines(value, info)]
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(name, as_text(name) if isinstance(name, int | float) else name) for name in value]
    else:
        return value
    names = {as_text(label): name or label for label, name in pairs}
    if len(names) < len(pairs):
        ((twice, _),) = Counter(as_text(label) for label, _ in pairs).most_common(1)
        raise ValueError(f"class {twice!r} is listed twice")
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
    """The view of the items. Evaluation ignores the options that augment or drop tokens in training."""


class ZeroShot(Strict):
    """Zero-shot classification: top-1 and top-5, or mean average precision if the label column holds lists."""

    type: Literal["zero_shot"]
    """What kind of evaluation this is."""
    source: str
    """The name of one of `sources`; it may not be a stream."""
    inputs: OneInput
    """The one modality to classify."""
    label: str
    """The column with the class. If it holds lists, a row may have any number of classes."""
    classes: Annotated[dict[str, str], Field(min_length=1), BeforeValidator(_class_names)] | None = None
    """All classes that can be chosen, including those that no row has, and their names in the prompts. A mapping from
    label to name; a list of labels that are also the names; or a text file in the recipe's folder, with one name, or
    one label, tab and name, per line. null: the labels that occur in the rows, which are also the names."""
    words: bool = False
    """If a class's name is its label, split it into words: `brush_hair` and `BrushHair` become "brush hair"."""
    prompts: Annotated[list[str], Field(min_length=1), BeforeValidator(text_lines)] = ["{}"]
    """Templates, or a text file in the recipe's folder with one per line. A class embedding is the mean over all."""
    splits: str | None = None
    """A column with the test split of each row, or a list of splits if splits overlap. Figures are then means over the
    splits. null: all rows form one split."""
    reader: str = "text"
    """The modality that reads the prompts, in its first training view."""
    view: View = Field(default_factory=View)
    """The view of the items. Evaluation ignores the options that augment or drop tokens in training."""


class ClassHead(Strict):
    """Top-1 and top-5 of a trained classification head, or mean average precision if its loss is sigmoid.

    The head's classes are those it was trained on.
    """

    type: Literal["classification"]
    """What kind of evaluation this is."""
    task: str
    """The name of the task whose classification objective for `label` trained the head."""
    source: str
    """The name of one of `sources`, with other rows than the task's; it may not be a stream."""
    inputs: OneInput
    """The one modality to classify."""
    label: str
    """The column with the class in both sources, or with a list of classes if the loss is sigmoid."""
    view: View = Field(default_factory=View)
    """The view of the items. Evaluation ignores the options that augment or drop tokens in training."""


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
    """The view of the items. Evaluation ignores the options that augment or drop tokens in training."""


EvaluationSet = Retrieval | ZeroShot | ClassHead | Probe


class Evaluation(Strict):
    """What is measured during training, at its end, and by `openimp eval`."""

    renamed = {"batch": "batch_size"}

    every: Count | None = None
    """Steps between two evaluations; null: at the end only."""
    batch_size: Count = 128
    """Examples encoded at once."""
    best: str | None = None
    """The name of one of `sets`. When its result is the best so far, a checkpoint is saved, and it is kept in addition
    to the last ones; `checkpoints/best` links to it. The best is the highest R@1 (mean of both ways), top-1 or mAP."""
    sets: dict[str, Annotated[EvaluationSet, Field(discriminator="type")]] = {}
    """What is measured, by name."""
