"""Callbacks: what a program does during a training run, without a trainer of its own."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from openimp.common.errors import UserError, nearest
from openimp.evaluation.results import main_metric
from openimp.parallel import distributed
from openimp.recipe.schema import Recipe


class StopTraining(Exception):
    """A callback raises it to end the training. The run is then saved, and evaluated unless this step was evaluated."""


class Callback:
    """A program's own part of a training run, for `openimp.train`. Override any of the methods.

    With several ranks, each of them calls the callbacks. Steps and results are equal on all ranks, but times in
    `metrics` are not: do not end the training because of them.
    """

    def on_start(self, recipe: Recipe) -> None:
        """Called before anything is written. A UserError says that the callback does not suit the recipe."""

    def on_step(self, step: int, metrics: dict[str, Any] | None) -> None:
        """Called when the update of a step is confirmed. `step` counts from 1. `metrics` is the line of metrics.jsonl,
        if one is written."""

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        """Called after each evaluation, with the lines of results.jsonl. Sets that cannot be measured have none."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called once a checkpoint is complete on disk, which may be some steps after `step`."""


class EarlyStopping(Callback):
    """Ends the training if the main metric of an evaluation set has not improved in `patience` evaluations in a row.

    `evaluation.every` says how often sets are evaluated, and `evaluation.best` keeps the best checkpoint. If the run is
    resumed before it ended, counting starts again. Once it has ended, `resume="auto"` does nothing.
    """

    def __init__(self, set: str, patience: int = 3) -> None:
        self.set = set
        self.patience = patience
        self._best = float("-inf")
        self._without_gain = 0

    def on_start(self, recipe: Recipe) -> None:
        sets = recipe.evaluation.sets
        if self.set not in sets:
            raise UserError(f"EarlyStopping: no evaluation set is called {self.set!r}{nearest(self.set, sets)}")
        if recipe.evaluation.every is None:
            raise UserError("EarlyStopping: evaluation.every is null, so sets are evaluated only at the end; set it")
        self._best = float("-inf")
        self._without_gain = 0

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        metrics = [main_metric(result) for result in results if result["set"] == self.set]
        if not metrics:  # The set could not be measured.
            return
        metric = fmean(metrics)
        self._without_gain = 0 if metric > self._best else self._without_gain + 1
        self._best = max(self._best, metric)
        if self._without_gain >= self.patience:
            raise StopTraining


class Callbacks:
    """Several callbacks. All of them are called, in order, before one of them ends the training."""

    def __init__(self, callbacks: Callback | Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
        for callback in self.callbacks:
            if not isinstance(callback, Callback):
                raise UserError(f"callbacks: expected instances of openimp.Callback, found {callback!r:.100}")

    def call(self, method: Callable[[Callback], None]) -> None:
        """Calls a method of each callback. Raises StopTraining if one of them did."""
        stops = False
        for callback in self.callbacks:
            try:
                method(callback)
            except StopTraining:
                stops = True
            except UserError:
                raise
            except Exception as error:
                if distributed.world_size() > 1:
                    raise  # The other ranks would wait for this one to save.
                # As a UserError, it ends the training with a checkpoint.
                kind = type(error).__name__
                raise UserError(f"callback {type(callback).__name__} failed with {kind}: {error}") from error
        if stops:
            raise StopTraining
