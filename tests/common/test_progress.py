"""Progress in a terminal, and without one, as in the log of a job."""

import io
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
