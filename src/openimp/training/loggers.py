"""Where the figures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, or Trackio."""

import secrets
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from openimp.common.errors import UserError, one_line
from openimp.recipe.schema import Recipe


class TensorBoard:
    """Files for TensorBoard, in the run's directory."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else 0)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """A run of Weights & Biases, or of Trackio, which has the same functions.

    The file logger.id in the run's directory names the tracker's run, which continues if openimp resumes. Environment
    variables choose the account and the mode, such as WANDB_MODE=offline.
    """

    def __init__(self, library: str, run: Path, recipe: Recipe) -> None:
        module = import_module(library)
        id_file = run / "logger.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        id = id_file.read_text()
        options = {"project": "openimp", "config": recipe.to_dict(), "resume": "allow"}
        if library == "wandb":
            options |= {"id": id, "name": run.name, "dir": str(run)}
        else:
            options["name"] = f"{run.name}-{id}"
        try:
            module.init(**options)
        except Exception as error:  # The libraries raise many kinds.
            raise UserError(f"train.loggers: {library} cannot start: {one_line(error)}") from None
        self._module = module

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._module.log(dict(figures), step=step)

    def close(self) -> None:
        self._module.finish()


Logger = TensorBoard | Tracker
"""Shows the figures of a run: `log` adds some by name, and `close` writes what has not been written."""


def check_loggers(recipe: Recipe) -> None:
    """Raises UserError if the library of a logger is not installed."""
    for name in recipe.train.loggers:
        if name != "tensorboard" and find_spec(name) is None:
            raise UserError(f"train.loggers: {name} is not installed: pip install {name}")


def open_loggers(recipe: Recipe, run: Path, step: int) -> list[Logger]:
    """The loggers of a recipe, for a run that has done `step` steps."""
    return [
        TensorBoard(run, step) if name == "tensorboard" else Tracker(name, run, recipe) for name in recipe.train.loggers
    ]
