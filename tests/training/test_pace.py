"""What a run tells of its pace: step times, the wait for data and what could be done, and which process is slow.

torchrun runs this very file to train with one slow process.
"""

import os
import re
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from socket import gethostname

import PIL.Image
import pytest
import torch
from torch.overrides import TorchFunctionMode

from openimp.common.json_lines import read_lines
from openimp.modalities.image import Image
from openimp.recipe.schema import Recipe
from openimp.training.pace import advice, shown, slowest
from openimp.training.trainer import train

COMMON = ["train.precision=fp32", "tasks.heard.weight=0", "tasks.named.views.1.batch_size=8", "evaluation={}",
          "train.steps=20", "train.log_every=10", "train.num_workers=1"]  # fmt: skip
LINE = re.compile(
    r"step (\d+)/20  (?:named \d+\.\d{3}  )(?:heard \d+\.\d{3}  )? *[\d,.]+ examples, "
    r" *[\d,.]+ tokens/s  wait ([ \d]{2})%  "
    r"step [\d.]+ m?s \(p95 [\d.]+ m?s\)  \d:\d\d of \d:\d\d(?:  slowest rank (\d): \+(\d+)% (data|compute))?"
)


def burn(seconds: float) -> None:
    """Keeps a core busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Slow(TorchFunctionMode):
    """A processor that takes longer for each operation."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        burn(0.00005)
        return function(*arguments, **(options or {}))


def slow(what: str) -> AbstractContextManager:
    """Makes this process slow: in the workers that read its part of the data, or in what it computes itself."""
    if what == "compute":
        return Slow()
    transform = Image.transform

    def slowly(*arguments):
        burn(0.08)
        return transform(*arguments)

    Image.transform = slowly
    return nullcontext()


@pytest.mark.parametrize(("what", "rank"), [("data", 1), ("compute", 0)])
def test_the_slow_one_of_two_processes_is_named(little_data, tmp_path, what, rank):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, little_data, tmp_path / "run", what, str(rank)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines, told = read_lines(tmp_path / "run" / "metrics.jsonl"), LINE.findall(done.stdout)
    assert [int(step) for step, *_ in told] == [line["step"] for line in lines] == [10, 20]
    # The first line is of the time in which the workers start.
    line, (_, wait, *named) = lines[1], told[1]
    last = line["slowest"]
    assert (last["rank"], last["by"], last["host"]) == (rank, what, gethostname())
    assert last["slower"] > 0.1
    assert named == [str(rank), f"{100 * last['slower']:.0f}", what]
    assert int(wait) == round(100 * line["data_wait"])
    assert line["data_wait"] == pytest.approx(line["waits"]["named"])
    assert line["step_p50"] <= line["step_p95"] < line["seconds"]


def test_by_itself_a_process_waits_for_its_own_data_and_computes_as_fast_as_it_is():
    """Three processes, two steps of 10 s, of which 4 and 2 s are spent on waiting for the first one's data."""
    steps = torch.full((3, 2), 10.0)
    waits = torch.tensor([[4.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    # Of the other 7 s the last two would need 6/7, by themselves 7 s with their data; the first one needs 10 s.
    rank, slower, by = slowest(steps, waits, torch.tensor([0.7, 0.6, 0.6]))
    assert (rank, slower, by) == (0, pytest.approx(3 / 7), "data")
    # The last one would need 8 s, and all of the 7 s; the median one 3.5 and 3 s.
    rank, slower, by = slowest(steps, waits, torch.tensor([3.5, 3.5, 7.0]))
    assert (rank, slower, by) == (2, pytest.approx(8 / 6.5 - 1), "compute")
    assert slowest(steps, torch.ones(3, 2), torch.ones(3))[1] == 0


def test_waiting_for_data_is_told_once_with_what_could_be_done(own_data, tmp_path):
    """Of large pictures, decoded by the process that trains; not at the first line, when workers would start."""
    for i, file in enumerate(sorted((own_data / "pictures").rglob("*.png"))):
        PIL.Image.new("RGB", (900 + i, 900), (i, 9 * i, 90)).save(file)
    command = [sys.executable, "-m", "openimp", "train", own_data / "recipe.yaml", "--run", tmp_path / "run"]
    for change in ("evaluation={}", "train.log_every=4"):
        command += ["--set", change]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    *_, first, second, warning, third = done.stdout.splitlines()
    assert all(line.startswith(f"step {4 * i}/12") for i, line in enumerate((first, second, third), 1))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert warning.startswith(
        f"{lines[1]['data_wait']:.0%} of the time is spent waiting for data, most of it for task named; "
        "raise train.num_workers (now 0, on "
    )
    assert warning.endswith(" cores), set sources.pictures.cache=memory or make the views of tasks.named smaller")
    assert all(line["data_wait"] > 0.1 and "slowest" not in line for line in lines)
    assert lines[1]["data_wait"] == pytest.approx(sum(lines[1]["waits"].values()))


def test_the_advice_fits_the_recipe(little_data, streamed):
    def told(folder: Path, task: str, *changes: str, rare: bool = False) -> str:
        recipe = Recipe.load(folder / "recipe.yaml", changes)
        return " | ".join(advice(recipe, recipe.make_modalities(), task, rare))

    smaller, many = "make the views of tasks.named smaller", "train.num_workers=1000"
    assert told(little_data, "named", many) == f"set sources.pictures.cache=memory | {smaller}"
    assert told(little_data, "named", many, "sources.pictures.cache=memory") == smaller
    assert told(streamed[0], "named", many, *streamed[1]) == smaller
    ahead = told(little_data, "heard", many, "train.prefetch_factor=3", rare=True)
    assert ahead.startswith("raise train.prefetch_factor (now 3) | set sources.sounds.cache=memory | ")
    assert told(little_data, "heard", rare=True).startswith("raise train.num_workers (now 0, on ")


def test_a_line_is_short_and_names_no_process_that_is_hardly_slower():
    line = {
        "examples_per_s": 1234.5,
        "tokens_per_s": 1_234_567,
        "data_wait": 0.014,
        "step_p50": 0.0421,
        "step_p95": 1.3,
    }
    pace = "  1,234 examples,  1.23 M tokens/s  wait  1%  step 42.1 ms (p95 1.30 s)"
    assert shown(line) == (pace, "")
    for slower, remark in ((0.09, ""), (0.12, "slowest rank 11: +12% data")):
        assert shown({**line, "slowest": {"rank": 11, "host": "b", "slower": slower, "by": "data"}}) == (pace, remark)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, run, what, rank = sys.argv[1:]
    with slow(what) if os.environ["RANK"] == rank else nullcontext():
        train(Recipe.load(Path(folder) / "recipe.yaml", COMMON), Path(run))
