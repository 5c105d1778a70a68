"""The training loop: alternating gradient descent. Each step trains one task with one of its views."""

import math
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from openimp.checkpoint.saver import CheckpointError
from openimp.common.device import HostCopy
from openimp.common.errors import UserError, counted
from openimp.common.progress import StepBar, console
from openimp.data.loader import load_batches
from openimp.data.order import seed_key
from openimp.data.step_batches import LoadedBatch
from openimp.data.streams import Cursor
from openimp.encoding.items import Progress
from openimp.model.embedder import in_chunks
from openimp.model.moe import collect_usage
from openimp.objectives.losses import Losses
from openimp.parallel import distributed
from openimp.parallel.layout import mixed_precision
from openimp.planning.ledger import empty_batch
from openimp.recipe.schema import Recipe
from openimp.training.run_directory import RunDirectory, locked
from openimp.training.setup import Parts, Variant, set_up
from openimp.training.stopping import Stop, Stopped, stop_all_ranks, stop_signals


@distributed.report_dead_ranks()
def train(
    recipe: Recipe,
    run: Path,
    resume: bool | Literal["auto"] = False,
    variant: Variant | None = None,
    allow_changed_data: bool = False,
) -> bool:
    """Trains and evaluates a recipe. Returns True if the run is complete, and False if a signal stopped it.

    Args:
        run: directory to write to; with `resume`, that of an interrupted run of the same recipe.
        resume: True requires a checkpoint and resumes from the newest intact one; "auto" starts from step 0 if there is
            no checkpoint. Ranks that torchrun has restarted always use "auto".
        variant: what a study changes.
        allow_changed_data: resume even if a source has changed since the checkpoint was saved.

    Raises:
        UserError: the run cannot start, resume or continue. If data is bad or a loss is not finite, all complete steps
            are saved. If a rank died, the steps since the last checkpoint are lost.
        CheckpointError: a checkpoint cannot be written. Steps since the previous one are lost.
    """
    distributed.start()
    variant = variant or Variant()
    with locked(run):
        if resume and RunDirectory(run, recipe).finished(variant.name):
            complete = True
            console.print(f"{run}: all {recipe.train.steps:,} steps are done and evaluated already", soft_wrap=True)
        else:
            complete = Trainer(set_up(recipe, run, resume, variant, allow_changed_data)).train()
    distributed.shut_down()
    return complete


@dataclass
class PendingStep:
    """A step that is not complete yet. It passes through these states:

    1. Computed: its losses are on the device. If the trainer sums the tasks of a round, the update comes with the
       round's last step.
    2. Queued: its gradients and its update are queued on the device, which applies the update only if the gradients are
       finite. The host does not know yet whether they are.
    3. Confirmed: the gradients were finite, so the update was applied. The step counts, and is logged. If they were not
       finite, this state is never reached, and `Trainer.confirm` raises an error before the next update.
    """

    loaded: LoadedBatch  # the batch, without its tensors
    losses: Losses


class QueuedUpdate(NamedTuple):
    """An update in the second state, by one step or by a round. Its gradient norm tells whether it was applied."""

    steps: list[PendingStep]
    grad_norm: HostCopy


