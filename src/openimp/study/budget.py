"""The recipe of each model of a study, with as many steps as its FLOPs pay for."""

from typing import Any

import yaml

from openimp.common.errors import UserError, nearest
from openimp.data.step_batches import StepBatches
from openimp.planning.ledger import costs, mixture
from openimp.recipe.file import RecipeLoader, flat
from openimp.recipe.schema import Recipe
from openimp.study.schema import Part, Study
from openimp.study.two_towers import flops_of_a_step as towers_flops

SAVES = 5
"""Checkpoints of a training, for stops that nobody asked for."""
DERIVED = {"train.steps", "train.save_every", "optimizer.warmup_steps", "seed"}
SMOKE_ROWS, SMOKE_BATCH = 48, 16
"""Rows per source and examples per step, with --smoke."""
MOST_STEPS = 10**8
"""Of a training, whose whole schedule is in memory."""


def part_recipe(study: Study, part: Part, seed: int, smoke: bool = False) -> Recipe:
    """The recipe of one model, with as many steps as its share of the FLOPs pays for.

    Raises:
        UserError: a change that the recipe does not take, an unknown task, or more FLOPs than anyone can train for.
    """
    data = Recipe.load(study.recipe, [*study.set, *part.set, f"seed={seed}"]).to_dict()
    for key, _, value in (change.partition("=") for change in (*study.set, *part.set)):
        for derived in flat({key.strip(): yaml.load(value, RecipeLoader)}).keys() & DERIVED:
            raise UserError(f"{derived} follows from the study's FLOPs and seeds")
    if part.summed:
        data["alternation"]["kind"] = "intervals"
        for task in data["tasks"].values():  # A round sums one batch of each.
            task["interval"] = 1
    if smoke:
        _make_small(data)
    share = 1.0
    if part.tasks is not None:
        # Shares are those of the study's recipe: what the part sets may change what a step of its task costs.
        whole = Recipe.load(study.recipe, study.set)
        spent = _flops_of_a_step(whole)
        _keep_tasks(data, part.tasks, whole)
        share = sum(spent.get(name, 0) for name in part.tasks) / sum(spent.values())  # A task of weight 0 has none.
    recipe = Recipe.build(data)
    a_step = towers_flops(recipe) if part.two_towers else sum(_flops_of_a_step(recipe).values())
    paid = part.flops * share * study.flops / a_step
    if paid > MOST_STEPS:
        raise UserError(f"its FLOPs pay for {paid:.2g} steps, where a training takes at most {MOST_STEPS:,}")
    steps = max(1, round(paid))
    # A whole number of rounds, for within one of summed losses nothing can be saved.
    rounds = len(data["tasks"])
    data["train"].update(steps=steps, save_every=max(1, steps // (SAVES * rounds)) * rounds)
    data["optimizer"]["warmup_steps"] = None  # A share of the steps: a fixed number would be all of a short training.
    return Recipe.build(data)


def _make_small(data: dict[str, Any]) -> None:
    for source in data["sources"].values():
        source.update(limit=SMOKE_ROWS, cache="none")
    for task in data["tasks"].values():
        task["batch_size"] = SMOKE_BATCH
    data["train"]["num_workers"] = 0


def _keep_tasks(data: dict[str, Any], names: list[str], whole: Recipe) -> None:
    """Leaves out the other tasks, and the modalities and evaluation sets that then have no use."""
    for name in names:
        if name not in data["tasks"]:
            raise UserError(f"study: no task of the recipe is called {name!r}{nearest(name, data['tasks'])}")
    data["tasks"] = {name: data["tasks"][name] for name in names}
    seen = {name for task in data["tasks"].values() for name in task["inputs"]}
    stems = {modality.stem for name, modality in whole.make_modalities().items() if name in seen}
    data["modalities"] = {stem: options for stem, options in data["modalities"].items() if stem in stems}
    data["evaluation"]["sets"] = {
        name: options
        for name, options in data["evaluation"]["sets"].items()
        if {*options["inputs"], *([options["reader"]] if "reader" in options else [])} <= seen
    }


def _flops_of_a_step(recipe: Recipe) -> dict[str, float]:
    """What each task contributes to the FLOPs of the mean step."""
    data = recipe.to_dict()
    for source in data["sources"].values():
        source["cache"] = "none"
    recipe = Recipe.build(data)
    modalities = recipe.make_modalities()
    batches = StepBatches(recipe, modalities)
    return {name: row["flops"] for name, row in mixture(recipe, costs(recipe, modalities, batches.classes)).items()}
