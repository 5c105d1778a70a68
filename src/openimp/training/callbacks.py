"""Callbacks: what a program does during a training run, without a trainer of its own."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from openimp.common.errors import UserError
from openimp.evaluation.results import main_metric


class StopTraining(Exception):
    """A callback raises it to end the training. The run is then saved, and evaluated unless this step was evaluated."""


class Callback:
    """A program's own part of a training run, for `openimp.train`. Override any of the methods.

    With several ranks, each of them calls the callbacks, with equal arguments.
    """

    def on_step(self, step: int, figures: dict[str, Any] | None) -> None:
        """Called when the update of a step is confirmed. `step` counts from 1. `figures` is the line of metrics.jsonl,
        if one is written."""

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        """Called after each evaluation, with the lines of results.jsonl."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Called once a checkpoint is complete on disk, which may be some steps after `step`."""


class EarlyStopping(Callback):
    """Ends the training if the main metric of an evaluation set has not improved in `patience` evaluations in a row.

    `evaluation.every` says how often sets are evaluated, and `evaluation.best` keeps the best checkpoint.
    """

    def __init__(self, set: str, patience: int = 3) -> None:
        self.set = set
        self.patience = patience
        self._best = float("-inf")
        self._without_gain = 0

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        metrics = [main_metric(result) for result in results if result["set"] == self.set]
        if not metrics:
            raise UserError(f"EarlyStopping: no evaluation set is called {self.set!r}")
        metric = fmean(metrics)
        self._without_gain = 0 if metric > self._best else self._without_gain + 1
        self._best = max(self._best, metric)
        if self._without_gain >= self.patience:
            raise StopTraining


class Callbacks(Callback):
    """Several callbacks, called in order."""

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def on_step(self, step: int, figures: dict[str, Any] | None) -> None:
        for callback in self.callbacks:
            callback.on_step(step, figures)

    def on_evaluation(self, step: int, results: list[dict[str, Any]]) -> None:
        for callback in self.callbacks:
            callback.on_evaluation(step, results)

    def on_checkpoint(self, step: int, folder: Path) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(step, folder)
