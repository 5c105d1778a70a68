"""The directory of a run: its lock, the files that say what it trains, and the checkpoint from which it resumes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from openimp.checkpoint.folder import BEST, CHECKPOINTS, step_of, verify
from openimp.checkpoint.resume import common_checkpoints, newest_intact, only_evaluates, require_same_run
from openimp.checkpoint.saver import remove_leftovers
from openimp.common.errors import UserError, counted
from openimp.common.json_lines import own_lines
from openimp.common.progress import console
from openimp.common.safe_files import read_object, refuse_links, write_text
from openimp.data.trust import record_training
from openimp.evaluation.results import measured_sets
from openimp.parallel import distributed
from openimp.recipe.file import differences
from openimp.recipe.schema import Recipe

LOCK = ".lock"
"""File in the directory that a training run holds a lock on while it runs."""
ENDED = "ended.json"
"""File in the directory with the step after which a callback ended the training early."""


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
        remove_leftovers(run)

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

        With `resume`, True requires a checkpoint, "auto" also starts a run that has made no step yet, and False refuses
        a directory with a run. None of them starts again a run that has logged steps, but has no checkpoint.
        `trainer` is the name of the `Variant`. For `allow_changed_data`, see `require_same_run`.
        """
        saved = bool(common_checkpoints(self.path))
        if not saved:
            distributed.run_on_rank_zero(self._refuse_to_start_again)
        if resume is True or (resume and saved):
            newest = newest_intact(self.path)
            require_same_run(newest, self.recipe, trainer, allow_changed_data)
            return newest
        logs = ("tensorboard", "logger.id", "metrics.jsonl", "results.jsonl", "skipped.jsonl")
        has_logged = any((self.path / name).exists() for name in logs)
        has_recipe = self.recipe_file.exists()
        # A run that died before it logged a step starts again and loses nothing. If it died before it logged anything,
        # it has left only this very recipe; any other recipe.yaml was written by the user.
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
        if resume:
            why = "it was interrupted before it logged a step" if is_run else "there is no run yet"
            console.print(f"{self.path}: {why}, so the training starts at step 0", soft_wrap=True)
        return None

    def _refuse_to_start_again(self) -> None:
        """UserError if the run has logged steps: they cost time, and their checkpoints may only be out of reach."""
        if not self.recipe_file.exists():
            return  # It is no run.
        logged = max((line.get("step") or 0 for line in self._logged_lines()), default=0)
        if logged:
            raise UserError(
                f"{self.path}: has logged {counted(logged, 'step')}, but has no checkpoint to resume from; if its "
                f"checkpoints are elsewhere, put them back into {self.path / CHECKPOINTS}; to start at step 0, move "
                f"{self.path} away, or name another directory with --run-dir"
            )

    def _logged_lines(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(own_lines(self.path / name) for name in ("metrics.jsonl", "results.jsonl"))

    @property
    def last_step(self) -> int:
        """The number of steps of the training: those of the recipe, or fewer if a callback has ended it."""
        file = self.path / ENDED
        ended = distributed.run_on_rank_zero(lambda: read_object(file) if file.exists() else {})
        step = ended.get("step", self.recipe.train.steps)
        if not isinstance(step, int):
            raise UserError(f"{file}: damaged: step is not an integer")
        return min(step, self.recipe.train.steps)

    def end(self, step: int) -> None:
        """Records that a callback has ended the training after a step, so that `resume="auto"` does not train on."""
        if step < self.recipe.train.steps:
            distributed.run_on_rank_zero(lambda: write_text(self.path / ENDED, json.dumps({"step": step})))

    def finished(self, resume: Literal[True, "auto"], trainer: str, allow_changed_data: bool) -> str:
        """If the training is over and was evaluated, so that resuming would do nothing, a sentence that says so.

        With `resume` True, a training that a callback has ended is not over.
        """
        checkpoints = common_checkpoints(self.path)
        last_step = self.recipe.train.steps if resume is True else self.last_step
        if not checkpoints or step_of(checkpoints[-1]) < last_step:
            return ""
        if not distributed.run_on_rank_zero(lambda: self._evaluated(last_step)):
            return ""
        try:
            verify(checkpoints[-1])
        except UserError:
            return ""  # A run that resumes from the previous checkpoint reports the damage.
        require_same_run(checkpoints[-1], self.recipe, trainer, allow_changed_data)
        if last_step < self.recipe.train.steps:
            return (
                f"{self.path}: is finished: a callback ended the training after step {last_step:,} of "
                f"{self.recipe.train.steps:,}; to train on, use --resume (in Python: resume=True) without auto"
            )
        return f"{self.path}: is finished: all {last_step:,} steps are done and evaluated already"

    def begin(self, config: str, recipe: str, trains_on: bool) -> None:
        """Writes what the run trains. From then on, the directory holds a run.

        `config` and `recipe` are the texts of the config.json and the recipe.yaml of its checkpoints. With `trains_on`,
        the training goes on even if a callback has ended it.
        """
        distributed.barrier()  # Every rank must have looked for an older run before this one's files appear.

        def write() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, recipe)
            record_training(config, recipe)
            if trains_on:
                (self.path / ENDED).unlink(missing_ok=True)

        distributed.run_on_rank_zero(write)

    def _evaluated(self, last_step: int) -> bool:
        """Whether the final step was evaluated as the recipe says, and the best checkpoint is marked."""
        evaluation = self.recipe.evaluation
        changes = differences(Recipe.load(self.recipe_file).to_dict(), self.recipe.to_dict())
        if any(only_evaluates(key, self.recipe) for key, _, _ in changes):
            return False
        if not evaluation.sets.keys() <= measured_sets(self.path / "results.jsonl", last_step):
            return False
        return evaluation.best is None or (self.path / CHECKPOINTS / BEST).exists()
