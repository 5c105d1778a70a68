"""The schema of `evaluation` in the recipe and of its sets."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from openimp.common.schema import Count, Strict, as_text, text_lines
from openimp.recipe.inputs import Input, Inputs, View


def _class_names(value: Any, info: ValidationInfo) -> Any:
    """Converts a mapping, a list of names, or a text file with lines `name` or `label<TAB>name` to {label: name}."""
    if isinstance(value, str):
        labels_and_names = [line.partition("\t")[::2] for line in text_lines(value, info)]
    elif isinstance(value, list):
        labels_and_names = [(label, as_text(label) if isinstance(label, int | float) else label) for label in value]
    elif isinstance(value, dict):
        labels_and_names = list(value.items())
    else:
        return value
    names: dict[str, Any] = {}
    for label, name in labels_and_names:
        key = as_text(label)
        if key in names:
            raise ValueError(f"class {key!r} is listed twice")
        names[key] = name or label
    return names


OneInput = Annotated[dict[str, Input], Field(min_length=1, max_length=1, description="The modality to classify.")]
EvaluationView = Annotated[
    View,
    Field(
        default_factory=View,
        description="The view of the items. Evaluation ignores the options that augment or drop tokens in training.",
    ),
]


class Retrieval(Strict):
    """R@1/5/10, median rank and mean reciprocal rank between two modalities of a source, in both directions."""

    type: Literal["retrieval"]
    """The kind of evaluation."""
    source: str
    """The name of a source that is not a stream."""
    inputs: Inputs
    """Two modalities. Equal values are the same item; texts are equal if they differ only in case and white space."""
    view: EvaluationView


class ZeroShot(Strict):
    """Zero-shot classification: top-1 and top-5 accuracy, or mean average precision if the labels are lists."""

    type: Literal["zero_shot"]
    """The kind of evaluation."""
    source: str
    """The name of a source that is not a stream."""
    inputs: OneInput
    label: str
    """The column with the class. If it holds lists, a row may have any number of classes."""
    classes: Annotated[dict[str, str], Field(min_length=1), BeforeValidator(_class_names)] | None = None
    """All classes, including those that no row has, and their names in the prompts: a mapping from label to name, a
    list of labels that are also the names, or a text file in the recipe's folder, with a name or a label, a tab and a
    name per line. null: the labels that occur in the rows, which are also the names."""
    words: bool = False
    """If a class's name is its label, split it into words: `brush_hair` and `BrushHair` become "brush hair"."""
    prompts: Annotated[list[str], Field(min_length=1), BeforeValidator(text_lines)] = ["{}"]
    """Templates, or a text file in the recipe's folder with one per line. The embedding of a class is the mean over
    all templates."""
    splits: str | None = None
    """A column with the test split of each row, or with a list if splits overlap. Metrics are then means over the
    splits. null: all rows form one split."""
    reader: str = "text"
    """The modality that reads the prompts. Its view is that of inference."""
    view: EvaluationView


class ClassHead(Strict):
    """Top-1 and top-5 accuracy of a trained classification head, or mean average precision if its loss is sigmoid.

    The classes are those that the head was trained on.
    """

    type: Literal["classification"]
    """The kind of evaluation."""
    task: str
    """The name of the task whose classification objective for `label` trained the head."""
    source: str
    """The name of a source that is not a stream, with other rows than the task's source."""
    inputs: OneInput
    label: str
    """The column with the class in both sources, or with a list of classes if the loss is sigmoid."""
    view: EvaluationView


class Probe(Strict):
    """Top-1 accuracy of a linear classifier and of nearest neighbors on the frozen encoder's features, before any
    projection.

    It needs scikit-learn: `pip install 'openimp[probe]'`.
    """

    type: Literal["probe"]
    """The kind of evaluation."""
    train: str
    """The name of a source that is not a stream, on whose rows the classifiers are trained."""
    source: str
    """The name of another source that is not a stream, whose rows are classified."""
    inputs: OneInput
    label: str
    """The column with the class in both sources."""
    k: Count = 20
    """Number of nearest neighbors that vote; 20 as in DINO."""
    view: EvaluationView


EvaluationSet = Retrieval | ZeroShot | ClassHead | Probe


class Evaluation(Strict):
    """Evaluation during training, at its end, and by `openimp eval`."""

    every: Count | None = None
    """Steps between evaluations; null: only at the end."""
    batch_size: Count = 128
    """Number of examples that are encoded at once."""
    best: str | None = None
    """The name of a set. When its result is the best so far, a checkpoint is saved and kept in addition to the last
    ones; `checkpoints/best` links to it. The best result has the highest R@1 (mean of both directions), top-1 or
    mAP. The weights of `train.init` do not count: they are measured, but not saved again."""
    sets: dict[str, Annotated[EvaluationSet, Field(discriminator="type")]] = {}
    """Evaluation sets by name."""
