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

        self.file, self.peak = run / "metrics.jsonl", peak
        self.board: SummaryWriter | None = None
        if rank() == 0:
            forget_after(self.file, step)
            forget_after(run / "results.jsonl", step)
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.totals = {task: Counter(units) for task, units in (totals or {}).items()}
        self._reset()

    def _reset(self) -> None:
        self.examples = self.tokens = self.digest = self.model_flops = self.hardware_flops = 0
        self.steps: Counter[str] = Counter()
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.routing: dict[str, list[Tensor]] = {}
        self.passes: Counter[str] = Counter()

    def add(self, task: str, losses: Losses, cost: Cost, digest: int = 0) -> None:
        """Adds one step; `digest` is the sum of its examples' digests on this rank."""
        self.digest += digest
        self.examples += cost.examples
        self.tokens += cost.tokens
        self.model_flops += cost.model_flops
        self.hardware_flops += cost.hardware_flops
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
        tasks = {
            task: {
                "steps": self.steps[task],
                **{name: float(all_reduce_mean(x)) / self.steps[task] for name, x in sums.items()},
            }
            for task, sums in self.sums.items()
        }
        experts = {name: [self._layer(name, layer) for layer in layers] for name, layers in self.routing.items()}
        peak = self.peak * world_size() * speed["seconds"]
        utilization = {"mfu": self.model_flops / peak}
        if self.hardware_flops > self.model_flops:
            utilization["hfu"] = self.hardware_flops / peak
        line = {
            "step": step,
            "lr": lr,
            "grad_norm": grad_norm,
            "examples_per_s": self.examples / speed["seconds"],
            "tokens_per_s": self.tokens / speed["seconds"],
            **utilization,
            **speed,
            "samples": f"{sum(all_gather_object(self.digest)) % DIGESTS:012x}",
            "tasks": tasks,
            "experts": experts,
            "totals": {task: dict(units) for task, units in self.totals.items()},
        }
        self._reset()
        if self.board is None:
            return line
        append(self.file, line)
        speeds = ("examples_per_s", "tokens_per_s", *utilization, "data_wait", "step_p50", "step_p95")
        for key in ("lr", "grad_norm", *speeds):
            self.board.add_scalar(key, line[key], step)
        for task, share in line["waits"].items():
            self.board.add_scalar(f"data_wait/{task}", share, step)
        for task, means in tasks.items():
            for name, value in means.items():
                self.board.add_scalar(f"{name}/{task}", value, step)
        for modality, layers in experts.items():
            for i, layer in enumerate(layers):
                self.board.add_scalar(f"dropped_tokens/{modality}/sparse{i}", layer["dropped"], step)
                for e, gate in enumerate(layer["gate"]):
                    self.board.add_scalar(f"expert_gate/{modality}/sparse{i}/expert{e}", gate, step)
        return line

    def _layer(self, modality: str, layer: Tensor) -> dict[str, Any]:
        *shares, dropped = (all_reduce_mean(layer) / self.passes[modality]).tolist()
        half = len(shares) // 2
        return {"load": shares[:half], "gate": shares[half:], "dropped": dropped}

    def results(self, run: Path, results: list[dict[str, Any]]) -> None:
        """Writes evaluation results, on rank 0, and removes older ones of the same step."""
        assert self.board is not None
        replace_after(run / "results.jsonl", max(result["step"] for result in results) - 1, results)
        for result in results:
            for key in ("r1", "r5", "mrr", "top1", "map"):
                if key in result:
                    self.board.add_scalar(f"{key}/{result['set']}/{result['task']}", result[key], result["step"] or 0)
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
