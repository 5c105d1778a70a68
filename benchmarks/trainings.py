"""What benchmarks/faults.py starts, watches and compares: trainings of the tests' small recipe, in processes."""

import json
import multiprocessing
import os
import shlex
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.run

from openimp.checkpoint.folder import checkpoints, load_model, step_of
from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe
from tests import little
from tests.processes import Process, torchrun

os.environ["OMP_NUM_THREADS"] = "1"  # In the processes too.
STEPS, EVERY, BATCH = 24, 8, 8
AT = 12
"""The step after which most faults happen: in the middle between two checkpoints."""
CHANGES = [f"train.steps={STEPS}", f"train.save_every={EVERY}", "train.keep_last=3", "evaluation={}",
           f"tasks.named.views.1.batch_size={BATCH}", f"tasks.heard.batch_size={BATCH}"]  # fmt: skip
REPLICAS = ["parallel.shard_degree=1"]
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For restarts; see `parallel.distributed.start`."""
How = Literal["one", "two", "two nodes"]
"""On one rank, on two with a replica each, or on two as on two nodes, which share one replica."""
WHILE_SAVING = 2 * EVERY
"""Most steps that a fault may cost while a checkpoint is written: `EVERY` up to this checkpoint, and as many during
the writing, which ends before the next checkpoint."""


@dataclass
class Outcome:
    """What a fault came to.

    Attributes:
        fault: what was done.
        noticed: how a person hears of it; empty if nobody does.
        steps: made before the fault, and made again.
        samples: lost, or seen twice.
        same: whether the weights in the end are those of the run in peace; None where they cannot be.
        limit: most steps that it may cost.
    """

    fault: str
    noticed: str
    steps: int = 0
    samples: int = 0
    same: bool | None = None
    limit: int = EVERY

    @property
    def ok(self) -> bool:
        return bool(self.noticed) and self.steps <= self.limit and not self.samples and self.same is not False

    def row(self) -> list[str]:
        same = {True: "the same", False: "OTHERS", None: ""}[self.same]
        cells = (self.fault, self.noticed or "NOT NOTICED", self.steps, self.samples, same)
        return [str(cell).replace("|", r"\|") for cell in cells]


@dataclass
class Bench:
    """Trainings, in a folder, of the recipe in a folder of data."""

    folder: Path
    data: Path

    @classmethod
    def of_little_data(cls, folder: Path) -> "Bench":
        """With data of its own, which may be spoilt."""
        (folder / "data").mkdir()
        return cls(folder, little.write(folder / "data"))

    def streaming(self) -> "Bench":
        """With the pictures of this one in tars that are streamed."""
        (folder := self.folder / "streaming" / "data").mkdir(parents=True)
        recipe = Recipe.load(self.data / "recipe.yaml", little.write_tars(self.data, folder))
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        return Bench(folder.parent, folder)

    def command(self, run: Path, *options: str, changes: Iterable[str] = ()) -> list[str]:
        sets = [part for change in (*CHANGES, *changes) for part in ("--set", change)]
        return ["train", str(self.data / "recipe.yaml"), "--run-dir", str(run), *sets, *options]

    def start(self, run: Path, *options: str, changes: Iterable[str] = (), **environment: str) -> Process:
        return Process("-m", "openimp", *self.command(run, *options, changes=changes), merge=True, **environment)

    def start_two(self, run: Path, *options: str, nodes: bool = False) -> list[Process]:
        """Two ranks, started without torchrun. They have a replica each, or share one as on two nodes."""
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        changes = [] if nodes else REPLICAS
        return [
            self.start(run, *options, changes=changes, **group, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(2)
        ]

    def torchrun(self, run: Path, *options: str, restarts: int = 0, forked: bool = True) -> Process:
        """Two ranks with a replica each."""
        command = torchrun(2, *self.command(run, *options, changes=REPLICAS), restarts=restarts, forked=forked)
        return Process(*command, merge=True, **NEW_STORE)

    def two_nodes(self, run: Path) -> Process:
        """Two torchruns with a rank each, as on two nodes. They are the children of the returned process."""
        node = torchrun(1, *self.command(run, "--resume", "auto"), restarts=1, nodes=f"localhost:{free_port()}")
        return Process("-m", "benchmarks.trainings", *node[2:], merge=True, **NEW_STORE)

    def started(self, how: How, run: Path, *options: str) -> list[Process]:
        return [self.start(run, *options)] if how == "one" else self.start_two(run, *options, nodes=how == "two nodes")

    def whole(self, how: How = "one") -> Path:
        """A run in peace, made when it is asked for."""
        run = self.folder / f"whole {how}"
        if not run.exists():
            for process in self.started(how, run):
                finished(process, watch(process))
        return run

    def copy(self, name: str) -> Path:
        """A copy of the run in peace, to be spoilt."""
        return Path(shutil.copytree(self.whole(), self.folder / name))

    def outcome_of_resuming(
        self, fault: str, run: Path, noticed: str, reached: int | None = None, how: How = "one"
    ) -> Outcome:
        """What became of a run that goes on with --resume.

        Args:
            fault, noticed: see `Outcome`.
            run: where it ended.
            reached: how many steps it had made; left out, those of its metrics.
            how: it goes on.
        """
        reached = read_lines(run / "metrics.jsonl")[-1]["step"] if reached is None else reached
        # If the next checkpoint was due, it was being written: the fault costs the steps that it would have kept, too.
        was_saving = step_of(checkpoints(run)[-1]) + EVERY <= reached
        lines = [finished(process, watch(process)) for process in self.started(how, run, "--resume")]
        outcome = self.compared(fault, run, noticed, reached - steps_of(lines[0])[0] + 1, how)
        return replace(outcome, limit=WHILE_SAVING if was_saving else EVERY)

    def compared(self, fault: str, run: Path, noticed: str, steps: int, how: How = "one") -> Outcome:
        """What became of a run that has come to its end."""
        whole = self.whole(how)
        weights, others = (load_model(checkpoints(path)[-1])[0].state_dict() for path in (run, whole))
        same = all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
        ours, theirs = made(run), made(whole)
        differ = (ours - theirs) + (theirs - ours)
        return Outcome(fault, noticed, steps, BATCH * differ.total(), same)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def watch(
    process: Process, harm: Callable[[Process], Any] | None = None, at: int = AT, saved: Path | None = None
) -> list[str]:
    """All lines that a process prints until it ends; after that of step `at`, harm is done, if need be a few steps
    later, when the run `saved` has a checkpoint: it is written beside the steps."""
    assert process.stdout is not None
    lines, reached = [], False
    for line in process.stdout:
        lines.append(line.rstrip())
        reached = reached or line.startswith(f"step {at}/")
        if harm and reached and (saved is None or checkpoints(saved)):
            harm(process)
            harm = None
    process.wait()
    return lines


def finished(process: Process, lines: list[str]) -> list[str]:
    if process.returncode:
        raise RuntimeError(f"{shlex.join(map(str, process.args))}: exit code {process.returncode}: {lines[-9:]}")
    return lines


def steps_of(lines: list[str]) -> list[int]:
    """The steps that were printed, in order."""
    return [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]


def made(run: Path) -> Counter[str]:
    """The steps of a run: number, names of the examples, losses."""
    lines = read_lines(run / "metrics.jsonl")
    return Counter(json.dumps([line["step"], line["samples"], line["tasks"]]) for line in lines)


def told(process: Process, lines: list[str], part: str, code: int = 2) -> str:
    """The line with this part, and the exit code; nothing if either is another one, or there is a traceback."""
    found = [line for line in lines if part in line]
    if process.returncode != code or not found or any("Traceback" in line for line in lines):
        print("\n".join(lines[-20:]), f"exit code {process.returncode}", sep="\n", file=sys.stderr)
        return ""
    return f"exit code {code}: {found[-1].removeprefix('openimp: ')}"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def most_memory(process: Process) -> int:
    """Bytes that a process has held at most so far."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    nodes = [multiprocessing.Process(target=torch.distributed.run.main, args=(sys.argv[1:],)) for _ in range(2)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join()
    sys.exit(any(node.exitcode for node in nodes))
