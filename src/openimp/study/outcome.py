"""What one arm of a study reached and spent with one seed."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines


@dataclass
class Outcome:
    """All models of an arm together.

    Attributes:
        scores: mean reciprocal rank by evaluation set, both directions averaged.
        flops, steps, seconds, parameters: of all models.
        memory: bytes that an update holds at most beyond weights and data, of the largest model.
        judged: CLIP_benchmark's recalls, by (evaluation set, figure).
        cosines: by pair of tasks, the cosine of their gradients at each step where it was measured.
        versions: of openimp that trained the models and measured them.
        experts: the last line's expert usage, by modality and sparse layer (see docs/metrics.md).
    """

    scores: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    steps: int = 0
    parameters: int = 0
    seconds: float = 0.0
    memory: int = 0
    versions: set[str] = field(default_factory=set)
    judged: dict[tuple[str, str], float] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)
    experts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Over the evaluation sets."""
        return statistics.mean(self.scores.values())

    def add(self, run: Path, parameters: int) -> None:
        """Adds a model that was trained, of so many parameters.

        Raises:
            UserError: what the training wrote is not there any more.
        """
        lines = lines_of(run, "metrics.jsonl", "step", "totals", "seconds", "experts")
        results = lines_of(run, "results.jsonl", "step", "openimp")
        if not lines or any((line["step"] or 0) > lines[-1]["step"] for line in results):
            raise damaged(run, "metrics.jsonl")
        self.flops += sum(units["flops"] for units in lines[-1]["totals"].values())
        self.steps += lines[-1]["step"]
        self.seconds += sum(line["seconds"] for line in lines)
        self.parameters += parameters
        for line in lines:  # A modality may be missing in the last one.
            self.experts.update(line["experts"])
        by_set = defaultdict(list)
        for line in results:
            self.versions.add(line["openimp"])
            if line["step"] == lines[-1]["step"] and "mrr" in line:
                by_set[line["set"]].append(line["mrr"])
        self.scores.update((name, statistics.mean(both_ways)) for name, both_ways in by_set.items())
        for line in lines_of(run, "conflict.jsonl", "cosine"):
            for pair, cosine in line["cosine"].items():
                self.cosines.setdefault(pair, []).append(cosine)

    def count_memory(self, peak: int) -> None:
        """Models are trained one at a time, so the largest counts."""
        self.memory = max(self.memory, peak)


def lines_of(run: Path, name: str, *keys: str) -> list[dict[str, Any]]:
    """All lines of one of the run's files.

    Raises:
        UserError: one of them is without one of these keys.
    """
    try:
        lines = read_lines(run / name)
    except UserError:
        raise damaged(run, name) from None
    if not all(line.keys() >= set(keys) for line in lines):
        raise damaged(run, name)
    return lines


def damaged(run: Path, name: str) -> UserError:
    return UserError(f"{run}: {name} is missing or damaged; remove the folder to train it again")
