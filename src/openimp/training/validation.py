"""Evaluation during a training run and at its end, and the choice of the best checkpoint."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import checkpoints, mark_best, step_of
from openimp.common.progress import Progress, console
from openimp.data.tables import Table
from openimp.data.task_data import TaskData
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import best_step, table
from openimp.model.embedder import Embedder
from openimp.parallel import distributed
from openimp.parallel.layout import reshard
from openimp.training.checkpointing import Checkpointing
from openimp.training.ema import EMA
from openimp.training.metrics import Metrics


@dataclass(frozen=True)
class Validation:
    """Evaluates the model on the recipe's evaluation sets. The ranks share the work as they share the model."""

    run: Path
    data: TaskData
    model: Embedder
    tables: dict[str, Table]  # the sources of the evaluation sets, by name

    def evaluate(
        self, step: int, ema: EMA | None, metrics: Metrics, watch: Progress | None = None
    ) -> tuple[list[dict[str, Any]], NotMeasured | None]:
        """Measures the model after `step` steps, with the weights of `ema` if given. Writes, prints and returns the
        results, and says which sets could not be measured.

        `watch` wraps the passes; see `Evaluator`.
        """
        failure = None
        recipe = self.data.recipe
        with ema.swapped() if ema else nullcontext():
            try:
                results = evaluate(
                    self.model,
                    recipe,
                    self.data.modalities,
                    step=step,
                    classes=self.data.classes,
                    watch=watch,
                    tables=self.tables,
                )
            except NotMeasured as error:
                failure = error
                results = error.results
            finally:
                reshard(self.model)  # Gathered weights are out of date once the EMA is swapped back.
        if results:
            distributed.run_on_rank_zero(lambda: metrics.write_results(results))
            console.print(table(results))
        return results, failure

    def keep_best(
        self,
        step: int,
        checkpointing: Checkpointing,
        state: Callable[[], dict[str, Any]],
        results: list[dict[str, Any]],
    ) -> None:
        """Saves a checkpoint if the `results` after `step` steps are the best so far, and links to the best one.

        `state` returns what the checkpoint stores; see `Checkpointing.save`. All ranks call it, or none.
        """
        name = self.data.recipe.evaluation.best
        measured = {result["set"] for result in results}
        if name is None or name not in measured:
            return
        checkpointing.wait()
        saved = {step, *map(step_of, checkpoints(self.run))}
        best = distributed.run_on_rank_zero(lambda: best_step(self.run / "results.jsonl", name, saved))
        if best == step:
            checkpointing.save(state())
            checkpointing.wait()
        if distributed.rank() == 0:
            mark_best(self.run, best)
