"""Saving the state of a training run, and loading it again."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openimp.checkpoint.folder import load_training_state, optimizer_state
from openimp.checkpoint.saver import Saver
from openimp.model.embedder import Embedder
from openimp.training.updater import Updater


class Checkpointing:
    """Saves the checkpoints of a training run in the background.

    Attributes:
        saver: writes the files, in a thread.
        saved: step of the newest checkpoint.
    """

    def __init__(
        self,
        run: Path,
        keep_last: int,
        model: Embedder,
        updater: Updater,
        texts: Mapping[str, str],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        """Prepares saving.

        Args:
            run: directory of the run.
            keep_last: number of checkpoints that are kept.
            model: the model that is trained.
            updater: its optimizers and its EMA.
            texts: configuration and vocabulary by file name; see `config_files`.
            state: returns everything else that the next step depends on, as JSON values; its "step" is the number of
                steps that are done.
        """
        self.model, self.updater, self.texts, self.state = model, updater, texts, state
        self.saver, self.saved = Saver(run, keep_last), 0

    def load(self, folder: Path) -> dict[str, Any]:
        """Loads weights, optimizer state and EMA from a checkpoint, and returns the state that was saved with them."""
        ema = self.updater.ema.weights if self.updater.ema else None
        state = load_training_state(folder, self.model, self.updater.optimizers, ema)
        self.saved = state["step"]
        return state

    def save(self) -> None:
        """Starts writing a checkpoint, unless the newest one is of this step.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        state = self.state()
        if state["step"] == self.saved:
            return
        moments = optimizer_state(self.model, self.updater.optimizers)
        tensors = {"model": self.model.state_dict(), "optimizer": moments}
        if self.updater.ema:
            tensors["ema"] = self.updater.ema.weights
        texts = {**self.texts, "state.json": json.dumps(state, indent=1)}
        self.saver.start(state["step"], texts, tensors)
        self.saved = state["step"]

    def wait(self) -> None:
        """Waits until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        self.saver.wait()
