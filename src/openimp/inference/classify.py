"""Tells the classes of items: by a trained classification head, or by names of classes that the model reads as texts.

Shape suffixes: N items, K classes, D width, Z features of the shared embedding space.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError, by_extension, counted, escaped, nearest
from openimp.common.modality import BadMedia
from openimp.common.progress import notice
from openimp.common.protocols import TextReader
from openimp.data.batch import head_key
from openimp.encoding.engine import ItemEncoder
from openimp.evaluation.zero_shot import check_prompt
from openimp.inference.files import File, file_value, find_files, shown_name
from openimp.inference.model import Model, load


class Predictions(NamedTuple):
    """The probability of each class, for several items."""

    classes: list[Any]
    probabilities: (
        Tensor  # (N, K) fp32. Rows add up to 1, unless the head was trained on any number of classes per item.
    )

    @property
    def labels(self) -> list[Any]:
        """The most probable class of each item."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]


@dataclass(frozen=True)
class Classifier:
    """Tells the classes of items of one modality."""

    classes: list[Any]
    encoder: ItemEncoder  # makes the vectors (Z,), or (D,) for a head
    weight_KZ: Tensor
    bias_K: Tensor | None = None
    has_lists: bool = False  # whether an item may have any number of classes

    def predict(self, z_NZ: Tensor) -> Predictions:
        """The classes of items with these vectors."""
        logits_NK = F.linear(z_NZ, self.weight_KZ, self.bias_K)
        return Predictions(self.classes, logits_NK.sigmoid() if self.has_lists else logits_NK.softmax(1))


@torch.no_grad()
def make_classifier(
    model: Model,
    modality: str,
    names: Sequence[str] | None = None,
    prompts: Sequence[str] = ("{}",),
    head: str | None = None,
    batch_size: int = 64,
) -> Classifier:
    """The classifier for a modality; see `Model.classify`."""
    if names is not None:
        if head is not None:
            raise UserError("either name the classes or choose a classification head, not both")
        return _by_names(model, modality, list(names), prompts, batch_size)
    heads = _heads(model, modality)
    if head is None and len(heads) > 1:
        raise UserError(f"choose one of the classification heads for {modality}: {', '.join(heads)}")
    head = head or next(iter(heads))
    if head not in heads:
        raise UserError(f"no classification head {head!r} was trained on {modality}{nearest(head, heads)}")
    layer: Any = model.imp.get_submodule(f"classifiers.{head}")
    encoder = model.feature_encoder(modality, batch_size)
    return Classifier(model.classes[head], encoder, layer.weight.float(), layer.bias.float(), heads[head])


def _heads(model: Model, modality: str) -> dict[str, bool]:
    """The classification heads that were trained on a modality, and whether an item may have any number of classes.

    UserError if there are none.
    """
    heads = {}
    for task in model.recipe.tasks.values() if model.classes else ():
        for objective in task.objectives:
            column = objective.class_column()
            if column and modality in objective.modalities(task):
                heads[head_key(task.source, column.name)] = column.has_lists
    heads = {head: has_lists for head, has_lists in heads.items() if head in model.classes}
    if not heads:
        raise UserError(f"the model has no classification head for {modality}, so name the classes to choose from")
    return heads


def _by_names(model: Model, modality: str, names: list[str], prompts: Sequence[str], batch_size: int) -> Classifier:
    """A classifier by names (zero-shot). A class is the mean of the unit vectors of its name in each prompt."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError("name two classes or more, each once")
    for prompt in prompts:
        check_prompt(prompt, "classify")
    reader = next((reader for reader in model.modalities.values() if reader.reads_text), None)
    if reader is None:
        raise UserError("the model reads no texts, so it does not know classes by their names")
    for name in names:
        if isinstance(reader, TextReader) and not reader.knows(name, model.views[reader.name]):
            raise UserError(f"the class {name!r} has no word that the model knows")
    encoder = model.item_encoder(modality, reader.name, batch_size, "classify")
    texts = [prompt.format(name) for name in names for prompt in prompts]
    z_NZ = model.encode(reader.name, texts, normalize=True, towards=modality, batch_size=batch_size)
    class_KZ = F.normalize(z_NZ.unflatten(0, (len(names), len(prompts))).mean(1), dim=-1)
    return Classifier(names, encoder, model.scale(modality, reader.name) * class_KZ)


def classify_files(
    run: str | Path,
    files: Iterable[File],
    names: Sequence[str] | None = None,
    prompts: Sequence[str] = ("{}",),
    head: str | None = None,
    modality: str | None = None,
    k: int = 3,
    batch_size: int = 64,
) -> None:
    """Prints a line for each file: its path, then its `k` most probable classes and their probabilities.

    The parts of a line are separated by tabs. What cannot be read is told on standard error.

    Args:
        run: a model, as `openimp.load` takes it.
        files: files, and folders to search, on disk or at URLs that fsspec opens.
        names, prompts, head: see `Model.classify`.
        modality: the modality of all files. By default, the extension of each file decides.
        k: number of classes.
        batch_size: number of files per forward pass.

    Raises:
        UserError: see `Model.classify`, or no file can be read.
    """
    model = load(run)
    hint = "; if it is one of these, use --modality"
    files_by_modality, unknown = find_files(files, model.modalities, modality, hint)
    classifiers = {}
    for name in files_by_modality:
        classifiers[name] = make_classifier(model, name, names, prompts, head, batch_size)
    skipped = []
    count = 0
    for name, modality_files in files_by_modality.items():
        classifier = classifiers[name]
        encoder = classifier.encoder
        items = ((file, partial(_read, encoder, file)) for file in modality_files)
        for file, result in encoder.encode(items):
            if isinstance(result, BadMedia):
                skipped.append(f"{shown_name(file)}: {result}")
                continue
            count += 1
            classes, probabilities = classifier.predict(result[None])
            best = probabilities[0].topk(min(k, len(classes)))
            line = [escaped(shown_name(file))]
            for probability, number in zip(best.values.tolist(), best.indices.tolist()):
                line += [escaped(str(classes[number])), f"{probability:.3f}"]
            print("\t".join(line), flush=True)
    if unknown:
        notice(f"skipped files in folders that no modality of the model reads: {by_extension(unknown)}")
    if skipped and not count:
        raise UserError(f"no file can be read; the first: {escaped(skipped[0])}")
    if skipped:
        notice("\n  ".join([f"{counted(len(skipped), 'file')} could not be read:", *map(escaped, skipped)]))


def _read(encoder: ItemEncoder, file: File) -> Any:
    return encoder.read(file_value(file, encoder.modality.reads_text))
