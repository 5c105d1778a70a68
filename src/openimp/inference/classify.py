"""Tells the classes of items: by a trained classification head, or by names of classes that the model reads as texts.

Shape suffixes: N items, K classes, D width, Z features of the shared embedding space.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError, counted, escaped, nearest
from openimp.common.objective import head_key
from openimp.common.progress import notice
from openimp.common.protocols import is_known
from openimp.common.texts import text_key
from openimp.encoding.engine import ItemEncoder
from openimp.evaluation.zero_shot import check_prompt, class_vectors, names_with_equal_tokens
from openimp.inference.files import File, encoded, find_files, left_out, shown_name
from openimp.inference.model import Model, load
from openimp.parallel.distributed import alone
from openimp.recipe.schema import Recipe


class Predictions(NamedTuple):
    """The probability of each class, for several items."""

    classes: list[Any]
    probabilities: Tensor
    """(N, K) fp32. The probabilities of an item add up to 1, unless the head allows any number of classes per item."""

    @property
    def labels(self) -> list[Any]:
        """The most probable class of each item."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]


@dataclass(frozen=True)
class Classifier:
    """Tells the classes of items of one modality."""

    classes: list[Any]
    encoder: ItemEncoder  # makes the vectors (Z,) of items, or their features (D,) for a head
    logits: Callable[[Tensor], Tensor]  # (N, K) of vectors (N, Z) or features (N, D) on the model's device
    has_lists: bool = False  # whether an item may have any number of classes

    @torch.no_grad()
    def predict(self, z_NZ: Tensor) -> Predictions:
        """The classes of items with these vectors."""
        logits_NK = self.logits(z_NZ)
        return Predictions(self.classes, logits_NK.sigmoid() if self.has_lists else logits_NK.softmax(1))


@torch.no_grad()
def make_classifier(
    model: Model,
    modality: str,
    names: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    head: str | None = None,
    batch_size: int = 64,
) -> Classifier:
    """The classifier for a modality; see `Model.classify`."""
    if names is not None:
        if head is not None:
            raise UserError("either name the classes or choose a classification head, not both")
        return _by_names(model, modality, names, ("{}",) if prompts is None else prompts, batch_size)
    if prompts is not None:
        raise UserError("prompts need the names of the classes")
    encoder = model.feature_encoder(modality, batch_size)
    heads = class_heads(model.recipe, modality) if model.classes else {}  # A model without heads needs no recipe.
    if not heads:
        advice = "" if model.modalities[modality].reads_text else ", so name the classes to choose from"
        raise UserError(f"the model has no classification head for {modality}{advice}")
    if head is None and len(heads) > 1:
        raise UserError(f"{modality} has several classification heads; choose the head: {', '.join(heads)}")
    head = head or next(iter(heads))
    if head not in heads:
        raise UserError(f"no classification head {head!r} was trained on {modality}{nearest(head, heads)}")
    return Classifier(model.classes[head], encoder, partial(model.imp.classify, head=head), heads[head])


def class_heads(recipe: Recipe, modality: str) -> dict[str, bool]:
    """The classification heads that were trained on a modality, and whether an item may have any number of classes."""
    heads = {}
    for task in recipe.tasks.values():
        for objective in task.objectives:
            column = objective.class_column()
            if column and task.weight and modality in objective.modalities(task):
                heads[head_key(task.source, column.name)] = column.has_lists
    return heads


def _by_names(model: Model, modality: str, names: Sequence[str], prompts: Sequence[str], batch_size: int) -> Classifier:
    """A classifier by names (zero-shot)."""
    if any(isinstance(texts, str | Mapping) for texts in (names, prompts)):
        raise UserError("names and prompts are lists of texts")
    names = list(names)
    prompts = list(prompts)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"names are texts, such as {str(names[0])!r}")
    if len(names) < 2 or len({text_key(name) for name in names}) < len(names):
        raise UserError("name two classes or more, each once")
    if not prompts:
        raise UserError("prompts is empty; leave it out to use the names alone")
    for prompt in prompts:
        check_prompt(prompt, "classify")
    reader = next((reader for reader in model.modalities.values() if reader.reads_text), None)
    if reader is None:
        raise UserError("the model reads no texts, so it does not know classes by their names")
    if reader.name == modality:
        raise UserError("texts are not classified by names of classes")
    encoder = model.item_encoder(modality, reader.name, batch_size, "classify")
    scale = model.similarity_scale(modality, reader.name)
    for name in names:
        if not name.strip() or not is_known(reader, name, model.views[reader.name]):
            raise UserError(f"the class {name!r} has no word that the model knows; try another name for it")
    if equal_names := names_with_equal_tokens(names, reader, model.views[reader.name]):
        name, other = equal_names
        raise UserError(f"the model reads the classes {name!r} and {other!r} as the same text; rename one")
    text_encoder = model.item_encoder(reader.name, modality, batch_size, "classify")
    with alone():  # Other ranks may not call this.
        class_KZ = scale * class_vectors(text_encoder, names, prompts)
    return Classifier(names, encoder, partial(F.linear, weight=class_KZ))


def classify_files(
    run: str | Path,
    files: Iterable[File],
    names: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    head: str | None = None,
    modality: str | None = None,
    k: int = 3,
    batch_size: int = 64,
) -> None:
    """Prints a line for each file: its path, then its `k` most probable classes and their probabilities.

    Tabs separate the parts of a line. Standard error lists the files that are left out or cannot be read.

    Args:
        run: a model, as `openimp.load` takes it.
        files: files, and folders to search, on disk or at URLs that fsspec opens.
        names, prompts, head: see `Model.classify`.
        modality: the modality of all files. By default, the extension of each file decides, and files of a modality
            that cannot be classified are left out.
        k: number of classes.
        batch_size: number of files per forward pass.

    Raises:
        UserError: see `Model.classify`; or no file can be classified.
    """
    model = load(run)
    hint = "; if it is one of these, use --modality"
    files_by_modality, unknown = find_files(files, model.modalities, modality, hint)
    classifiers: dict[str, Classifier] = {}
    errors: dict[str, UserError] = {}
    for name in files_by_modality:
        try:
            classifiers[name] = make_classifier(model, name, names, prompts, head=head, batch_size=batch_size)
        except UserError as error:
            errors[name] = error
    if not classifiers:
        raise next(iter(errors.values()))
    for name, reason in errors.items():
        notice(f"left out {counted(len(files_by_modality[name]), f'{name} file')}: {reason}")
    skipped: list[str] = []
    count = 0
    for name, classifier in classifiers.items():
        for vectors in encoded(classifier.encoder, files_by_modality[name], skipped):
            count += len(vectors)
            if vectors:
                z_NZ = torch.from_numpy(np.stack([*vectors.values()])).to(model.device)
                _print_lines(list(vectors), classifier.predict(z_NZ), k)
    if skipped or unknown:
        notice("\n".join(left_out(skipped, unknown)))
    if not count:
        raise UserError(f"no file can be read; the first: {escaped(skipped[0])}")


def _print_lines(files: list[File], predictions: Predictions, k: int) -> None:
    classes = predictions.classes
    best = predictions.probabilities.topk(min(k, len(classes)))
    for file, probabilities, numbers in zip(files, best.values.tolist(), best.indices.tolist()):
        parts = [escaped(shown_name(file))]
        for probability, number in zip(probabilities, numbers):
            parts += [escaped(str(classes[number])), f"{probability:.3f}"]
        print("\t".join(parts), flush=True)
