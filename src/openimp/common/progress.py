"""Console output: progress bars in a terminal, plain lines otherwise."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, redirect_stderr
from io import TextIOBase
from threading import RLock, Timer
from typing import Any, TextIO, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from openimp.common.errors import printable

T = TypeVar("T")
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable, `progress(iterable, description)`, to show its progress or to stop it by an error; see `track`."""
PLAIN_WIDTH = 110
PLAIN_SECONDS = 60
"""Time between two lines of progress without a terminal."""
LONG_SECONDS = 10
"""Time after which a line says that a library is still at work, because its own progress bars are hidden."""

library_log = logging.getLogger("openimp.libraries")
"""What other libraries print, warn of and log while `quiet_libraries` is active, with the level INFO."""
_QUIET = RLock()
"""Held while standard error is replaced."""


class _Console(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Removes control characters that do not come from rich, for example from names of classes or files."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)

    def on_broken_pipe(self) -> None:
        """Continues without output if the reader of a pipe exits, as `head` does, so that the run continues."""
        self.quiet = True
        # Otherwise the interpreter reports an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, markup=False, emoji=False)
"""Standard output."""
if not console.is_terminal:
    console.width = PLAIN_WIDTH


def notice(message: str) -> None:
    """Prints lines for the user to standard error, so that they are not among the results on standard output."""
    stream = sys.stderr
    while isinstance(stream, _KeptText):
        stream = stream.terminal
    print(printable(message), file=stream)


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields items while a bar shows the time left. Without a terminal, prints a line every minute and at the end."""
    total = len(items) if isinstance(items, Sized) else None
    if not console.is_terminal:
        start = time.perf_counter()
        last_line = start
        count = 0
        for count, item in enumerate(items, 1):
            yield item
            now = time.perf_counter()
            if now - last_line >= PLAIN_SECONDS and count != total:
                last_line = now
                of_total = f"/{total}" if total else ""
                console.print(f"{description}: {count}{of_total} in {clock(now - start)}")
        console.print(f"{description}: {count} in {time.perf_counter() - start:.1f} s")
        return
    with ProgressBar(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        yield from bar.track(items, total=total, description=description)


class StepBar(ProgressBar):
    """Progress of a training run: steps, time left, and below them the losses and throughput of the last record."""

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.first_step = done
        self.start_time = time.perf_counter()
        self.note = ""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self.task = self.add_task("train", total=total, completed=done)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)

    def step(self, done: int) -> None:
        self.update(self.task, completed=done)

    def track_evaluation(self, rows: Iterable[T], description: str) -> Iterator[T]:
        """Yields the rows while a bar below the bar of the steps shows their progress."""
        bar = self.add_task(f"evaluate {description}", total=len(rows) if isinstance(rows, Sized) else None)
        try:
            for row in rows:
                yield row
                self.advance(bar)
        finally:
            self.remove_task(bar)

    def report(self, done: int, losses: Mapping[str, float], speed: str, paused_seconds: float = 0.0) -> None:
        """Shows a line of metrics below the bar, or prints it if there is no terminal.

        `paused_seconds`, as of evaluations, do not tell how long the remaining steps take.
        """
        note = "  ".join([*(f"{name} {loss:.3f}" for name, loss in losses.items()), speed])
        if console.is_terminal:
            self.note = note
            return
        elapsed = time.perf_counter() - self.start_time
        seconds_per_step = (elapsed - paused_seconds) / max(1, done - self.first_step)
        expected = elapsed + seconds_per_step * (self.total - done)
        step = f"step {done}/{self.total}".ljust(len(f"step {self.total}/{self.total}"))
        console.print(f"{step}  {note}  {clock(elapsed)} of {clock(expected)}", soft_wrap=True)


def number_table(
    title: str, head: Iterable[str], rows: Iterable[Iterable[str]], below: Iterable[Iterable[str]] = ()
) -> Table:
    """A table whose columns are aligned to the right, except for the first. `below` are rows under a line."""
    table = Table(*head, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for row in below:
        table.add_row(*row)
    return table


def clock(seconds: float) -> str:
    """Seconds as 4:07 or 1:04:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def no_log_output(level: int = logging.WARNING) -> Iterator[None]:
    """Hides what libraries log up to a level, for example of weights that are not loaded on purpose."""
    disabled_level = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(disabled_level)


class _KeptText(TextIOBase):
    """Standard error that keeps what is written. When it is closed, it writes to the terminal again.

    Because a library may keep it for ever, as the handler of its logger.
    """

    def __init__(self, terminal: Any) -> None:
        self.terminal = terminal
        self.kept: list[str] | None = []

    def write(self, text: str) -> int:
        if self.kept is None:
            return self._current().write(text)
        self.kept.append(text)
        return len(text)

    def flush(self) -> None:
        if self.kept is None:
            self._current().flush()

    def end(self) -> list[str]:
        """The lines that were written, without blank ones. Of a progress bar, the last state."""
        lines = "".join(self.kept or ()).split("\n")
        self.kept = None
        return [last for line in lines if (last := line.rstrip().rpartition("\r")[2])]

    def _current(self) -> TextIO:
        return self.terminal if sys.stderr is self else sys.stderr


@contextmanager
def quiet_libraries(model: str) -> Iterator[None]:
    """Sends what libraries show on standard error while they open a model to `library_log`: progress bars, warnings
    and log records.

    Errors that they log are still shown, and what they raise is raised. A handler of the root logger is the caller's
    choice, so it stays as it is. If the block takes long, a line with the model's name says so.
    """
    records: list[logging.LogRecord] = []

    def shows(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            records.append(record)
        return record.levelno >= logging.ERROR

    timer = Timer(LONG_SECONDS, notice, [f"{model}: still opening or downloading"])
    timer.daemon = True
    with _QUIET:
        text = _KeptText(sys.stderr)
        own_root_handler = None if logging.root.handlers else logging.StreamHandler()  # Instead of `lastResort`.
        if own_root_handler:
            logging.root.addHandler(own_root_handler)
        handlers = [*filter(None, [own_root_handler]), *_terminal_handlers()]
        for handler in handlers:
            handler.addFilter(shows)
        timer.start()
        try:
            with redirect_stderr(text):
                yield
        finally:
            timer.cancel()
            for handler in handlers:
                handler.removeFilter(shows)
            if own_root_handler:
                logging.root.removeHandler(own_root_handler)
            for record in records:
                arguments = record.args if isinstance(record.args, tuple) else (record.args,)
                library_log.info(f"{record.name}: {record.msg}", *arguments)
            for line in text.end():
                library_log.info("%s", line)


def _terminal_handlers() -> list[logging.Handler]:
    """The handlers with which libraries show log records of their own loggers on the terminal."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    return [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
