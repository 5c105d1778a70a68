"""Alternation: which task and view each step trains.

It is a pure function of recipe and seed, so all ranks know it without communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from openimp.recipe.schema import Recipe

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, fill the unit interval with the lowest discrepancy (Weyl's sequence)."""


@dataclass(frozen=True)
class Visit:
    """The task, view and examples of one step. The batch is `start` to `start + batch_size` in the task's order."""

    step: int  # from 0
    task: str
    view: int  # index in the task's list
    batch_size: int  # over all ranks
    start: int  # number of examples that earlier steps of the task used


class Schedule(Sequence[Visit]):
    """The schedule of a recipe, in a few bytes per step.

    The schedule of a longer run begins with that of a shorter one, except for sequences of tasks or views.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._names = [name for name, task in recipe.tasks.items() if task.weight]
        tasks = [recipe.tasks[name] for name in self._names]
        steps = recipe.train.steps
        kind = recipe.alternation.kind
        weights = [task.weight for task in tasks]
        intervals = [task.interval for task in tasks]
        self._task_indices = _draw_tasks(kind, weights, intervals, steps, recipe.seed)
        self._view_indices = np.zeros(steps, np.int16)
        self._batch_size = np.zeros(steps, np.int64)
        self._start = np.zeros(steps, np.int64)
        for i, task in enumerate(tasks):
            steps_of_task = np.flatnonzero(self._task_indices == i)
            view_weights = [view.weight for view in task.views]
            if recipe.alternation.views == "sequence":
                chosen_views = _sequence(view_weights, len(steps_of_task))
            else:
                # Only "random" draws views at random. All other kinds spread them evenly.
                chosen_views = _draw(view_weights, len(steps_of_task), kind == "random", (recipe.seed, 1, i))
            batch_size = np.array(task.batch_sizes)[chosen_views]
            self._view_indices[steps_of_task] = chosen_views
            self._batch_size[steps_of_task] = batch_size
            self._start[steps_of_task] = np.cumsum(batch_size) - batch_size

    def __len__(self) -> int:
        return len(self._task_indices)

    def __getitem__(self, step: int) -> Visit:  # type: ignore[override]
        if not 0 <= step < len(self):
            raise IndexError(step)
        return Visit(
            step=step,
            task=self._names[self._task_indices[step]],
            view=int(self._view_indices[step]),
            batch_size=int(self._batch_size[step]),
            start=int(self._start[step]),
        )


def expected_shares(recipe: Recipe) -> dict[str, float]:
    """Each task's expected share of the steps."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
    by_interval = recipe.alternation.kind == "intervals"
    rate = {name: 1 / task.interval if by_interval else task.weight for name, task in tasks.items()}
    return {name: value / sum(rate.values()) for name, value in rate.items()}


def _draw_tasks(kind: str, weights: list[float], intervals: list[int], steps: int, seed: int) -> np.ndarray:
    """The task index of each step, (steps,)."""
    if kind == "sequence":
        return _sequence(weights, steps)
    if kind != "intervals":
        return _draw(weights, steps, kind == "random", (seed, 0))
    # In round r, each task whose interval divides r has a step.
    visited = (i for r in count() for i, interval in enumerate(intervals) if r % interval == 0)
    return np.fromiter(visited, np.int16, steps)


def _sequence(weights: list[float], n: int) -> np.ndarray:
    """Indices (n,) in ascending order, with frequencies proportional to the weights."""
    return _pick(weights, (np.arange(n) + 0.5) / n)


def _draw(weights: list[float], n: int, random: bool, key: tuple[int, ...]) -> np.ndarray:
    """Indices (n,) with frequencies proportional to the weights. A shorter draw is a prefix of a longer one.

    `key` seeds the random numbers: (seed, 0) for the tasks, and (seed, 1, i) for the views of task i.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    points = rng.random(n) if random else (rng.random() + GOLDEN * np.arange(n)) % 1.0
    return _pick(weights, points)


def _pick(weights: list[float], points: np.ndarray) -> np.ndarray:
    """Divides 0..1 into intervals as long as the weights, and returns the index of the interval of each point."""
    edges = np.cumsum(weights) / np.sum(weights)
    # The last edge may be slightly below 1, because of rounding.
    return np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1).astype(np.int16)
