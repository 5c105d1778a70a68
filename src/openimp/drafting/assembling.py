"""Puts the parts of a recipe together as plain data, with comments that explain them."""

import os
import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from openimp.common.errors import UserError, counted
from openimp.common.protocols import file_copies
from openimp.common.texts import text_key
from openimp.drafting import sizing
from openimp.drafting.columns import TaskDraft
from openimp.drafting.finding import ROLE
from openimp.drafting.machine import Machine
from openimp.drafting.probing import MediaInfo
from openimp.drafting.splitting import Split
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.registry import modality_class
from openimp.recipe.training import tolerant_fraction

LEAST_BAD_FRACTION = 0.1
"""The least `train.max_bad_fraction` of a draft. Ordinary folders hold some broken files."""
DISTINCT_TEXTS = 0.9
"""Share of distinct texts below which equal texts of different items are positives, too."""
AUGMENTATION = ("flip", "crop", "aspect", "jitter")
"""Options of a view that evaluation ignores."""
COMMENTS = {
    "modalities": "patch: frames, height and width of a token. conv_channels: of a convolution before patches are "
    "embedded. min_df: whole words; rare words are left out. "
    "tower: a frozen encoder, whose vectors are computed once; crops: vectors of each item.",
    "sources": "cache: media are decoded once, before training, and kept in memory.",
    "tasks": "positives_by: rows with equal values in this column are positives of each other, and not negatives; "
    "positives_in: so is a text that equals the value of another row. "
    "weight: of a task, how often it is drawn; of a view, its share of the task's steps.",
    "alternation": "A task uses its views one after the other: many fast steps with a quarter of the tokens, then some "
    "with all of them.",
    "optimizer": "As in the demo.",
    "parallel": "With several GPUs, each has all of the model.",
    "evaluation": "Measured at the end; `every: N` also measures after each N steps. `best: SET` keeps the best "
    "checkpoint, too.",
}
FROZEN_TEXTS = (
    "lr_scale: the vectors of texts stay as they are, so the space is that of the tower of texts, and media are mapped "
    "into it. A modality that is added later does not move the others."
)


class ChosenTower(NamedTuple):
    """A frozen encoder of a modality."""

    name: str  # of the model
    features: int  # the size of its vectors


class NamedTask(NamedTuple):
    """A task with its name in the recipe, and the rows that it holds out."""

    name: str
    task: TaskDraft
    split: Split


class Draft(NamedTuple):
    """A recipe as plain data, and the comments above its sections. Both may still be changed."""

    recipe: dict[str, Any]
    comments: dict[str, str]


class Start(NamedTuple):
    """A trained model that training starts from."""

    name: str
    config: ModelConfig


def assemble(
    name: str,
    tasks: list[NamedTask],
    machine: Machine,
    towers: Mapping[str, ChosenTower],
    start: Start | None = None,
) -> Draft:
    """Makes a complete recipe. Its batches may not fit into memory yet, and its training may take too long.

    `towers` has the frozen encoders that read some of the modalities.
    """
    samples: dict[str, list[MediaInfo]] = {}
    for _, task, _ in tasks:
        samples.setdefault(task.media.kind, []).extend(task.media.sample)
    text_columns = [task.text for _, task, _ in tasks if task.text]
    texts = [text for column in text_columns for text in column.sample]
    bad_share = max([column.bad for column in text_columns] + [task.media.bad for _, task, _ in tasks])
    views = {kind: sizing.view(kind, sample, machine) for kind, sample in samples.items() if kind not in towers}
    modalities = sizing.stems(views, machine)
    rows = sum(split.rows for _, _, split in tasks)
    mentions_sides = any(re.search(r"\b(left|right)\b", text.lower()) for text in texts)
    kinds = [*samples, *(["text"] if texts else [])]
    for kind in kinds:
        if kind in towers:
            stem = _tower_stem(kind, kinds, towers)
            modalities[stem] = {**modalities.get(stem, {}), "tower": towers[kind].name}
            views[kind] = {}
    text_length = 0
    if texts and "text" not in towers:
        class_names = [name for column in text_columns if not column.distinct for name in column.sample]
        modalities["text"], text_length = sizing.text(texts, rows, class_names)
        views["text"] = {"length": modalities["text"]["positions"]}
    only_vectors = towers.keys() >= {*kinds}
    model = sizing.heads_on_towers(towers, kinds) if only_vectors else sizing.model(rows, machine)
    optimizer: dict[str, Any] = {"lr": 1e-3, "muon_lr": 4e-3, "weight_decay": 0.1}
    if only_vectors:
        optimizer = {"lr": 3e-3, "weight_decay": 0.1}
        if "text" in kinds:
            optimizer["lr_scale"] = {"stems.text": 0, "projections.text": 0}
    if start:
        model = start.config.model.model_dump(mode="json", exclude_defaults=True)
        optimizer |= {"lr": 3e-4, "muon_lr": 1.2e-3}
        text_length = 0
        _take_over(start.config, kinds, modalities, views)
    if "size" in views.get("image", {}) and mentions_sides:
        views["image"]["flip"] = False  # A mirrored picture would contradict its text.
    recipe: dict[str, Any] = {
        "name": name,
        "model": model,
        "modalities": modalities,
        "sources": {},
        "tasks": {},
        "alternation": {"views": "sequence"},
        "optimizer": optimizer,
        "parallel": {"shard_degree": 1},
        "train": {**({"init": start.name} if start else {}), "num_workers": machine.workers, "save_every": 500},
        "evaluation": {"sets": {}},
    }
    comments = dict(COMMENTS)
    if start:
        comments["optimizer"] = "Rates for a model that is trained already."
    if not any(views[kind] for kind in samples):  # Towers read all media, in one view and from openimp's cache.
        comments |= {"sources": "", "alternation": ""}
    if only_vectors:
        comments["optimizer"] = FROZEN_TEXTS if "text" in kinds else ""
    _add_tasks(recipe, tasks, views, machine, text_length)
    for task_name, _, split in tasks:
        count = f"{counted(split.rows, 'row')}, and {split.test_rows:,} for evaluation"
        comments["sources"] += f"\n{task_name}: {count} ({split.why})."
    comments["sources"] = comments["sources"].strip()
    recipe["train"]["max_bad_fraction"] = max(LEAST_BAD_FRACTION, tolerant_fraction(bad_share))
    return Draft(recipe, comments)


