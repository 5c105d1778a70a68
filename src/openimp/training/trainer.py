"""The training loop: alternating gradient descent. Each step trains one task with one of its views."""

import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openimp.checkpoint.folder import config_files, read_config
from openimp.checkpoint.resume import changed_sources
from openimp.checkpoint.saver import CheckpointError, Saver
from openimp.checkpoint.warm_start import WarmStart, open_warm_start
from openimp.common.device import keep_freed_memory, precision_of
from openimp.common.errors import UserError, counted
from openimp.common.modality import Modalities, Modality
from openimp.common.progress import StepBar, console, track
from openimp.data.batch import Batch
from openimp.data.loader import load_batches
from openimp.data.order import seed_key
from openimp.data.step_batches import LoadedBatch, StepBatches
from openimp.data.streams import Cursor
from openimp.encoding.items import Progress
from openimp.evaluation.evaluate import check_sets
from openimp.model.build import build_model
from openimp.model.embedder import Embedder, EncodeAll, in_chunks
from openimp.model.learning_rates import freeze
from openimp.model.moe import collect_usage
from openimp.objectives import Losses, task_losses
from openimp.parallel import distributed
from openimp.parallel.deferred_init import DeferredInit
from openimp.parallel.layout import apply_parallelism, mixed_precision
from openimp.planning.layouts import choose_layout, layout_of
from openimp.planning.ledger import costs, empty_batch
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from openimp.training.checkpointing import Checkpointing
from openimp.training.compilation import compile_blocks, signatures, variants
from openimp.training.log import Log, print_plan
from openimp.training.run_directory import RunDirectory, locked
from openimp.training.stopping import Stop, Stopped, stop_all_ranks, stop_signals
from openimp.training.updater import Updater
from openimp.training.validation import Validation


@distributed.report_dead_ranks()
def train(
    recipe: Recipe,
    run: Path,
    resume: bool | Literal["auto"] = False,
    trainer: "type[Trainer] | None" = None,
    allow_changed_data: bool = False,
) -> bool:
    """Trains and evaluates a recipe. Returns True if the run is complete, and False if a signal stopped it.

    Args:
        run: directory to write to; with `resume`, that of an interrupted run of the same recipe.
        resume: True requires a checkpoint and resumes from the newest intact one; "auto" starts from step 0 if there is
            no checkpoint. Ranks that torchrun has restarted always use "auto".
        trainer: a subclass of `Trainer`, as studies define them; None: `Trainer` itself.
        allow_changed_data: resume even if a source has changed since the checkpoint was saved.

    Raises:
        UserError: the run cannot start, resume or continue. If data is bad or a loss is not finite, all complete steps
            are saved. If a rank died, the steps since the last checkpoint are lost.
        CheckpointError: a checkpoint cannot be written. Steps since the previous one are lost.
    """
    distributed.start()
    console.quiet = distributed.rank() > 0
    trainer = trainer or Trainer
    with locked(run):
        if resume and RunDirectory(run, recipe).finished(trainer.__name__):
            complete = True
            console.print(f"{run}: all {recipe.train.steps:,} steps are done and evaluated already", soft_wrap=True)
        else:
            complete = trainer(recipe, run, resume, allow_changed_data).train()
    distributed.shut_down()
    return complete


