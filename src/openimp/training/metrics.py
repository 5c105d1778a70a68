"""Aggregates metrics over steps and ranks, and writes metrics.jsonl and results.jsonl."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openimp.common.json_lines import append, forget_after, replace_after
from openimp.objectives.losses import Losses
from openimp.parallel.distributed import all_gather_object, all_reduce_mean, rank, world_size
from openimp.planning.costs import Cost
from openimp.training.loggers import Logger

DIGEST_MODULUS = 2**48
"""The digest of a line is the sum of its examples' 48-bit hashes modulo this."""


class Metrics:
    """Aggregates the metrics of the steps since the last line, and writes the next line.

    Rank 0 writes. Losses and router statistics are means over all ranks. `peak` is a device's FLOP/s (`peak_flops`).
    `loggers` get the figures too; they are those of rank 0. docs/metrics.md explains every field.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        peak: float,
        totals: dict[str, dict[str, int]],
        loggers: Sequence[Logger],
    ) -> None:
        self.file = run / "metrics.jsonl"
        self.results_file = run / "results.jsonl"
        self.peak = peak
        self.loggers = loggers
        if rank() == 0:
            forget_after(self.file, step)
            forget_after(self.results_file, step)
        self.totals = {task: Counter(amounts) for task, amounts in totals.items()}
        self._reset()

    def _reset(self) -> None:
        self.costs: list[Cost] = []
        self.digest = 0
        self.steps: Counter[str] = Counter()  # by task
        self.loss_sums: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by task and name of the loss
        self.passes: Counter[str] = Counter()  # by modality
        self.usage_sums: dict[str, list[Tensor]] = {}  # by modality: per sparse layer, load, gate and dropped

    def add(self, task: str, losses: Losses, cost: Cost, digest: int) -> None:
        """Adds one step; `digest` is the sum of its examples' digests on this rank."""
        self.costs.append(cost)
        self.digest += digest
        self.steps[task] += 1
        totals = self.totals.setdefault(task, Counter())
        totals.update(steps=1, examples=cost.examples, tokens=cost.tokens, flops=cost.flops)
        # Sums stay on the device, because reading a value from a GPU would wait for the step to finish.
        loss_sums = self.loss_sums[task]
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            loss_sums[name] = loss_sums.get(name, 0) + value
        for modality, layers in losses.usage.items():
            if not layers:
                continue
            self.passes[modality] += 1
            usages = [torch.cat([layer.load_E, layer.gate_E, layer.dropped[None]]) for layer in layers]
            if modality in self.usage_sums:
                usages = [total + usage for total, usage in zip(self.usage_sums[modality], usages)]
            self.usage_sums[modality] = usages

    def write(self, step: int, lr: float, grad_norm: float, speed: dict[str, Any]) -> dict[str, Any]:
        """Writes and returns the line for the steps up to `step`; `speed` is `StepTimer.record()`."""
        tasks = {}
        for task, loss_sums in self.loss_sums.items():
            means = {name: float(all_reduce_mean(total)) / self.steps[task] for name, total in loss_sums.items()}
            tasks[task] = {"steps": self.steps[task], **means}
        possible_flops = self.peak * world_size() * speed["seconds"]
        model_flops = sum(cost.model_flops for cost in self.costs)
        hardware_flops = sum(cost.hardware_flops for cost in self.costs)
        utilization = {"mfu": model_flops / possible_flops}
        if hardware_flops > model_flops:
            utilization["hfu"] = hardware_flops / possible_flops
        line = {
            "step": step,
            "lr": lr,
            "grad_norm": grad_norm,
            "examples_per_s": sum(cost.examples for cost in self.costs) / speed["seconds"],
            "tokens_per_s": sum(cost.tokens for cost in self.costs) / speed["seconds"],
            **utilization,
            **speed,
            "samples": f"{sum(all_gather_object(self.digest)) % DIGEST_MODULUS:012x}",
            "tasks": tasks,
            "experts": {modality: self._mean_usage(modality) for modality in self.usage_sums},
            "totals": {task: dict(amounts) for task, amounts in self.totals.items()},
        }
        self._reset()
        if rank() == 0:
            append(self.file, line)
        for logger in self.loggers:
            logger.log(_scalars(line), step)
        return line

    def _mean_usage(self, modality: str) -> list[dict[str, Any]]:
        """How each sparse layer used its experts, averaged over the passes of a modality on all ranks."""
        layers = []
        for usage_sum in self.usage_sums[modality]:
            *shares, dropped = (all_reduce_mean(usage_sum) / self.passes[modality]).tolist()
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
