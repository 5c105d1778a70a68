"""Saving the state of a training run, and loading it again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import RECIPE, load_training_state, optimizer_state
from openimp.checkpoint.saver import Saver
from openimp.common.safe_files import read_text
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import run_on_rank_zero
from openimp.training.updater import Updater


@dataclass
class Checkpointing:
    """Saves the checkpoints of a training run in the background."""

    saver: Saver
    model: Embedder
    updater: Updater
    text_files: Mapping[str, str]  # configuration, recipe and tokenizer by file name (`checkpoint.folder.text_files`)
    newest_step: int = 0  # of the newest checkpoint, which may still be being written; 0 if there is none
    _has_old_recipe: bool = False  # whether the newest checkpoint has another recipe than this run, as it may on resume

    def load(self, folder: Path) -> dict[str, Any]:
        """Loads weights, optimizer state and EMA from a checkpoint, and returns the state that was saved with them."""
        ema = self.updater.ema.weights if self.updater.ema else None
        state = load_training_state(folder, self.model, self.updater.optimizers, ema)
        self.newest_step = state["step"]
        # Evaluation may have changed, and data may have moved. `openimp eval` reads the checkpoint's recipe.
        self._has_old_recipe = run_on_rank_zero(lambda: self._is_old(folder / RECIPE))
        return state

    def _is_old(self, recipe: Path) -> bool:
        return not recipe.exists() or read_text(recipe) != self.text_files[RECIPE]  # Format 6 has no recipe.yaml.

    def save(self, state: dict[str, Any]) -> None:
        """Does nothing if this step has a checkpoint with the run's recipe. Otherwise, starts writing one, or raises
        CheckpointError if the previous save failed.

        `state` is everything besides tensors that the next step depends on, as JSON values. Its "step" is the number of
        steps done.
        """
        if state["step"] == self.newest_step and not self._has_old_recipe:
            return
        self._has_old_recipe = False
        optimizer_tensors = optimizer_state(self.model, self.updater.optimizers)
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_tensors}
        if self.updater.ema:
            tensors["ema"] = self.updater.ema.weights
        text_files = {**self.text_files, "state.json": json.dumps(state, indent=1)}
        self.saver.start(state["step"], text_files, tensors)
        self.newest_step = state["step"]

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete, or raises CheckpointError."""
        self.saver.wait()
