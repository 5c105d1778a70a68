"""Aggregates metrics over steps and ranks, and writes metrics.jsonl, results.jsonl and TensorBoard files."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openimp.common.json_lines import append, forget_after, replace_after
from openimp.objectives.losses import Losses
from openimp.parallel.distributed import all_gather_object, all_reduce_mean, rank, world_size
from openimp.planning.ledger import Cost

DIGESTS = 2**48
"""Sums of example digests are taken modulo this, so that the sums of all ranks can be added in int64."""


class Metrics:
    """Aggregates the metrics of the steps since the last line, and writes the next line.

    Rank 0 writes. Losses and router statistics are means over all ranks. `peak` is a device's `peak_flops`.
    docs/metrics.md explains every field.
    """

    def __init__(self, run: Path, step: int, peak: float, totals: dict[str, dict[str, int]] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = run / "metrics.jsonl"
        self.results_file = run / "results.jsonl"
        self.peak = peak
        self.board: SummaryWriter | None = None
        if rank() == 0:
            forget_after(self.file, step)
            forget_after(self.results_file, step)
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.totals = {task: Counter(units) for task, units in (totals or {}).items()}
        self._reset()

    def _reset(self) -> None:
        self.costs: list[Cost] = []
        self.digest = 0
        self.steps: Counter[str] = Counter()  # by task, like the sums of its losses
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.passes: Counter[str] = Counter()  # by modality, like the sums of how its layers use their experts
        self.routing: dict[str, list[Tensor]] = {}

    def add(self, task: str, losses: Losses, cost: Cost, digest: int) -> None:
        """Adds one step; `digest` is the sum of its examples' digests on this rank."""
        self.costs.append(cost)
        self.digest += digest
        self.steps[task] += 1
        totals = self.totals.setdefault(task, Counter())
        totals.update(steps=1, examples=cost.examples, tokens=cost.tokens, flops=cost.flops)
        # Sums stay on the device, because reading a value from a GPU would wait for the step to finish.
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            self.sums[task][name] = self.sums[task].get(name, 0) + value
        for modality, layers in losses.usage.items():
            if layers:
                stats = [torch.cat([usage.load_E, usage.gate_E, usage.dropped[None]]) for usage in layers]
                before = self.routing.get(modality)
                self.routing[modality] = stats if before is None else [a + b for a, b in zip(before, stats)]
                self.passes[modality] += 1

    def write(self, step: int, lr: float, grad_norm: float, speed: dict[str, Any]) -> dict[str, Any]:
        """Writes and returns the line for the steps up to `step`; `speed` is `StepTimer.record()`."""
        tasks: dict[str, dict[str, float]] = {}
        for task, sums in self.sums.items():
            means = {name: float(all_reduce_mean(total)) / self.steps[task] for name, total in sums.items()}
            tasks[task] = {"steps": self.steps[task], **means}
        peak = self.peak * world_size() * speed["seconds"]
        model_flops = sum(cost.model_flops for cost in self.costs)
        hardware_flops = sum(cost.hardware_flops for cost in self.costs)
        utilization = {"mfu": model_flops / peak}
        if hardware_flops > model_flops:
            utilization["hfu"] = hardware_flops / peak
        line = {
            "step": step,
            "lr": lr,
            "grad_norm": grad_norm,
            "examples_per_s": sum(cost.examples for cost in self.costs) / speed["seconds"],
            "tokens_per_s": sum(cost.tokens for cost in self.costs) / speed["seconds"],
            **utilization,
            **speed,
            "samples": f"{sum(all_gather_object(self.digest)) % DIGESTS:012x}",
            "tasks": tasks,
            "experts": {
                modality: [self._layer(modality, stats) for stats in layers]
                for modality, layers in self.routing.items()
            },
            "totals": {task: dict(units) for task, units in self.totals.items()},
        }
        self._reset()
        if self.board is not None:
            append(self.file, line)
            for name, value in _scalars(line).items():
                self.board.add_scalar(name, value, step)
        return line

    def _layer(self, modality: str, stats: Tensor) -> dict[str, Any]:
        *shares, dropped = (all_reduce_mean(stats) / self.passes[modality]).tolist()
        experts = len(shares) // 2
        return {"load": shares[:experts], "gate": shares[experts:], "dropped": dropped}

    def write_results(self, results: list[dict[str, Any]]) -> None:
        """Writes evaluation results, on rank 0, and removes older ones of the same step."""
        assert self.board is not None
        replace_after(self.results_file, max(result["step"] for result in results) - 1, results)
        for result in results:
            for key in ("r1", "r5", "mrr", "top1", "map"):
                if key in result:
                    self.board.add_scalar(f"{key}/{result['set']}/{result['task']}", result[key], result["step"] or 0)
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a line that TensorBoard shows, by name."""
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
