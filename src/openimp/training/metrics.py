"""What a run writes down: metrics.jsonl, TensorBoard events, and the examples that could not be read."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.safe_files import write_text
from openimp.evaluation.figures import first_figure, table
from openimp.objectives import Losses
from openimp.parallel.distributed import mean, rank, total
from openimp.planning.ledger import Cost
from openimp.recipe.file import read_text

ENOUGH = 100
"""Examples of a task after which the share of bad ones is judged."""
DIGESTS = 2**48
"""The sums of digests are taken modulo this, so that those of many processes can be added."""
LARGEST_LOG = 2**28
"""Bytes of a file of JSON lines at most, when it is read."""

NEEDED = {"set": str, "task": str, "type": str, "n": int, "candidates": int, "skipped": int}
"""Keys that every result has, beside its figures."""


class Metrics:
    """Sums up the steps between two lines of metrics, and writes the lines.

    The first process writes; losses and experts' shares are means over all processes. A line holds, for the steps since
    the last: by task the steps, the mean loss and its parts; examples and tokens a second, a name for those examples,
    and what `Pace` tells; by modality and sparse layer the experts' load, gate weight and the share of tokens that no
    expert took; and, since step 0, FLOPs, tokens and examples by task.
    """

    def __init__(self, run: Path, step: int, totals: dict[str, dict[str, int]] | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = run / "metrics.jsonl"
        self.board: SummaryWriter | None = None
        if rank() == 0:
            forget_after(self.file, step)
            forget_after(run / "results.jsonl", step)
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.totals = {task: Counter(units) for task, units in (totals or {}).items()}
        self._reset()

    def _reset(self) -> None:
        self.examples = self.tokens = self.digest = 0
        self.steps: Counter[str] = Counter()
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.routing: dict[str, list[Tensor]] = {}
        self.passes: Counter[str] = Counter()

    def add(self, task: str, losses: Losses, cost: Cost, digest: int = 0) -> None:
        """One step."""
        self.digest += digest
        self.examples += cost.examples
        self.tokens += cost.tokens
        self.steps[task] += 1
        totals = self.totals.setdefault(task, Counter())
        totals.update(steps=1, examples=cost.examples, tokens=cost.tokens, flops=cost.flops)
        # Sums stay on the device: reading a number from a GPU would wait for the step to end.
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            self.sums[task][name] = self.sums[task].get(name, 0) + value
        for modality, encoded in losses.encoded.items():
            if encoded.routing:
                told = [torch.cat([s.load_E, s.gate_E, s.dropped[None]]).detach() for s in encoded.routing]
                before = self.routing.get(modality)
                self.routing[modality] = told if before is None else [a + b for a, b in zip(before, told)]
                self.passes[modality] += 1

    def write(self, step: int, lr: float, grad_norm: float, pace: dict[str, Any]) -> dict[str, Any]:
        """Writes the line of the steps up to `step`, starts the next one, and returns it."""
        tasks = {
            task: {"steps": self.steps[task], **{name: float(mean(x)) / self.steps[task] for name, x in sums.items()}}
            for task, sums in self.sums.items()
        }
        experts = {name: [self._layer(name, layer) for layer in layers] for name, layers in self.routing.items()}
        line = {
            "step": step,
            "lr": lr,
            "grad_norm": grad_norm,
            "examples_per_s": self.examples / pace["seconds"],
            "tokens_per_s": self.tokens / pace["seconds"],
            **pace,
            "samples": f"{total(self.digest % DIGESTS) % DIGESTS:012x}",
            "tasks": tasks,
            "experts": experts,
            "totals": {task: dict(units) for task, units in self.totals.items()},
        }
        self._reset()
        if self.board is None:
            return line
        append(self.file, line)
        for key in ("lr", "grad_norm", "examples_per_s", "tokens_per_s", "data_wait", "step_p50", "step_p95"):
            self.board.add_scalar(key, line[key], step)
        for key in ("rank", "slower") if "slowest" in line else ():
            self.board.add_scalar(f"slowest/{key}", line["slowest"][key], step)
        for task, share in line["waits"].items():
            self.board.add_scalar(f"data_wait/{task}", share, step)
        for task, figures in tasks.items():
            for name, value in figures.items():
                self.board.add_scalar(f"{name}/{task}", value, step)
        for modality, layers in experts.items():
            for i, layer in enumerate(layers):
                self.board.add_scalar(f"dropped_tokens/{modality}/sparse{i}", layer["dropped"], step)
                for e, gate in enumerate(layer["gate"]):
                    self.board.add_scalar(f"expert_gate/{modality}/sparse{i}/expert{e}", gate, step)
        return line

    def _layer(self, modality: str, layer: Tensor) -> dict[str, Any]:
        *shares, dropped = (mean(layer) / self.passes[modality]).tolist()
        half = len(shares) // 2
        return {"load": shares[:half], "gate": shares[half:], "dropped": dropped}

    def results(self, run: Path, results: list[dict[str, Any]]) -> None:
        """Adds evaluation results to results.jsonl and to TensorBoard, in place of older ones of this step; in the
        first process only."""
        assert self.board is not None
        forget_after(run / "results.jsonl", max(result["step"] for result in results) - 1)
        for result in results:
            append(run / "results.jsonl", result)
            for key in ("r1", "r5", "mrr", "top1", "map"):
                if key in result:
                    self.board.add_scalar(f"{key}/{result['set']}/{result['task']}", result[key], result["step"] or 0)
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class BadExamples:
    """Counts and names the examples that could not be read, and stops the run when they are too many."""

    def __init__(self, run: Path, step: int, limit: float, state: dict[str, dict[str, int]] | None = None) -> None:
        self.file, self.limit = run / "skipped.jsonl", limit
        if rank() == 0:
            forget_after(self.file, step - 1)  # Its lines count steps from 0.
        self.state = state or {}

    def add(self, step: int, task: str, read: int, bad: list[tuple[str, str]]) -> None:
        """One step's reading, by all processes.

        Raises:
            UserError: more than the recipe's share could not be read.
        """
        counts = self.state.setdefault(task, {"read": 0, "bad": 0})
        counts["read"] += read
        counts["bad"] += len(bad)
        for where, why in bad if rank() == 0 else []:
            append(self.file, {"step": step, "task": task, "where": where, "why": why})
        if bad and counts["read"] >= ENOUGH and counts["bad"] > self.limit * counts["read"]:
            named = "; ".join(f"{where}: {why}" for where, why in bad[:3])
            raise UserError(
                f"task {task}: {counts['bad']} of {counts['read']} examples could not be read, more than train.max_bad "
                f"{self.limit:g}; among them {named}; all are named in {self.file}"
            )


def append(file: Path, line: dict[str, Any]) -> None:
    """Adds one JSON line."""
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:  # A full disk does not say where it is.
        raise OSError(error.errno, error.strerror, str(file)) from None


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole JSON lines of a file; a last one that a crash cut short is left out.

    Raises:
        UserError: a line is not a JSON object with a step, or the file is too large.
    """
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(read_text(file, LARGEST_LOG).split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError:
            raise UserError(f"{file}: line {number} is not JSON") from None
        if not isinstance(found[-1], dict) or not isinstance(found[-1].get("step", ""), int | None):
            raise UserError(f"{file}: line {number} is not an object with a step")
    return found


def read_results(file: Path) -> list[dict[str, Any]]:
    """The results in a file, with all that a table or a report of them needs.

    Raises:
        UserError: a line is not a result, or as in `read_lines`.
    """
    results = read_lines(file)
    for number, result in enumerate(results, 1):
        try:
            table([result])
            shares = [first_figure(result), result["chance"], *result["interval"]]
            whole = all(type(result[key]) is kind for key, kind in NEEDED.items()) and all(0 <= x <= 1 for x in shares)
            whole = whole and (result["type"] != "retrieval" or {"r10", "mrr"} <= result.keys())
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
            whole = False
        if not whole:
            raise UserError(f"{file}: line {number} is not a result of an evaluation")
    return results


def best_step(file: Path, name: str, steps: Collection[int]) -> int:
    """Which of these steps has the highest first figure of a set, as the mean over its tasks; the first of equals."""
    found: dict[int, list[float]] = defaultdict(list)
    for line in read_lines(file):
        if line["set"] == name and line["step"] in steps:
            found[line["step"]].append(first_figure(line))
    return max(found, key=lambda step: fmean(found[step]))


def forget_after(file: Path, step: int) -> None:
    """Forgets lines after `step`, which a run that goes on from there will write again."""
    kept = [line for line in read_lines(file) if (line["step"] or 0) <= step]
    if file.exists():
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
