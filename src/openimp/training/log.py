"""What a training run records and prints about its steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openimp.common.device import precision_of
from openimp.common.progress import StepBar, console
from openimp.data.loaded_batch import LoadedBatch
from openimp.model.embedder import Embedder
from openimp.objectives.losses import Losses
from openimp.parallel import distributed
from openimp.planning.costs import Costs, mixture_table
from openimp.planning.gpus import peak_flops
from openimp.recipe.schema import Recipe
from openimp.training.bad_examples import BadExamples
from openimp.training.loggers import open_loggers
from openimp.training.metrics import Metrics
from openimp.training.step_timer import StepTimer, speed_text


class Log:
    """Records every step, and writes and prints a line when `is_due` says so, and when the run ends or stops.

    Only then, and with the first batch of a task, does it read numbers from the device or communicate with other ranks.
    `state` is that of the checkpoint from which the run resumes; it is empty for a new run.
    """

    def __init__(self, run: Path, recipe: Recipe, costs: Costs, device: torch.device, state: Mapping[str, Any]) -> None:
        self.recipe = recipe
        train = self.recipe.train
        step = state.get("step", 0)
        self.run = run
        self.costs = costs
        self.timer = StepTimer()
        loggers = open_loggers(self.recipe, run, step) if distributed.rank() == 0 else []
        self.metrics = Metrics(run, step, peak_flops(device, train.precision), state.get("totals", {}), loggers)
        self.bad_examples = BadExamples(run, step, train.max_bad_fraction, state.get("bad", {}))
        self._begun_tasks: set[str] = set()

    def print_start(self, model: Embedder, device: torch.device, step: int) -> None:
        """Prints the tasks, the size of the model, the device, the precision and the directory of the run."""
        console.print(mixture_table(self.recipe, self.costs))
        parameter_count = sum(parameter.numel() for parameter in model.parameters())
        frozen_count = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        size = f"{parameter_count / 1e6:.2f}M parameters"
        if frozen_count:
            size += f", {frozen_count / 1e6:.2f}M of them frozen,"
        execution: str = precision_of(device, self.recipe.train.precision)
        if distributed.world_size() > 1:
            execution += f", {distributed.world_size()} ranks"
        if self.recipe.train.compile:
            execution += ", compiled"
        console.print(f"{self.recipe.name}: {size} on {device.type}, {execution}, into {self.run}", soft_wrap=True)
        if step:
            console.print(f"resuming from step {step}", soft_wrap=True)
        if (self.recipe.optimizer.warmup_steps or 0) >= self.recipe.train.steps:
            console.print("the learning rate only rises, because optimizer.warmup_steps are at least train.steps")

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the counts to continue."""
        totals = {task: dict(amounts) for task, amounts in self.metrics.totals.items()}
        return {"bad": self.bad_examples.state, "totals": totals}

    def is_due(self, steps_done: int) -> bool:
        """Whether a line is written after `steps_done` steps.

        Checkpoints and evaluations also have lines, so that a resumed run writes the lines of an uninterrupted one.
        """
        train = self.recipe.train
        intervals = (train.log_every, train.save_every, self.recipe.evaluation.every)
        return steps_done == train.steps or any(every and steps_done % every == 0 for every in intervals)

    @property
    def has_unlogged_steps(self) -> bool:
        """Whether a step was recorded since the last line."""
        return bool(self.metrics.steps)

    def record(self, loaded: LoadedBatch, losses: Losses) -> None:
        """Counts one step for the next line."""
        visit = loaded.visit
        self.metrics.add(visit.task, losses, self.costs[visit.task, visit.view], loaded.digest)
        self.bad_examples.add(visit.step, visit.task, visit.batch_size, loaded.bad)

    def write(self, steps_done: int, lr_factor: float, grad_norm: float, bar: StepBar) -> dict[str, Any]:
        """Writes, prints and returns a line after `steps_done` steps, with the learning rate and norm of the last
        update."""
        lr = self.recipe.optimizer.lr * lr_factor
        line = self.metrics.write(steps_done, lr, grad_norm, self.timer.record())
        losses = {task: line["tasks"][task]["loss"] for task in self.recipe.tasks if task in line["tasks"]}
        bar.report(steps_done, losses, speed_text(line))
        if warning := self.timer.warning(line):
            console.print(warning, soft_wrap=True)
        return line

    def print_warnings_of_objectives(self, loaded: LoadedBatch) -> None:
        """Prints the warnings of a task's objectives, if this batch is the first of its task."""
        name = loaded.visit.task
        if name in self._begun_tasks:
            return
        self._begun_tasks.add(name)
        task = self.recipe.tasks[name]
        batch = loaded.batch
        warnings = [
            objective.warning(task, batch.tokens, targets)
            for objective, targets in zip(task.objectives, batch.targets, strict=True)
        ]
        for warning in dict.fromkeys(filter(None, warnings)):
            console.print(f"task {name}: {warning}", soft_wrap=True)
