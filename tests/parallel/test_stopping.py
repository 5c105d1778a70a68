"""Two ranks that stop, fail, and tell each other what they found, although they communicate only on logged steps."""

import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints
from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.parallel import distributed
from openimp.training.trainer import Trainer
from tests import ranks
from tests.saved import assert_equal
from tests.trained import trainer_of

pytestmark = pytest.mark.slow

CHANGES = [*ranks.COMMON, "evaluation={}", "train.steps=12", "train.log_every=5", "train.save_every=100",
           "train.keep_last=9", "alternation.kind=intervals", "train.num_workers=1", "train.prefetch_factor=1",
           "optimizer={lr: 3e-3, muon_lr: 0.01, warmup_steps: 1, ema_decay: 0.9}"]  # fmt: skip
AT = 6
"""The step, from 0, in which something happens on the last rank. It is not logged, and neither is the next."""


@pytest.fixture(scope="module")
def out(little_data, tmp_path_factory) -> Path:
    """What `compute` writes on two ranks. Three pictures cannot be read."""
    out = tmp_path_factory.mktemp("two")
    data = Path(shutil.copytree(little_data, out / "data"))
    for file in sorted((data / "pictures").rglob("*.png"))[::9]:
        file.write_bytes(b"no picture")
    ranks.on(2, compute, data, out)
    return out


def test_ranks_gather_what_they_found_on_logged_steps_only(out):
    """All other steps of a task have the same collectives: those of its passes and its update."""
    gathered = {int(step) + 1: count for step, count in ranks.facts(out)["gathered"].items()}
    assert gathered.keys() == {5, 10, 12}
    in_updates = ranks.facts(out)["in updates"]
    assert {step: task for step, (task, _) in in_updates.items()} == {
        str(step): ("named", "heard")[step % 2] for step in range(12)
    }
    assert len({json.dumps(count) for count in in_updates.values()}) == 2


def test_bad_files_of_all_ranks_are_listed_in_the_order_of_the_steps(out):
    skipped = read_lines(out / "whole" / "skipped.jsonl")
    state = json.loads((checkpoints(out / "whole")[-1] / "state.json").read_text())
    assert state["bad"] == {"named": {"read": 48, "bad": len(skipped)}, "heard": {"read": 48, "bad": 0}}
    assert len(skipped) == 6  # Of 24 pictures, which two epochs read.
    assert [line["step"] for line in skipped] == sorted(line["step"] for line in skipped)


@pytest.mark.parametrize("what", ["signal", "worker"])
def test_what_stops_one_rank_stops_all_and_costs_no_step(out, what):
    """The checkpoint has all steps before, and the resumed run equals one that was never interrupted."""
    ends = ranks.facts(out)[what]
    assert ends[0] == ends[1]
    saved, how = ends[0]
    if what == "signal":
        assert (saved, how) == (AT + 1, "stopped")
    else:
        assert saved in (AT + 1, AT + 2)  # One batch may have been loaded already.
        assert how.startswith("train.num_workers: a data worker died: ")
    whole, resumed = (out / name / "checkpoints" / "step-00000012" for name in ("whole", what))
    for kind in ("model", "ema", "optimizer"):
        assert_equal(dcp.read(resumed / kind), dcp.read(whole / kind))
    assert (resumed / "state.json").read_text() == (whole / "state.json").read_text()
    assert read_lines(out / what / "skipped.jsonl") == read_lines(out / "whole" / "skipped.jsonl")


class Collectives(TorchDispatchMode):
    """Counts collectives by step: those within updates by operator, and all others."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.step = -1
        self.within = False
        self.make_step = trainer.make_step
        self.gathered = Counter[int]()
        self.in_updates: dict[int, tuple[str, Counter[str]]] = {}
        trainer.make_step = self.counted_step  # type: ignore[method-assign]

    def counted_step(self, loaded: Any) -> Any:
        self.step = loaded.visit.step
        self.within = True
        self.in_updates[self.step] = loaded.visit.task, Counter()
        losses = self.make_step(loaded)
        self.within = False
        return losses

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func._opname.startswith(("wait", "_wrap")):
            if self.within:
                self.in_updates[self.step][1][func._opname] += 1
            else:
                self.gathered[self.step] += 1
        return func(*args, **(kwargs or {}))


def trained(folder: Path, run: Path, resume: bool = False, what: str = "") -> tuple[int, str]:
    """Trains, and returns the step at which it ended and how. On the last rank, `what` happens in a step."""
    trainer = trainer_of(folder, run, *CHANGES, resume=resume)
    make_step = trainer.make_step

    def disturbed_step(loaded: Any) -> Any:
        if loaded.visit.step == AT and distributed.rank() == 1:
            pids = {"signal": [os.getpid()], "worker": [child.pid for child in multiprocessing.active_children()]}
            for pid in pids[what]:
                os.kill(pid, signal.SIGTERM if what == "signal" else signal.SIGKILL)
        return make_step(loaded)

    if what:
        trainer.make_step = disturbed_step  # type: ignore[method-assign]
    try:
        how = "finished" if trainer.train() else "stopped"
    except UserError as error:
        how = str(error)
    return trainer.step, how


def compute(folder: Path, out: Path) -> dict[str, Any]:
    trainer = trainer_of(folder, out / "whole", *CHANGES)
    with Collectives(trainer) as collectives:
        trainer.train()
    found: dict[str, Any] = {"gathered": collectives.gathered, "in updates": collectives.in_updates}
    for what in ("signal", "worker"):
        found[what] = distributed.all_gather_object(trained(folder, out / what, what=what))
        assert trained(folder, out / what, resume=True) == (12, "finished")
    return found