class Trainer:
    """One training run on this rank.

    A subclass trains another model if it overrides the three static methods, and changes how a step is made if it
    overrides `update`. Data, resuming, metrics and evaluation stay the same.

    Attributes:
        step: number of steps that are known to be complete; see `confirm`.
        savable: False in the middle of an update that takes several steps. Nothing is saved then.
        summed: whether an update sums the losses of all tasks.
        suggest_same: whether to suggest the option `same` if a task has many duplicate texts.
    """

    suggest_same = True
    summed = False

    @staticmethod
    def make_modalities(recipe: Recipe) -> dict[str, Modality]:
        """The modalities by name, not fitted. Their tokens are the model's inputs."""
        return recipe.make_modalities()

    @staticmethod
    def build(recipe: Recipe, modalities: Modalities, classes: Mapping[str, int]) -> Embedder:
        """The model, with random weights, or a wrapped one, whose weights are loaded."""
        return build_model(recipe, modalities, classes)

    @staticmethod
    def losses(model: Any, task: Task, batch: Batch, encode_all: EncodeAll | None = None) -> Losses:
        """The losses of a task. `encode_all` replaces `model.encode_all` if it works in chunks."""
        return task_losses(model, task, batch, encode_all)

    def __init__(
        self, recipe: Recipe, run: Path, resume: bool | Literal["auto"] = False, allow_changed_data: bool = False
    ) -> None:
        self.recipe, self.run, self.savable, self.device = recipe, run, True, distributed.start()
        self._unconfirmed: tuple[LoadedBatch, Tensor] | None = None
        self._unrecorded: list[tuple[LoadedBatch, Losses]] = []
        console.quiet = distributed.rank() > 0
        keep_freed_memory()
        self._check_ranks()
        directory = RunDirectory(run, recipe)
        checkpoint = directory.checkpoint(resume, type(self).__name__)
        self.modalities = self.make_modalities(recipe)
        warm_start = open_warm_start(recipe, self.modalities) if checkpoint is None else None
        changed = self._open_data(checkpoint, warm_start, allow_changed_data)
        self.costs = costs(recipe, self.modalities, self.data.classes, self.build, self.losses, self.summed)
        ranks = distributed.world_size()
        signature_count = len(signatures(recipe, self.modalities, ranks)) if recipe.train.compile else 0
        text_files = self._make_model(checkpoint, warm_start, signature_count)
        self.encode_all = in_chunks(self.model.encode_all, recipe.memory.chunk_size)
        self.updater = Updater(recipe, self.model, self.costs)
        saver = Saver(run, recipe.train.keep_last)
        self.checkpointing = Checkpointing(saver, self.model, self.updater, text_files, self.state)
        state = self.checkpointing.load(checkpoint) if checkpoint else {}
        self.step = state.get("step", 0)
        self.cursors = self.data.load_cursors(state.get("cursors", {}), changed)
        directory.begin(text_files["config.json"])
        self.log = Log(recipe, run, self.modalities, self.data.schedule, self.costs, self.device, state)
        self.bar = StepBar(recipe.train.steps, self.step)
        self.validation = Validation(recipe, run, self.modalities, self.data.classes, self.model)
        print_plan(recipe, run, self.model, self.device, self.costs, self.step, signature_count)

    def train(self) -> bool:
        """Trains the remaining steps, evaluates and saves. Returns False if a signal stopped it."""
        with stop_signals(self.checkpointing.saver.failed) as stop, self.bar, closing(self.log.metrics):
            try:
                self._loop(stop)
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
        return True

    def _loop(self, stop: Stop) -> None:
        recipe = self.recipe
        if self.step and self._due(recipe.evaluation.every):
            self.evaluate(stop.watch)  # The interrupted run may have saved this step without evaluating it.
        batches = self.log.timer.timed(load_batches(self.data, self.step))
        try:
            # The alternation has chosen the task and the view of each batch: `loaded.visit`.
            for loaded in stop.watch_steps(batches, self.step, self._stand_in):
                self._make_step(loaded)
                if self._settles_after(loaded.visit.step + 1):
                    self.settle()
                    self.log.bad.check()
                    if self._due(recipe.train.save_every):
                        self.save()
                    if self._due(recipe.evaluation.every):
                        self.evaluate(stop.watch)
        except (Stopped, UserError):
            self.settle()  # The last step may have failed, which is then the error.
            raise
        self.save()
        self.evaluate(stop.watch)
        self.checkpointing.wait()
        self.log.bad.report()

    def _make_step(self, loaded: LoadedBatch) -> None:
        losses = self.update(loaded)
        self.log.timer.end_step(loaded.visit.task)
        if self.suggest_same:
            self.log.warn_of_duplicate_texts(loaded)
        self._unrecorded.append((loaded.without_tensors(), replace(losses, total=losses.total.detach())))
        self._record()

    def update(self, loaded: LoadedBatch) -> Losses:
        """Makes one step: computes a task's losses and gradients, and updates the weights that the task uses."""
        losses = self.forward(loaded)
        self.backward(loaded, losses.total)
        self.apply_gradients(loaded, losses)
        return losses

    def backward(self, loaded: LoadedBatch, loss: Tensor) -> None:
        """Computes the gradients of a loss. They are NaN if it is not finite or this rank has a reason to stop; then
        no rank applies the step."""
        grad_output = loss.detach() * 0 + (1 if loaded.stop is None else math.nan)
        loss.backward(grad_output)

    def forward(self, loaded: LoadedBatch) -> Losses:
        """The losses of the step's task."""
        task, wants_usage = self.recipe.tasks[loaded.visit.task], self.log.wants_usage(loaded.visit.step)
        collect_usage(self.model, wants_usage)
        if self.recipe.model.wrap:  # Its towers may have dropout, which a resumed run must repeat.
            torch.manual_seed(seed_key(self.recipe.seed, "dropout", loaded.visit.step, distributed.rank()) % 2**63)
        with mixed_precision(self.device, self.recipe.train.precision):
            losses = self.losses(self.model, task, loaded.to(self.device), self.encode_all)
        return losses if wants_usage else replace(losses, usage={})

    def apply_gradients(self, loaded: LoadedBatch, losses: Losses) -> None:
        """Queues the update of the weights. If a gradient is not finite, they stay as they are, and the next call of
        `confirm` raises."""
        self.confirm()  # The step before. Meanwhile the device computes this step's gradients.
        self.updater.step(loaded.visit.step)
        self._unconfirmed = loaded.without_tensors(), losses.total.detach()

    def confirm(self) -> None:
        """Waits until the last step is complete, and counts it.

        Raises on all ranks: UserError if the loss or its gradient was not finite; if a rank had a reason to stop,
        `Stopped` or a UserError. The step was not applied then.
        """
        if self._unconfirmed is None:
            return
        (loaded, loss), self._unconfirmed = self._unconfirmed, None
        if not self.updater.confirm():
            self._unrecorded.clear()
            stop_all_ranks(loaded.stop)
            raise self._not_finite(loaded, loss)
        self.step = loaded.visit.step + 1

    def settle(self) -> None:
        """Confirms and records the last step, and gathers bad examples from all ranks. `state` is complete then."""
        self.confirm()
        self._record()
        self.log.bad.gather()

    def _record(self) -> None:
        """Logs the complete steps, and keeps this rank's positions in streamed sources for the next checkpoint."""
        while self._unrecorded and self._unrecorded[0][0].visit.step < self.step:
            loaded, losses = self._unrecorded.pop(0)
            if loaded.cursors:
                self.cursors[loaded.visit.task] = loaded.cursors
            self.log.record(loaded, losses, self.updater.grad_norm, self.bar)

    def save(self, wait: bool = False) -> None:
        """Starts saving this step, unless it is saved or cannot be; with `wait`, returns when the files are written."""
        self.settle()
        if self.savable:
            self.checkpointing.save()
        if wait:
            self.checkpointing.wait()

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for resuming besides tensors, as JSON values. Every rank must call this."""
        cursors: dict[str, dict[str, Cursor]] = {}
        for own in distributed.all_gather_object(self.cursors):
            for task, by_lane in own.items():
                cursors[task] = cursors.get(task, {}) | by_lane
        state = {"step": self.step, "trainer": type(self).__name__, "sources": self.sources, "cursors": cursors}
        return state | self.log.state()

    def evaluate(self, watch: Progress | None = None) -> None:
        """Evaluates the EMA if there is one, else the model.

        If the result on the set that `evaluation.best` names is the best so far, this step is saved.
        `watch(passes, description)` wraps the forward passes. `Stop.watch` lets a signal stop them.
        """
        self.settle()
        if self.recipe.evaluation.sets:
            self.validation.evaluate(self.step, self.updater.ema, self.log.metrics, watch)
            if self.savable:
                self.validation.keep_best(self.step, self.checkpointing)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0 and self.step < self.recipe.train.steps

    def _settles_after(self, step: int) -> bool:
        """Whether anything is logged, saved or evaluated after `step` steps.

        Only then does the host wait for the device, and do the ranks gather what they have found.
        """
        intervals = self.recipe.train.save_every, self.recipe.evaluation.every
        return self.log.is_due(step) or any(every and step % every == 0 for every in intervals)

    def _stand_in(self, step: int) -> LoadedBatch:
        """Replaces a batch that this rank could not load, in a step that no rank will apply."""
        visit, cpu = self.data.schedule[step], torch.device("cpu")
        shapes = self.recipe, visit.task, visit.view, self.modalities, self.data.classes
        return LoadedBatch(visit, [empty_batch(*shapes, cpu, distributed.world_size())])

    def _check_ranks(self) -> None:
        """Raises UserError if the ranks cannot train the recipe."""
        ranks = distributed.world_size()
        if ranks > 1 and type(self) is not Trainer:
            raise UserError(f"{type(self).__name__}: a study trains on one rank; start it without torchrun")
        layout_of(self.recipe, ranks, self.recipe.parallel.shard_degree)

    def _open_data(self, checkpoint: Path | None, warm_start: WarmStart | None, allow_changed_data: bool) -> list[str]:
        """Opens the sources, fits or restores the modalities, and returns the sources that have changed."""
        place, classes = (distributed.rank(), distributed.world_size()), None
        if checkpoint is not None:
            _, classes, learned = read_config(checkpoint, None)
            for modality in self.modalities.values():
                modality.load_state(learned)
        self.data = distributed.run_first_on_node(lambda: StepBatches(self.recipe, self.modalities, track, *place))
        self.sources = distributed.run_on_rank_zero(self.data.fingerprints)  # It reads a part of every file.
        if checkpoint is None:
            self.data.fit(warm_start.stems if warm_start else ())
            return []
        changed = changed_sources(checkpoint, self.sources, allow_changed_data)
        if classes != self.data.classes:
            raise UserError(f"{checkpoint}: the classes in the data have changed since it was saved")
        return changed

    def _make_model(
        self, checkpoint: Path | None, warm_start: WarmStart | None, signature_count: int
    ) -> dict[str, str]:
        """Creates the model, distributes it over the ranks, and returns the text files of its checkpoints.

        Its weights are the initial ones, unless they are to be loaded from `checkpoint`. With `train.compile`, its
        blocks are compiled, for `signature_count` signatures.
        """
        deferred, sizes = DeferredInit(self.recipe.seed), {name: len(some) for name, some in self.data.classes.items()}
        build = partial(self.build, self.recipe, self.modalities, sizes)
        self.model = deferred.build(build, at_once=self.recipe.model.wrap is not None).train()
        freeze(self.model, self.recipe.optimizer)
        distributed.run_first_on_node(lambda: check_sets(self.model, self.recipe, self.modalities, self.data.classes))
        # Before FSDP2 replaces the model's class, whose name is in config.json.
        text_files = config_files(self.model, self.recipe, self.modalities, self.data.classes)
        layout = choose_layout(self.recipe, self.model, self.device)
        if signature_count:
            # Expert parallelism shards the experts of a block as a group of its own, whose hooks divide a graph anyway.
            apart = self.model.experts() if layout.expert_degree > 1 else ()
            compile_blocks(self.model.blocks(), signature_count * variants(self.model), apart)
        # All ranks gather in the same type, whatever their processors.
        precisions = distributed.all_gather_object(precision_of(self.device, self.recipe.train.precision))
        apply_parallelism(
            self.model, self.model.blocks(), self.model.experts(), ("encode", "encode_all", "project", "classify"),
            layout, self.device, torch.float32 if "fp32" in precisions else torch.bfloat16,
            self.model.fp32_modules(), cast_inputs=bool(self.recipe.model.wrap),
        )  # fmt: skip
        if layout.ranks > 1:
            console.print(f"parallel: {layout}")
        if checkpoint is None:
            deferred.initialize(self.model)
        if warm_start is not None:
            console.print(warm_start.load(self.model, self.data.classes), soft_wrap=True)
        return text_files

    def _not_finite(self, loaded: LoadedBatch, loss: Tensor) -> UserError:
        """The error of a step that was not applied. Every rank must call this.

        It names up to 8 examples of each rank whose loss is not finite. If all losses are finite, it names examples of
        this rank.
        """
        visit, names = loaded.visit, loaded.names[:8]
        suspects = distributed.all_gather_object([] if loss.isfinite() else names)
        return UserError(
            f"step {visit.step}, task {visit.task}: the loss ({float(distributed.all_reduce_mean(loss)):g}) or its "
            f"gradient is not finite; nothing was updated; the batch of {counted(visit.batch_size, 'example')} "
            f"includes {', '.join([*chain.from_iterable(suspects)] or names)}"
        )
