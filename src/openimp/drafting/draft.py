"""Drafts a recipe for data on this machine: `openimp init` and `openimp train PATH`."""

import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from openimp.checkpoint.find import find_own_model
from openimp.checkpoint.folder import read_config
from openimp.common.device import pick_device, precision_of
from openimp.common.errors import UserError, counted
from openimp.common.modality import Classes, Modalities
from openimp.common.names import BUNDLED, HUB, Name, absolute_name
from openimp.common.objective import head_key
from openimp.common.schema import as_text
from openimp.common.texts import equal_pair, text_key
from openimp.data.files import is_utf8
from openimp.data.sources import FORMATS
from openimp.data.tables import Table
from openimp.data.targets import sort_classes
from openimp.drafting import sizing
from openimp.drafting.assembling import (
    ChosenTower,
    Draft,
    NamedTask,
    Start,
    assemble,
    share_steps,
    source_name,
    task_names,
)
from openimp.drafting.columns import TaskDraft, inspect
from openimp.drafting.finding import Candidate, find, shown
from openimp.drafting.machine import Machine, this_machine
from openimp.drafting.splitting import split_task
from openimp.drafting.writing import write
from openimp.encoding.frozen import vector_sizes
from openimp.parallel.layout import Layout
from openimp.planning.costs import costs, meta_model, mixture, short
from openimp.planning.memory import step_memory
from openimp.planning.sharding import Sharding
from openimp.planning.step import StepPlanner
from openimp.recipe.file import bundled
from openimp.recipe.schema import Recipe

HEAD = """\
Drafted from the data, for this machine. It trains as it is:

  openimp init {command} > mine.yaml
  openimp train mine.yaml

Expect {cost}, and some time to read the data. The cost depends most on train.steps, then on the size of the views and \
the width of the model; `openimp info mine.yaml` counts the FLOPs. Paths are relative to the folder of this file. \
docs/init.md has the rules of this draft, and docs/recipe.md explains all keys.
"""
TIME = re.compile(r"(?i)(^|[^a-z])(start|end|begin|onset|offset)([^a-z]|$)")
"""In the name of a column of times: rows may be about a part of a recording."""
JOINED = re.compile(r"[a-z]{2}[A-Z][a-z]")
"""Matches in a name that joins words, such as GoldenRetriever."""
MAX_NOTES = 50
"""Most lines about data that is not used."""


class DraftedRecipe(NamedTuple):
    """A drafted recipe, and notes on the data."""

    text: str  # the recipe as YAML, without a name
    notes: list[str]  # what is used and what is not, one line each


