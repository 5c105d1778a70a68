"""The directory of a run: its lock, the files that say what it trains, and the checkpoint from which it resumes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from openimp.checkpoint.folder import BEST, CHECKPOINTS, step_of, verify
from openimp.checkpoint.resume import common_checkpoints, newest_intact, only_evaluates, require_same_run
from openimp.common.errors import UserError
from openimp.common.safe_files import refuse_links, write_text
from openimp.data.trust import record_training
from openimp.evaluation.results import measured_sets
from openimp.parallel import distributed
from openimp.recipe.file import differences
from openimp.recipe.schema import Recipe

LOCK = ".lock"
"""File in the directory that a training run holds a lock on while it runs."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Creates a run's directory and keeps other training processes out. If nothing was written, it is removed again."""
    lock = FileLock(run / LOCK, timeout=0)

    def acquire() -> None:
        if run.exists() and not run.is_dir():
            raise UserError(f"{run}: is a file; name a directory with --run-dir")
        refuse_links(run)
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{run}: another training is writing to it; use another directory with --run-dir") from None

    distributed.run_on_rank_zero(acquire)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Somebody may have removed the directory.
                if [path.name for path in run.iterdir()] == [LOCK]:
                    (run / LOCK).unlink()
                    run.rmdir()
            lock.release()


class RunDirectory:
    """The directory that a training run of a recipe writes to."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self.recipe_file = path / "recipe.yaml"

    def checkpoint(self, resume: bool | Literal["auto"], trainer: str, allow_changed_data: bool) -> Path | None:
        """The checkpoint to resume from, or None for a training run that starts at step 0.

        With `resume`, True requires a checkpoint, "auto" uses one if there is one, and False refuses a directory with a
        run. `trainer` is the name of the `Variant`. For `allow_changed_data`, see `require_same_run`.
        """
        saved = bool(common_checkpoints(self.path))
        if resume is True or (resume and saved):
            newest = newest_intact(self.path)
            require_same_run(newest, self.recipe, trainer, allow_changed_data)
            return newest
        logs = ("tensorboard", "logger.id", "metrics.jsonl", "results.jsonl", "skipped.jsonl")
        has_logged = any((self.path / name).exists() for name in logs)
        has_recipe = self.recipe_file.exists()
        # A run that died before its first checkpoint starts again and loses nothing. If it died before it logged
        # anything, it has left only this very recipe; any other recipe.yaml was written by the user.
        is_run = has_recipe and (has_logged or self.recipe_file.read_bytes() == self.recipe.to_yaml().encode())
        if (saved or has_logged or has_recipe) and not (resume and is_run):
            if resume:
                raise UserError(
                    f"{self.path}: holds files that are not of this run; name another directory with --run-dir"
                )
            raise UserError(
                f"{self.path}: holds a run, or files that a run would overwrite; resume the run with --resume auto (in "
                'Python: resume="auto"), or name another directory with --run-dir'
            )
        return None

    def finished(self, trainer: str, allow_changed_data: bool) -> bool:
        """Whether the run has made all steps and has been evaluated, so that resuming would do nothing."""
        checkpoints = common_checkpoints(self.path)
        if not checkpoints or step_of(checkpoints[-1]) < self.recipe.train.steps:
            return False
        if not distributed.run_on_rank_zero(self._evaluated):
            return False
        try:
            verify(checkpoints[-1])
        except UserError:
            return False  # A run that resumes from the previous checkpoint reports the damage.
        require_same_run(checkpoints[-1], self.recipe, trainer, allow_changed_data)
        return True

    def begin(self, config: str, recipe: str) -> None:
        """Writes what the run trains. From then on, the directory holds a run.

        `config` and `recipe` are the texts of the config.json and the recipe.yaml of its checkpoints.
        """
        distributed.barrier()  # Every rank must have looked for an older run before this one's files appear.

        def write() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, recipe)
            record_training(config, recipe)

        distributed.run_on_rank_zero(write)

    def _evaluated(self) -> bool:
        """Whether the final step was evaluated as the recipe says, and the best checkpoint is marked."""
        evaluation = self.recipe.evaluation
        changes = differences(Recipe.load(self.recipe_file).to_dict(), self.recipe.to_dict())
        if any(only_evaluates(key, self.recipe) for key, _, _ in changes):
            return False
        if not evaluation.sets.keys() <= measured_sets(self.path / "results.jsonl", self.recipe.train.steps):
            return False
        return evaluation.best is None or (self.path / CHECKPOINTS / BEST).exists()
