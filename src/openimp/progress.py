"""What a person sees: bars where there is a terminal, plain lines where there is none."""

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(highlight=False)
"""Standard output."""
PLAIN_WIDTH = 110
if not console.is_terminal:
    console = Console(highlight=False, width=PLAIN_WIDTH)


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Passes the items on, under a bar with the time left; without a terminal, one line at the end."""
    total = len(items) if isinstance(items, Sized) else None
    if not console.is_terminal:
        start, count = time.perf_counter(), 0
        for count, item in enumerate(items, 1):  # noqa: B007 (the count is for the line below)
            yield item
        console.print(f"{description}: {count} in {time.perf_counter() - start:.1f} s")
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        yield from bar.track(items, total=total, description=description)


class StepBar:
    """The progress of training: steps, loss by task, examples a second, data wait, time left."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.first, self.start = total, done, time.perf_counter()
        self.bar = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=total, completed=done, note="")

    def __enter__(self) -> "StepBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, done: int) -> None:
        self.bar.update(self.task, completed=done)

    def report(self, done: int, losses: dict[str, float], rate: float, wait: float) -> None:
        """A line of figures: on the bar, or on a line of its own."""
        note = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        note = f"{note}  {rate:.0f} examples/s  wait {wait:.1%}"
        if console.is_terminal:
            self.bar.update(self.task, note=note)
            return
        spent = time.perf_counter() - self.start
        left = spent / max(1, done - self.first) * (self.total - done)
        console.print(f"step {done}/{self.total}  {note}  {clock(spent)} spent, {clock(left)} left", soft_wrap=True)


def clock(seconds: float) -> str:
    """Seconds as 4:07 or 1:04:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
