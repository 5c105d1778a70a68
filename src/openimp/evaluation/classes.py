"""Labels, predictions and metrics of classification, shared by zero-shot classification and class heads.

Shape suffixes: N examples, K classes, Z features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openimp.common.errors import UserError, nearest
from openimp.common.schema import as_text
from openimp.data.tables import Table, Unreadable
from openimp.evaluation.figures import accuracy, average_precision, classes_in, interval
from openimp.evaluation.retrieval import SIMILARITIES, ranks


@dataclass(frozen=True)
class Labels:
    """The class labels of a source's rows.

    Attributes:
        values: for each row its class, a list of classes, or a `Unreadable`.
        classes: the labels of all classes that a model can choose.
        lists: whether a row may have any number of classes.
        splits: for each row the test splits that it is in; None if the source has no splits.
    """

    values: list[Any]
    classes: list[Any]
    lists: bool
    splits: list[list[Any]] | None = None


@dataclass(frozen=True)
class Classified:
    """The predictions on one evaluation set whose rows have one class each.

    Attributes:
        query: the modality.
        target: the column with the class.
        classes: the names of the classes.
        row: (N,) int64, the source's row of each example; rows that could not be read are left out.
        truth: (N,) int64, the class of each example.
        predicted: (N,) int64, the most similar class.
        rank: (N,) int64, the rank of the true class, from 1; ties count against the model.
        splits: for each test split the indices of its examples; empty if there are no splits.
    """

    query: str
    target: str
    classes: list[Any]
    row: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    splits: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task's name in results."""
        return f"{self.query} -> {self.target}"

    def confusion(self) -> np.ndarray:
        """(K, K) int64, how many examples of each class (row) were predicted as each class (column)."""
        k = len(self.classes)
        return np.bincount(self.truth * k + self.predicted, minlength=k * k).reshape(k, k)

    def figures(self) -> dict[str, Any]:
        """Top-1 with its 95 % interval, top-5, top-1 averaged over the classes, and chance.

        With test splits: the means over the splits, and the figures of each split.
        """
        figures = self._figures(np.arange(len(self.rank)))
        if not self.splits:
            return figures
        parts = {name: self._figures(some) for name, some in self.splits.items()}
        means = {key: float(np.mean([part[key] for part in parts.values()])) for key in ("top1", "per_class", "top5")}
        weight = np.zeros(len(self.rank))
        for some in self.splits.values():
            weight[some] += 1 / len(some)
        return {**figures, **means, "interval": interval(self.rank == 1, weight), "splits": parts}

    def _figures(self, some: np.ndarray) -> dict[str, Any]:
        top5 = float((self.rank[some] <= 5).mean())
        return accuracy(self.rank[some] == 1, self.truth[some], len(self.classes)) | {"top5": top5}


@dataclass(frozen=True)
class MultiLabel:
    """The predictions on one evaluation set whose rows may have any number of classes.

    Attributes:
        query: the modality.
        target: the column with the classes.
        score_NK: the similarity of each example to each class.
        hot_NK: bool, whether an example has a class.
    """

    query: str
    target: str
    score_NK: np.ndarray
    hot_NK: np.ndarray

    @property
    def task(self) -> str:
        """The task's name in results."""
        return f"{self.query} -> {self.target} (mAP)"

    def figures(self) -> dict[str, Any]:
        """Mean average precision with its 95 % interval, and chance."""
        return average_precision(self.score_NK, self.hot_NK)


