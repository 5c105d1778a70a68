"""Alternation: which task and view each step trains.

It is a pure function of recipe and seed, so all ranks know it without communication.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import cast

import numpy as np

from openimp.recipe.schema import Recipe

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, fill the unit interval with the lowest discrepancy (Weyl's sequence)."""
BLOCK = 2**12
"""Number of steps that are computed at a time."""


@dataclass(frozen=True)
class Visit:
    """The task, view and examples of one step. The batch is `start` to `start + batch_size` in the task's order."""

    step: int  # from 0
    task: str
    view: int  # index in the task's list
    batch_size: int  # over all ranks
    start: int  # number of examples that earlier steps of the task used


class Schedule(Sequence[Visit]):
    """The schedule of a recipe.

    It computes a step when it is asked for, so that making it takes as much time and memory for 10**9 steps as for
    1000. Only views in a sequence need the number of steps of each task first: if `random` or `cycle` chooses between
    several tasks, all steps are counted, which takes about 20 ns per step.

    The schedule of a longer run begins with that of a shorter one, except for sequences of tasks or views.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._names = [name for name, task in recipe.tasks.items() if task.weight]
        self._steps = recipe.train.steps
        tasks = [recipe.tasks[name] for name in self._names]
        kind = recipe.alternation.kind
        weights = [task.weight for task in tasks]
        self._tasks: _Choices
        if kind == "sequence":
            self._tasks = _Sequence(weights, self._steps)
        elif kind == "intervals":
            self._tasks = _Intervals([task.interval for task in tasks])
        else:
            self._tasks = _Draws(weights, kind == "random", (recipe.seed, 0))
        # For each task, the views of its steps.
        self._views: list[_Choices] = []
        for i, task in enumerate(tasks):
            view_weights = [view.weight for view in task.views]
            if recipe.alternation.views == "sequence" and len(view_weights) > 1:
                self._views.append(_Sequence(view_weights, self._tasks.counts(self._steps)[i]))
            else:
                # Only "random" draws views at random. All other kinds spread them evenly.
                self._views.append(_Draws(view_weights, kind == "random", (recipe.seed, 1, i)))
        self._batch_sizes = [task.batch_sizes for task in tasks]

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Visit:  # type: ignore[override]
        if not 0 <= step < self._steps:
            raise IndexError(step)
        task = self._tasks.at(step)
        step_of_task = self._tasks.counts(step)[task]
        view = self._views[task].at(step_of_task)
        batch_sizes = self._batch_sizes[task]
        return Visit(
            step=step,
            task=self._names[task],
            view=view,
            batch_size=batch_sizes[view],
            start=sum(map(mul, batch_sizes, self._views[task].counts(step_of_task))),
        )

    def counts(self, step: int) -> dict[tuple[str, int], int]:
        """The number of steps of each task and view before `step`, which may be the number of all steps."""
        steps_of_tasks = zip(self._names, self._views, self._tasks.counts(step))
        return {
            (name, view): steps
            for name, views, steps_of_task in steps_of_tasks
            for view, steps in enumerate(views.counts(steps_of_task))
        }


def expected_shares(recipe: Recipe) -> dict[str, float]:
    """Each task's expected share of the steps."""
    tasks = {name: task for name, task in recipe.tasks.items() if task.weight}
    by_interval = recipe.alternation.kind == "intervals"
    rate = {name: 1 / task.interval if by_interval else task.weight for name, task in tasks.items()}
    return {name: value / sum(rate.values()) for name, value in rate.items()}


class _Choices(ABC):
    """An index, of a task or a view, for each n from 0 on."""

    @abstractmethod
    def at(self, n: int) -> int:
        """The index for n."""

    @abstractmethod
    def counts(self, n: int) -> list[int]:
        """How often each index comes before n."""


class _Sequence(_Choices):
    """`total` indices in ascending order, with frequencies proportional to the weights."""

    def __init__(self, weights: list[float], total: int) -> None:
        def index_at(n: int) -> int:
            return int(_pick(weights, np.array([(n + 0.5) / total]))[0])

        # For each index, the n after its last one.
        self._stops = [bisect_right(range(total), index, key=index_at) for index in range(len(weights))]

    def at(self, n: int) -> int:
        return bisect_right(self._stops, n)

    def counts(self, n: int) -> list[int]:
        passed = [min(n, stop) for stop in self._stops]
        return [stop - start for start, stop in zip([0, *passed], passed)]


