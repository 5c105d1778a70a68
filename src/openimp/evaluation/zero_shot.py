"""Zero-shot classification: classes that are named only by text (CLIP, arXiv 2103.00020, section 3.1).

Shape suffixes: N examples, K classes, Z features of the common space.
"""

import re
from string import Formatter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.common.schema import as_text
from openimp.data.tables import Table
from openimp.encoding.items import Progress, embed, encode_input, first_view, require_columns, require_pair
from openimp.evaluation.classes import Classified, Labels, MultiLabel, predict, read_labels
from openimp.evaluation.figures import Readable, readable_rows
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import ZeroShot
from openimp.recipe.schema import Recipe


def classify(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    table: Table,
    progress: Progress | None = None,
) -> tuple[Classified | MultiLabel, Readable]:
    """Classifies one evaluation set by its class names, and tells which rows counted.

    The classes are those that the set lists, or the distinct labels of the source. Prompts are read in the reader's
    first training view.

    Raises:
        UserError: a column is missing, a class has no text, a prompt has no place for it, no row can be read, or the
            two modalities share no space.
    """
    options = recipe.evaluation.sets[name]
    assert isinstance(options, ZeroShot)
    where = f"evaluation.sets.{name}"
    (seen,), reader = options.inputs, options.reader
    labels, texts = check(model, modalities, options, where, table)
    classes_KZ = class_embeddings(model, recipe, modalities[reader], texts, options.prompts, seen, where)
    encoded = encode_input(model, recipe, modalities, options, seen, table, reader, progress)
    counted = readable_rows(table, [encoded], where, labels.values)
    z_NZ = encoded.embeddings[torch.from_numpy(encoded.item[counted.row])]
    return predict(seen, options.label, z_NZ, classes_KZ, counted.row, labels, texts, where), counted


def check(
    model: Embedder, modalities: dict[str, Modality], options: ZeroShot, where: str, table: Table
) -> tuple[Labels, list[str]]:
    """Finds what would stop `classify`, without encoding anything.

    Returns:
        The labels, and what each class is called.

    Raises:
        UserError: as `classify`.
    """
    (seen, spec) = next(iter(options.inputs.items()))
    require_pair(model, seen, options.reader, where)
    require_columns(table, modalities[seen], spec, where)
    known = None if options.classes is None else list(options.classes)
    labels = read_labels(table, options.label, where, known, options.splits)
    texts = [_class_text(label, options, f"{where}: source {table.name}") for label in labels.classes]
    first: dict[str, Any] = {}
    for label, text in zip(labels.classes, texts):
        if (other := first.setdefault(text, label)) != label:
            raise UserError(f"{where}: classes {other!r} and {label!r} have the same text, {text!r}; rename one")
    for prompt in options.prompts:
        _fill(prompt, "", where)
    return labels, texts


def class_embeddings(
    model: Embedder, recipe: Recipe, reader: Modality, texts: list[str], prompts: list[str], seen: str, where: str
) -> Tensor:
    """(K, Z) unit vectors: each class' text in every prompt, averaged over the prompts as unit vectors."""
    view = first_view(recipe, reader.name)
    filled = [_fill(prompt, text, where) for text in texts for prompt in prompts]
    items = (reader.encode_input(text, view) for text in filled)
    z_NZ = embed(model, reader, view, items, seen, recipe.evaluation.batch_size, recipe.train.precision)
    return F.normalize(z_NZ.unflatten(0, (len(texts), len(prompts))).mean(1), dim=-1)


def _class_text(label: Any, options: ZeroShot, where: str) -> str:
    text = (options.classes or {}).get(as_text(label), label)
    if options.words and text == label and isinstance(text, str):
        text = words(text)
    if not isinstance(text, str) or not text.strip():
        hint = f"name it in classes as {as_text(label)!r}"
        raise UserError(f"{where}: class {label!r} of column {options.label!r} has no text; {hint}")
    return text


def words(label: str) -> str:
    """A label as it is spoken: `brush_hair` and `BrushHair` are "brush hair"; what has spaces keeps its capitals."""
    spaced = " ".join(label.replace("_", " ").split())
    if " " in spaced:
        return spaced
    # Capitals alone, as in TVShow, are one word.
    parts = re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W_])(?=[A-Z][a-z])", spaced)
    return " ".join(part if len(part) > 1 and part.isupper() else part.lower() for part in parts)


def _fill(prompt: str, text: str, where: str) -> str:
    try:
        fields = [field for _, *field in Formatter().parse(prompt) if field[0] is not None]
    except ValueError:
        fields = []
    # Without a format: a width, as in {:>2000000000}, would fill the memory.
    if fields != [["", "", None]]:
        raise UserError(f"{where}: prompt {prompt!r} needs one plain {{}} where the class' text goes")
    return prompt.format(text)
