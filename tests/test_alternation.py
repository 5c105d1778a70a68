"""The alternation: pure, stable, and as frequent as the recipe says."""

from itertools import pairwise

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.alternation import Schedule, _draw, expected_shares
from openimp.recipe.schema import Recipe

THREE = """
name: x
sources: {all: {path: x.parquet}}
tasks:
  a: {source: all, inputs: {image: i, text: t}, objectives: [{type: contrastive}], batch_size: 4, weight: 5,
      views: [{weight: 2, batch_size: 6}, {weight: 1, image: {size: 128}}]}
  b: {source: all, inputs: {image: i, text: t}, objectives: [{type: contrastive}], batch_size: 4, weight: 3,
      interval: 2}
  c: {source: all, inputs: {image: i, text: t}, objectives: [{type: contrastive}], batch_size: 10, weight: 2,
      interval: 5}
"""


def mixture(kind: str, steps: int, seed: int = 0, **weights: float) -> Recipe:
    data = yaml.safe_load(THREE)
    for task, weight in weights.items():
        data["tasks"][task]["weight"] = weight
    return Recipe.build({**data, "seed": seed, "alternation": {"kind": kind}, "train": {"steps": steps}})


@pytest.mark.parametrize("kind", ["random", "intervals", "cycle"])
def test_the_order_of_tasks_is_a_pure_function_of_recipe_seed_and_step(kind):
    """Two processes that never speak agree; a longer run begins like a shorter one; the seed makes the difference."""
    long, again, short = (Schedule(mixture(kind, steps, seed=3)) for steps in (500, 500, 123))
    assert list(long) == list(again)
    assert list(long)[:123] == list(short)
    other = Schedule(mixture(kind, 500, seed=4))
    # Of fixed intervals, only the views are left to the seed.
    assert list(other) != list(long)


@pytest.mark.parametrize("kind", ["random", "intervals", "cycle", "sequence"])
def test_each_task_takes_its_examples_one_after_the_other(kind):
    """Batches of a task lie end to end in its order, whatever comes between them and however large its views' are."""
    following = {"a": 0, "b": 0, "c": 0}
    for step, visit in enumerate(Schedule(mixture(kind, 300))):
        assert visit.step == step
        assert visit.start == following[visit.task]
        assert visit.batch_size == {"a": [6, 4][visit.view], "b": 4, "c": 10}[visit.task]
        following[visit.task] += visit.batch_size
    assert all(following.values())


def test_random_draws_tasks_and_views_by_weight():
    visits = list(Schedule(mixture("random", 20_000)))
    tasks = [visit.task for visit in visits]
    # Four standard deviations of a share of 20 000 draws.
    for name, share in expected_shares(mixture("random", 1)).items():
        assert share == {"a": 0.5, "b": 0.3, "c": 0.2}[name]
        assert tasks.count(name) / 20_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    views = [visit.view for visit in visits if visit.task == "a"]
    assert views.count(0) / len(views) == pytest.approx(2 / 3, abs=0.02)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_cycle_is_never_far_from_its_shares(weights, seed):
    """In any run of steps, from any step on, a task has its share of them to within five visits."""
    steps = 2000
    drawn = _draw(weights, steps, False, (seed, 0))
    for i, weight in enumerate(weights):
        visits = np.concatenate([[0], np.cumsum(drawn == i)])
        off = visits - weight / sum(weights) * np.arange(steps + 1)
        assert off.max() - off.min() < 5


def test_in_a_sequence_each_task_has_its_share_of_the_steps_at_one_time():
    tasks = [visit.task for visit in Schedule(mixture("sequence", 100))]
    assert tasks == ["a"] * 50 + ["b"] * 30 + ["c"] * 20


@pytest.mark.parametrize("kind", ["random", "intervals", "cycle", "sequence"])
def test_views_in_a_sequence_have_their_shares_of_a_task_one_after_the_other(kind):
    recipe = mixture(kind, 300)
    recipe.alternation.views = "sequence"
    visits = [visit for visit in Schedule(recipe) if visit.task == "a"]
    assert len(visits) > 100
    views = [visit.view for visit in visits]
    assert views == sorted(views)
    assert views.count(0) == round(2 / 3 * len(views))
    # A view's own batch size counts, so no example is skipped or seen twice.
    assert all(visit.start + visit.batch_size == following.start for visit, following in pairwise(visits))


def test_fixed_intervals_give_the_mixture_of_the_release():
    """Image-text and labelled images at every round, the others at every 5th to 12th (arXiv 2305.06324)."""
    recipe = Recipe.load("imp_s")
    assert {name: task.interval for name, task in recipe.tasks.items()} == {
        "image_text": 1, "image_class": 1, "video_text": 12, "video_class": 5, "video_audio_text": 12, "audio_class": 8,
    }  # fmt: skip
    assert {name: round(100 * share) for name, share in expected_shares(recipe).items()} == {
        "image_text": 40, "image_class": 40, "video_text": 3, "video_class": 8, "video_audio_text": 3, "audio_class": 5,
    }  # fmt: skip
    steps = 299 * 10  # ten times the 120 rounds after which all repeats
    tasks = [visit.task for visit in Schedule(Recipe.load("imp_s", [f"train.steps={steps}"]))]
    for name, share in expected_shares(recipe).items():
        assert tasks.count(name) == round(share * steps)
    assert tasks[:8] == [*recipe.tasks, "image_text", "image_class"]


def test_tasks_of_weight_0_are_never_visited():
    for kind in ("random", "intervals", "cycle", "sequence"):
        recipe = mixture(kind, 100, b=0)
        assert {visit.task for visit in Schedule(recipe)} == {"a", "c"}
        assert "b" not in expected_shares(recipe)