def draft_recipe(
    paths: list[str],
    text: str | None = None,
    label: str | None = None,
    towers: Sequence[str] = (),
    init: str | None = None,
) -> DraftedRecipe:
    """Drafts a recipe for the data at `paths`. Paths in the recipe are relative to the current folder.

    `text` and `label` name the columns with texts and classes. By default, the names of the columns tell. `towers` are
    frozen encoders. If several can read a modality, the first one does. `init` names a model of openimp that training
    starts from.

    Raises:
        UserError: there is nothing to train on, or a model cannot be used.
    """
    start = _start(init) if init else None
    if start and towers:
        raise UserError("--init and --tower: choose one; a model to start from has its own stems")
    tasks, notes = find_tasks(paths, text, label)
    machine = this_machine()
    tower_by_kind: dict[str, ChosenTower] = {}
    for tower in towers:
        for kind, features in vector_sizes(absolute_name(tower, ".")).items():
            tower_by_kind.setdefault(kind, ChosenTower(tower, features))
    kinds: set[str] = {task.media.kind for _, task, _ in tasks}
    if any(task.text for _, task, _ in tasks):
        kinds.add("text")
    for tower in towers:
        if not any(tower_by_kind[kind].name == tower for kind in kinds & tower_by_kind.keys()):
            raise UserError(f"--tower {tower}: reads none of {', '.join(sorted(kinds))}, or another tower does")
    notes += [
        f"{name}: {split.why}"
        for name, task, split in tasks
        if split.test is None or split.rows + split.test_rows < len(task.table)
    ]
    notes += [
        f"{name}: the rows for evaluation have classes that training lacks, so the classification head is not evaluated"
        for name, task, split in tasks
        if task.label and not split.trains_test_classes
    ]
    draft = assemble(source_name(paths[0]), tasks, machine, tower_by_kind, start)
    classes = {
        head_key(draft.recipe["tasks"][name]["source"], task.label.name): sort_classes(split.classes)
        for name, task, split in tasks if task.label
    }  # fmt: skip
    rows = {name: split.rows for name, _, split in tasks}
    flops = fit(draft, classes, rows, machine)
    rows |= {f"{name}_test": split.test_rows for name, _, split in tasks}
    measured_rows = sum(rows[options["source"]] for options in draft.recipe["evaluation"]["sets"].values())
    every = sizing.steps_between_evaluations(draft.recipe, measured_rows)
    if every and draft.recipe["model"]["layers"]:  # Otherwise, an evaluation would take longer than the training.
        draft.recipe["evaluation"] = {"every": every, **draft.recipe["evaluation"]}
    minutes = max(1, round(flops / machine.speed / 60))
    cost = f"{short(flops)}FLOPs, roughly {minutes:,} min on {machine.name}"
    arguments = [*paths]
    if text:
        arguments += ["--text", text]
    if label:
        arguments += ["--label", label]
    for tower in towers:
        arguments += ["--tower", tower]
    if init:
        arguments += ["--init", init]
    command = shlex.join(shown(argument, limit=1000) for argument in arguments)
    draft.comments["model"] = HEAD.format(command=command, cost=cost)
    del draft.recipe["name"]  # The name of the file in which the user stores the recipe suits its run better.
    return DraftedRecipe(write(draft.recipe, draft.comments), notes)


def _start(name: str) -> Start:
    """The model that `train.init` names. UserError if there is none, or it is not openimp's own encoder."""
    if Name.parse(name).scheme in (None, BUNDLED, HUB):
        config, _, _ = read_config(find_own_model(name))
        return Start(name, config)
    raise UserError(
        f"{name}: is not openimp's own encoder, so training cannot start from it; it can be a tower: openimp init DATA "
        f"--tower {name}"
    )


def is_data(what: str) -> bool:
    """Whether the argument of a command names data. If not, it is a recipe; a bundled recipe's name always is.

    Raises:
        UserError: it is the directory of a run.
    """
    if Name.parse(what).scheme in (BUNDLED, HUB) or Path(what).suffix.lower() in FORMATS:
        return True
    if not Path(what).is_dir() or what in bundled():
        return False
    if (Path(what) / "recipe.yaml").exists():
        command = f"openimp train {Path(what) / 'recipe.yaml'} --run-dir {what} --resume"
        raise UserError(f"{what}: is a run; to go on: {command}")
    return True


def find_tasks(
    paths: list[str], text: str | None = None, label: str | None = None
) -> tuple[list[NamedTask], list[str]]:
    """The tasks for all data below the paths, and lines that say what was found and what is not used."""
    tasks, unused = _inspect(find(paths), text, label)
    if not tasks:  # A table, perhaps of expenses, may lie among media.
        with suppress(UserError):
            tasks, notes = _inspect(find(paths, tables=False), text, label)
            if tasks:  # Otherwise what is wrong with the table is enough.
                unused = list(dict.fromkeys([*unused, *notes]))
    if not tasks:
        raise UserError(f"nothing to train on: {'; '.join(unused[:5])}")
    named = [NamedTask(name, task, split_task(task)) for name, task in zip(task_names(tasks), tasks)]
    lines = [*map(_summary, named), *(f"not used: {note}" for note in unused[:MAX_NOTES])]
    return named, lines + ([f"and {len(unused) - MAX_NOTES:,} more"] if len(unused) > MAX_NOTES else [])


