"""Zero-shot classification: classes that are named only by text (CLIP, arXiv 2103.00020, section 3.1).

Shape suffixes: N examples, K classes, P prompts, Z features of the common space.
"""

from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.data.sources import Table
from openimp.data.tables import as_text
from openimp.errors import UserError
from openimp.evaluation.encoding import Progress, embed, encode_rows, first_view, require_columns, require_pair
from openimp.evaluation.figures import Readable, accuracy, classes_in, readable_rows
from openimp.evaluation.retrieval import SIMILARITIES, ranks
from openimp.modalities import Modality
from openimp.model.embedder import Embedder
from openimp.recipe import Recipe, ZeroShot


@dataclass(frozen=True)
class Classified:
    """One evaluation set, for its figures and for a closer look.

    Attributes:
        query, target: the modality, and the column with the class.
        classes: the labels, sorted.
        row: (N,) int64, the rows of the source that could be read.
        truth: (N,) int64, the class of each.
        predicted: (N,) int64, the most similar class.
        rank: (N,) int64, the rank of the true class from 1; ties count against the model.
    """

    query: str
    target: str
    classes: list[Any]
    row: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray

    @property
    def task(self) -> str:
        """What a result calls it."""
        return f"{self.query} -> {self.target}"

    def confusion(self) -> np.ndarray:
        """(K, K) int64, how many examples of a class (row) were taken for each class (column)."""
        k = len(self.classes)
        return np.bincount(self.truth * k + self.predicted, minlength=k * k).reshape(k, k)

    def figures(self) -> dict[str, Any]:
        """Top-1, top-5, the mean over the classes of their top-1, chance, and the 95 % interval of top-1."""
        top5 = float((self.rank <= 5).mean())
        return accuracy(self.rank == 1, self.truth, len(self.classes)) | {"top5": top5}


def classify(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    table: Table,
    progress: Progress | None = None,
) -> tuple[Classified, Readable]:
    """Classifies one evaluation set by its class names, and tells which rows counted.

    The classes are the distinct labels of the source. Prompts are read in the reader's first training view.

    Raises:
        UserError: a column is missing, a class has no text, a prompt has no place for it, no row can be read, or the
            two modalities share no space.
    """
    options = recipe.evaluation.sets[name]
    assert isinstance(options, ZeroShot)
    where = f"evaluation.sets.{name}"
    (seen, spec), reader = next(iter(options.inputs.items())), options.reader
    labels, classes, texts = check(model, modalities, options, where, table)
    classes_KZ = class_embeddings(model, recipe, modalities[reader], texts, options.prompts, seen, where)
    encoded = encode_rows(
        model,
        table,
        modalities[seen],
        spec,
        options.view[seen],
        towards=reader,
        batch=recipe.evaluation.batch,
        precision=recipe.train.precision,
        progress=progress,
    )
    counted = readable_rows(table, [encoded], where, labels)
    row = counted.row
    index = {label: i for i, label in enumerate(classes)}
    truth = np.array([index[labels[i]] for i in row], np.int64)
    z_NZ = encoded.embeddings[torch.from_numpy(encoded.item[row])]
    rank = ranks(z_NZ, classes_KZ, np.stack([np.arange(len(row)), truth], axis=1))
    return Classified(seen, options.label, classes, row, truth, _most_similar(z_NZ, classes_KZ), rank), counted


def check(
    model: Embedder, modalities: dict[str, Modality], options: ZeroShot, where: str, table: Table
) -> tuple[list[Any], list[Any], list[str]]:
    """Finds what would stop `classify`, without encoding anything.

    Returns:
        The label of each row, the distinct ones, and the text of each of those.

    Raises:
        UserError: as `classify`.
    """
    (seen, spec) = next(iter(options.inputs.items()))
    require_pair(model, seen, options.reader, where)
    require_columns(table, modalities[seen], spec, where)
    table.require([options.label], where)
    labels = table.column(options.label)
    classes = classes_in(labels, f"{where}: column {options.label!r} of source {table.name}")
    if None in classes:
        column = f"column {options.label!r} of source {table.name}"
        raise UserError(f"{where}: {column} has {labels.count(None)} rows without a class; leave them out with where")
    texts = [_class_text(label, options, f"{where}: source {table.name}") for label in classes]
    for prompt in options.prompts:
        _fill(prompt, "", where)
    return labels, classes, texts


def class_embeddings(
    model: Embedder, recipe: Recipe, reader: Modality, texts: list[str], prompts: list[str], seen: str, where: str
) -> Tensor:
    """(K, Z) unit vectors: each class' text in every prompt, averaged over the prompts as unit vectors."""
    view = first_view(recipe, reader.name)
    filled = [_fill(prompt, text, where) for text in texts for prompt in prompts]
    items = (reader.encode_input(text, view) for text in filled)
    z_NZ = embed(model, reader, view, items, seen, recipe.evaluation.batch, recipe.train.precision)
    return F.normalize(z_NZ.unflatten(0, (len(texts), len(prompts))).mean(1), dim=-1)


def _class_text(label: Any, options: ZeroShot, where: str) -> str:
    text = (options.texts or {}).get(as_text(label), label)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where}: class {label!r} of column {options.label!r} has no text; name it in texts as {as_text(label)!r}"
        )
    return text


def _fill(prompt: str, text: str, where: str) -> str:
    try:
        fields = [field for _, *field in Formatter().parse(prompt) if field[0] is not None]
    except ValueError:
        fields = []
    # Without a format: a width, as in {:>2000000000}, would fill the memory.
    if fields != [["", "", None]]:
        raise UserError(f"{where}: prompt {prompt!r} needs one plain {{}} where the class' text goes")
    return prompt.format(text)


def _most_similar(z_NZ: Tensor, classes_KZ: Tensor) -> np.ndarray:
    parts = z_NZ.split(max(1, SIMILARITIES // len(classes_KZ)))
    return torch.cat([(part @ classes_KZ.T).argmax(1) for part in parts]).cpu().numpy()
