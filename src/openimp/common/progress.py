"""What a person sees: bars where there is a terminal, plain lines where there is none."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from openimp.common.errors import printable

T = TypeVar("T")
PLAIN_WIDTH = 110


class _Console(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Without control characters but rich's own, whatever the names of tasks, classes and files hold."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def on_broken_pipe(self) -> None:
        """Goes on, silently: whoever read the output has left, as `head` does, but a training must not end for that."""
        self.quiet = True
        # Else the interpreter would complain at its end, of what could not be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, markup=False)
"""Standard output."""
if not console.is_terminal:
    console = _Console(highlight=False, markup=False, width=PLAIN_WIDTH)


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
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        yield from bar.track(items, total=total, description=description)


class StepBar:
    """The progress of training: steps and the time left, and the losses and the pace of the last line of metrics."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.first, self.start = total, done, time.perf_counter()
        self.bar = _Noted(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("train", total=total, completed=done)

    def __enter__(self) -> "StepBar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, done: int) -> None:
        self.bar.update(self.task, completed=done)

    def report(self, done: int, losses: Mapping[str, float], pace: str, remark: str) -> None:
        """A line of figures: below the bar, or on a line of its own."""
        note = "  ".join([*(f"{name} {loss:.3f}" for name, loss in losses.items()), pace])
        remark = f"  {remark}" if remark else ""
        if console.is_terminal:
            self.bar.note = note + remark
            return
        spent = time.perf_counter() - self.start
        whole = spent / max(1, done - self.first) * (self.total - self.first)
        place = f"step {done}/{self.total}".ljust(len(f"step {self.total}/{self.total}"))
        console.print(f"{place}  {note}  {clock(spent)} of {clock(whole)}{remark}", soft_wrap=True)


class _Noted(Progress):
    """A bar with a note below it, for which there is no room beside it."""

    note = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)


def clock(seconds: float) -> str:
    """Seconds as 4:07 or 1:04:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
