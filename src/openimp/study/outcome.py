"""The results of one arm of a study with one seed, and their scores over all arms and seeds."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.common.schema import checked
from openimp.evaluation.results import read_results
from openimp.training.metrics_file import LayerUsage, read_metrics


@dataclass
class Outcome:
    """The results of one arm with one seed, over all models of the arm.

    Attributes:
        scores: mean reciprocal rank by evaluation set, averaged over both directions.
        flops, steps, seconds, parameters: sums over the models.
        memory: peak memory of an update in bytes, beyond what `peak_memory` leaves out. The models train one at a time,
            so this is the maximum over them.
        recalls: CLIP_benchmark's recalls by (evaluation set, metric).
        cosines: by pair of tasks, the cosine of their gradients at each measured step.
        versions: the versions of openimp that measured the scores.
        experts: the latest expert usage by modality and sparse layer, see docs/metrics.md.
    """

    scores: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    steps: int = 0
    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0
    versions: set[str] = field(default_factory=set)
    recalls: dict[tuple[str, str], float] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)
    experts: dict[str, list[LayerUsage]] = field(default_factory=dict)

    def add(self, run: Path, parameters: int) -> None:
        """Adds the results of a finished training.

        Args:
            run: its run directory.
            parameters: the number of the model's parameters.

        Raises:
            UserError: the run's metrics or results are missing or damaged.
        """
        metrics = read_metrics(run / "metrics.jsonl")
        results = read_results(run / "results.jsonl")
        if not metrics or any((result["step"] or 0) > metrics[-1].step for result in results):
            raise UserError(f"{run / 'metrics.jsonl'}: steps are missing; remove {run} to train it again")
        self.flops += sum(total.flops for total in metrics[-1].totals.values())
        self.steps += metrics[-1].step
        self.seconds += sum(line.seconds for line in metrics)
        self.parameters += parameters
        for line in metrics:  # The last line lacks the modalities that did not occur since the line before.
            self.experts.update(line.experts)
        by_set = defaultdict(list)
        for result in results:
            self.versions.add(result.get("openimp", "of an unknown version"))
            if result["step"] == metrics[-1].step and result["type"] == "retrieval":
                by_set[result["set"]].append(result["mrr"])
        self.scores.update((name, statistics.mean(directions)) for name, directions in by_set.items())
        conflict = run / "conflict.jsonl"
        for measured in read_lines(conflict):
            for pair, cosine in checked(_ConflictLine, measured, str(conflict)).cosine.items():
                self.cosines.setdefault(pair, []).append(cosine)


class _ConflictLine(BaseModel):
    """A line of conflict.jsonl, which `ConflictTrainer` writes."""

    model_config = ConfigDict(strict=True)

    cosine: dict[str, float]


Outcomes = Mapping[str, Sequence[Outcome]]
"""By arm, one outcome per seed."""


def scores_by_set(outcomes: Outcomes) -> list[tuple[str, dict[str, list[float]]]]:
    """The scores of each arm and seed: first the mean over the evaluation sets, then each set.

    Returns:
        Pairs of a title and, by arm, the scores of its seeds. An arm whose tasks lack a set's modality has an empty
        list there, and for the mean.
    """
    sets = list(dict.fromkeys(name for seeds in outcomes.values() for name in seeds[0].scores))
    means = {
        arm: [statistics.mean(seed.scores.values()) for seed in seeds if seed.scores.keys() == set(sets)]
        for arm, seeds in outcomes.items()
    }
    columns = [("mean", means)]
    for name in sets:
        by_arm = {arm: [seed.scores[name] for seed in seeds if name in seed.scores] for arm, seeds in outcomes.items()}
        columns.append((name.replace("_", " "), by_arm))
    return columns
