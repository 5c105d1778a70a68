"""Evaluation during a training run and at its end, and the choice of the best checkpoint."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import checkpoints, mark_best, step_of
from openimp.common.modality import Classes, Modality
from openimp.common.progress import console
from openimp.encoding.items import Progress
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import best_step, table
from openimp.model.embedder import Embedder
from openimp.parallel import distributed
from openimp.parallel.layout import reshard
from openimp.recipe.schema import Recipe
from openimp.training.checkpointing import Checkpointing
from openimp.training.ema import EMA
from openimp.training.metrics import Metrics


@dataclass(frozen=True)
class Validation:
    """Evaluates the model on the recipe's evaluation sets. The ranks share the work as they share the model."""

    recipe: Recipe
    run: Path
    modalities: dict[str, Modality]
    classes: Classes
    model: Embedder

    def evaluate(self, step: int, ema: EMA | None, metrics: Metrics, watch: Progress | None = None) -> None:
        """Measures the model after `step` steps, with the weights of `ema` if given, and writes and prints the results.

        If a set could not be measured, it raises NotMeasured after that. `watch` wraps the passes; see `Evaluator`.
        """
        failed = None
        with ema.swapped() if ema else nullcontext():
            try:
                results = evaluate(
                    self.model, self.recipe, self.modalities, step=step, classes=self.classes, watch=watch
                )
            except NotMeasured as error:
                results, failed = error.results, error
            finally:
                reshard(self.model)  # What is gathered is out of date once the weights change.
        if results:
            distributed.run_on_rank_zero(lambda: metrics.results(self.run, results))
            console.print(table(results))
        if failed:
            raise failed

    def keep_best(self, step: int, checkpointing: Checkpointing, state: dict[str, Any]) -> None:
        """Saves a checkpoint if the evaluation after `step` steps is the best so far, and links to the best one.

        `state` is that of the checkpoint; see `Checkpointing.save`.
        """
        name = self.recipe.evaluation.best
        if name is None:
            return
        checkpointing.wait()
        saved = {step, *map(step_of, checkpoints(self.run))}
        best = distributed.run_on_rank_zero(lambda: best_step(self.run / "results.jsonl", name, saved))
        if best == step:
            checkpointing.save(state)
            checkpointing.wait()
        if distributed.rank() == 0:
            mark_best(self.run, best)
