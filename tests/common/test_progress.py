"""Progress in a terminal, and without one, as in the log of a job."""

import io
import subprocess
import sys
import time

from openimp.common import progress
from openimp.training.step_timer import StepTimer


def test_without_a_terminal_long_work_prints_lines_before_its_end(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.05)
    for _ in progress.track(range(3), "embed image"):
        time.sleep(0.06)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"embed image: {count}" for count in ("1/3", "2/3", "3")]


def test_an_evaluation_has_a_bar_below_that_of_the_steps(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", progress._Console(file=screen, force_terminal=True, width=100))
    with progress.StepBar(total=8, done=2) as bar:
        for row in bar.track_evaluation(range(5), "image"):
            if row == 3:
                bar.refresh()
    assert "train" in screen.getvalue()
    assert "2/8" in screen.getvalue()
    assert "evaluate image" in screen.getvalue()
    assert "3/5" in screen.getvalue()
    assert [task.description for task in bar.tasks] == ["train"]


def test_the_time_of_evaluations_does_not_make_the_remaining_steps_longer(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    bar = progress.StepBar(total=100, done=0)
    timer = StepTimer()
    with timer.paused():
        now += 90
    now += 10
    bar.report(10, {}, "", timer.paused_seconds)
    assert capsys.readouterr().out.rstrip().endswith("1:40 of 3:10")


NOISE = """
import logging, sys, warnings
from openimp.common.progress import library_log, notice, quiet_libraries

shown = logging.StreamHandler()  # As transformers has one, whose stream is standard error when it is imported.
logging.getLogger("before").addHandler(shown)
logging.getLogger("before").propagate = False
lines = []
kept = logging.Handler()
kept.emit = lambda record: lines.append(record.getMessage())
library_log.addHandler(kept)
library_log.setLevel(logging.INFO)

with quiet_libraries("model"):
    sys.stderr.write("loading 1\\rloading 2\\n")
    warnings.warn("old")
    logging.warning("root")  # Would configure the root logger, for ever.
    logging.getLogger("plain").warning("of %s", "plain")
    logging.getLogger("before").warning("of before")
    logging.getLogger("before").error("error of before")
    logging.getLogger("plain").error("error of plain")
    logging.getLogger("during").addHandler(logging.StreamHandler())
    logging.getLogger("during").propagate = False
    logging.getLogger("during").warning("of during")
    notice("ours")
assert not logging.root.handlers
logging.getLogger("before").warning("later of before")
logging.getLogger("during").warning("later of during")
try:
    with quiet_libraries("model"):
        print("before it fails", file=sys.stderr)
        raise ValueError("fails")
except ValueError as error:
    notice(str(error))
print("\\n".join(lines))
"""


def test_what_libraries_show_goes_to_the_log_and_errors_and_own_lines_to_the_terminal():
    run = subprocess.run([sys.executable, "-c", NOISE], capture_output=True, text=True, check=True)
    shown = ["error of before", "error of plain", "ours", "later of before", "later of during", "fails"]
    assert run.stderr.splitlines() == shown
    logged = run.stdout.splitlines()
    (warning,) = [line for line in logged if "UserWarning: old" in line]
    logged.remove(warning)
    assert [line for line in logged if "warnings.warn" not in line] == [
        "root: root",
        "plain: of plain",
        "before: of before",
        "loading 2",
        "of during",
        "before it fails",
    ]


def test_a_library_that_takes_long_is_named(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LONG_SECONDS", 0)
    with progress.quiet_libraries("timm:large"):
        deadline = time.monotonic() + 10
        while "timm:large: still opening or downloading" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