class _Blocks(_Choices):
    """Indices that are computed in blocks, of which it keeps the last one."""

    def __init__(self, size: int) -> None:
        self._size = size  # number of different indices
        self._block = -1  # number of the block that is kept
        self._indices = np.zeros(0, np.int16)
        self._counts = np.zeros((0, size), np.int64)  # before each n of the block

    def at(self, n: int) -> int:
        if self._size == 1:
            return 0
        self._compute(n // BLOCK)
        return int(self._indices[n % BLOCK])

    def counts(self, n: int) -> list[int]:
        if self._size == 1:
            return [n]
        self._compute(n // BLOCK)
        return cast(list[int], self._counts[n % BLOCK].tolist())

    def _compute(self, block: int) -> None:
        if block == self._block:
            return
        self._indices = self._indices_of(block)
        is_index = self._indices[:, None] == np.arange(self._size)
        self._counts = np.cumsum(is_index, axis=0) - is_index + self._counts_before(block)
        self._block = block

    @abstractmethod
    def _indices_of(self, block: int) -> np.ndarray:
        """The indices of a block, (BLOCK,)."""

    @abstractmethod
    def _counts_before(self, block: int) -> np.ndarray:
        """How often each index comes before a block."""


class _Draws(_Blocks):
    """Indices with frequencies proportional to the weights, drawn at random or spread evenly.

    `key` seeds the random numbers: (seed, 0) for the tasks, and (seed, 1, i) for the views of task i.
    """

    def __init__(self, weights: list[float], random: bool, key: tuple[int, ...]) -> None:
        super().__init__(len(weights))
        self._weights = weights
        self._random = random
        self._key = key
        self._counts_before_blocks = [np.zeros(len(weights), np.int64)]  # of all blocks up to the last one so far

    def _indices_of(self, block: int) -> np.ndarray:
        return _draw(self._weights, BLOCK, self._random, self._key, BLOCK * block)

    def _counts_before(self, block: int) -> np.ndarray:
        counts = self._counts_before_blocks
        while len(counts) <= block:
            counts.append(counts[-1] + np.bincount(self._indices_of(len(counts) - 1), minlength=self._size))
        return counts[block]


class _Intervals(_Blocks):
    """In round r, each task whose interval divides r has a step."""

    def __init__(self, intervals: list[int]) -> None:
        super().__init__(len(intervals))
        self._intervals = intervals

    def _steps_before(self, round_number: int) -> list[int]:
        """The steps of each task before a round."""
        return [-(-round_number // interval) for interval in self._intervals]

    def _round_at(self, n: int) -> int:
        """The round of step n."""
        rounds = range(n * min(self._intervals) + 2)
        return bisect_right(rounds, n, key=lambda round_number: sum(self._steps_before(round_number))) - 1

    def _indices_of(self, block: int) -> np.ndarray:
        first = BLOCK * block
        round_number = self._round_at(first)
        skipped = first - sum(self._steps_before(round_number))
        indices: list[int] = []
        while len(indices) < skipped + BLOCK:
            indices += (i for i, interval in enumerate(self._intervals) if round_number % interval == 0)
            round_number = min((round_number // interval + 1) * interval for interval in self._intervals)
        return np.array(indices[skipped : skipped + BLOCK], np.int16)

    def _counts_before(self, block: int) -> np.ndarray:
        first = BLOCK * block
        round_number = self._round_at(first)
        counts = self._steps_before(round_number)
        skipped = first - sum(counts)
        visited = [i for i, interval in enumerate(self._intervals) if round_number % interval == 0]
        for i in visited[:skipped]:
            counts[i] += 1
        return np.array(counts, np.int64)


def _draw(weights: list[float], n: int, random: bool, key: tuple[int, ...], start: int = 0) -> np.ndarray:
    """The indices from `start` to `start + n` - 1 of `_Draws`. `start` is a multiple of 4."""
    points: np.ndarray
    bit_generator = np.random.Philox(np.random.SeedSequence(key))
    if random:
        bit_generator.advance(start // 4)  # It makes four numbers at a time.
        points = np.random.Generator(bit_generator).random(n)
    else:
        points = (np.random.Generator(bit_generator).random() + GOLDEN * np.arange(start, start + n)) % 1.0
    return _pick(weights, points)


def _pick(weights: list[float], points: np.ndarray) -> np.ndarray:
    """Divides 0..1 into intervals as long as the weights, and returns the index of the interval of each point."""
    edges = np.cumsum(weights) / np.sum(weights)
    # The last edge may be slightly below 1, because of rounding.
    return np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1).astype(np.int16)
