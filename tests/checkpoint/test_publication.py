"""A process that is killed at any file-system call of a save leaves a complete checkpoint, from which a run resumes.

The test starts this very file, which saves the last step of a run again.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import openimp
from openimp.checkpoint.folder import checkpoints, verify
from openimp.training.trainer import train
from tests.processes import run as run_python
from tests.trained import recipe_of, trainer_of

CHANGES = ["train.steps=2", "train.keep_last=1", "evaluation={}", "train.loggers=[]"]
CALLS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Audit events of calls that change files, besides "open". `os.replace` is an os.rename there."""


def save_again(folder: Path, run: Path) -> None:
    """Saves a finished run once more, as after a change of its evaluation. At each call of the save that changes a
    file, a copy of this process is killed, in a copy of the run: RUN-0, RUN-1, ..."""
    number = 0
    while True:
        copy = Path(shutil.copytree(run, f"{run}-{number}"))
        trainer = trainer_of(folder, copy, *CHANGES, "evaluation.every=5", resume=True)
        child = os.fork()
        if not child:
            kill_at(number, copy / "checkpoints")
            trainer.save(wait=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        number += 1


def kill_at(number: int, checkpoints_folder: Path) -> None:
    """Kills this process before the call with this number that changes a file."""
    calls = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event == "open":
            path, _, flags = arguments
            counts = f"{path}".startswith(f"{checkpoints_folder}/") and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            counts = event in CALLS
        if counts and calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls += bool(counts)

    sys.addaudithook(audit)


@pytest.mark.slow
def test_killed_at_any_call_of_a_save_a_run_keeps_a_complete_checkpoint(little_data, tmp_path):
    run = tmp_path / "run"
    train(recipe_of(little_data, *CHANGES), run)
    run_python(__file__, little_data, run, check=True)
    killed = sorted(tmp_path.glob("run-*"), key=lambda path: int(path.name[4:]))
    seen = set()
    for left in killed:
        names = {path.name for path in (left / "checkpoints").iterdir()}
        seen |= names
        assert len(checkpoints(left)) == 1
        verify(checkpoints(left)[0])
        openimp.load(left)
        assert train(recipe_of(little_data, *CHANGES), left, resume="auto")
        trainer_of(little_data, left, *CHANGES, resume=True).log.close()
        assert [path.name for path in (left / "checkpoints").iterdir()] == ["step-00000002"]
    name = "step-00000002"
    assert seen == {name, f".{name}.tmp", f".{name}.replaced"}, "the test must reach all states of a save"
    assert len(killed) > 10


if __name__ == "__main__":
    save_again(Path(sys.argv[1]), Path(sys.argv[2]))
