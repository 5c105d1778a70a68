"""The training loop: alternating gradient descent. Each step trains one task with one of its views."""

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from openimp.checkpoint.folder import checkpoint_folder, checkpoints, mark_best, step_of
from openimp.checkpoint.saver import CheckpointError
from openimp.common.device import HostCopy, is_out_of_memory
from openimp.common.errors import UserError, counted
from openimp.common.progress import Progress, StepBar, console
from openimp.data.loaded_batch import LoadedBatch
from openimp.data.loader import load_batches
from openimp.data.order import seed_key
from openimp.data.streams import Cursor
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import best_step, measured_sets, table
from openimp.model.embedder import in_chunks
from openimp.objectives.losses import Losses, task_losses
from openimp.parallel import distributed
from openimp.parallel.layout import mixed_precision, reshard
from openimp.planning.costs import zero_batch
from openimp.recipe.schema import Recipe
from openimp.training.callbacks import Callback, Callbacks, StopTraining
from openimp.training.run_directory import RunDirectory, locked
from openimp.training.setup import ORDINARY, Parts, Variant, set_up
from openimp.training.stopping import Interrupted, Stop, raise_if_any_rank_stops, stop_signals


@distributed.leave_after_errors()
def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    run: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    variant: Variant = ORDINARY,
    allow_changed_data: bool = False,
    callbacks: Callback | Iterable[Callback] = (),
) -> bool:
    """Trains and evaluates a recipe. Returns True if the run is complete, and False if a signal stopped it.

    Args:
        recipe: a recipe, a dictionary for `Recipe.build`, a file, or the name of a recipe that comes with openimp.
        run: directory to write to; with `resume`, that of an interrupted run of the same recipe. None: runs/NAME.
        resume: True requires a checkpoint and resumes from the newest intact one; "auto" starts at step 0 if the run
            has made no step yet, and does nothing if a callback has ended the training, which True continues.
        variant: what a study changes.
        allow_changed_data: resume even if a source has changed since the checkpoint was saved.
        callbacks: their methods are called at the start, and after steps, evaluations and checkpoints, where they may
            end the training.

    Raises:
        UserError: the run cannot start, resume or continue. If data is bad or a loss is not finite, all complete steps
            are saved. If a rank died, the steps since the last checkpoint are lost.
        CheckpointError: a checkpoint cannot be written. The steps since the last complete checkpoint are lost.
    """
    if isinstance(recipe, Mapping):
        recipe = Recipe.build(dict(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    run = Path("runs") / recipe.name if run is None else Path(run).expanduser()
    distributed.start()
    with locked(run):
        if resume and (finished := RunDirectory(run, recipe).finished(resume, variant.name, allow_changed_data)):
            complete = True
            console.print(finished, soft_wrap=True)
        else:
            all_callbacks = Callbacks(callbacks)
            try:
                all_callbacks.call(lambda callback: callback.on_start(recipe))  # Before `set_up` writes anything.
            except StopTraining:
                raise UserError("a callback ended the training before its first step") from None
            complete = Trainer(set_up(recipe, run, resume, variant, allow_changed_data), all_callbacks).train()
    distributed.shut_down()
    return complete


@dataclass
class PendingStep:
    """A step that is not complete yet. It passes through these states:

    1. Begun: its forward pass is queued on the device.
    2. Queued: its gradients and its update are queued on the device, which applies the update only if the gradients are
       finite. The host does not know yet whether they are.
    3. Confirmed: the gradients were finite, so the update was applied. The step counts, and is logged. If they were not
       finite, this state is never reached, and `Trainer.confirm` raises an error before the next update.
    """

    batch_info: LoadedBatch  # the batch, without its tensors
    losses: Losses


class QueuedUpdate(NamedTuple):
    """An update whose steps are in the state Queued. Its gradient norm tells whether it was applied.

    Its steps are a *round*: usually one step or, if a study sums the losses of all tasks, one step of each task.
    """

    steps: list[PendingStep]
    grad_norm: HostCopy


class Trainer(Parts):
    """The training loop of one rank.

    It inherits from `setup.Parts` only to have its attributes, which `Parts` explains: `model`, `updater`, `cursors`,
    `log`, `checkpointing` and others. Further attributes are:

    Attributes:
        step: the number of confirmed steps; a checkpoint contains no others.
        grad_norm: the Euclidean norm of the last confirmed step's gradient, before clipping.
        encode_all: `model.encode_all`, in chunks if the recipe says so.
    """

    def __init__(self, parts: Parts, callbacks: Callbacks | None = None) -> None:
        super().__init__(**vars(parts))
        self.callbacks = callbacks or Callbacks()
        self._announced_step = self.checkpointing.newest_step  # of the last checkpoint that the callbacks know
        self._evaluated_step: int | None = None
        self._failure: NotMeasured | None = None  # of the last evaluation
        self._callback_stops = False  # Whether a callback has raised StopTraining in `on_checkpoint`.
        self.encode_all = in_chunks(self.model.encode_all, self.recipe.memory.chunk_size)
        self.step = self.checkpointing.newest_step
        self.grad_norm = 0.0
        self._last_step = RunDirectory(self.run, self.recipe).last_step
        self._bar = StepBar(self.recipe.train.steps, self.step)
        self._begun_steps: list[PendingStep] = []
        self._queued_update: QueuedUpdate | None = None
        self._is_updating = False  # True while the optimizers step: then the weights are those of no step.

    @property
    def steps_per_update(self) -> int:
        """1, or the number of tasks if the losses of all tasks are summed."""
        if not self.variant.sum_tasks:
            return 1
        return sum(task.weight > 0 for task in self.recipe.tasks.values())

    def train(self) -> bool:
        """Runs the training to its end. Returns False if a signal stopped it; then all complete steps are saved."""
        # The run stops after a signal, or if a checkpoint could not be written.
        with (
            stop_signals(self.checkpointing.saver.failed) as stop,
            # Reports dead ranks while `stop_signals` still catches SIGTERM, which torchrun sends to all ranks when one
            # is dead. `leave_after_errors` reports dead ranks later, when SIGTERM may have ended this process.
            distributed.report_dead_ranks(),
            self._bar,
            closing(self.log),
        ):
            try:
                self._complete_run(stop)
                return True
            except Interrupted:  # By a signal or a failed save. The run can be resumed.
                self.save(wait=True)  # If a failed save was the reason to stop, this raises its CheckpointError.
                self._log_unlogged_steps()
                advice = "the same command resumes it (openimp train: with --resume)"
                outcome = f"saved in {self.run}; {advice}" if self.step else "nothing is saved"
                console.print(f"stopped at step {self.step}, {outcome}", soft_wrap=True)
                return False
            except CheckpointError:
                raise  # It is a UserError too, but saving again would not help.
            except UserError:
                self.save(wait=True)
                self._log_unlogged_steps()
                raise

    def _complete_run(self, stop: Stop) -> None:
        """Makes the remaining steps, then the last checkpoint and the last evaluation."""
        try:
            self._train_steps(stop)
        except StopTraining:
            console.print(f"a callback ended the training after step {self.step}", soft_wrap=True)
            # Before the last checkpoint and evaluation, so that the run is over even if it is killed in one of them.
            RunDirectory(self.run, self.recipe).end(self.step)
        self.save()
        self._log_unlogged_steps()
        if self._evaluated_step != self.step:
            with suppress(StopTraining):  # The training is over already.
                self.evaluate(stop.watch, is_last=True)
            if self._failure:
                raise self._failure
        self.checkpointing.wait()
        self._announce_checkpoint()
        self.log.bad_examples.report()

    def _train_steps(self, stop: Stop) -> None:
        """Makes the remaining steps, with the checkpoints and evaluations that are due between them."""
        save_every = self.recipe.train.save_every
        evaluate_every = self.recipe.evaluation.every
        if self.step >= self._last_step:  # All that may be missing is the last evaluation.
            return
        if self.step == 0 and self.recipe.starts_from_weights:
            self.evaluate(stop.watch)  # The baseline: later results show what was forgotten.
        # A resumed run: it may have been interrupted before an evaluation, or before it marked the step as the best.
        if self.step and self._is_due(evaluate_every, self.step):
            if self._is_measured():
                self._keep_best(self.recipe.evaluation.sets)
            else:
                self.evaluate(stop.watch)
        loaded_batches = self.log.timer.timed(load_batches(self.batches, self.step))
        try:
            # The alternation has chosen the task and the view of each batch: `loaded.visit`. With several ranks, a rank
            # that must stop still makes the next step; see `Stop.watch_steps`.
            for loaded in stop.watch_steps(loaded_batches, self.step, self._placeholder_batch):
                try:
                    self.make_step(loaded)
                except RuntimeError as error:
                    # With several ranks, the others cannot save: they wait for this one in collectives.
                    if distributed.world_size() > 1 or self._is_updating or not is_out_of_memory(error):
                        raise
                    raise self._out_of_memory_error(loaded) from None
                if self.variant.prints_warnings:
                    self.log.print_warnings_of_objectives(loaded)
                steps_done = loaded.visit.step + 1
                if self.log.is_due(steps_done):  # True also if a checkpoint or an evaluation is due.
                    self.confirm_and_gather_bad_examples()
                    self.log.bad_examples.raise_if_too_many()
                if self._is_due(save_every, steps_done):
                    self.save()
                if self._is_due(evaluate_every, steps_done):
                    self.evaluate(stop.watch)
                if steps_done == self._last_step < self.recipe.train.steps:  # Where a callback ended it before.
                    self.confirm_and_gather_bad_examples()
                    raise StopTraining
                if self._callback_stops:
                    raise StopTraining
        except (Interrupted, UserError):
            with suppress(StopTraining):  # This error matters more than a callback's StopTraining.
                self.confirm_and_gather_bad_examples()  # If the queued step failed too, its error is raised instead.
            raise

    def make_step(self, loaded: LoadedBatch) -> Losses:
        """Queues the forward pass of a step on the device, and returns the losses of its task.

        The last step of a round, which usually is its only one, also queues gradients and the update of the weights.
        """
        visit = loaded.visit
        if self.variant.before_step:
            self.variant.before_step(self, visit.step)
        losses = self.forward(loaded)
        self._begun_steps.append(PendingStep(loaded.without_tensors(), losses))
        is_last_step = visit.step + 1 == self.recipe.train.steps
        if is_last_step or len(self._begun_steps) == self.steps_per_update:
            self._update()
        self.log.timer.end_step(visit.task)
        return losses

    def forward(self, loaded: LoadedBatch) -> Losses:
        """The losses of a step's task."""
        visit = loaded.visit
        task = self.recipe.tasks[visit.task]
        # A resumed run must repeat the model's dropout.
        dropout_seed = seed_key(self.recipe.seed, "dropout", visit.step, distributed.rank())
        torch.manual_seed(dropout_seed % 2**63)
        with mixed_precision(self.device, self.recipe.train.precision):
            return task_losses(self.model, task, loaded.batch_on(self.device), self.encode_all)

    def _update(self) -> None:
        """Queues the backward pass of the begun steps, and the update from their gradients."""
        steps = self._begun_steps
        self._begun_steps = []
        loss = reduce(torch.add, (step.losses.total for step in steps))
        has_stop_reason = any(step.batch_info.stop_reason is not None for step in steps)
        # 1, but NaN if the loss is not finite or this rank must stop. No rank applies NaN gradients.
        grad_output = loss.detach() * 0 + (math.nan if has_stop_reason else 1)
        loss.backward(grad_output)
        # Confirms the previous update while the device computes these gradients. If a callback raises StopTraining,
        # these steps are not applied.
        self.confirm()
        self._is_updating = True
        grad_norm = self.updater.queue_update(steps[-1].batch_info.visit.step)
        self._is_updating = False
        for step in steps:
            # Frees the autograd graph. The log still needs the value.
            step.losses = replace(step.losses, total=step.losses.total.detach())
        self._queued_update = QueuedUpdate(steps, grad_norm)

    def confirm(self) -> None:
        """Waits for the gradient norm of the queued update, then counts and logs its steps.

        If the gradient norm is not finite, the steps were not applied, and this raises on all ranks: `Interrupted` or a
        UserError if a rank had a reason to stop, else a UserError that names the loss.
        """
        if self._queued_update is None:
            return
        steps, grad_norm = self._queued_update
        self._queued_update = None
        norm = grad_norm.read()
        if not math.isfinite(norm):
            stop_reasons = (step.batch_info.stop_reason for step in steps if step.batch_info.stop_reason is not None)
            raise_if_any_rank_stops(next(stop_reasons, None))
            raise self._not_finite_error(steps)
        self.grad_norm = norm
        if self.updater.ema:
            self.updater.ema.update(steps[-1].batch_info.visit.step)
        for step in steps:
            visit = step.batch_info.visit
            self.step = visit.step + 1
            if step.batch_info.cursors:  # Of a stream: where each of its lanes (sequences of shards) resumes.
                self.cursors[visit.task] = step.batch_info.cursors
            self.log.record(step.batch_info, step.losses)
        self._bar.step(self.step)
        metrics = None
        if any(self.log.is_due(step.batch_info.visit.step + 1) for step in steps):
            metrics = self._log()
        self.callbacks.call(lambda callback: callback.on_step(self.step, metrics))

    def _log(self) -> dict[str, Any]:
        """Writes and returns a line of metrics, up to the last confirmed step."""
        return self.log.write(self.step, self.updater.lr_factor(self.step - 1), self.grad_norm, self._bar)

    def _log_unlogged_steps(self) -> None:
        """Writes a line of metrics if a step was confirmed since the last line, as when the run ended early."""
        if self.log.unlogged_steps:
            self._log()

    def confirm_and_gather_bad_examples(self) -> None:
        """Confirms the queued steps, and gathers bad examples from all ranks.

        Afterwards, `state` has everything that a checkpoint needs.
        """
        self.confirm()
        self.log.bad_examples.gather()

    def save(self, wait: bool = False) -> None:
        """Starts saving the confirmed steps, unless they are saved; with `wait`, returns when the files are written."""
        self.confirm_and_gather_bad_examples()
        self._announce_checkpoint()  # Now, because `checkpointing.save` changes `newest_step`.
        self.checkpointing.save(self.state())
        if wait:
            self.checkpointing.wait()
            self._announce_checkpoint()

    def _announce_checkpoint(self) -> None:
        """Waits for the newest checkpoint and tells the callbacks of it, unless they know it."""
        step = self.checkpointing.newest_step
        if self.callbacks.callbacks and step != self._announced_step:
            self.checkpointing.wait()
            self._announced_step = step
            try:
                folder = checkpoint_folder(self.run, step)
                self.callbacks.call(lambda callback: callback.on_checkpoint(step, folder))
            except StopTraining:
                self._callback_stops = True  # `_train_steps` stops later: the caller has yet to save or to evaluate.

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for resuming besides tensors, as JSON values. Every rank must call this."""
        cursors: dict[str, dict[str, Cursor]] = {}
        for cursors_of_rank in distributed.all_gather_object(self.cursors):
            for task, cursor_by_lane in cursors_of_rank.items():
                cursors.setdefault(task, {}).update(cursor_by_lane)
        return {"step": self.step, **self.constant_state, "cursors": cursors, **self.log.state()}

    def evaluate(self, watch: Progress | None = None, is_last: bool = False) -> None:
        """Evaluates the EMA if there is one, else the model. If the result is the best so far, saves a checkpoint.

        `evaluation.best` names the set that decides. `watch(passes, description)` wraps the forward passes; with
        `Stop.watch`, a signal stops them.

        If a set cannot be measured, for example because its disk is missing, `_failure` says why. Training goes on;
        after the last evaluation (`is_last`), `_complete_run` raises `_failure`.
        """
        self.confirm_and_gather_bad_examples()
        if not self.recipe.evaluation.sets:
            return
        with self.log.timer.paused():
            results = self._measure(watch)
        self._evaluated_step = None if self._failure else self.step
        if self._failure and not is_last:
            console.print(f"{self._failure}; training goes on", soft_wrap=True)
        self._announce_checkpoint()  # Before `_keep_best` may save: only the newest checkpoint is announced.
        self._keep_best([result["set"] for result in results])
        self._announce_checkpoint()
        self.callbacks.call(lambda callback: callback.on_evaluation(self.step, results))

    def _measure(self, watch: Progress | None) -> list[dict[str, Any]]:
        """Writes, prints and returns the results of the EMA, or of the model if there is none.

        Every rank must call this, and encodes an equal part of the rows. `_failure` becomes the reason why a set cannot
        be measured, or None.
        """
        self._failure = None
        ema = self.updater.ema
        with ema.swapped() if ema else nullcontext():
            try:
                results = evaluate(
                    self.model,
                    self.recipe,
                    self.data.modalities,
                    step=self.step,
                    classes=self.data.classes,
                    progress=self._bar.track_evaluation,
                    watch=watch,
                    tables=self.evaluated_tables,
                )
            except NotMeasured as error:
                self._failure = error
                results = error.results
            except RuntimeError as error:
                if distributed.world_size() > 1 or not is_out_of_memory(error):
                    raise
                raise UserError("evaluation: out of memory; lower evaluation.batch_size") from None
            finally:
                reshard(self.model)  # Gathered weights are out of date once the EMA is swapped back.
        if results:
            distributed.run_on_rank_zero(lambda: self.log.write_results(results))
            console.print(table(results))
        return results

    def _keep_best(self, measured: Collection[str]) -> None:
        """Saves a checkpoint if this step is the best so far, and links to the best one.

        Does nothing unless `evaluation.best` names a set that was measured.
        """
        name = self.recipe.evaluation.best
        if name is None or name not in measured:
            return
        self.checkpointing.wait()
        steps = {self.step, *map(step_of, checkpoints(self.run))}
        best = distributed.run_on_rank_zero(lambda: best_step(self.run / "results.jsonl", name, steps))
        if best == self.step:
            self.checkpointing.save(self.state())
            self.checkpointing.wait()
        if distributed.rank() == 0:
            mark_best(self.run, best)

    def _is_due(self, every: int | None, steps_done: int) -> bool:
        """Whether `steps_done` is a multiple of `every`. False within a round and after the last step."""
        if every is None or self._begun_steps or steps_done == self.recipe.train.steps:
            return False
        return steps_done % every == 0

    def _is_measured(self) -> bool:
        """Whether results.jsonl has all sets at this step."""
        return distributed.run_on_rank_zero(
            lambda: self.recipe.evaluation.sets.keys() <= measured_sets(self.run / "results.jsonl", self.step)
        )

    def _placeholder_batch(self, step: int) -> LoadedBatch:
        """Zeros in place of a batch that could not be loaded, so that this rank takes part in the step's collectives.

        No rank applies the step.
        """
        visit = self.batches.schedule[step]
        batch = zero_batch(
            self.recipe,
            visit.task,
            visit.view,
            self.data.modalities,
            self.data.classes,
            device=torch.device("cpu"),
            ranks=distributed.world_size(),
        )
        return LoadedBatch(visit, [batch])

    def _not_finite_error(self, steps: list[PendingStep]) -> UserError:
        """The error of steps that were not applied. Every rank must call this.

        The error names the first step whose loss is not finite on this rank, or else the last step. In a round, ranks
        may name different steps. The error also names up to 8 examples of each rank that has such a loss. If no rank
        has one, it names examples of this rank.
        """
        failed_step = next((step for step in steps if not step.losses.total.isfinite()), steps[-1])
        visit = failed_step.batch_info.visit
        loss = failed_step.losses.total
        mean_loss = float(distributed.all_reduce_mean(loss))
        example_names = failed_step.batch_info.names[:8]
        suspects_by_rank = distributed.all_gather_object([] if loss.isfinite() else example_names)
        suspects = list(chain.from_iterable(suspects_by_rank)) or example_names
        from_here = f", which can start from these weights with train.init={self.run}" if self.step else ""
        return UserError(
            f"step {visit.step}, task {visit.task}: the loss ({mean_loss:g}) or its gradient is not finite; nothing "
            f"was updated; the batch of {counted(visit.batch_size, 'example')} includes {', '.join(suspects)}; if they "
            f"are fine, lower optimizer.lr and muon_lr in another run{from_here}"
        )

    def _out_of_memory_error(self, loaded: LoadedBatch) -> UserError:
        visit = loaded.visit
        return UserError(
            f"step {visit.step}, task {visit.task}, view {visit.view}: out of memory; lower batch_size or the view's "
            "sizes, or set memory.chunk_size or memory.activation_checkpointing"
        )