def _tower_stem(kind: str, kinds: list[str], towers: Mapping[str, ChosenTower]) -> str:
    """The stem that a modality's tower becomes. The tower must read all modalities of the data with this stem."""
    stem = modality_class(kind).stem
    tower = towers[kind].name
    for other in kinds:
        if modality_class(other).stem == stem and (other not in towers or towers[other].name != tower):
            raise UserError(
                f"--tower {tower}: does not read {other}, or another tower does; {kind} and {other} have the "
                f"same stem, {stem}, so name a tower that reads both"
            )
    return stem


def _take_over(config: ModelConfig, kinds: list[str], modalities: dict[str, Any], views: dict[str, Any]) -> None:
    """Replaces stems and views by those of a trained model, where it has them."""
    for kind in kinds:
        stem = modality_class(kind).stem
        if stem in config.modalities:
            copies = file_copies(modality_class(kind))  # `train.init` brings the tokenizer.
            modalities[stem] = config.modalities[stem].model_dump(mode="json", exclude_defaults=True, exclude={*copies})
        if kind in config.views:
            views[kind] = config.views[kind].model_dump(mode="json", exclude={"drop_tokens"})


def _add_tasks(
    recipe: dict[str, Any], tasks: list[NamedTask], views: dict[str, Any], machine: Machine, text_length: int
) -> None:
    """Adds all tasks, with their weights and the number of steps. Sources are cached as far as memory allows."""
    cached_bytes = 0.0
    for named in tasks:
        media = named.task.media
        size = sizing.decoded_bytes(media.sample, views[media.kind], named.split.rows) if views[media.kind] else inf
        is_cached = cached_bytes + size <= sizing.CACHE_SHARE * machine.host_memory
        cached_bytes += size if is_cached else 0
        _add(recipe, named, views, machine, is_cached=is_cached, text_length=text_length)
    share_steps(recipe, {name: split.rows for name, _, split in tasks})
    decoded_once = all(recipe["sources"][name]["cache"] == "memory" for name in recipe["tasks"])
    # Preparing decoded examples is little work, and a process for it would slow the threads of few cores down. Reading
    # vectors is even less.
    if (decoded_once and machine.workers == 1 and not machine.is_gpu) or not recipe["model"]["layers"]:
        recipe["train"]["num_workers"] = 0


def share_steps(recipe: dict[str, Any], rows: Mapping[str, int]) -> None:
    """Sets the number of steps, and the weights of the tasks, from the `rows` of each task and its batch size."""
    tasks = recipe["tasks"]
    only_vectors = not recipe["model"]["layers"]
    steps_of_tasks = {name: sizing.steps(rows[name], task["batch_size"], only_vectors) for name, task in tasks.items()}
    for name, steps in steps_of_tasks.items():
        tasks[name]["weight"] = float(f"{steps / min(steps_of_tasks.values()):.2g}")
    recipe["train"]["steps"] = sizing.rounded(sum(steps_of_tasks.values()), only_vectors)


