"""How fast a run goes: the time of a step, how much of it is waiting for data, and which process is behind the others.

Shape suffixes: R processes, S steps of a line of metrics.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from socket import gethostname
from typing import Any

import torch
from torch import Tensor, nn

from openimp.common.modality import Modality
from openimp.data.step_batches import LoadedBatch
from openimp.model.encoder import Attention
from openimp.parallel.distributed import everywhere, told_to_all, world
from openimp.planning.ledger import short
from openimp.recipe.schema import Recipe

NOTABLE = 0.1
"""The share of the time that waits for data from which on it is told what could be done, and how much slower than the
median a process must be to be named."""
SPANS = 2000
"""Forward passes that are remembered between two lines: enough for a mean, and no more of a GPU's events than that."""


class Pace:
    """Times the steps between two lines of metrics. A step lasts from asking for its batch to the end of its update;
    evaluations and checkpoints are not part of it.

    Every process has the same step time where all work together, for whoever is done sooner waits in the next exchange.
    So two things are timed that each does by itself: waiting for its own part of a batch, and the forward pass of the
    attention layers, within which nothing is exchanged and whose work is the same everywhere.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.clock = _Clock([m for m in model.modules() if isinstance(m, Attention)], device) if world() > 1 else None
        self.hosts = told_to_all([gethostname()])
        self.lines, self.warned, self.rare = 0, False, False
        self._reset()

    def _reset(self) -> None:
        self.since = time.perf_counter()
        self.tasks: list[str] = []
        self.steps: list[float] = []
        self.waits: list[float] = []

    def batches(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Passes the batches on, and notes when each is asked for and when it is there."""
        self.asked = time.perf_counter()
        for loaded in batches:
            self.waits.append(time.perf_counter() - self.asked)
            yield loaded
            self.asked = time.perf_counter()

    def step(self, task: str) -> None:
        """The end of a step."""
        self.tasks.append(task)
        self.steps.append(time.perf_counter() - self.asked)

    def line(self) -> dict[str, Any]:
        """The figures of all processes' steps since the last line; asked for by all of them.

        A step waits for the process whose batch comes last, so that is its wait.
        """
        seconds = time.perf_counter() - self.since
        own = [*self.steps, *self.waits, self.clock.seconds() if self.clock else 1]
        (told,) = everywhere(torch.tensor([own], dtype=torch.float64))
        steps_RS, waits_RS, computing_R1 = told.split([len(self.steps), len(self.waits), 1], dim=1)
        waits_S = waits_RS.amax(0)
        waits = dict.fromkeys(self.tasks, 0.0)
        for task, wait in zip(self.tasks, waits_S.tolist()):
            waits[task] += wait / seconds
        p50, p95 = steps_RS.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        figures: dict[str, Any] = {"seconds": seconds, "step_p50": p50, "step_p95": p95}
        figures |= {"data_wait": sum(waits.values()), "waits": waits}
        if self.clock:
            rank, slower, by = slowest(steps_RS, waits_RS, computing_R1[:, 0])
            figures["slowest"] = {"rank": rank, "host": self.hosts[rank], "slower": slower, "by": by}
        self.rare = bool(waits_S.median() < waits_S.mean() / 10)
        self.lines += 1
        self._reset()
        return figures

    def warning(self, line: Mapping[str, Any], recipe: Recipe, modalities: Mapping[str, Modality]) -> str | None:
        """What could be done if data is waited for too long: once, and not at the first line, when workers start."""
        if self.warned or self.lines == 1 or line["data_wait"] <= NOTABLE:
            return None
        self.warned = True
        name = max(line["waits"], key=line["waits"].get)
        told = f"{line['data_wait']:.0%} of the time is spent waiting for data, most of it for task {name}"
        *others, last = advice(recipe, modalities, name, self.rare)
        return f"{told}; {', '.join(others)}{' or ' if others else ''}{last}"


def slowest(steps_RS: Tensor, waits_RS: Tensor, computing_R: Tensor) -> tuple[int, float, str]:
    """The process that would take longest by itself, by how much longer than the median one (of two, the faster), and
    whether it is "data" or "compute" that it is behind with.

    By itself a process would wait for its own data only, and compute for the part of the rest of a step that its time
    for the same work is of the longest. What is exchanged between processes counts as computing there.

    Args:
        steps_RS: seconds.
        waits_RS: seconds, of them, that each waited for its own data.
        computing_R: the time that each took for the same work, in any unit.
    """
    wait_R = waits_RS.mean(1)
    compute_R = (steps_RS.mean() - waits_RS.amax(0).mean()) * computing_R / computing_R.max()
    own_R = wait_R + compute_R
    rank = int(own_R.argmax())
    # Of an even number, torch's median is the lower one of the middle two.
    by_data, by_compute = (float(part_R[rank] - part_R.median()) for part_R in (wait_R, compute_R))
    return rank, float(own_R[rank] / own_R.median()) - 1, "data" if by_data > by_compute else "compute"


def advice(recipe: Recipe, modalities: Mapping[str, Modality], name: str, rare: bool) -> list[str]:
    """What makes a task's data come sooner, the easiest first.

    Args:
        recipe: what is trained.
        modalities: its modalities.
        name: the task.
        rare: few steps wait, and those for long; batches that are made ahead bridge that.
    """
    task, workers = recipe.tasks[name], recipe.train.num_workers
    source = recipe.sources[task.source]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    media = any(not modalities[modality].reads_text for modality in task.inputs)
    found = []
    if workers < cores:
        found.append(f"raise train.num_workers (now {workers}, on {cores} cores)")
    if workers and rare:
        found.append(f"raise train.prefetch_factor (now {recipe.train.prefetch_factor})")
    if media and source.cache == "none" and not source.stream:
        found.append(f"set sources.{task.source}.cache=memory")
    if media or not found:
        found.append(f"make the views of tasks.{name} smaller")
    return found


def shown(line: Mapping[str, Any]) -> tuple[str, str]:
    """A line's pace for people, and the slowest process if it is notably slower."""
    pace = f"{line['examples_per_s']:7,.0f} examples, {short(line['tokens_per_s']):>7} tokens/s"
    pace = f"{pace}  wait {line['data_wait']:3.0%}  step {_brief(line['step_p50'])} (p95 {_brief(line['step_p95'])})"
    last = line.get("slowest")
    if last is None or last["slower"] < NOTABLE:
        return pace, ""
    return pace, f"slowest rank {last['rank']}: +{last['slower']:.0%} {last['by']}"


def _brief(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


class _Clock:
    """The time that modules took for their forward passes, by the clock of the device that computes them."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: deque[tuple[Any, Any]] = deque(maxlen=SPANS)
        self.begun: Any = None
        for module in modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *_: Any) -> None:
        self.begun = self._now()

    def _end(self, *_: Any) -> None:
        self.spans.append((self.begun, self._now()))

    def seconds(self) -> float:
        """Of the forward passes since the last call. This waits for a GPU to end the last of them."""
        if self.cuda and self.spans:
            self.spans[-1][1].synchronize()
        told = sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in self.spans)
        self.spans.clear()
        return told
