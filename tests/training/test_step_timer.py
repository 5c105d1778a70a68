"""The reported speed of a training run: step times, the wait for data, and advice against it."""

import time

import PIL.Image
import pytest

import openimp
from openimp.common.json_lines import read_lines
from openimp.training.step_timer import StepTimer, speed_text
from tests.trained import recipe_of


def test_waiting_for_data_is_told_once_with_what_could_be_done(own_data, tmp_path, capsys):
    """Of large pictures, decoded by the process that trains; not at the first line, when workers would start."""
    for i, file in enumerate(sorted((own_data / "pictures").rglob("*.png"))):
        PIL.Image.new("RGB", (900 + i, 900), (i, 9 * i, 90)).save(file)
    changes = ["evaluation={}", "train.log_every=4", "train.save_every=100"]
    openimp.train(recipe_of(own_data, *changes), tmp_path / "run")
    *_, first, second, warning, third = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"step {4 * i}/12") for i, line in enumerate((first, second, third), 1))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    waits = lines[1]["waits"]
    slowest_task = max(waits, key=waits.get)
    assert warning == (
        f"{lines[1]['data_wait']:.0%} of the time is spent waiting for data, most of it for task {slowest_task}; "
        "more train.num_workers, a source's cache or smaller views may help"
    )
    assert all(line["step_p50"] <= line["step_p95"] < line["seconds"] for line in lines)
    assert lines[1]["data_wait"] == pytest.approx(sum(waits.values()))


def test_a_line_is_short():
    record = dict(
        examples_per_s=1234.5, tokens_per_s=1_234_567, mfu=0.14, data_wait=0.014, step_p50=0.0421, step_p95=1.3
    )
    assert speed_text(record) == "  1,234 examples,  1.23 M tokens/s  MFU 14%  wait  1%  step 42.1 ms (p95 1.30 s)"


def test_an_evaluation_does_not_count_as_time_of_the_steps():
    timer = StepTimer()
    start = time.perf_counter()
    for _ in timer.timed([None]):
        timer.end_step("task")
    with timer.paused():
        evaluation_end = time.perf_counter() + 20 * (time.perf_counter() - start)
        while time.perf_counter() < evaluation_end:
            pass
    whole = time.perf_counter() - start
    assert timer.record()["seconds"] < whole / 2
