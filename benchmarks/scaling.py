"""The demo recipe in 1, 2 and 4 processes of one thread each: examples a second, against one process.

    python benchmarks/scaling.py [--rounds 3] [--write]

Several processes hold the model as the recipe says, in shards, or with the experts apart. A process makes its batches
itself, so that it is one thread in all; in the last two settings each has a loader's worker besides. In one setting two
trainings run side by side that know nothing of one another, each on half of the batch: what two processes would reach
if exchanging gradients cost nothing. The settings take turns, as many rounds as asked for, each a short training; the
first steps, which warm up, are left out. What is compared is the paired ratio of each round, for machines are shared.
`--write` puts the table into docs/results/scaling.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from openimp.metrics import read_lines
from openimp.recipe import Recipe
from openimp.versions import openimp_version, processor

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 10
WORKER = "train.workers=1"
SETTINGS = {
    "1": (1, []),
    "2": (2, []),
    "2, exchanging nothing": (2, []),
    "4": (4, []),
    "2, in shards": (2, ["parallel={shard: 2}"]),
    "2, experts apart": (2, ["parallel={shard: 1, experts: 2}"]),
    "4, in shards with experts apart": (4, ["parallel={shard: 4, experts: 2}"]),
    "1 and a worker": (1, [WORKER]),
    "2 and a worker each": (2, [WORKER]),
}
"""Processes, and changes of the recipe, which itself says how they hold the model."""


def examples_per_s(setting: str, steps: int, recipe: str) -> float:
    """Of a training of some steps, without its first `LOG_EVERY`; of two at once, their sum."""
    processes, changes = SETTINGS[setting]
    apart = setting.endswith("nothing")
    changes = [f"train.steps={steps}", "optimizer.warmup=1", f"train.log_every={LOG_EVERY}", "evaluation.sets={}",
               "train.save_every=1000000", "alternation.kind=cycle", "train.workers=0", *changes]  # fmt: skip
    if apart:
        tasks = Recipe.load(recipe, []).tasks
        changes += [f"tasks.{name}.batch={task.batch // processes}" for name, task in tasks.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 and not apart else []), "-m", "openimp", "train", recipe]
    command += [part for change in changes for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run{i}" for i in range(processes if apart else 1)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        trainings = [
            subprocess.Popen([*command, "--run-dir", str(run)], env=environment, stdout=subprocess.DEVNULL)
            for run in runs
        ]
        if any([training.wait() for training in trainings]):
            sys.exit(f"the training of {setting} failed")
        return sum(map(rate, runs))


def rate(run: Path) -> float:
    """Examples a second of a run, without its first line of metrics."""
    lines = read_lines(run / "metrics.jsonl")[1:]
    return sum(line["examples_per_s"] * line["seconds"] for line in lines) / sum(line["seconds"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument(
        "--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="the first is compared with"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--write", action="store_true", help="into docs/results/scaling.md")
    args = parser.parse_args()
    rounds = [[examples_per_s(name, args.steps, args.recipe) for name in args.only] for _ in range(args.rounds)]
    lines = ["| processes | examples/s | against one |", "|---|---:|---:|"]
    for name, rates in zip(args.only, zip(*rounds)):
        ratio = statistics.median(rate / others[0] for rate, others in zip(rates, rounds))
        lines.append(f"| {name} | {statistics.median(rates):.0f} | {ratio:.2f} |")
    table = "\n".join(lines)
    print(table)
    if args.write:
        head = (
            f"# Several processes on one machine\n\n`python benchmarks/scaling.py --write`: the recipe {args.recipe}, "
            f"{args.steps} steps, one thread a process, which makes its batches itself; medians of {args.rounds} "
            "rounds in which the settings take turns. Two that exchange nothing are trainings of half of the batch "
            "each, side by side: the most that two processes could reach.\n\n"
        )
        by = f"\n\n{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, openimp {openimp_version()}.\n"
        (ROOT / "docs" / "results" / "scaling.md").write_text(head + table + by, encoding="utf-8")


if __name__ == "__main__":
    main()
