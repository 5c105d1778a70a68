"""The demo recipe in 1, 2 and 4 processes of one thread each: examples a second, against one process.

    python benchmarks/scaling.py [--rounds 3] [--write]

Several processes hold the model as the recipe says, in shards, or with the experts apart. A process makes its batches
itself, so that it is one thread in all; in the last two settings each has a loader's worker besides. In one setting two
trainings run side by side that know nothing of one another, each on half of the batch: what two processes would reach
if exchanging gradients cost nothing, and each updated all of the model. The settings take turns, as many rounds as
asked for, each a short training; the first steps, which warm up, are left out. What is compared is the paired ratio of
each round, for machines are shared.
`--write` puts the table into docs/results/scaling.md.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from openimp.common.json_lines import read_lines
from openimp.common.versions import openimp_version, processor
from openimp.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 10


class Setting(NamedTuple):
    """How the recipe is trained.

    Attributes:
        processes: how many.
        changes: of the recipe, which itself says how they hold the model.
        apart: they are trainings of their own, each of its part of the batch.
        gloo: they exchange as processes of several machines do.
    """

    processes: int
    changes: tuple[str, ...] = ()
    apart: bool = False
    gloo: bool = False


WORKER = "train.num_workers=1"
SETTINGS = {
    "1": Setting(1),
    "2": Setting(2),
    "2, exchanging nothing": Setting(2, apart=True),
    "2, through gloo": Setting(2, gloo=True),
    "4": Setting(4),
    "2, in shards": Setting(2, ("parallel={shard_degree: 2}",)),
    "2, experts apart": Setting(2, ("parallel={shard_degree: 1, expert_degree: 2}",)),
    "4, in shards with experts apart": Setting(4, ("parallel={shard_degree: 4, expert_degree: 2}",)),
    "1 and a worker": Setting(1, (WORKER,)),
    "2 and a worker each": Setting(2, (WORKER,)),
}


def examples_per_s(setting: Setting, steps: int, recipe: str) -> float:
    """Of a training of some steps, without its first `LOG_EVERY`; of several apart, their sum."""
    changes = [f"train.steps={steps}", "optimizer.warmup_steps=1", f"train.log_every={LOG_EVERY}", "evaluation.sets={}",
               "train.save_every=1000000", "alternation.kind=cycle", "train.num_workers=0",
                *setting.changes]  # fmt: skip
    if setting.apart:
        for name, task in Recipe.load(recipe, []).tasks.items():
            batches = {f"tasks.{name}.batch_size": task.batch_size}
            batches |= {
                f"tasks.{name}.views.{i}.batch_size": view.batch_size
                for i, view in enumerate(task.views)
                if view.batch_size
            }
            changes += [f"{key}={batch // setting.processes}" for key, batch in batches.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.processes)]
    if setting.gloo:  # What torchrun says of processes that are not all on one machine.
        torchrun += ["--no-python", "env", "LOCAL_WORLD_SIZE=1", sys.executable]
    together = setting.processes > 1 and not setting.apart
    command = [sys.executable, *(torchrun if together else []), "-m", "openimp", "train", recipe]
    command += [part for change in changes for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run{i}" for i in range(1 if together else setting.processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        trainings = [
            subprocess.Popen([*command, "--run-dir", str(run)], env=environment, stdout=subprocess.DEVNULL)
            for run in runs
        ]
        if any([training.wait() for training in trainings]):
            sys.exit("the training failed")
        return sum(map(rate, runs))


def rate(run: Path) -> float:
    """Examples a second of a run, without its first line of metrics."""
    lines = read_lines(run / "metrics.jsonl")[1:]
    return sum(line["examples_per_s"] * line["seconds"] for line in lines) / sum(line["seconds"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument(
        "--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="SETTING", help="; ".join(SETTINGS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="into docs/results/scaling.md")
    args = parser.parse_args()
    if args.write and args.only != list(SETTINGS):
        parser.error("--write: is for the whole table; leave out --only")
    # Asked for here, and kept from now on: the checkout may move on meanwhile.
    if args.write and "-dirty" in openimp_version():
        parser.error("--write: the checkout was changed since its commit, which the page names; commit first")
    rounds = [
        [examples_per_s(SETTINGS[name], args.steps, args.recipe) for name in args.only] for _ in range(args.rounds)
    ]
    lines = [f"| processes | examples/s | against {args.only[0]} |", "|---|---:|---:|"]
    for name, rates in zip(args.only, zip(*rounds)):
        ratio = statistics.median(rate / others[0] for rate, others in zip(rates, rounds))
        lines.append(f"| {name} | {statistics.median(rates):.0f} | {ratio:.2f} |")
    table = "\n".join(lines)
    print(table)
    if args.write:
        command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
        head = (
            f"# Several processes on one machine\n\n`{command}`: the recipe {args.recipe}, {args.steps} steps, one "
            "thread a process, which makes its batches itself but for the last two rows; "
            f"medians of {args.rounds} rounds in which the settings take turns. Two that exchange nothing are "
            "trainings of half of the batch each, side by side, which share no work of the optimisers either.\n\n"
        )
        by = f"\n\n{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, openimp {openimp_version()}.\n"
        (ROOT / "docs" / "results" / "scaling.md").write_text(head + table + by, encoding="utf-8")


if __name__ == "__main__":
    main()