def _add(
    recipe: dict[str, Any],
    named: NamedTask,
    views: dict[str, Any],
    machine: Machine,
    is_cached: bool,
    text_length: int,
) -> None:
    """Adds a task, its sources, and its evaluation sets.

    Distinct texts are evaluated by retrieval, names of classes by zero-shot classification, and the trained classes by
    their head. `text_length` is the length of texts in the first view; 0: as in the last view, which is used after
    training and has room for longer queries.
    """
    name, task, split = named
    kind = task.media.kind
    inputs = {kind: task.media.name}
    text_input: dict[str, Any] = {}
    if task.text:
        text_input = {"text": [task.text.name, *task.text.others] if task.text.others else task.text.name}
    text_view = {"text": views["text"]} if task.text else {}
    short_text_view = {"text": {"length": text_length}} if text_view and text_length else text_view
    view = views[kind]
    recipe["sources"][name] = {**split.train, "cache": "memory" if is_cached else "none"}
    if split.test:
        recipe["sources"][f"{name}_test"] = split.test
    objectives: list[dict[str, Any]] = []
    if task.text and not task.text.distinct:
        objectives.append({"type": "contrastive", "positives_by": task.text.name})
    elif task.text:
        objectives.append({"type": "contrastive", "positives_by": split.item})
        distinct_texts = len({text_key(text) for text in task.text.sample})
        if split.item != task.text.name and distinct_texts < DISTINCT_TEXTS * len(task.text.sample):
            objectives[-1]["positives_in"] = task.text.name
    if task.label:
        objectives.append({"type": "classification", "label": task.label.name})
    recipe["tasks"][name] = {
        "source": name,
        "inputs": inputs | text_input,
        "objectives": objectives,
        "batch_size": sizing.batch_size(kind, split.rows, machine, bool(view)),
        "views": [
            {kind: {**view, "drop_tokens": 0.75}, **short_text_view, "weight": 7},
            {kind: view, **text_view, "weight": 1},
        ],
    }
    if not recipe["model"]["layers"]:
        recipe["tasks"][name]["batch_size"] = sizing.vector_batch_size(split.rows)
        recipe["tasks"][name]["views"] = [{kind: {"dropout": sizing.DROPOUT}}]
    elif not view:
        recipe["tasks"][name]["views"] = [text_view if views.get("text") else {}]
    sets = recipe["evaluation"]["sets"]
    view = {kind: {key: value for key, value in view.items() if key not in AUGMENTATION}}
    rows = {"source": f"{name}_test" if split.test else name, "inputs": inputs, "view": view}
    if task.text and task.text.distinct:
        sets[name] = {"type": "retrieval", **rows, "inputs": inputs | text_input, "view": view | text_view}
    elif task.text:
        sets[name] = {"type": "zero_shot", **rows, "label": task.text.name}
    if task.label and split.test and split.trains_test_classes:
        sets[f"{name}_classes"] = {"type": "classification", "task": name, **rows, "label": task.label.name}


def source_name(place: str) -> str:
    """A short name for a path, a pattern or a data set of the hub: letters, digits and underscores.

    If the file's name is only a number, a split such as train, or metadata (as in the Hub's folders of media), the
    nearest folder that has another name gives it.
    """
    path = Path(os.path.abspath(place) if os.path.exists(place) else re.sub(r"^\w+:(//)?", "", place))
    words = re.findall(r"[^\W_]+", ROLE.sub("", path.stem if path.suffix else path.name).lower())
    words = [word for word in words if not word.isdigit() and word != "of"]
    if words in ([], ["metadata"]) and path.parent.name:
        return source_name(str(path.parent))
    return "_".join(words) or "data"


def task_names(tasks: list[TaskDraft]) -> list[str]:
    """A name for each task, and no name twice. If a source has several tasks, their names end in the modality.

    `_test` and `_classes` are appended to names of tasks, for sources and evaluation sets.
    """
    endings = ("", "_test", "_classes")
    places = [task.candidate.place for task in tasks]
    names: list[str] = []
    for task, place in zip(tasks, places):
        name = source_name(place) + (f"_{task.media.kind}" if places.count(place) > 1 else "")
        taken = {other + ending for other in names for ending in endings}
        while any(name + ending in taken for ending in endings):
            name += "_2"
        names.append(name)
    return names
