"""The model that is evaluated, and how it encodes the rows of a source.

Shape suffixes: N items, R rows, D width, Z features of the shared embedding space.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Classes, Modalities
from openimp.data.files import stable_hash
from openimp.data.tables import Table, Unreadable
from openimp.encoding.items import Progress, ahead, embed, raw_values
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import EvaluationSet
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class Predicted(ABC):
    """Predictions about an evaluation set: for items of the modality `query`, items of the modality `target` or classes
    in the column `target`."""

    query: str
    target: str

    @property
    def task(self) -> str:
        """The task's name in results."""
        return f"{self.query} -> {self.target}"

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """The metrics, among them "interval", which is the main metric's, and "chance"."""


@dataclass(frozen=True)
class Encoded:
    """One input of all rows of a source. Equal values are encoded once."""

    embeddings: Tensor  # (N, Z) unit vectors, or (N, D) features, fp32, of the distinct values
    item: np.ndarray  # (R,) int64, the index of each row's embedding; -1 if the row cannot be read
    bad: dict[int, str]  # the reason why a row cannot be read, by row
    keys: list[str]  # a string per row, which identifies the row's value


@dataclass(frozen=True)
class ReadableRows:
    """The rows of a source that are evaluated, because everything in them could be read."""

    row: np.ndarray  # int64, the numbers of the rows
    skipped: list[str]  # "row: reason" for each other row
    content: str  # a hash of everything that was read: media, texts, labels, and their order


@dataclass(frozen=True)
class Evaluator:
    """A model and everything that evaluation needs to know about it."""

    model: Embedder  # in evaluation mode while `encode` runs
    recipe: Recipe
    modalities: Modalities  # an instance per modality of the recipe, fitted
    classes: Classes = field(default_factory=dict)  # of each classification head of the model
    progress: Progress | None = None

    def encode(self, options: EvaluationSet, name: str, table: Table, towards: str | None) -> Encoded:
        """Encodes one input of an evaluation set, of the modality `name`, for all rows of a source, in order.

        Media are the same item if their bytes are equal, and texts if they differ only in case and spaces. Equal tokens
        do not make texts the same item: a model that does not know a word, or reads only the beginning, would be right
        with any of them.
        """
        modality, view = self.modalities[name], options.view[name]
        keys: list[str] = []
        items: list[str] = []
        bad: dict[str, str] = {}
        place: dict[str, int] = {}

        def distinct() -> Iterator[tuple[str, Any]]:
            seen = set()
            for key, value in raw_values(table, modality, options.inputs[name], self.progress):
                item = " ".join(key.casefold().split()) if modality.reads_text else key
                keys.append(key)
                items.append(item)
                if item not in seen:
                    seen.add(item)
                    yield item, value

        def read(pair: tuple[str, Any]) -> tuple[str, np.ndarray | BadMedia]:
            item, value = pair
            try:
                return item, value if isinstance(value, BadMedia) else modality.encode_input(value, view)
            except BadMedia as error:
                return item, error

        def readable() -> Iterator[np.ndarray]:
            for item, found in ahead(read, distinct()):
                if isinstance(found, BadMedia):
                    bad[item] = str(found)
                else:
                    place[item] = len(place)
                    yield found

        batch, precision = self.recipe.evaluation.batch_size, self.recipe.train.precision
        embeddings = embed(self.model, modality, view, readable(), towards, batch, precision, towards is not None)
        rows = np.array([place.get(item, -1) for item in items], np.int64)
        return Encoded(embeddings, rows, {row: bad[item] for row, item in enumerate(items) if item in bad}, keys)


def readable_rows(table: Table, inputs: list[Encoded], where: str, labels: Sequence[Any] | None = None) -> ReadableRows:
    """The rows in which all inputs, and the label if there are labels, can be read. UserError if there are none."""
    bad: dict[int, str] = {}
    for encoded in inputs:
        bad = encoded.bad | bad
    bad |= {row: label.reason for row, label in enumerate(labels or ()) if isinstance(label, Unreadable)}
    skipped = [f"{table.row_name(row)}: {bad[row]}" for row in sorted(bad)]
    rows = np.setdiff1d(np.arange(len(table)), list(bad))
    if not len(rows):
        raise UserError(f"{where}: no row of source {table.name} can be read; the first: {skipped[0]}")
    content = stable_hash((*(encoded.keys[row] for encoded in inputs), labels and labels[row]) for row in rows)
    return ReadableRows(rows, skipped, content)
