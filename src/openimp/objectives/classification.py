"""`classification`: a linear head tells the classes in a column.

Shape suffixes: B examples, D features, K classes.
"""

from collections import Counter
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from openimp.common.device import full_precision
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.common.objective import ClassColumn, Objective, Row, TargetSizes, Tensors, head_key
from openimp.common.schema import PartialShare, as_text
from openimp.data.targets import row_classes
from openimp.model.embedder import Embedder, EncodedAll
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task


class Classification(Objective):
    """A linear classification head on the pooled features, one per source and label column."""

    type: Literal["classification"]
    """The kind of objective."""
    label: str
    """The column with the class or, if the loss is sigmoid, with a list of classes. An empty cell is an empty list."""
    of: str | None = None
    """The modality to classify. Default: each of the task's modalities except those with a mask, such as text."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: one class per example. sigmoid: any number of classes per example; the binary cross-entropy is averaged
    over the classes, as in torch and timm."""
    classes: list[str] | list[int] | None = None
    """The classes, in the order of the head's outputs. Default: all values of the column. Required for streams."""
    label_smoothing: PartialShare = 0.0
    """Share of the target that is distributed over all classes."""

    @model_validator(mode="after")
    def _classes_differ(self) -> "Classification":
        for label, count in Counter(map(as_text, self.classes or ())).items():
            if count > 1:
                raise ValueError(f"classes: {label!r} is listed twice")
        return self

    def check(self, location: str, task: Task, recipe: Recipe) -> None:
        if not self.modalities(task):
            raise UserError(f"{location}: no input is without a mask, so name the modality to classify in `of`")

    def modalities(self, task: Task) -> list[str]:
        return [self.of] if self.of else [name for name in task.inputs if not modality_class(name).masked]

    def class_column(self) -> ClassColumn:
        return ClassColumn(self.label, self.loss == "sigmoid", self.classes)

    def columns(self) -> set[str]:
        return {self.label}

    def read(self, task: Task, row: Row, number: int, sizes: TargetSizes) -> Tensors:
        """The class () int64 for loss softmax, or (K,) float zeros and ones for sigmoid."""
        index = sizes.class_numbers[head_key(task.source, self.label)]
        location = f"column {self.label!r}"
        # The rows of a table were checked before training. A stream is not read ahead, so its bad rows are replaced.
        try:
            classes = row_classes(row[self.label], self.loss == "sigmoid")
            if any(label is None or label != label for label in classes):
                raise BadMedia(f"{location}: no class")
            # The message does not suggest the nearest class: with 20,000 classes, the search for it takes a second.
            if unknown := [label for label in classes if label not in index]:
                raise BadMedia(f"{location}: {unknown[0]!r} is not among the classes")
        except ValueError as error:
            raise BadMedia(f"{location}: {error}") from None
        numbers = [index[label] for label in classes]
        if self.loss == "softmax":
            return {"label": torch.tensor(numbers[0])}
        label_K = torch.zeros(len(index))
        label_K[numbers] = 1
        return {"label": label_K}

    def zeros(self, task: Task, examples: int, sizes: TargetSizes) -> Tensors:
        if self.loss == "softmax":
            return {"label": torch.zeros(examples, dtype=torch.int64)}
        return {"label": torch.zeros(examples, len(sizes.class_numbers[head_key(task.source, self.label)]))}

    def losses(self, model: Embedder, task: Task, encoded: EncodedAll, targets: Tensors) -> Tensors:
        """The loss of each classified modality, by the name "modality:column"."""
        target = targets["label"]
        loss_of = F.cross_entropy if self.loss == "softmax" else sigmoid_classification
        losses = {}
        for name in self.modalities(task):
            features_BD = encoded[name].features
            with full_precision(features_BD.device):
                logits_BK = model.classify(features_BD, head_key(task.source, self.label))
            # A modality that is drawn k times per example has k rows per example.
            repeated = target.repeat_interleave(len(logits_BK) // len(target), dim=0)
            losses[f"{name}:{self.label}"] = loss_of(logits_BK, repeated, label_smoothing=self.label_smoothing)
        return losses


def sigmoid_classification(logits_BK: Tensor, label_BK: Tensor, label_smoothing: float) -> Tensor:
    """Binary cross-entropy, averaged over classes and examples. Smoothing moves targets towards 1/2.

    A sum over hundreds of classes would be hundreds of times as large as the other losses of a step.
    """
    target_BK = label_BK * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits_BK, target_BK)
