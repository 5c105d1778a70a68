"""Alternation: the function step -> (task, view), pure in (recipe, seed), so every process knows it without asking."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from openimp.recipe.inputs import View
from openimp.recipe.schema import Recipe

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this size visit the unit circle with the least discrepancy there is (Weyl's sequence)."""


@dataclass(frozen=True)
class Visit:
    """What one step does.

    Attributes:
        step: which step, from 0.
        task: the task's name.
        view: the index of the view among the task's.
        batch: examples, over all processes.
        start: examples that the task has had before; the batch takes `start` to `start + batch` of its order.
    """

    step: int
    task: str
    view: int
    batch: int
    start: int


class Alternation(Sequence[Visit]):
    """The whole schedule of a recipe, a few bytes a step.

    A longer run's schedule begins with a shorter one's, unless the tasks come one after the other.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._names = [name for name, task in recipe.tasks.items() if task.weight]
        tasks = [recipe.tasks[name] for name in self._names]
        steps, kind = recipe.train.steps, recipe.alternation.kind
        self._task = _tasks(kind, [t.weight for t in tasks], [t.interval for t in tasks], steps, recipe.seed)
        self._view = np.zeros(steps, np.int16)
        self._batch = np.zeros(steps, np.int64)
        self._start = np.zeros(steps, np.int64)
        for i, task in enumerate(tasks):
            visits = np.flatnonzero(self._task == i)
            view = _draw([view.weight for view in task.views], len(visits), kind == "random", (recipe.seed, 1, i))
            batch = np.array([view.batch_size or task.batch_size for view in task.views])[view]
            self._view[visits], self._batch[visits] = view, batch
            self._start[visits] = np.cumsum(batch) - batch

    def __len__(self) -> int:
        return len(self._task)

    def __getitem__(self, step: int) -> Visit:  # type: ignore[override]
        if not 0 <= step < len(self):
            raise IndexError(step)
        return Visit(
            step,
            self._names[self._task[step]],
            int(self._view[step]),
            int(self._batch[step]),
            int(self._start[step]),
        )

    def visits(self) -> dict[tuple[str, int], int]:
        """How many steps take each (task, view)."""
        found, steps = np.unique(np.stack((self._task, self._view)), axis=1, return_counts=True)
        return {(self._names[task], int(view)): int(n) for task, view, n in zip(*found, steps)}


def expected_shares(recipe: Recipe) -> dict[str, float]:
    """Each task's expected share of the steps."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
    by_interval = recipe.alternation.kind == "intervals"
    rate = {name: 1 / task.interval if by_interval else task.weight for name, task in tasks.items()}
    return {name: value / sum(rate.values()) for name, value in rate.items()}


def view_shares(views: Sequence[View]) -> list[float]:
    """Each view's share of its task's steps."""
    total = sum(view.weight for view in views)
    return [view.weight / total for view in views]


def _tasks(kind: str, weights: list[float], intervals: list[int], steps: int, seed: int) -> np.ndarray:
    """(steps,) index of each step's task."""
    if kind == "sequence":
        return _pick(weights, (np.arange(steps) + 0.5) / steps)
    if kind != "intervals":
        return _draw(weights, steps, kind == "random", (seed, 0))
    visited: list[int] = []
    for turn in count():
        if len(visited) >= steps:
            break
        visited += [i for i, interval in enumerate(intervals) if turn % interval == 0]
    return np.array(visited[:steps], np.int16)


def _draw(weights: list[float], n: int, random: bool, key: tuple[int, ...]) -> np.ndarray:
    """(n,) indices with frequencies as the weights; a prefix of a longer draw is the shorter one."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    return _pick(weights, rng.random(n) if random else (rng.random() + GOLDEN * np.arange(n)) % 1.0)


def _pick(weights: list[float], points: np.ndarray) -> np.ndarray:
    """Indices of points between 0 and 1, each index for a part as large as its weight."""
    edges = np.cumsum(weights) / np.sum(weights)
    # The last edge may be a rounding error below 1.
    return np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1).astype(np.int16)
