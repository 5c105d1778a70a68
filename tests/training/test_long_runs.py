"""Runs of any length, from minutes to months on thousands of GPUs: the learning rate, the end, the totals."""

import json
import time
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import pytest
import yaml

from openimp.alternation import Schedule
from openimp.checkpoint.folder import checkpoint_folder, checkpoints, manifest_entry
from openimp.planning.costs import Cost, short
from openimp.recipe.schema import Recipe
from openimp.training.callbacks import Callback, StopTraining
from openimp.training.metrics_file import read_metrics
from openimp.training.optimizers import LRSchedule
from openimp.training.setup import work_before_step
from openimp.training.trainer import train
from tests.trained import recipe_of

RECIPE = """
name: x
sources: {all: {path: x.parquet}}
tasks:
  a: {source: all, inputs: {image: i, text: t}, objectives: [{type: contrastive}], weight: 3, interval: 2,
      views: [{weight: 2}, {weight: 1, image: {size: 128}}, {weight: 1, batch_size: 8}]}
  b: {source: all, inputs: {image: i, text: t}, objectives: [{type: contrastive}], weight: 0,
      views: [{}, {image: {size: 128}}]}
"""
COSTS = {("a", 0): 1, ("a", 1): 4, ("a", 2): 7, ("b", 0): 2, ("b", 1): 3}
"""FLOPs of a step of each task and view, in proportion."""


def long_recipe(kind: str, steps: int, weight_of_b: float, views: str = "sequence") -> Recipe:
    data = yaml.safe_load(RECIPE)
    data["tasks"]["b"]["weight"] = weight_of_b
    options = {"alternation": {"kind": kind, "views": views}, "optimizer": {"min_lr_ratio": 0.01}}
    return Recipe.build({**data, **options, "train": {"steps": steps}})


def costs_of(flops: int, steps: int) -> dict[tuple[str, int], Cost]:
    """Costs of which the steps of a run have about `flops` FLOPs in all."""
    return {
        task_view: Cost(
            examples=8,
            tokens=8,
            flops=share * flops // (2 * steps),
            forward_flops=0,
            repeated_flops=0,
            optimizer_flops=0,
            params_with_grad=frozenset(),
        )
        for task_view, share in COSTS.items()
    }


def sampled(steps: int, warmup: int) -> list[int]:
    """Some steps: the first and last ones, those around the end of the warm-up, and 200 in between."""
    edges = (0, warmup, steps // 2, 3 * steps // 4, steps)
    near = {edge + offset for edge in edges for offset in (-2, -1, 0, 1)}
    return sorted(step for step in near | {i * steps // 200 for i in range(200)} if 0 <= step < steps)


@pytest.mark.parametrize("steps", [10**3, 10**5, 10**7, 10**9])
@pytest.mark.parametrize(("kind", "weight_of_b"), [("random", 0), ("cycle", 0), ("sequence", 1), ("intervals", 1)])
def test_the_learning_rate_rises_once_and_falls_once_in_a_run_of_any_length(kind, weight_of_b, steps):
    """`openimp init` drafts one task at random, with views in a sequence, for a folder of pictures."""
    recipe = long_recipe(kind, steps, weight_of_b)
    schedule = Schedule(recipe)
    warmup = steps // 20
    chosen = sampled(steps, warmup)
    for exponent in range(12, 26):
        costs = costs_of(10**exponent, steps)
        lr_factor = LRSchedule(recipe, work_before_step(schedule, "sequence", costs))
        factors = [lr_factor(step) for step in chosen]
        rising = [factor for step, factor in zip(chosen, factors) if step < warmup]
        falling = [factor for step, factor in zip(chosen, factors) if step >= warmup]
        assert all(one < other for one, other in pairwise(rising))
        assert rising[-1] == falling[0] == 1.0
        assert all(one >= other for one, other in pairwise(falling))
        assert falling[-1] < 0.02
        assert lr_factor(steps) == pytest.approx(0.01, abs=1e-15)
    # The count of steps, and so of FLOPs, is exact.
    total = sum(costs[task_view].flops * count for task_view, count in schedule.counts(steps).items())
    assert sum(schedule.counts(steps).values()) == steps
    middle = steps // 2
    done = sum(costs[task_view].flops * count for task_view, count in schedule.counts(middle).items())
    assert Fraction(1, 10) < Fraction(done, total) < Fraction(9, 10)
    assert lr_factor.cosine_work + lr_factor.warmup_work == total


@pytest.mark.parametrize(("kind", "weight_of_b"), [("random", 0), ("cycle", 0), ("sequence", 1), ("intervals", 1)])
@pytest.mark.parametrize("views", ["drawn", "sequence"])
def test_a_schedule_takes_no_more_memory_and_time_for_more_steps(kind, weight_of_b, views):
    """Of 10**9 steps, an array with a byte per step would take a gigabyte."""
    recipes = [long_recipe(kind, steps, weight_of_b, views) for steps in (10**4, 10**9)]
    list(Schedule(recipes[0])[step] for step in range(100))  # Imports what it needs.
    used = []
    for recipe in recipes:
        tracemalloc.start()
        start = time.process_time()
        schedule = Schedule(recipe)
        lr_factor = LRSchedule(recipe, work_before_step(schedule, views, costs_of(10**20, 1000)))
        if views == "sequence":  # If views are drawn, the counts of all steps before are needed.
            assert lr_factor(recipe.train.steps - 1) < 0.02
        assert schedule[0].start == 0
        used.append((tracemalloc.get_traced_memory()[1], time.process_time() - start))
        tracemalloc.stop()
    assert used[1][0] < used[0][0] + 2**20
    assert used[1][1] < used[0][1] + 0.5


class StopsAfterTwo(Callback):
    def on_step(self, step, metrics):
        if step == 2:
            raise StopTraining


def test_a_run_ends_exactly_at_its_last_step_with_exact_totals(little_data, tmp_path):
    """A checkpoint of 10**8 - 2 of 10**8 steps and 10**25 FLOPs resumes, makes two steps, and is complete."""
    steps = 10**8
    run = tmp_path / "run"
    changes = [f"train={{steps: {steps}, num_workers: 0, log_every: 1}}", "evaluation={}", "optimizer.warmup_steps=1"]
    recipe = recipe_of(little_data, *changes, "alternation={kind: intervals, views: sequence}")
    train(recipe, run, callbacks=StopsAfterTwo())
    folder = checkpoints(run)[-1]
    state = json.loads((folder / "state.json").read_text())
    flops = {task: used["flops"] for task, used in state["totals"].items()}
    state["step"] = steps - 2
    for used in state["totals"].values():
        used["flops"] += 10**25
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = manifest_entry(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    folder.rename(checkpoint_folder(run, steps - 2))

    assert train(recipe, run, resume=True)
    line = read_metrics(run / "metrics.jsonl")[-1]
    assert line.step == steps
    assert 0 < line.lr < 1e-12
    assert set(line.totals) == {"named", "heard"}
    assert all(used.flops > 10**25 and used.steps == 2 for used in line.totals.values())
    assert line.totals["heard"].flops == 10**25 + 2 * flops["heard"], "heard has one view, so its steps are equal"
    # From 10**8 steps on, the names of checkpoints have another digit, and the newest is still the last.
    assert [folder.name for folder in checkpoints(run)] == ["step-99999998", "step-100000000"]
    assert short(10**25) == "10 Y"
