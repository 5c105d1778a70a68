"""Evaluates trained classification heads on new rows."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.data.batch import head_key
from openimp.data.tables import Table
from openimp.encoding.items import Progress, encode_input, require_columns
from openimp.evaluation.classes import Classified, Labels, MultiLabel, predict, read_labels
from openimp.evaluation.figures import Readable, readable_rows
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.recipe.evaluation import ClassHead
from openimp.recipe.schema import Recipe


def classify(
    model: Embedder,
    recipe: Recipe,
    modalities: dict[str, Modality],
    name: str,
    table: Table,
    classes: Mapping[str, list[Any]],
    progress: Progress | None = None,
) -> tuple[Classified | MultiLabel, Readable]:
    """Predictions of the class head of evaluation set `name`, and the rows that could be read.

    If an item has several clips, their logits are averaged.

    Raises:
        UserError: `check` fails, or no row can be read.
    """
    options = recipe.evaluation.sets[name]
    assert isinstance(options, ClassHead)
    where, key = f"evaluation.sets.{name}", head_key(recipe.tasks[options.task].source, options.label)
    labels = check(recipe, modalities, options, where, table, classes)
    (seen,) = options.inputs
    encoded = encode_input(model, recipe, modalities, options, seen, table, None, progress)
    counted = readable_rows(table, [encoded], where, labels.values)
    assert isinstance(model, IMP)
    head: Any = model.classifiers[key]
    # The bias is the weight of a feature that is always 1.
    weights_KD = torch.cat([head.weight, head.bias[:, None]], dim=1).detach()
    features_ND = F.pad(encoded.embeddings[torch.from_numpy(encoded.item[counted.row])], (0, 1), value=1.0)
    return predict(seen, options.label, features_ND, weights_KD, counted.row, labels, labels.classes, where), counted


def check(
    recipe: Recipe,
    modalities: dict[str, Modality],
    options: ClassHead,
    where: str,
    table: Table,
    classes: Mapping[str, list[Any]],
) -> Labels:
    """Finds the errors that would stop `classify`, without encoding anything, and returns the labels.

    Args:
        classes: the classes of each of the model's heads, by head name.

    Raises:
        UserError: the model has no such head, a column is missing, or a row has a class that the head does not know.
            Also if the rows hold single classes but the head's loss is sigmoid, or lists but it is softmax.
    """
    ((seen, spec),) = options.inputs.items()
    objective, key = recipe.class_head(options, where), head_key(recipe.tasks[options.task].source, options.label)
    if key not in classes:
        raise UserError(f"{where}: the model has no head that tasks.{options.task} trained on {options.label!r}")
    require_columns(table, modalities[seen], spec, where)
    labels = read_labels(table, options.label, where, classes[key])
    if labels.lists != (objective.loss == "sigmoid"):
        wanted = "one class" if labels.lists else "a list of classes"
        raise UserError(f"{where}: the head's loss is {objective.loss}, so {options.label!r} needs {wanted} per row")
    return labels
