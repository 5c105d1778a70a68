"""What the commands do: the glue between the command line and the library, and what they print."""

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from openimp.checkpoint import load_model, model_folder, read_config, saved_step
from openimp.data.loader import classes_of
from openimp.data.sources import open_source
from openimp.device import pick_device
from openimp.errors import UserError
from openimp.evaluation import evaluate, table
from openimp.ledger import costs, mixture_table
from openimp.metrics import append, read_lines
from openimp.modalities import modalities_of
from openimp.model.imp import IMP
from openimp.objectives import head_key
from openimp.progress import console, track
from openimp.recipe import Classification, Recipe
from openimp.report import write_report
from openimp.train import train


def run_demo(overrides: list[str], run: Path | None) -> None:
    """Trains the bundled recipe and says what to do next."""
    recipe = Recipe.load("demo", overrides)
    run = run or Path("runs") / recipe.name
    if not train(recipe, run):
        return
    console.print(
        f"\nThe run is in {run}: results.jsonl, metrics.jsonl, tensorboard/, checkpoints/.\n"
        f"Next:  openimp report {run}   |   openimp info {run}   |   openimp embed {run} PICTURES...\n"
        f"       tensorboard --logdir {run}"
    )


def run_train(
    name: str, overrides: list[str], run: Path | None, resume: bool, allow_changed_data: bool = False
) -> None:
    """Trains a recipe into `run`, or into runs/NAME."""
    recipe = Recipe.load(name, overrides)
    train(recipe, run or Path("runs") / recipe.name, resume, allow_changed_data=allow_changed_data)


def run_eval(path: Path, sets: list[str] | None, other: str | None, out: Path | None) -> None:
    """Measures a model on the sets of its own recipe, or of another."""
    if out and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(f"{out}: --out needs a file, in a directory that is there")
    folder = model_folder(path)
    model, recipe, modalities, _ = load_model(folder)
    if other:
        ours, theirs = recipe.to_dict(), Recipe.load(other).to_dict()
        # The run's own sources stay known, for its tasks name them; the views must suit the run's modalities.
        sources = ours["sources"] | theirs["sources"]
        recipe = Recipe.build({**ours, "sources": sources, "evaluation": theirs["evaluation"]}, where=other)
    if not recipe.evaluation.sets:
        raise UserError(f"{other or path}: the recipe has no evaluation sets")
    results = evaluate(model.to(pick_device()), recipe, modalities, sets or None, saved_step(folder), track)
    console.print(table(results))
    for result in results if out else []:
        assert out is not None
        append(out, result)


def run_report(run: Path, out: Path | None) -> None:
    """Writes a run's page."""
    file = write_report(run, out, progress=track)
    console.print(f"{file}: {file.stat().st_size / 1e6:.2f} MB", soft_wrap=True, markup=False)


def run_info(what: str, overrides: list[str]) -> None:
    """Describes a recipe, or a model and the run that made it."""
    path = Path(what)
    if path.is_dir():
        if overrides:
            raise UserError(f"{path}: --set changes a recipe, and this is a run or a model")
        folder = model_folder(path)
        recipe, classes, learned = read_config(folder)
        modalities = modalities_of(recipe)
        for modality in modalities.values():
            modality.load_state(learned)
        console.print(f"{folder}: recipe {recipe.name}, saved with openimp's model format", soft_wrap=True)
    else:
        recipe = Recipe.load(what, overrides)
        modalities = modalities_of(recipe)
        classes = _classes(recipe)
    _print_model(recipe, modalities, classes)
    _print_costs(recipe, modalities, classes)
    if path.is_dir():
        _print_run(path)


def _classes(recipe: Recipe) -> dict[str, list[Any]]:
    """The classes of each head, as far as the data is there; a head without data counts as one class."""
    found: dict[str, list[Any]] = {}
    for name, task in recipe.tasks.items():
        for objective in task.objectives:
            if isinstance(objective, Classification):
                key = head_key(task.source, objective.label)
                try:
                    found[key] = classes_of(open_source(task.source, recipe.sources[task.source]), objective, name)
                except UserError as error:
                    found[key] = [None]
                    console.print(f"head {key} counts as one class: {error}", soft_wrap=True)
    return found


def _print_model(recipe: Recipe, modalities: Any, classes: dict[str, list[Any]]) -> None:
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
    shown = Table(title="parameters", title_justify="left")
    shown.add_column("part")
    shown.add_column("parameters", justify="right")
    for name, part in model.named_children():
        shown.add_row(name, f"{_count(part):,}")
    shown.add_section()
    shown.add_row("in all", f"{_count(model):,}")
    moe = recipe.model.moe
    # Soft slots take from all tokens of an example, so no token uses a number of experts.
    if moe and moe.routing != "soft":
        expert = 2 * recipe.model.width * recipe.model.mlp
        used = moe.top_k if moe.routing == "token_choice" else moe.capacity
        active = _count(model.encoder) - moe.layers * expert * (moe.experts - used)
        shown.add_row("encoder, used by a token on average", f"{round(active):,}")
    console.print(shown)


def _print_costs(recipe: Recipe, modalities: Any, classes: dict[str, list[Any]]) -> None:
    by_view = costs(recipe, modalities, classes)
    shown = Table(title="one step", title_justify="left")
    for column in ("task", "view", "examples", "tokens", "GFLOPs"):
        shown.add_column(column, justify="left" if column == "task" else "right")
    for (task, view), cost in by_view.items():
        shown.add_row(task, str(view), str(cost.examples), str(cost.tokens), f"{cost.flops / 1e9:,.1f}")
    console.print(shown)
    console.print(mixture_table(recipe, by_view))


def _print_run(path: Path) -> None:
    lines = read_lines(path / "metrics.jsonl")
    if lines:
        shown = Table(title=f"spent up to step {lines[-1]['step']}", title_justify="left")
        for column in ("task", "steps", "examples", "tokens", "FLOPs"):
            shown.add_column(column, justify="left" if column == "task" else "right")
        for task, units in lines[-1]["totals"].items():
            shown.add_row(task, *(f"{units[u]:,}" for u in ("steps", "examples", "tokens")), f"{units['flops']:.4g}")
        console.print(shown)
    results = read_lines(path / "results.jsonl")
    if results:
        last = max(result["step"] or 0 for result in results)
        console.print(table([result for result in results if (result["step"] or 0) == last]))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
