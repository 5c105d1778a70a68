"""What a training run records and prints about its steps: metrics.jsonl, results.jsonl, loggers and the terminal."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openimp.common.device import precision_of
from openimp.common.json_lines import append, forget_after, replace_after
from openimp.common.progress import StepBar, console
from openimp.data.loaded_batch import LoadedBatch
from openimp.model.embedder import Embedder
from openimp.objectives.losses import Losses
from openimp.parallel import distributed
from openimp.planning.costs import Cost, Costs, mixture_table
from openimp.planning.gpus import peak_flops
from openimp.planning.plan import parameter_count
from openimp.recipe.schema import Recipe
from openimp.training.bad_examples import BadExamples
from openimp.training.loggers import open_loggers
from openimp.training.step_timer import StepTimer, speed_text

DIGEST_MODULUS = 2**48
"""The digest of a line is the sum of its examples' 48-bit hashes modulo this."""


class Log:
    """Records every step, and writes and prints a line when `is_due` says so, and when the run ends or stops.

    Only then, and with the first batch of a task, does it read numbers from the device or communicate with other ranks.
    Rank 0 writes. Losses and router statistics are means over all ranks. docs/metrics.md explains every field.

    `state` is that of the checkpoint from which the run resumes; it is empty for a new run.
    """

    def __init__(self, run: Path, recipe: Recipe, costs: Costs, device: torch.device, state: Mapping[str, Any]) -> None:
        step = state.get("step", 0)
        self.recipe = recipe
        self.run = run
        self.step_costs = costs
        self.peak_flops = peak_flops(device, recipe.train.precision)  # FLOP/s of one device
        self.file = run / "metrics.jsonl"
        self.results_file = run / "results.jsonl"
        self.loggers = []
        if distributed.rank() == 0:
            forget_after(self.file, step)
            forget_after(self.results_file, step)
            self.loggers = open_loggers(recipe, run, step)
        self.timer = StepTimer()
        self.bad_examples = BadExamples(run, step, recipe.train.max_bad_fraction, state.get("bad", {}))
        self.totals = {task: Counter(amounts) for task, amounts in state.get("totals", {}).items()}
        self._begun_tasks: set[str] = set()
        self._reset()

    def _reset(self) -> None:
        """Forgets what was recorded since the last line."""
        self.costs: list[Cost] = []
        self.digest = 0
        self.unlogged_steps: Counter[str] = Counter()  # by task
        self.loss_sums: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by task and name of the loss
        self.passes: Counter[str] = Counter()  # by modality
        self.usage_sums: dict[str, Tensor] = {}  # by modality: load, gate and dropped of each sparse layer (row)

    def print_start(self, model: Embedder, device: torch.device, step: int) -> None:
        """Prints the tasks, the size of the model, the device, the precision and the directory of the run."""
        console.print(mixture_table(self.recipe, self.step_costs))
        size = f"{parameter_count(model) / 1e6:.2f}M parameters"
        if frozen := parameter_count(model, frozen=True):
            size += f", {frozen / 1e6:.2f}M of them frozen,"
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
        totals = {task: dict(amounts) for task, amounts in self.totals.items()}
        return {"bad": self.bad_examples.state, "totals": totals}

    def is_due(self, steps_done: int) -> bool:
        """Whether a line is written after `steps_done` steps.

        Checkpoints and evaluations also have lines, so that a resumed run writes the lines of an uninterrupted one.
        """
        train = self.recipe.train
        intervals = (train.log_every, train.save_every, self.recipe.evaluation.every)
        return steps_done == train.steps or any(every and steps_done % every == 0 for every in intervals)

    def record(self, loaded: LoadedBatch, losses: Losses) -> None:
        """Counts one step for the next line."""
        visit = loaded.visit
        task = visit.task
        self.bad_examples.add(visit.step, task, visit.batch_size, loaded.bad)
        cost = self.step_costs[task, visit.view]
        self.costs.append(cost)
        self.digest += loaded.digest
        self.unlogged_steps[task] += 1
        totals = self.totals.setdefault(task, Counter())
        totals.update(steps=1, examples=cost.examples, tokens=cost.tokens, flops=cost.flops)
        # Sums stay on the device, because reading a value from a GPU would wait for the step to finish.
        loss_sums = self.loss_sums[task]
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            loss_sums[name] = loss_sums.get(name, 0) + value
        for modality, layers in losses.usage.items():
            if layers:
                self.passes[modality] += 1
                usage = torch.stack([torch.cat([layer.load_E, layer.gate_E, layer.dropped[None]]) for layer in layers])
                self.usage_sums[modality] = self.usage_sums.get(modality, 0) + usage

    def write(self, steps_done: int, lr_factor: float, grad_norm: float, bar: StepBar) -> dict[str, Any]:
        """Writes, prints and returns a line after `steps_done` steps, with the learning rate and norm of the last
        update."""
        line = self._line(steps_done, lr_factor, grad_norm)
        self._reset()
        if distributed.rank() == 0:
            append(self.file, line)
        for logger in self.loggers:
            logger.log(_scalars(line), steps_done)
        losses = {task: line["tasks"][task]["loss"] for task in self.recipe.tasks if task in line["tasks"]}
        bar.report(steps_done, losses, speed_text(line), self.timer.paused_seconds)
        if warning := self.timer.warning(line):
            console.print(warning, soft_wrap=True)
        return line

    def _line(self, steps_done: int, lr_factor: float, grad_norm: float) -> dict[str, Any]:
        """The line of metrics.jsonl for the steps since the last line."""
        speed = self.timer.record()
        tasks = {}
        for task, loss_sums in self.loss_sums.items():
            steps = self.unlogged_steps[task]
            means = {name: float(distributed.all_reduce_mean(total)) / steps for name, total in loss_sums.items()}
            tasks[task] = {"steps": steps, **means}
        possible_flops = self.peak_flops * distributed.world_size() * speed["seconds"]
        model_flops = sum(cost.model_flops for cost in self.costs)
        hardware_flops = sum(cost.hardware_flops for cost in self.costs)
        utilization = {"mfu": model_flops / possible_flops}
        if hardware_flops > model_flops:
            utilization["hfu"] = hardware_flops / possible_flops
        return {
            "step": steps_done,
            "lr": self.recipe.optimizer.lr * lr_factor,
            "grad_norm": grad_norm,
            "examples_per_s": sum(cost.examples for cost in self.costs) / speed["seconds"],
            "tokens_per_s": sum(cost.tokens for cost in self.costs) / speed["seconds"],
            **utilization,
            **speed,
            "samples": f"{sum(distributed.all_gather_object(self.digest)) % DIGEST_MODULUS:012x}",
            "tasks": tasks,
            "experts": {modality: self._mean_usage(modality) for modality in self.usage_sums},
            "totals": {task: dict(amounts) for task, amounts in self.totals.items()},
        }

    def _mean_usage(self, modality: str) -> list[dict[str, Any]]:
        """How each sparse layer used its experts, averaged over the passes of a modality on all ranks."""
        usage = distributed.all_reduce_mean(self.usage_sums[modality]) / self.passes[modality]
        layers = []
        for *shares, dropped in usage.tolist():
            experts = len(shares) // 2
            layers.append({"load": shares[:experts], "gate": shares[experts:], "dropped": dropped})
        return layers

    def write_results(self, results: list[dict[str, Any]]) -> None:
        """Writes evaluation results, on rank 0, and removes older ones of the same step."""
        replace_after(self.results_file, max(result["step"] for result in results) - 1, results)
        for result in results:
            figures = {
                f"{key}/{result['set']}/{result['task']}": result[key]
                for key in ("r1", "r5", "mrr", "top1", "map")
                if key in result
            }
            for logger in self.loggers:
                logger.log(figures, result["step"])

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

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


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line that loggers show, by name."""
    keys = ("lr", "grad_norm", "examples_per_s", "tokens_per_s", "mfu", "hfu", "data_wait", "step_p50", "step_p95")
    scalars = {key: line[key] for key in keys if key in line}
    scalars |= {f"data_wait/{task}": share for task, share in line["waits"].items()}
    for task, means in line["tasks"].items():
        scalars |= {f"{name}/{task}": value for name, value in means.items()}
    for modality, layers in line["experts"].items():
        for i, layer in enumerate(layers):
            scalars[f"dropped_tokens/{modality}/sparse{i}"] = layer["dropped"]
            for expert, gate in enumerate(layer["gate"]):
                scalars[f"expert_gate/{modality}/sparse{i}/expert{expert}"] = gate
    return scalars
