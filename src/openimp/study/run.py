"""Runs a study: trains variants of a recipe with several seeds at equal FLOPs, and writes tables and plots.

A study is a YAML file, such as those in `studies/`. Each arm is the study's recipe with some keys changed, or a list of
such models that share the arm's FLOPs.
"""

import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

from openimp.checkpoint.resume import FREE
from openimp.common.errors import UserError
from openimp.common.progress import console
from openimp.inference.model import load
from openimp.recipe.evaluation import Retrieval
from openimp.recipe.file import differences
from openimp.recipe.schema import Recipe
from openimp.study.budget import part_recipe, variant_of
from openimp.study.outcome import Outcome
from openimp.study.schema import Study, file_name, read_study
from openimp.study.trainers import peak_memory
from openimp.study.two_towers import load_two_towers
from openimp.training.trainer import train


def run_study(name: str, runs: Path, out: Path, smoke: bool = False) -> bool:
    """Trains the models of a study that are not trained yet, then writes NAME.md and its plots into the folder `out`.

    `name` is a study file, or that of a bundled study. Its run directories are in a subfolder of `runs`. `smoke` trains
    one seed with a small part of the FLOPs and data, to check that the study works. Returns False if a signal stopped a
    training. The same command then resumes the study.
    """
    if "RANK" in os.environ:
        raise UserError(f"{name}: a study trains on one rank; start it without torchrun")
    # Imported here because it needs matplotlib, and before the training so that a missing matplotlib is reported first.
    from openimp.study.results import write_results

    study, title = read_study(name, smoke)
    plan = [(seed, arm, i) for seed in study.seeds for arm, parts in study.arms.items() for i in range(len(parts))]
    recipes: dict[tuple[int, str, int], Recipe] = {}
    for seed, arm, i in plan:  # Before the first training, so that a mistake in any arm is reported at once.
        try:
            recipes[seed, arm, i] = part_recipe(study, study.arms[arm][i], seed, smoke)
        except UserError as error:
            raise UserError(f"{name}: arm {arm!r}: {error}") from None
    first_seed = {
        arm: [recipes[study.seeds[0], arm, i] for i in range(len(parts))] for arm, parts in study.arms.items()
    }
    _check_evaluation(study, name, first_seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: --out must be a folder, but it cannot be created: {error.strerror}") from None
    outcomes = {arm: {seed: Outcome() for seed in study.seeds} for arm in study.arms}
    for number, (seed, arm, i) in enumerate(plan, 1):
        part, recipe, outcome = study.arms[arm][i], recipes[seed, arm, i], outcomes[arm][seed]
        variant = variant_of(study, part)
        run = runs / title / f"{file_name(arm)}-{i}-seed{seed}"
        console.print(f"\n{title}, training {number} of {len(plan)}: {arm}, seed {seed}", style="bold")
        _check_same_recipe(run, recipe)
        if not train(recipe, run, "auto", variant):
            return False
        model = load_two_towers(run) if part.two_towers else load(run)
        outcome.add(run, sum(parameter.numel() for parameter in model.parameters()))
        if seed == study.seeds[0]:
            with TemporaryDirectory() as folder, console.capture():
                outcome.memory = max(outcome.memory, peak_memory(recipe, Path(folder), variant))
    command = f"openimp study {shlex.quote(name)}{' --smoke' if smoke else ''}"
    write_results(study, {arm: list(by_seed.values()) for arm, by_seed in outcomes.items()}, out, title, command)
    console.print(f"\nThe results are in {out / title}.md", soft_wrap=True)
    return True


def _check_evaluation(study: Study, name: str, recipes: dict[str, list[Recipe]]) -> None:
    """Checks that the arms, with the recipes of their models, can be compared after the training."""
    sets: dict[str, set[str]] = {}
    for arm, models in recipes.items():
        sets[arm] = set()
        for recipe in models:
            retrieval = {title for title, options in recipe.evaluation.sets.items() if isinstance(options, Retrieval)}
            if shared := retrieval & sets[arm]:
                raise UserError(f"{name}: arm {arm!r}: only one of its models may be evaluated on {min(shared)}")
            sets[arm] |= retrieval
    complete = max(sets.values(), key=len)
    if not complete:
        raise UserError(f"{name}: recipe {study.recipe} has no evaluation set of type retrieval, which studies compare")
    if not all(known <= complete for known in sets.values()):
        raise UserError(f"{name}: at least one arm must have all evaluation sets, so that there is a mean over them")


def _check_same_recipe(run: Path, recipe: Recipe) -> None:
    """Raises UserError if the study has changed since the run: the run has another recipe.

    `train` compares only keys that change the training. A study also needs results of the same evaluation.
    """
    if not (run / "recipe.yaml").exists():
        return
    for key, was, now in differences(Recipe.load(run / "recipe.yaml").to_dict(), recipe.to_dict()):
        if key not in FREE:
            raise UserError(f"{run}: trained with {key} {was!r}, now {now!r}; remove the folder to train it again")
