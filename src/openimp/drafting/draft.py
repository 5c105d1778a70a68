"""Drafts a recipe for data on this machine: `openimp init` and `openimp train PATH`."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from openimp.common.errors import UserError, by_extension
from openimp.common.modality import Classes
from openimp.data.batch import head_key
from openimp.data.files import is_utf8
from openimp.data.sources import FORMATS
from openimp.data.targets import sort_classes
from openimp.drafting import sizing
from openimp.drafting.assembling import Draft
from openimp.drafting.choosing import TaskDraft, choose
from openimp.drafting.finding import find, shown, unknown_files
from openimp.drafting.inspecting import Inspected, inspect, unreadable
from openimp.drafting.machine import Machine, this_machine
from openimp.drafting.naming import source_name
from openimp.drafting.writing import write
from openimp.model.imp import IMP
from openimp.planning.ledger import costs, mixture, short
from openimp.planning.memory import step_memory
from openimp.recipe.file import bundled
from openimp.recipe.schema import Recipe


@dataclass(frozen=True)
class DraftedRecipe:
    """A drafted recipe, and notes on the data."""

    name: str
    text: str  # the recipe as YAML
    notes: list[str]  # what is used and what is not, one line each


def draft_recipe(paths: list[str]) -> DraftedRecipe:
    """Drafts a recipe for the data at `paths`. Paths in the recipe are relative to the current folder.

    Raises:
        UserError: there is nothing to train on.
    """
    tasks, notes = _tasks(paths)
    machine, name = this_machine(), recipe_name(paths[0])
    draft = Draft(name, tasks, machine)
    classes = {
        head_key(key, task.label.name): sort_classes(task.split.classes)
        for key, task in zip(draft.recipe["tasks"], tasks) if task.label
    }  # fmt: skip
    _fit_memory(draft, classes, machine)
    cost = _fit_time(draft, tasks, classes, machine)
    return DraftedRecipe(name, write(draft.recipe, draft.comments, _head(paths, cost)), notes)


def is_data(what: str) -> bool:
    """Whether the argument of a command names data. If not, it is a recipe; a bundled recipe's name always is.

    Raises:
        UserError: it is the directory of a run.
    """
    if what.startswith(("hub:", "openimp:")) or Path(what).suffix.lower() in FORMATS:
        return True
    if not Path(what).is_dir() or what in bundled():
        return False
    if (Path(what) / "recipe.yaml").exists():
        raise UserError(f"{what}: is a run; to train its recipe again, name {Path(what) / 'recipe.yaml'}")
    return True


def recipe_name(path: str) -> str:
    """The name of the recipe for data, from its path."""
    return source_name(os.path.abspath(path) if os.path.exists(path) else path)


def _tasks(paths: list[str]) -> tuple[list[TaskDraft], list[str]]:
    """The tasks for all data below the paths, and lines that say what was found and what is not used."""
    tasks: list[TaskDraft] = []
    found: list[Inspected] = []
    used, unused = list[str](), list[str]()
    for candidate in find(paths):
        place = shown(candidate.place)
        if not is_utf8(candidate.place):
            unused.append(f"{place}: its name is not UTF-8; rename it")
            continue
        if candidate.beside_data_files and any(str(Path(candidate.place).resolve()) in data.files for data in found):
            unused.append(f"{place}: a table lists its files")
            continue
        try:
            data = inspect(candidate)
            own, reasons = choose(data)
        except (UserError, OSError) as error:
            unused.append(unreadable(error))
            continue
        if own:
            found.append(data)
        tasks += own
        unused += [f"{place}: {reason}" for reason in reasons]
        used += [f"{place}: {_summary(task)}" for task in own]
    for path in filter(os.path.isdir, paths):
        if unknown := unknown_files(Path(path)):
            unused.append(
                f"{shown(path)}: files that are neither media nor data: {shown(by_extension(unknown), limit=200)}"
            )
    if not tasks:
        raise UserError(f"nothing to train on: {'; '.join(_some(unused, 5))}")
    return tasks, _some([*(f"found {line}" for line in used), *(f"not used: {line}" for line in unused)], 50)


def _some(lines: list[str], most: int) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most:,} more"]


def _summary(task: TaskDraft) -> str:
    parts = [f"{task.split.rows + task.split.test_rows:,} rows"]
    parts += [f"{media.kind} in {shown(media.column)}" for media in task.media]
    parts += [f"text in {shown(column.name)}" for column in task.texts]
    parts += [f"{len(task.split.classes):,} classes in {shown(task.label.name)}"] if task.label else []
    return ", ".join(parts)


def _fit_memory(draft: Draft, classes: Classes, machine: Machine) -> None:
    """Halves the batch sizes until each step fits into memory, and notes the memory of the largest in the recipe."""
    while True:
        recipe = Recipe.build(draft.recipe, Path.cwd())
        modalities = recipe.make_modalities()
        steps = [
            step_memory(recipe, modalities, classes, name, view, recipe.train.precision, machine.is_gpu)
            for name, task in recipe.tasks.items()
            for view in range(len(task.views))
        ]
        with torch.device("meta"):
            model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
        weights = sum(parameter.numel() for parameter in model.parameters())
        # fp32 weights, gradients and two moments
        needed = 16 * weights + max(step.peak.total() + step.inputs for step in steps)
        if needed <= machine.memory or all(each["batch_size"] <= 2 for each in draft.recipe["tasks"].values()):
            break
        for each in draft.recipe["tasks"].values():
            each["batch_size"] = max(2, each["batch_size"] // 2)
        draft.recipe["train"]["steps"] *= 2  # The rows are seen as often as before.
    memory = f"{needed / 2**30:.1f} GiB" if needed > 2**29 else f"{needed / 2**20:.0f} MiB"
    draft.explain("model", f"{short(weights)} parameters at most; the largest step needs {memory} of memory.")


def _fit_time(draft: Draft, tasks: list[TaskDraft], classes: Classes, machine: Machine) -> str:
    """Limits the steps to `machine.hours` of training, and returns the cost of the training in words."""
    recipe = Recipe.build(draft.recipe, Path.cwd())
    by_task = mixture(recipe, costs(recipe, recipe.make_modalities(), classes))
    flops = sum(row["flops"] for row in by_task.values())
    train, affordable = draft.recipe["train"], machine.hours * 3600 * machine.speed / flops
    is_limited = train["steps"] > affordable
    train["steps"] = steps = min(train["steps"], sizing.rounded(affordable))
    seen = sum(steps * row["examples"] for row in by_task.values()) / sum(task.split.rows for task in tasks)
    more = (
        f"More often would be better, but this machine then needs more than {machine.hours} h."
        if is_limited
        else "More steps help as long as the results on new rows improve."
    )
    draft.explain("train", f"Each row is seen about {seen:,.0f} times. {more}")
    minutes = steps * flops / machine.speed / 60
    time = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{max(1, round(minutes))} min"
    return f"{steps:,} steps, {short(steps * flops)}FLOPs, roughly {time} on {machine.name}"


def _head(paths: list[str], cost: str) -> str:
    """The comment at the top of the recipe."""
    command = " ".join(shlex.quote(shown(path)) for path in paths)
    return (
        "Drafted from the data, for this machine. It trains as it is:\n\n"
        f"  openimp init {command} > mine.yaml\n  openimp train mine.yaml\n\n"
        f"Expect {cost}, and some time to read the data. The cost depends most on train.steps, then on the size "
        "of the views and the width of the model; `openimp info mine.yaml` counts the FLOPs. Paths are relative to the "
        "folder of this file. docs/recipe.md explains all keys, also those that are left out here."
    )