def _inspect(candidates: list[Candidate], text: str | None, label: str | None) -> tuple[list[TaskDraft], list[str]]:
    """The tasks for candidates, and lines that say what is not used."""
    tasks = []
    unused = []
    for candidate in candidates:
        notes = []
        if candidate.left_out:
            notes.append(f"files that are not media, or lie beside its subfolders: {candidate.left_out}")
        try:
            if candidate.problem:
                raise UserError(candidate.problem)
            if not is_utf8(candidate.place):
                raise UserError("its name is not UTF-8; rename it")
            new_tasks, new_notes = inspect(candidate, text, label)
            tasks += new_tasks
            notes += new_notes
        except (UserError, OSError) as error:
            notes.append(shown(str(error).removeprefix("source data: "), limit=1000))
        unused += [f"{shown(candidate.place)}: {note}" for note in notes]
    return tasks, unused


def _summary(named: NamedTask) -> str:
    _, task, split = named
    media = task.media
    unusable = (
        f" ({media.bad:.0%} of a sample cannot be used: {shown(media.problem, limit=500)})" if media.problem else ""
    )
    parts = [f"{split.rows + split.test_rows:,} rows", f"{media.kind} in {shown(media.name)}{unusable}"]
    if task.text and task.text.distinct:
        empty = f" (empty in {task.text.bad:.0%} of the rows)" if task.text.bad >= 0.005 else ""
        columns = ", ".join(map(shown, [task.text.name, *task.text.others]))
        parts.append(f"text in {columns}{empty}")
        has_times = any(TIME.search(name) for name in task.table.columns)
        if has_times and (count := _files_of_several(task.table, media.name, task.text.name)):
            parts[-1] += f" ({counted(count, 'file')} of several texts: openimp reads whole files, so cut them first)"
    if task.label:
        alike = equal_pair(map(as_text, sort_classes(split.classes)), text_key)
        note = f" ({shown(alike[0])!r} and {shown(alike[1])!r} count as two)" if alike else ""
        joined = next(filter(JOINED.search, task.text.sample if task.text else []), None)
        if joined and joined in split.classes:
            note += f" ({shown(joined)!r} is one word to the model; underscores or spaces separate words)"
        if count := _files_of_several(task.table, media.name, task.label.name):
            note += f" ({counted(count, 'file')} of several classes: openimp reads whole files, so cut them first)"
        parts.append(f"{len(split.classes):,} classes in {shown(task.label.name)}{note}")
    return f"found {shown(task.candidate.place)}: {', '.join(parts)}"


def _files_of_several(table: Table, media: str, column: str) -> int:
    """The number of files that rows with different values name, as in a table of segments of recordings."""
    first_value: dict[str, Any] = {}
    conflicting = {
        path
        for path, value in zip(table.path_of_rows(media), table.column(column))
        if path and first_value.setdefault(path, value) != value
    }
    return len(conflicting)


def largest_memory(recipe: Recipe, modalities: Modalities, classes: Classes, is_gpu: bool) -> int:
    """The most bytes that training holds in any step on one device."""
    planner = StepPlanner(recipe, Sharding(Layout(1, 1, 1), meta_model(recipe, modalities, classes)))
    precision = precision_of(pick_device(), recipe.train.precision)
    return max(
        planner.memory(
            recipe.tasks[task],
            cost,
            step_memory(recipe, modalities, classes, task, view, precision=precision, on_gpu=is_gpu),
        ).total
        for (task, view), cost in costs(recipe, modalities, classes).items()
    )


def fit(draft: Draft, classes: Classes, rows: Mapping[str, int], machine: Machine) -> float:
    """Halves the batch sizes until each step fits into memory, and limits the steps to `machine.hours` of training.

    `rows` is the number of rows of each task. Returns the FLOPs of the training.
    """
    tasks = draft.recipe["tasks"].values()
    train = draft.recipe["train"]
    while True:
        recipe = Recipe.build(draft.recipe, Path.cwd())
        modalities = recipe.make_modalities()
        if largest_memory(recipe, modalities, classes, machine.is_gpu) <= machine.memory:
            break
        if all(task["batch_size"] <= 2 for task in tasks):
            break
        for task in tasks:
            task["batch_size"] = max(2, task["batch_size"] // 2)
        share_steps(draft.recipe, rows)  # So that training sees each row the same number of times.
    flops = sum(row["flops"] for row in mixture(recipe, costs(recipe, modalities, classes)).values())
    train["steps"] = min(train["steps"], sizing.rounded(machine.hours * 3600 * machine.speed / flops))
    return train["steps"] * flops
