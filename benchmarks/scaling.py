"""The demo recipe in 1, 2 and 4 processes of one thread each: examples a second, against one process.

    python benchmarks/scaling.py [--rounds 3] [--write]

Several processes hold the model as the recipe says, in shards, or with the experts apart. The settings take turns, as
many rounds as asked for, each a short training started by torchrun; the first steps, which warm up, are left out. What
is compared is the paired ratio of each round, for machines are shared. Every process has a loader's worker besides.
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
from openimp.versions import openimp_version, processor

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY = 10
SETTINGS = {
    "1": (1, []),
    "2": (2, []),
    "4": (4, []),
    "2, in shards": (2, ["parallel={shard: 2}"]),
    "2, experts apart": (2, ["parallel={shard: 1, experts: 2}"]),
    "4, in shards with experts apart": (4, ["parallel={shard: 4, experts: 2}"]),
}
"""Processes, and changes of the recipe, which itself says how they hold the model."""


def examples_per_s(processes: int, changes: list[str], steps: int, recipe: str) -> float:
    """Of a training of some steps, without its first `LOG_EVERY`."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        changes = [f"train.steps={steps}", "optimizer.warmup=1", f"train.log_every={LOG_EVERY}", "evaluation.sets={}",
                   "train.save_every=1000000", "alternation.kind=cycle", *changes]  # fmt: skip
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "openimp", "train", recipe,
                   "--run-dir", str(run)]  # fmt: skip
        command += [part for change in changes for part in ("--set", change)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = read_lines(run / "metrics.jsonl")[1:]
    seconds = sum(line["seconds"] for line in lines)
    return sum(line["examples_per_s"] * line["seconds"] for line in lines) / seconds


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
    rounds = [
        [examples_per_s(*SETTINGS[name], args.steps, args.recipe) for name in args.only] for _ in range(args.rounds)
    ]
    lines = ["| processes | examples/s | against one |", "|---|---:|---:|"]
    for name, rates in zip(args.only, zip(*rounds)):
        ratio = statistics.median(rate / others[0] for rate, others in zip(rates, rounds))
        lines.append(f"| {name} | {statistics.median(rates):.0f} | {ratio:.2f} |")
    table = "\n".join(lines)
    print(table)
    if args.write:
        head = (
            f"# Several processes on one machine\n\n`python benchmarks/scaling.py --write`: the recipe {args.recipe}, "
            f"{args.steps} steps, one thread a process and a loader's worker beside each; medians of {args.rounds} "
            "rounds in which the settings take turns.\n\n"
        )
        by = f"\n\n{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, openimp {openimp_version()}.\n"
        (ROOT / "docs" / "results" / "scaling.md").write_text(head + table + by, encoding="utf-8")


if __name__ == "__main__":
    main()
