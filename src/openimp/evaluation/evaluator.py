"""The model that is evaluated, and how it encodes the rows of a source.

Shape suffixes: N items, R rows, D width, Z dimensions of the shared embedding space.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Classes, Modalities
from openimp.common.progress import Progress
from openimp.common.texts import text_key
from openimp.data.tables import Table, Unreadable
from openimp.encoding.engine import ItemEncoder
from openimp.encoding.items import Raw, raw_values
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import all_gather_object, all_gather_uneven, own_part
from openimp.recipe.evaluation import ClassHead, EvaluationSet, Probe, ZeroShot
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Source

MAX_NAMED_ROWS = 20
"""Maximum number of unreadable or unknown rows that a result names. It counts all of them."""


@dataclass(frozen=True)
class Predicted(ABC):
    """Predictions on an evaluation set: for each item of the modality `query`, an item of the modality `target` (in
    retrieval) or a class of the column `target`."""

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
    """One input of all rows of a source. Each rank encodes equal values once."""

    embeddings: Tensor  # (N, Z) unit vectors, or (N, D) features, fp32, of the values
    embedding_index: np.ndarray  # (R,) int64, of each row, into `embeddings`; equal for equal values; -1: unreadable
    bad: dict[int, str]  # the reason why a row cannot be read, by row
    keys: list[str]  # a string per row, which identifies the row's value


@dataclass(frozen=True)
class ReadableRows:
    """The rows of a source that are evaluated, because everything in them could be read."""

    row: np.ndarray  # int64, the numbers of the rows
    skipped: list[str]  # "row: reason" for each other row
    content: str  # a hash of everything that was read: media, texts, labels, and their order


class LabelledRows(NamedTuple):
    """The rows of a source with a label, as far as they can be read."""

    vectors: Tensor  # (N, Z) or (N, D)
    labels: list[Any]  # the column's value of each row
    readable: ReadableRows


class _RankRows(NamedTuple):
    """What one rank read of one input."""

    keys: list[str]  # by row; identifies exactly what was read
    items: list[str]  # by row; rows with equal values have the same item, which is encoded once
    readable: list[str]  # the distinct items that could be read, in the order of their vectors
    unreadable: dict[str, str]  # the reason for each other item


@dataclass(frozen=True)
class Evaluator:
    """A model and everything that evaluation needs to know about it."""

    model: Embedder  # in evaluation mode while `encode` runs
    recipe: Recipe
    modalities: Modalities  # an instance per modality of the recipe, fitted
    classes: Classes = field(default_factory=dict)  # of each classification head of the model
    progress: Progress | None = None  # wraps the rows that this rank reads, to show the progress
    watch: Progress | None = None  # wraps the forward passes, which all ranks make together, and may stop them
    tables: dict[str, Table] = field(default_factory=dict)  # by source; filled as sets are opened
    training_sources: Mapping[str, Source] | None = None  # that the model was trained on; None: those of the recipe

    def encode(self, options: EvaluationSet, name: str, table: Table, towards: str | None) -> Encoded:
        """Encodes one input of an evaluation set, of the modality `name`, for all rows of a source, in order.

        Media are the same item if their bytes are equal, and texts if their `text_key` is equal. Texts with other keys
        are other items, even if the model reads the same tokens: a model that does not know a word, or reads only the
        beginning, would be right with any of these texts.

        Each rank reads and encodes an equal part of the rows. All ranks get the result for all rows.
        """
        encoder = self.item_encoder(name, options.view[name], towards)
        part = _RankRows([], [], [], {})

        def distinct() -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
            seen = set()
            rows = own_part(len(table))
            for key, value in raw_values(table, encoder.modality, options.inputs[name], rows, self.progress):
                item = f"text:{text_key(value)}" if isinstance(value, str) else key
                part.keys.append(key)
                part.items.append(item)
                if item not in seen:
                    seen.add(item)
                    yield item, partial(_read, encoder, value)

        vectors = []
        for item, vector in encoder.encode(distinct()):
            if isinstance(vector, BadMedia):
                part.unreadable[item] = str(vector)
            else:
                part.readable.append(item)
                vectors.append(vector)
        return _merge(all_gather_uneven(encoder.stack(vectors)), all_gather_object(part))

    def encode_labelled(
        self, options: ZeroShot | ClassHead | Probe, error_prefix: str, table: Table, towards: str | None
    ) -> LabelledRows:
        """Encodes the only input of the rows in which it and the label can be read. UserError if there are none."""
        (name,) = options.inputs
        encoded = self.encode(options, name, table, towards)
        labels = table.column(options.label)
        readable = readable_rows(table, [encoded], error_prefix, labels)
        vectors = encoded.embeddings[torch.from_numpy(encoded.embedding_index[readable.row])]
        return LabelledRows(vectors, [labels[row] for row in readable.row], readable)

    def item_encoder(self, name: str, view: Any, towards: str | None) -> ItemEncoder:
        """The engine that encodes items of the modality `name`. Only vectors that are compared have length 1."""
        return ItemEncoder(
            self.model,
            self.modalities[name],
            view,
            towards,
            self.recipe.train.precision,
            batch_size=self.recipe.evaluation.batch_size,
            normalize=towards is not None,
            watch=self.watch,
        )


def _read(encoder: ItemEncoder, value: Raw | BadMedia) -> np.ndarray:
    if isinstance(value, BadMedia):
        raise value
    return encoder.read(value)


def _merge(vectors: Tensor, parts: list[_RankRows]) -> Encoded:
    """One input of all rows. If several ranks have encoded the same item, the vector of the first one counts."""
    readable = [item for part in parts for item in part.readable]
    index = {item: i for i, item in reversed([*enumerate(readable)])}
    items = [item for part in parts for item in part.items]
    reasons = {item: reason for part in reversed(parts) for item, reason in part.unreadable.items()}
    return Encoded(
        embeddings=vectors,
        embedding_index=np.array([index.get(item, -1) for item in items], np.int64),
        bad={row: reasons[item] for row, item in enumerate(items) if item in reasons},
        keys=[key for part in parts for key in part.keys],
    )


def readable_rows(
    table: Table, inputs: list[Encoded], error_prefix: str, labels: Sequence[Any] | None = None
) -> ReadableRows:
    """The rows in which all inputs, and the label if there are labels, can be read. UserError if there are none."""
    bad = {row: reason for encoded in reversed(inputs) for row, reason in encoded.bad.items()}
    bad |= {row: label.reason for row, label in enumerate(labels or ()) if isinstance(label, Unreadable)}
    skipped = [f"{table.row_name(row)}: {bad[row]}" for row in sorted(bad)]
    rows = np.setdiff1d(np.arange(len(table)), list(bad))
    if not len(rows):
        raise UserError(f"{error_prefix}: no row of source {table.name} can be read; the first: {skipped[0]}")

    def content_of(row: int) -> tuple[Any, ...]:
        return (*(encoded.keys[row] for encoded in inputs), labels and labels[row])

    return ReadableRows(rows, skipped, content=stable_hash(map(content_of, rows)))
