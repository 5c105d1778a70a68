"""Classification by class names (zero-shot) or by a trained class head.

Both compare a vector per example with a vector per class by dot product.

Shape suffixes: N examples, K classes, D width, Z features of the shared embedding space.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.objective import head_key
from openimp.common.schema import as_text
from openimp.common.texts import text_key
from openimp.data.tables import Table, item_key
from openimp.data.targets import find_classes, index_of, sort_classes
from openimp.encoding.items import require_pair
from openimp.evaluation import zero_shot
from openimp.evaluation.evaluator import Evaluator, Predicted, ReadableRows
from openimp.evaluation.metrics import accuracy, average_precision, interval
from openimp.evaluation.retrieval import MAX_SIMILARITIES, ranks
from openimp.parallel.layout import full_tensor, reshard
from openimp.recipe.evaluation import ClassHead, ZeroShot


class Labels(NamedTuple):
    """The classes of an evaluation set, and its test splits. Labels are compared as text: CSV cells have no type."""

    names: list[Any]  # of all classes that the model can choose
    class_index: dict[str, int]  # by the label as text
    has_lists: bool  # whether a row may have any number of classes
    splits: dict[str, list[int]]  # the rows of each test split; empty if there are no splits


@dataclass(frozen=True)
class Classified(Predicted):
    """The predictions on an evaluation set with one class per row. The arrays are (N,) int64."""

    classes: list[Any]  # their names
    truth: np.ndarray  # the class of each example
    predicted: np.ndarray  # the most similar class
    rank: np.ndarray  # the rank of the true class, from 1; ties count against the model
    splits: dict[str, np.ndarray] = field(default_factory=dict)  # the indices of the examples of each test split

    def confusion(self) -> np.ndarray:
        """(K, K) int64, the number of examples of each class (row) that were predicted as each class (column)."""
        k = len(self.classes)
        return np.bincount(self.truth * k + self.predicted, minlength=k * k).reshape(k, k)

    def metrics(self) -> dict[str, Any]:
        """Top-1 with its 95 % interval, top-5, top-1 averaged over the classes, and chance.

        With test splits: the means over the splits, and the metrics of each split.
        """
        metrics = self._metrics(np.arange(len(self.rank)))
        if not self.splits:
            return metrics
        parts = {name: self._metrics(examples) for name, examples in self.splits.items()}
        means = {key: float(np.mean([part[key] for part in parts.values()])) for key in ("top1", "per_class", "top5")}
        weight = np.zeros(len(self.rank))
        for examples in self.splits.values():
            weight[examples] += 1 / len(examples)
        return {**metrics, **means, "interval": interval(self.rank == 1, weight), "splits": parts}

    def _metrics(self, examples: np.ndarray) -> dict[str, Any]:
        rank = self.rank[examples]
        return accuracy(rank == 1, self.truth[examples], len(self.classes)) | {"top5": float((rank <= 5).mean())}


@dataclass(frozen=True)
class MultiLabel(Predicted):
    """The predictions on an evaluation set with any number of classes per row."""

    score_NK: np.ndarray  # the similarity of each example to each class
    hot_NK: np.ndarray  # bool, whether an example has a class

    @property
    def task(self) -> str:
        return f"{super().task} (mAP)"

    def metrics(self) -> dict[str, Any]:
        """Mean average precision with its 95 % interval, and chance."""
        return average_precision(self.score_NK, self.hot_NK)


def read_labels(evaluator: Evaluator, options: ZeroShot | ClassHead, error_prefix: str, table: Table) -> Labels:
    """Reads the classes and the test splits, without encoding anything.

    UserError if a row has no class or no split, or a class that the model cannot choose; if no row has a class; if a
    class has no name; or if the model lacks the head.
    """
    table.require([options.label], error_prefix)
    values = table.column(options.label)
    remedy = None
    if isinstance(options, ClassHead):
        has_lists = evaluator.recipe.class_column(options, error_prefix).has_lists
        classes = evaluator.classes.get(_head_key(evaluator, options))
        if classes is None:
            raise UserError(f"{error_prefix}: tasks.{options.task} has not trained a head on {options.label!r}")
        remedy = f"list all classes in the objective of tasks.{options.task}, or leave the row out with where"
    else:
        (query,) = options.inputs
        require_pair(evaluator.model, query, options.reader, error_prefix)
        has_lists = any(isinstance(value, list) for value in values)
        # The keys of `options.classes` are the labels. `class_names` reads their names.
        classes = None if options.classes is None else list(options.classes)
    rows_by_class = find_classes(table, options.label, values, has_lists, error_prefix)
    column = f"{error_prefix}: column {options.label!r} of source {table.name}"
    if classes is None:
        classes, index = _merge_equal_texts(sort_classes(rows_by_class))
    else:
        index = {as_text(label): number for number, label in enumerate(classes)}
    if not rows_by_class:
        raise UserError(f"{column}: no row that can be read has a class")
    for label, row in rows_by_class.items():
        # UserError if the model cannot choose this class.
        index_of(as_text(label), index, f"{column}: {table.row_name(row)}", remedy)
    if isinstance(options, ClassHead):
        return Labels(classes, index, has_lists, {})
    if options.splits and has_lists:
        raise UserError(f"{error_prefix}: splits need rows with one class each, not lists of classes")
    splits = _read_splits(options.splits, error_prefix, table) if options.splits else {}
    names = zero_shot.class_names(classes, options, f"{error_prefix}: source {table.name}")
    return Labels(names, index, has_lists, splits)


def _merge_equal_texts(labels: list[Any]) -> tuple[list[Any], dict[str, int]]:
    """Makes one class of labels such as "Pizza" and "pizza ", whose texts have equal `text_key`s and equal vectors.

    Returns the first label of each class, and by the text of each label the index of its class.
    """
    label_by_key: dict[str, Any] = {}
    for label in labels:
        label_by_key.setdefault(text_key(as_text(label)), label)
    number_of = {key: number for number, key in enumerate(label_by_key)}
    return list(label_by_key.values()), {as_text(label): number_of[text_key(as_text(label))] for label in labels}


def classify(
    evaluator: Evaluator, options: ZeroShot | ClassHead, error_prefix: str, table: Table
) -> tuple[Classified | MultiLabel, ReadableRows]:
    """Predicts the class of each row, and returns the rows that could be read. UserError if there are none, or none of
    one of the test splits."""
    (query,) = options.inputs
    labels = read_labels(evaluator, options, error_prefix, table)
    if isinstance(options, ZeroShot):
        classes_KZ = zero_shot.class_embeddings(evaluator, options, error_prefix, labels.names)
        z_NZ, truths, readable = evaluator.encode_labelled(options, error_prefix, table, options.reader)
    else:
        classes_KZ = _head_vectors(evaluator, options)
        features_ND, truths, readable = evaluator.encode_labelled(options, error_prefix, table, None)
        z_NZ = F.pad(features_ND, (0, 1), value=1.0)  # Z is D + 1: the last weight of a class is its bias.
    if labels.has_lists:
        hot_NK = np.zeros((len(truths), len(labels.names)), bool)
        for hot_K, truth in zip(hot_NK, truths):
            hot_K[[labels.class_index[as_text(label)] for label in truth or []]] = True
        if not hot_NK.any():
            raise UserError(f"{error_prefix}: no row that can be read has a class in column {options.label!r}")
        return MultiLabel(query, options.label, (z_NZ @ classes_KZ.T).cpu().numpy(), hot_NK), readable
    truth_N = np.array([labels.class_index[as_text(label)] for label in truths], np.int64)
    blocks = z_NZ.split(max(1, MAX_SIMILARITIES // len(classes_KZ)))
    splits = {name: np.flatnonzero(np.isin(readable.row, rows)) for name, rows in sorted(labels.splits.items())}
    for name, examples in splits.items():
        if not len(examples):
            raise UserError(f"{error_prefix}: no row of split {name!r} can be read; leave the split out with where")
    classified = Classified(
        query,
        options.label,
        classes=labels.names,
        truth=truth_N,
        predicted=torch.cat([(block @ classes_KZ.T).argmax(1) for block in blocks]).cpu().numpy(),
        rank=ranks(z_NZ, classes_KZ, np.stack([np.arange(len(truths)), truth_N], axis=1)),
        splits=splits,
    )
    return classified, readable


def _head_key(evaluator: Evaluator, options: ClassHead) -> str:
    return head_key(evaluator.recipe.tasks[options.task].source, options.label)


def _head_vectors(evaluator: Evaluator, options: ClassHead) -> Tensor:
    """(K, D + 1) the weights of a head, and its bias as the weight of a feature that is always 1."""
    head: Any = evaluator.model.get_submodule(f"classifiers.{_head_key(evaluator, options)}")
    reshard(evaluator.model)  # An earlier pass may have left it gathered, in bf16.
    return torch.cat([full_tensor(head.weight.detach()), full_tensor(head.bias.detach())[:, None]], dim=1)


def _read_splits(column: str, error_prefix: str, table: Table) -> dict[str, list[int]]:
    """The rows of each test split. A row in no split is a UserError."""
    table.require([column], error_prefix)
    splits: dict[str, list[int]] = {}
    for row, value in enumerate(table.column(column)):
        names = value if isinstance(value, list) else [value]
        if not names or any(item_key(name) is None for name in names):
            place = f"column {column!r} of source {table.name}: {table.row_name(row)}"
            raise UserError(f"{error_prefix}: {place} is in no split; leave it out with where")
        for name in names:
            splits.setdefault(as_text(name), []).append(row)
    return splits
