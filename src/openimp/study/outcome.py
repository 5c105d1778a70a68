"""The results of one arm of a study with one seed, and their scores over all arms and seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.evaluation.results import main_metric, read_results
from openimp.study.schema import Score
from openimp.training.metrics_file import read_metrics


@dataclass
class Outcome:
    """The results of one arm with one seed. FLOPs, steps, parameters and seconds are sums over the arm's models.

    Parameters and memory are measured with the first seed only.
    """

    scores: dict[str, float] = field(default_factory=dict)  # by evaluation set; see `Study.score`
    flops: int = 0
    steps: int = 0
    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0  # largest result of `peak_memory`: the models train one at a time
    versions: set[str] = field(default_factory=set)  # of openimp, which measured the scores
    cosines: dict[str, list[float]] = field(default_factory=dict)  # of gradients at each measured step, by task pair

    def add(self, run: Path, score: Score = "mrr") -> None:
        """Adds the results of a finished run, but not what `run_study` measures."""
        metrics = read_metrics(run / "metrics.jsonl")
        results = read_results(run / "results.jsonl")
        if not metrics or any((result["step"] or 0) > metrics[-1].step for result in results):
            raise UserError(f"{run / 'metrics.jsonl'}: steps are missing; remove {run} to train it again")
        self.flops += sum(total.flops for total in metrics[-1].totals.values())
        self.steps += metrics[-1].step
        self.seconds += sum(line.seconds for line in metrics)
        by_set = defaultdict(list)
        for result in results:
            if "library" in result:  # of a published benchmark, which a user measured
                continue
            self.versions.add(result.get("openimp", "of an unknown version"))
            if result["step"] != metrics[-1].step:
                continue
            if score == "accuracy":
                by_set[result["set"]].append(main_metric(result))
            elif result["type"] == "retrieval":
                by_set[result["set"]].append(result["mrr"])
        self.scores.update((name, statistics.mean(directions)) for name, directions in by_set.items())
        for measured in read_lines(run / "conflict.jsonl"):
            for pair, cosine in measured["cosine"].items():
                self.cosines.setdefault(pair, []).append(cosine)


Outcomes = Mapping[str, Sequence[Outcome]]
"""By arm, one outcome per seed."""


def scores_by_set(outcomes: Outcomes) -> dict[str, dict[str, list[float]]]:
    """The scores of each arm and seed in percent, by evaluation set; under "", the mean over the sets.

    An arm whose tasks lack a set's modality has an empty list there, and for the mean.
    """
    sets = dict.fromkeys(name for seeds in outcomes.values() for name in seeds[0].scores)
    scores: dict[str, dict[str, list[float]]] = {title: {} for title in ("", *sets)}
    for arm, seeds in outcomes.items():
        scores[""][arm] = [
            100 * statistics.mean(seed.scores.values()) for seed in seeds if seed.scores.keys() == sets.keys()
        ]
        for name in sets:
            scores[name][arm] = [100 * seed.scores[name] for seed in seeds if name in seed.scores]
    return scores


def mean_and_deviation(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation, which is 0 for one score."""
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0
