"""Speed of a training run: the time per step, and the share of the time that is spent waiting for data.

Shape suffixes: R ranks, S steps since the last log record.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from openimp.data.loaded_batch import LoadedBatch
from openimp.parallel.distributed import all_gather
from openimp.planning.costs import short

WAIT_WARNING = 0.1
"""Share of the time spent waiting for data above which `StepTimer.warning` gives advice."""


class StepTimer:
    """Times the steps between two log records. A step lasts from the request for its batch to the end of its update."""

    def __init__(self) -> None:
        self.records = 0
        self.warned = False
        self.step_start = time.perf_counter()
        self.step_wait = 0.0
        self.paused_seconds = 0.0  # since the start of the training
        self._reset()

    def _reset(self) -> None:
        self.record_start = time.perf_counter()
        self.tasks: list[str] = []  # of each step
        self.steps: list[float] = []  # seconds of each step
        self.waits: list[float] = []  # seconds that each step waited for its batch

    def timed(self, batches: Iterable[LoadedBatch]) -> Iterator[LoadedBatch]:
        """Yields the batches, and measures the wait for each. A request for a batch starts a step."""
        self.step_start = time.perf_counter()
        for loaded in batches:
            self.step_wait = time.perf_counter() - self.step_start
            yield loaded
            self.step_start = time.perf_counter()

    def end_step(self, task: str) -> None:
        self.tasks.append(task)
        self.steps.append(time.perf_counter() - self.step_start)
        self.waits.append(self.step_wait)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block, such as an evaluation, does not count as time of the steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.record_start += seconds
            self.paused_seconds += seconds

    def record(self) -> dict[str, Any]:
        """The times since the last record in seconds, over all ranks. Every rank must call this.

        `waits` (by task) and `data_wait`, their sum, are shares of `seconds`.
        The slowest rank delays all others, so the wait of a step is the longest wait of any rank.
        """
        seconds = time.perf_counter() - self.record_start
        times = torch.tensor([self.steps + self.waits], dtype=torch.float64)
        (times_R2S,) = all_gather(times)
        steps_RS, waits_RS = times_R2S.chunk(2, dim=1)
        waits_S = waits_RS.amax(0)
        wait_shares = dict.fromkeys(self.tasks, 0.0)
        for task, wait_seconds in zip(self.tasks, waits_S.tolist()):
            wait_shares[task] += wait_seconds / seconds
        p50, p95 = steps_RS.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        self.records += 1
        self._reset()
        return {
            "seconds": seconds,
            "step_p50": p50,
            "step_p95": p95,
            "data_wait": sum(wait_shares.values()),
            "waits": wait_shares,
        }

    def warning(self, record: Mapping[str, Any]) -> str | None:
        """Advice, once, if much time is spent waiting for data. The first record, when workers start, is skipped."""
        if self.warned or self.records == 1 or record["data_wait"] <= WAIT_WARNING:
            return None
        self.warned = True
        return (
            f"{record['data_wait']:.0%} of the time is spent waiting for data, most of it for task "
            f"{max(record['waits'], key=record['waits'].get)}; more train.num_workers, a source's cache or smaller "
            "views may help"
        )


def speed_text(record: Mapping[str, Any]) -> str:
    """The speed in a record, for the progress line."""
    speed = f"{record['examples_per_s']:7,.0f} examples, {short(record['tokens_per_s']):>7} tokens/s"
    step = f"step {_brief(record['step_p50'])} (p95 {_brief(record['step_p95'])})"
    return f"{speed}  MFU {record['mfu']:3.0%}  wait {record['data_wait']:3.0%}  {step}"


def _brief(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"
