"""Puts the parts of a recipe together as plain data, with comments that explain them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from openimp.common.errors import counted
from openimp.drafting import sizing
from openimp.drafting.columns import TaskDraft
from openimp.drafting.finding import ROLE
from openimp.drafting.machine import Machine
from openimp.drafting.probing import Probed
from openimp.drafting.splitting import Split

BAD_ROWS_WARNING = 0.005
"""Share of bad rows in the sample above which the recipe sets `max_bad_fraction`."""
COMMENTS = {
    "modalities": "patch: frames, height and width of a token. min_df: whole words, of which rare ones are left out.",
    "sources": "cache: media are decoded once, before training, and kept in memory.",
    "tasks": "Three of four steps drop half of the tokens, which makes them nearly twice as fast. same: rows with "
    "equal values in this column are positives of each other, and not negatives. weight: how often a task is drawn.",
    "optimizer": "As in the demo. To fine-tune a model (train.init), divide the rates by 3 or more.",
    "parallel": "With several GPUs, each has all of the model.",
    "evaluation": "Measured at the end; with every: 500, also every 500 steps.",
}


class NamedTask(NamedTuple):
    """A task with its name in the recipe, and the rows that it holds out."""

    name: str
    task: TaskDraft
    split: Split


class Draft(NamedTuple):
    """A recipe as plain data, and the comments above its sections. Both may still be changed."""

    recipe: dict[str, Any]
    comments: dict[str, str]


def assemble(name: str, tasks: list[NamedTask], machine: Machine) -> Draft:
    """Makes a complete recipe. Its batches may not fit into memory yet, and its training may take too long."""
    samples: dict[str, list[Probed]] = {}
    for media in (media for _, task, _ in tasks for media in task.media):
        samples.setdefault(media.kind, []).extend(media.sample)
    views = {kind: sizing.view(kind, sample, machine) for kind, sample in samples.items()}
    modalities = sizing.stems(views, machine)
    if texts := [text for _, task, _ in tasks for column in task.texts for text in column.sampled_texts()]:
        modalities["text"] = sizing.text(texts, sum(split.rows for _, task, split in tasks if task.texts))
        views["text"] = {"length": modalities["text"]["positions"]}
        if "image" in views and any(re.search(r"\b(left|right)\b", text.lower()) for text in texts):
            views["image"]["flip"] = False  # A mirrored picture would contradict its text.
    recipe: dict[str, Any] = {
        "name": name,
        "model": sizing.model(sum(split.rows for _, _, split in tasks), machine),
        "modalities": modalities,
        "sources": {},
        "tasks": {},
        "optimizer": {"lr": 1e-3, "muon_lr": 4e-3, "weight_decay": 0.1},
        "parallel": {"shard_degree": 1},
        "train": {"num_workers": machine.workers, "save_every": 500},
        "evaluation": {"sets": {}},
    }
    comments = dict(COMMENTS)
    for named in tasks:
        split = named.split
        recipe["sources"] |= _sources(named, views, machine)
        recipe["tasks"][named.name] = _task(named, views, machine)
        recipe["evaluation"]["sets"] |= _sets(named, views)
        rows = f"{counted(split.rows, 'row')}, and {split.test_rows:,} for evaluation"
        comments["sources"] += f"\n{named.name}: {rows} ({split.why})."
    needed = [sizing.steps(split.rows, recipe["tasks"][name]["batch_size"]) for name, _, split in tasks]
    for section, steps in zip(recipe["tasks"].values(), needed):
        section["weight"] = float(f"{steps / min(needed):.2g}")
    recipe["train"]["steps"] = sizing.rounded(sum(needed))
    bad = max(column.bad for _, task, _ in tasks for columns in (task.media, task.texts[:1]) for column in columns)
    if bad > BAD_ROWS_WARNING:
        recipe["train"]["max_bad_fraction"] = round(1.5 * bad + 0.02, 2)
    return Draft(recipe, comments)


def _sources(named: NamedTask, views: dict[str, Any], machine: Machine) -> dict[str, Any]:
    name, task, split = named
    fits = all(sizing.fits_cache(media.sample, views[media.kind], split.rows, machine) for media in task.media)
    sources = {name: {**split.train, "cache": "memory" if fits else "none"}}
    return {**sources, f"{name}_test": split.test} if split.test else sources


def _task(named: NamedTask, views: dict[str, Any], machine: Machine) -> dict[str, Any]:
    name, task, split = named
    inputs: dict[str, Any] = {media.kind: media.name for media in task.media}
    batch_size = sizing.batch_size([*inputs], split.rows, machine)
    objectives: list[dict[str, Any]] = []
    if task.texts:
        inputs["text"] = [column.template for column in task.texts]
    if len(inputs) > 1:
        objectives.append({"type": "contrastive", "same": task.texts[0].name if task.prompt else split.item})
    if task.label:
        weight = 0.2 if objectives else 1.0
        objectives.append({"type": "classification", "label": task.label.name, "weight": weight})
    full = {kind: views[kind] for kind in inputs}
    fast = {kind: view if kind == "text" else {**view, "drop_tokens": 0.5} for kind, view in full.items()}
    return {
        "source": name,
        "inputs": inputs,
        "objectives": objectives,
        "batch_size": batch_size,
        "views": [{**full, "weight": 1}, {**fast, "weight": 3}],
    }


def _sets(named: NamedTask, views: dict[str, Any]) -> dict[str, Any]:
    """The evaluation sets of a task: by the names of classes or else by retrieval, and by its trained classes."""
    name, task, split = named
    sets: dict[str, Any] = {}
    media = {column.kind: column.name for column in task.media}
    inputs = media | ({"text": task.texts[0].template} if task.texts else {})
    views = {kind: {key: value for key, value in view.items() if key != "flip"} for kind, view in views.items()}
    source = f"{name}_test" if split.test else name
    if len(inputs) > 1 and not task.prompt:
        view = {kind: views[kind] for kind in inputs}
        sets[name] = {"type": "retrieval", "source": source, "inputs": inputs, "view": view}
    if task.label:
        view = {kind: views[kind] for kind in media}
        classified = {"source": source, "inputs": media, "label": task.label.name, "view": view}
        if task.prompt:
            sets[name] = {"type": "zero_shot", "prompts": [task.prompt], **classified}
        if split.test and split.trains_test_classes:
            sets[f"{name}_classes"] = {"type": "classification", "task": name, **classified}
    return sets


def source_name(place: str) -> str:
    """A short name for a path, a pattern or a data set of the hub: letters, digits and underscores."""
    path = Path(re.sub(r"^\w+:(//)?", "", place))
    words = [word for word in re.split(r"\W+|_", ROLE.sub("", path.stem if path.suffix else path.name)) if word]
    words = [word for word in words if not word.isdigit() and word != "of"]
    if not words and path.parent.name:
        return source_name(path.parent.name)
    return "_".join(words).lower() or "data"


def task_names(tasks: list[TaskDraft]) -> list[str]:
    """A name for each task, and no name twice. If a source has several tasks, their names end in the modality."""
    places = [task.candidate.place for task in tasks]
    names: list[str] = []
    for task, place in zip(tasks, places):
        name = source_name(place) + (f"_{task.media[0].kind}" if places.count(place) > 1 else "")
        while name in names:
            name += "_2"
        names.append(name)
    return names