class Trainer(Parts):
    """One training run on this rank.

    Attributes:
        step: the number of confirmed steps, which is what a checkpoint contains.
        grad_norm: the Euclidean norm of the last confirmed gradient, before clipping.
        encode_all: `model.encode_all`, in chunks if the recipe says so.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(**vars(parts))
        self.modalities = self.data.modalities
        self.encode_all = in_chunks(self.model.encode_all, self.recipe.memory.chunk_size)
        self.step = self.checkpointing.saved
        self.grad_norm = 0.0
        self._bar = StepBar(self.recipe.train.steps, self.step)
        self._computed: list[PendingStep] = []
        self._queued: QueuedUpdate | None = None

    @property
    def steps_per_update(self) -> int:
        """1, or the number of tasks if the losses of all tasks are summed."""
        return sum(task.weight > 0 for task in self.recipe.tasks.values()) if self.variant.sum_tasks else 1

    def train(self) -> bool:
        """Trains the remaining steps, evaluates and saves. Returns False if a signal stopped it."""
        with stop_signals(self.checkpointing.saver.failed) as stop, self._bar, closing(self.log.metrics):
            try:
                self._train_steps(stop)
                self.save()
                self.evaluate(stop.watch)
                self.checkpointing.wait()
                self.log.bad.report()
                return True
            except Stopped:
                self.save(wait=True)
                saved = self.checkpointing.saved
                up_to = "" if saved == self.step else f" up to step {saved}"
                outcome = f"saved{up_to} in {self.run}; resume with --resume" if saved else "nothing is saved"
                console.print(f"stopped at step {self.step}, {outcome}", soft_wrap=True)
                return False
            except CheckpointError:
                raise
            except UserError:
                self.save(wait=True)
                raise

    def _train_steps(self, stop: Stop) -> None:
        save_every = self.recipe.train.save_every
        evaluate_every = self.recipe.evaluation.every
        if self.step and self._is_due(evaluate_every, self.step):
            self.evaluate(stop.watch)  # The interrupted run may have saved this step without evaluating it.
        batches = self.log.timer.timed(load_batches(self.data, self.step))
        try:
            # The alternation has chosen the task and the view of each batch: `loaded.visit`.
            for loaded in stop.watch_steps(batches, self.step, self._placeholder_batch):
                self.make_step(loaded)
                if self.variant.warns:
                    self.log.warn_of_first_batch(loaded)
                step = loaded.visit.step + 1
                must_save = self._is_due(save_every, step)
                must_evaluate = self._is_due(evaluate_every, step)
                if must_save or must_evaluate or self.log.is_due(step):
                    self.settle()
                    self.log.bad.check()
                if must_save:
                    self.save()
                if must_evaluate:
                    self.evaluate(stop.watch)
        except (Stopped, UserError):
            self.settle()  # If the queued step failed too, its error is raised instead.
            raise

    def make_step(self, loaded: LoadedBatch) -> Losses:
        """Queues one step on the device: the losses of its task, their gradients, and the update of the weights.

        Returns the losses.
        """
        step = loaded.visit.step
        if self.variant.before_step:
            self.variant.before_step(self, step)
        pending = PendingStep(loaded.without_tensors(), self.forward(loaded))
        self._computed.append(pending)
        if len(self._computed) == self.steps_per_update or step + 1 == self.recipe.train.steps:
            self._update()
        self.log.timer.end_step(loaded.visit.task)
        return pending.losses

    def forward(self, loaded: LoadedBatch) -> Losses:
        """The losses of a step's task."""
        task = self.recipe.tasks[loaded.visit.task]
        wants_usage = self.log.wants_usage(loaded.visit.step)
        collect_usage(self.model, wants_usage)
        # The model may have dropout, which a resumed run must repeat.
        torch.manual_seed(seed_key(self.recipe.seed, "dropout", loaded.visit.step, distributed.rank()) % 2**63)
        with mixed_precision(self.device, self.recipe.train.precision):
            losses = self.variant.losses(self.model, task, loaded.to(self.device), self.encode_all)
        return losses if wants_usage else replace(losses, usage={})

    def _update(self) -> None:
        """Queues the update by the computed steps: usually one, or a round whose losses are summed."""
        steps = self._computed
        self._computed = []
        loss = reduce(torch.add, (step.losses.total for step in steps))
        stops = any(step.loaded.stop is not None for step in steps)
        # NaN gradients, which no rank applies, if the loss is not finite or this rank has a reason to stop.
        grad_output = loss.detach() * 0 + (math.nan if stops else 1)
        loss.backward(grad_output)
        self.confirm()  # The update before. Meanwhile the device computes these gradients.
        grad_norm = self.updater.step(steps[-1].loaded.visit.step)
        for step in steps:
            step.losses = replace(step.losses, total=step.losses.total.detach())
        self._queued = QueuedUpdate(steps, grad_norm)

    def confirm(self) -> None:
        """Waits until the queued steps are complete, counts and logs them.

        Raises on all ranks: UserError if a loss or its gradient was not finite; if a rank had a reason to stop,
        `Stopped` or a UserError. The steps were not applied then.
        """
        if self._queued is None:
            return
        steps, grad_norm = self._queued
        self._queued = None
        self.grad_norm = grad_norm.read()
        if not math.isfinite(self.grad_norm):
            stop_all_ranks(next((step.loaded.stop for step in steps if step.loaded.stop is not None), None))
            raise self._not_finite(steps)
        if self.updater.ema:
            self.updater.ema.update(steps[-1].loaded.visit.step)
        for step in steps:
            visit = step.loaded.visit
            self.step = visit.step + 1
            if step.loaded.cursors:
                self.cursors[visit.task] = step.loaded.cursors
            self.log.record(step.loaded, step.losses)
        self._bar.step(self.step)
        if any(self.log.is_due(step.loaded.visit.step + 1) for step in steps):
            self.log.write(self.step, self.grad_norm, self._bar)

    def settle(self) -> None:
        """Confirms the queued steps, and gathers bad examples from all ranks.

        Afterwards, `state` has everything that a checkpoint needs.
        """
        self.confirm()
        self.log.bad.gather()

    def save(self, wait: bool = False) -> None:
        """Starts saving the confirmed steps, unless they are saved; with `wait`, returns when the files are written."""
        self.settle()
        self.checkpointing.save(self.state())
        if wait:
            self.checkpointing.wait()

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for resuming besides tensors, as JSON values. Every rank must call this."""
        cursors: dict[str, dict[str, Cursor]] = {}
        for cursors_of_rank in distributed.all_gather_object(self.cursors):
            for task, by_lane in cursors_of_rank.items():
                cursors[task] = cursors.get(task, {}) | by_lane
        state = {"step": self.step, "trainer": self.variant.name, "sources": self.fingerprints, "cursors": cursors}
        return state | self.log.state()

    def evaluate(self, watch: Progress | None = None) -> None:
        """Evaluates the EMA if there is one, else the model.

        If the result on the set that `evaluation.best` names is the best so far, this step is saved.
        `watch(passes, description)` wraps the forward passes. `Stop.watch` lets a signal stop them.
        """
        self.settle()
        if self.recipe.evaluation.sets:
            self.validation.evaluate(self.step, self.updater.ema, self.log.metrics, watch)
            self.validation.keep_best(self.step, self.checkpointing, self.state())

    def _is_due(self, every: int | None, step: int) -> bool:
        """Whether something that happens every so many steps is due after `step` steps: not within a round, nor after
        the last step."""
        return every is not None and step % every == 0 and step < self.recipe.train.steps and not self._computed

    def _placeholder_batch(self, step: int) -> LoadedBatch:
        """Zeros in place of a batch that could not be loaded, so that this rank takes part in the step's collectives.

        No rank applies the step.
        """
        visit = self.data.schedule[step]
        cpu = torch.device("cpu")
        batch = empty_batch(
            self.recipe, visit.task, visit.view, self.modalities, self.data.classes, cpu, distributed.world_size()
        )
        return LoadedBatch(visit, [batch])

    def _not_finite(self, steps: list[PendingStep]) -> UserError:
        """The error of steps that were not applied. Every rank must call this.

        It is about the first step whose loss is not finite, or else the last step. It names up to 8 examples of each
        rank whose loss is not finite. If all losses are finite, it names examples of this rank.
        """
        failed = next((step for step in steps if not step.losses.total.isfinite()), steps[-1])
        visit = failed.loaded.visit
        names = failed.loaded.names[:8]
        loss: Tensor = failed.losses.total
        suspects = distributed.all_gather_object([] if loss.isfinite() else names)
        return UserError(
            f"step {visit.step}, task {visit.task}: the loss ({float(distributed.all_reduce_mean(loss)):g}) or its "
            f"gradient is not finite; nothing was updated; the batch of {counted(visit.batch_size, 'example')} "
            f"includes {', '.join([*chain.from_iterable(suspects)] or names)}"
        )
