"""Runs a study: trains variants of a recipe with several seeds at equal FLOPs, and writes tables and plots.

A study is a YAML file, such as those in `studies/`. Each arm is the study's recipe with some keys changed, or a list of
such models that share the arm's FLOPs.
"""

import os
import shlex
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from openimp.common.errors import UserError
from openimp.common.progress import console
from openimp.planning.plan import parameter_count
from openimp.recipe.evaluation import Retrieval
from openimp.recipe.schema import Recipe
from openimp.study.budget import arm_model_recipe, variant_of
from openimp.study.outcome import Outcome
from openimp.study.schema import ArmModel, Study, file_name, read_study
from openimp.study.variants import peak_memory
from openimp.training.setup import Variant, set_up
from openimp.training.trainer import Trainer, train


class Training(NamedTuple):
    """The training of one model of an arm with one seed."""

    seed: int
    arm: str
    model_number: int
    arm_model: ArmModel
    recipe: Recipe


def run_study(name: str, runs: Path, out: Path, smoke: bool = False) -> bool:
    """Trains the models of a study that are not trained yet, then writes NAME.md and its plots into the folder `out`.

    `name` is a study file, or the name of a bundled study. The study's run directories are in a subfolder of `runs`.
    `smoke` trains one seed with a small part of the FLOPs and data, to check that the study works. Returns False if a
    signal stopped a training. The same command then resumes the study.
    """
    if "RANK" in os.environ:
        raise UserError(f"{name}: a study trains on one rank; start it without torchrun")
    # Imported here because it needs matplotlib, and before the training so that a missing matplotlib is reported first.
    from openimp.study.results import write_results

    study, title = read_study(name, smoke)
    trainings = _trainings(study, name, smoke)
    first_seed = study.seeds[0]
    _check_evaluation(study, name, [training for training in trainings if training.seed == first_seed])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: --out must be a folder, but it cannot be created: {error.strerror}") from None
    outcomes = {arm: {seed: Outcome() for seed in study.seeds} for arm in study.arms}
    for number, training in enumerate(trainings, 1):
        arm = training.arm
        seed = training.seed
        outcome = outcomes[arm][seed]
        variant = variant_of(study, training.arm_model)
        run = runs / title / f"{file_name(arm)}-{training.model_number}-seed{seed}"
        console.print(f"\n{title}, training {number} of {len(trainings)}: {arm}, seed {seed}", style="bold")
        if not train(training.recipe, run, "auto", variant):
            return False
        outcome.add(run, study.score)
        if seed == first_seed:
            parameters, memory = _size(training.recipe, variant)
            outcome.parameters += parameters
            outcome.memory = max(outcome.memory, memory)
    command = f"openimp study {shlex.quote(name)}{' --smoke' if smoke else ''}"
    by_arm = {arm: list(by_seed.values()) for arm, by_seed in outcomes.items()}
    write_results(study, by_arm, out, title, command)
    console.print(f"\nThe results are in {out / title}.md", soft_wrap=True)
    return True


def _size(recipe: Recipe, variant: Variant) -> tuple[int, int]:
    """The number of parameters of a model, and the peak memory of its training in bytes."""
    # Without loggers, which would show this folder as a run.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"loggers": []})})
    with TemporaryDirectory() as folder, console.capture():
        trainer = Trainer(set_up(recipe, Path(folder), variant=variant))
        return parameter_count(trainer.model), peak_memory(trainer)


def _trainings(study: Study, name: str, smoke: bool) -> list[Training]:
    """All trainings of a study. They are listed before any starts, so that a mistake in any arm is reported at once."""
    trainings = []
    for seed in study.seeds:
        for arm, arm_models in study.arms.items():
            for model_number, arm_model in enumerate(arm_models):
                try:
                    recipe = arm_model_recipe(study, arm_model, seed, smoke)
                except UserError as error:
                    raise UserError(f"{name}: arm {arm!r}: {error}") from None
                trainings.append(Training(seed, arm, model_number, arm_model, recipe))
    return trainings


def _check_evaluation(study: Study, name: str, trainings: list[Training]) -> None:
    """Checks that the results of the arms can be compared. `trainings` are those of one seed."""
    sets_by_arm: dict[str, set[str]] = defaultdict(set)
    for training in trainings:
        arm = training.arm
        evaluation_sets = training.recipe.evaluation.sets
        scored_sets = {
            title
            for title, options in evaluation_sets.items()
            if study.score == "accuracy" or isinstance(options, Retrieval)
        }
        if shared := scored_sets & sets_by_arm[arm]:
            raise UserError(f"{name}: arm {arm!r}: only one of its models may be evaluated on {min(shared)}")
        sets_by_arm[arm] |= scored_sets
    most_sets = max(sets_by_arm.values(), key=len)
    if not most_sets:
        kind = "" if study.score == "accuracy" else " of type retrieval"
        raise UserError(f"{name}: recipe {study.recipe} has no evaluation set{kind}, which studies compare")
    if not all(sets <= most_sets for sets in sets_by_arm.values()):
        raise UserError(f"{name}: at least one arm must have all evaluation sets, so that there is a mean over them")