def read_labels(
    table: Table, column: str, where: str, known: Sequence[Any] | None = None, splits: str | None = None
) -> Labels:
    """Reads and checks the class labels of a source's rows.

    Args:
        table: the source.
        column: the column that holds each row's class or list of classes.
        where: the key in the recipe, for error messages.
        known: the labels of all classes; None: the labels that occur in the rows.
        splits: the column with the test splits; None if there are no splits.

    Raises:
        UserError: a column is missing, or a row has no class, an unknown class, or no split, or two classes are equal
            as text.
    """
    table.require([column, *([splits] if splits else [])], where)
    values, name = table.column(column), f"{where}: column {column!r} of source {table.name}"
    lists = any(isinstance(value, list) for value in values)
    if lists and not all(value is None or isinstance(value, list | Unreadable) for value in values):
        raise UserError(f"{name} holds lists in some rows and single classes in others")
    found = list(chain.from_iterable(value for value in values if isinstance(value, list))) if lists else values
    classes = classes_in(found, name)
    if None in classes:
        raise UserError(f"{name} has {found.count(None)} rows without a class; leave them out with where")
    if known is not None:
        texts = _index(known)
        for label in classes:
            if (text := as_text(label)) not in texts:
                raise UserError(f"{name}: unknown class {label!r}{nearest(text, texts)}")
        classes = list(known)
    index = _index(classes)
    for i, label in enumerate(classes):
        if index[as_text(label)] != i:
            raise UserError(f"{name}: class {label!r} and another one are both {as_text(label)!r} as text; rename one")
    return Labels(values, classes, lists, _splits(table, splits, where, lists) if splits else None)


def predict(
    query: str,
    target: str,
    z_NZ: Tensor,
    classes_KZ: Tensor,
    row: np.ndarray,
    labels: Labels,
    names: list[Any],
    where: str,
) -> Classified | MultiLabel:
    """Predicts the classes of examples by dot product, and pairs the predictions with the labels.

    Args:
        query: the modality.
        target: the column with the class.
        z_NZ: a vector per example.
        classes_KZ: a vector per class.
        row: (N,) int64, the source's row of each example.
        labels: the labels of all rows.
        names: the names of the classes, in results.
        where: the key in the recipe, for error messages.

    Raises:
        UserError: no example has a class, or a split has no example.
    """
    index, truths = _index(labels.classes), [labels.values[i] for i in row]
    if labels.lists:
        hot_NK = np.zeros((len(row), len(names)), bool)
        for i, truth in enumerate(truths):
            hot_NK[i, [index[as_text(label)] for label in truth or []]] = True
        if not hot_NK.any():
            raise UserError(f"{where}: none of the {len(row)} rows that can be read has a class in column {target!r}")
        return MultiLabel(query, target, (z_NZ @ classes_KZ.T).cpu().numpy(), hot_NK)
    truth_N = np.array([index[as_text(label)] for label in truths], np.int64)
    rank_N = ranks(z_NZ, classes_KZ, np.stack([np.arange(len(row)), truth_N], axis=1))
    splits: dict[str, list[int]] = {as_text(split): [] for of_row in labels.splits or () for split in of_row}
    for i, of_row in enumerate([labels.splits[i] for i in row] if labels.splits else ()):
        for split in of_row:
            splits[as_text(split)].append(i)
    for name, some in splits.items():
        if not some:
            raise UserError(f"{where}: no row of split {name!r} can be read; leave the split out with where")
    parts = {name: np.array(splits[name]) for name in sorted(splits)}
    return Classified(query, target, names, row, truth_N, _most_similar(z_NZ, classes_KZ), rank_N, parts)


def _index(classes: Iterable[Any]) -> dict[str, int]:
    """Index of each class by its label. Labels are compared as text, because the cells of a CSV file have no type."""
    return {as_text(label): i for i, label in enumerate(classes)}


def _splits(table: Table, column: str, where: str, lists: bool) -> list[list[Any]]:
    name = f"{where}: column {column!r} of source {table.name}"
    if lists:
        raise UserError(f"{name}: splits need rows with one class each, not lists of classes")
    cells = [value if isinstance(value, list) else [value] for value in table.column(column)]
    for row, cell in enumerate(cells):
        if not cell or any(split is None or isinstance(split, Unreadable) for split in cell):
            raise UserError(f"{name}: {table.row_name(row)} is in no split; leave it out with where")
    return cells


def _most_similar(z_NZ: Tensor, classes_KZ: Tensor) -> np.ndarray:
    parts = z_NZ.split(max(1, SIMILARITIES // len(classes_KZ)))
    return torch.cat([(part @ classes_KZ.T).argmax(1) for part in parts]).cpu().numpy()
