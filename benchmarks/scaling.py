"""Throughput of the recipe mixture on 1, 2 and 4 ranks of one thread each, compared with one rank.

    python -m benchmarks.scaling [--rounds 3] [--write]

The ranks have replicas, as the recipe says, or share the model in other layouts. A rank makes its batches itself, so
that it is a single thread; in the last two settings each rank has a loader's worker as well. In one setting, two
independent trainings run side by side, each on half of the batch. This is what two ranks would reach if communication
cost nothing and every rank updated the whole model. In each round every setting trains for some steps. The first steps
are a warm-up and do not count. Because machines are shared, ratios are taken within a round.
`--write` puts the table into docs/results/scaling.md.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import results_page
from openimp.common.json_lines import read_lines
from openimp.recipe.schema import Recipe

RECIPE = "mixture"
LOG_EVERY = 10


class Setting(NamedTuple):
    """How the recipe is trained.

    Attributes:
        ranks: number of ranks.
        changes: overrides of the recipe, such as another layout.
        independent: each rank is a training of its own, on its part of the batch.
    """

    ranks: int
    changes: tuple[str, ...] = ()
    independent: bool = False


WORKER = "train.num_workers=1"
SETTINGS = {
    "1": Setting(1),
    "2": Setting(2),
    "2, independent": Setting(2, independent=True),
    "4": Setting(4),
    "2, sharded": Setting(2, ("parallel={shard_degree: 2}",)),
    "2, expert parallelism": Setting(2, ("parallel={shard_degree: 1, expert_degree: 2}",)),
    "4, sharded, expert parallelism": Setting(4, ("parallel={shard_degree: 4, expert_degree: 2}",)),
    "1 and a worker": Setting(1, (WORKER,)),
    "2 and a worker each": Setting(2, (WORKER,)),
}


def examples_per_s(setting: Setting, steps: int) -> float:
    """Throughput of a training, without its first `LOG_EVERY` steps; of independent trainings, the sum."""
    changes = [f"train.steps={steps}", "optimizer.warmup_steps=1", f"train.log_every={LOG_EVERY}", "evaluation.sets={}",
               "train.save_every=1000000", "alternation.kind=cycle", "train.num_workers=0",
                *setting.changes]  # fmt: skip
    if setting.independent:
        for name, task in Recipe.load(RECIPE, []).tasks.items():
            batches = {f"tasks.{name}.batch_size": task.batch_size}
            batches |= {
                f"tasks.{name}.views.{i}.batch_size": view.batch_size
                for i, view in enumerate(task.views)
                if view.batch_size
            }
            changes += [f"{key}={batch // setting.ranks}" for key, batch in batches.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
    together = setting.ranks > 1 and not setting.independent
    command = [sys.executable, *(torchrun if together else []), "-m", "openimp", "train", RECIPE]
    command += [part for change in changes for part in ("--set", change)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"run{i}" for i in range(1 if together else setting.ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        trainings = [
            subprocess.Popen([*command, "--run-dir", str(run)], env=environment, stdout=subprocess.DEVNULL)
            for run in runs
        ]
        if any([training.wait() for training in trainings]):
            sys.exit("the training failed")
        return sum(map(rate, runs))


def rate(run: Path) -> float:
    """Examples per second of a run, without its first line of metrics."""
    lines = read_lines(run / "metrics.jsonl")[1:]
    return sum(line["examples_per_s"] * line["seconds"] for line in lines) / sum(line["seconds"] for line in lines)


def main() -> None:
    parser = results_page.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = results_page.parse(parser)
    rounds = [[examples_per_s(setting, args.steps) for setting in SETTINGS.values()] for _ in range(args.rounds)]
    rows = [["ranks", "examples/s", "against 1"]]
    for name, rates in zip(SETTINGS, zip(*rounds)):
        ratio = statistics.median(rate / others[0] for rate, others in zip(rates, rounds))
        rows.append([name, f"{statistics.median(rates):.0f}", f"{ratio:.2f}"])
    explanation = (
        f"- Trainings: the recipe {RECIPE}, {args.steps} steps, one thread per rank. A rank makes its batches itself, "
        f"except in the last two rows. The figures are medians of {args.rounds} rounds. Two independent ranks are two "
        "trainings on half of the batch each\n\n"
    )
    head = results_page.head("Several ranks on one machine", "torch")
    results_page.publish(head + explanation + results_page.table(*rows), "scaling", args.write)


if __name__ == "__main__":
    main()
