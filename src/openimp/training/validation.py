"""Evaluation during a training run and at its end, and the choice of the best checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openimp.checkpoint.folder import checkpoints, mark_best, step_of
from openimp.common.modality import Classes, Modality
from openimp.common.progress import console
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import best_step, table
from openimp.model.embedder import Embedder
from openimp.parallel import distributed, layout
from openimp.recipe.schema import Recipe
from openimp.training.checkpointing import Checkpointing
from openimp.training.metrics import Metrics
from openimp.training.stopping import Stopped


@dataclass(frozen=True)
class Validation:
    """Evaluates the model on the recipe's evaluation sets, on rank 0, while the other ranks wait.

    `build` creates a model of the same kind with new weights, to hold the EMA or gathered shards.
    """

    recipe: Recipe
    run: Path
    modalities: dict[str, Modality]
    classes: Classes
    model: Embedder
    build: Callable[[], Embedder]
    device: torch.device

    def evaluate(self, step: int, ema: Mapping[str, Tensor] | None, metrics: Metrics, progress: Any = None) -> None:
        """Measures the model after `step` steps, with the weights of `ema` if given, and writes and prints the results.

        If a set could not be measured, it raises NotMeasured after that; if a stop was requested meanwhile, Stopped.
        """
        model = self._full_model(ema)

        def measure() -> bool:
            assert model is not None
            failed = None
            try:
                results = evaluate(
                    model.to(self.device), self.recipe, self.modalities, step=step, progress=progress,
                    classes=self.classes,
                )  # fmt: skip
            except NotMeasured as error:
                results, failed = error.results, error
            except Stopped:
                return False
            if results:
                metrics.results(self.run, results)
                console.print(table(results))
            if failed:
                raise failed
            return True

        if not distributed.run_on_rank_zero(measure):
            raise Stopped

    def keep_best(self, step: int, checkpointing: Checkpointing) -> None:
        """Saves a checkpoint if the evaluation after `step` steps is the best so far, and links to the best one."""
        name = self.recipe.evaluation.best
        if name is None:
            return
        checkpointing.wait()
        saved = {step, *map(step_of, checkpoints(self.run))}
        best = distributed.run_on_rank_zero(lambda: best_step(self.run / "results.jsonl", name, saved))
        if best == step:
            checkpointing.save()
            checkpointing.wait()
        if distributed.rank() == 0:
            mark_best(self.run, best)

    def _full_model(self, ema: Mapping[str, Tensor] | None) -> Embedder | None:
        """The model with all its shards, or with the weights of `ema`, on rank 0; None on the other ranks."""
        if ema is None and distributed.world_size() == 1:
            return self.model
        weights = layout.gather_on_rank_zero(self.model.state_dict() if ema is None else ema)
        if distributed.rank():
            return None
        with torch.random.fork_rng(devices=[]):
            model = self.build()
        model.load_state_dict(weights)
        return model
