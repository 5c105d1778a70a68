"""The recipe of each model of a study, with as many steps as its FLOPs allow."""

import re
from pathlib import Path
from typing import Any

import yaml

from openimp.common.errors import UserError, counted, nearest
from openimp.data.task_data import TaskData
from openimp.planning.costs import mixture
from openimp.recipe.evaluation import Probe
from openimp.recipe.file import RecipeLoader, flat
from openimp.recipe.schema import Recipe
from openimp.study.schema import ArmModel, Study
from openimp.study.two_towers import TWO_TOWERS
from openimp.study.variants import CONFLICT, SUMMED
from openimp.training.setup import Variant

SAVES = 5
"""Number of checkpoints per training, so that a crash costs little."""
DERIVED = {"train.steps", "train.save_every", "optimizer.warmup_steps", "seed"}
"""Keys that follow from the study's FLOPs and seeds."""
SMOKE_ROWS = 48
"""Rows per source with --smoke."""
SMOKE_BATCH = 16
"""Examples per batch with --smoke."""
MIN_STEPS = 10
"""Fewest steps of a model. Steps are whole, so with fewer of them the arms' FLOPs would differ by more than 5 %."""


def variant_of(study: Study, arm_model: ArmModel) -> Variant:
    """How one model of a study is trained."""
    if arm_model.two_towers:
        return TWO_TOWERS
    if arm_model.summed:
        return SUMMED
    return CONFLICT if study.conflict else Variant()


def arm_model_recipe(study: Study, arm_model: ArmModel, seed: int, smoke: bool = False) -> Recipe:
    """The recipe of one model of a study.

    If its FLOPs allow fewer than `MIN_STEPS`, that is a UserError; `smoke` allows 1 step.
    """
    changes = [*study.set, *arm_model.set]
    original = Recipe.load(study.recipe, [*changes, f"seed={seed}"], Path.cwd())
    data = original.to_dict()
    for change in changes:
        _refuse_derived(change)
    if arm_model.summed:
        data["alternation"]["kind"] = "intervals"
        for task in data["tasks"].values():
            task["interval"] = 1
    if smoke:
        _make_small(data, original)
    share = 1.0
    if arm_model.tasks is not None:
        # The share is computed without the model's own changes, which may change the cost of a step of its tasks.
        common = Recipe.load(study.recipe, study.set, Path.cwd())
        flops = flops_per_step(common, Variant())
        _keep_tasks(data, arm_model.tasks, common)
        # A task of weight 0 has no FLOPs.
        share = sum(flops.get(name, 0) for name in arm_model.tasks) / sum(flops.values())
    recipe = Recipe.build(data)
    per_step = sum(flops_per_step(recipe, variant_of(study, arm_model)).values())
    allowed = arm_model.flops_factor * share * study.flops / per_step
    steps = max(1, round(allowed))
    if steps < MIN_STEPS and not smoke:
        raise UserError(
            f"its FLOPs allow {counted(round(allowed), 'step')}, but arms are comparable from {MIN_STEPS} steps on; "
            "raise flops"
        )
    round_length = sum(task.weight > 0 for task in recipe.tasks.values())
    # Whole rounds of one step per task: summed tasks are updated at the end of a round.
    rounds_per_save = max(1, steps // (SAVES * round_length))
    data["train"].update(steps=steps, save_every=rounds_per_save * round_length)
    data["optimizer"]["warmup_steps"] = None  # A share of the steps, because a fixed number may exceed them.
    return Recipe.build(data)


def _refuse_derived(change: str) -> None:
    """UserError if a change sets a key that follows from the study."""
    key, _, value = change.partition("=")
    changed_keys = flat({key.strip(): yaml.load(value, RecipeLoader)}).keys()
    if derived := changed_keys & DERIVED:
        raise UserError(f"{min(derived)} follows from the study's FLOPs and seeds, so it cannot be set")


def _make_small(data: dict[str, Any], original: Recipe) -> None:
    """Makes the data of a recipe small. Classes and words stay those of the whole data."""
    has_classes = {task.source for task in original.tasks.values() if task.class_columns}
    trains_probes = {options.train for options in original.evaluation.sets.values() if isinstance(options, Probe)}
    for name, source in data["sources"].items():
        source["cache"] = "none"
        if not source["stream"] and name not in has_classes | trains_probes:
            source["limit"] = SMOKE_ROWS
    for task in data["tasks"].values():
        if not data["sources"][task["source"]]["stream"]:  # The lanes of a stream divide its batches.
            for options in (task, *task["views"]):
                if options.get("batch_size"):
                    options["batch_size"] = SMOKE_BATCH
    if (data["modalities"].get("text") or {}).get("min_df") and not data["train"]["init"]:
        data["modalities"]["text"]["min_df"] = 1  # In few rows, words do not repeat.
    data["train"]["num_workers"] = 0


def _keep_tasks(data: dict[str, Any], names: list[str], common: Recipe) -> None:
    """Keeps only the tasks `names` of a recipe, and the modalities, experts and evaluation sets that they use."""
    for name in names:
        if name not in data["tasks"]:
            raise UserError(f"study: no task of the recipe is called {name!r}{nearest(name, data['tasks'])}")
    data["tasks"] = {name: data["tasks"][name] for name in names}
    used = {name for task in data["tasks"].values() for name in task["inputs"]}
    modalities = common.make_modalities()
    stems = {modalities[name].stem for name in used}
    names_left_out = {*modalities, *(modality.stem for modality in modalities.values())} - used - stems
    data["modalities"] = {stem: options for stem, options in data["modalities"].items() if stem in stems}
    scales = data["optimizer"]["lr_scale"]
    data["optimizer"]["lr_scale"] = {
        # Such as `stems.audio`, `encoder.own.audio` and `projections.text-to-audio`.
        part: scale
        for part, scale in scales.items()
        if names_left_out.isdisjoint(re.split("[.-]", part))
    }
    moe = data["model"].get("moe")
    if moe and isinstance(moe["experts"], dict):
        moe["experts"] = {stem: count for stem, count in moe["experts"].items() if stem in stems}
    kept_sets = {}
    for name, options in data["evaluation"]["sets"].items():
        needed = {*options["inputs"]}
        if "reader" in options:
            needed.add(options["reader"])
        if needed <= used and options.get("task", names[0]) in names:
            kept_sets[name] = options
    data["evaluation"]["sets"] = kept_sets
    if data["evaluation"]["best"] not in kept_sets:
        data["evaluation"]["best"] = None


def flops_per_step(recipe: Recipe, variant: Variant) -> dict[str, float]:
    """The mean FLOPs per step of a training run, split by task; see planning/costs.py."""
    modalities = variant.make_modalities(recipe)
    costs = variant.costs(recipe, modalities, TaskData(recipe, modalities).classes)
    return {name: row["flops"] for name, row in mixture(recipe, costs).items()}
