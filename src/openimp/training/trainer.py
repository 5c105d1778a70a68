"""The training loop: alternating gradient descent. Each step trains one task with one of its views."""

import math
from collections.abc import Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from openimp.checkpoint.folder import config_files, read_config
from openimp.checkpoint.resume import changed_sources
from openimp.checkpoint.saver import CheckpointError, Saver
from openimp.checkpoint.warm_start import WarmStart, open_warm_start
from openimp.common.device import autocast, keep_freed_memory
from openimp.common.errors import UserError, counted
from openimp.common.modality import Modalities, Modality
from openimp.common.progress import StepBar, console, track
from openimp.data.batch import Batch
from openimp.data.loader import load_batches
from openimp.data.step_batches import LoadedBatch, StepBatches
from openimp.evaluation.evaluate import check_sets
from openimp.model.embedder import Embedder, EncodeAll, in_chunks
from openimp.model.imp import IMP
from openimp.objectives import Losses, task_losses
from openimp.parallel import distributed
from openimp.parallel.layout import apply_parallelism
from openimp.planning.layouts import choose_layout, layout_of
from openimp.planning.ledger import costs
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from openimp.training.checkpointing import Checkpointing
from openimp.training.compilation import CompiledEncodeAll, signatures
from openimp.training.log import Log, print_plan
from openimp.training.run_directory import RunDirectory, locked
from openimp.training.stopping import Stop, Stopped, stop_signals
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
        step: number of complete steps.
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
        """The model, with random weights."""
        return IMP.from_recipe(recipe, modalities, classes)

    @staticmethod
    def losses(model: Any, task: Task, batch: Batch, encode_all: EncodeAll | None = None) -> Losses:
        """The losses of a task. `encode_all` replaces `model.encode_all` if it is compiled or works in chunks."""
        return task_losses(model, task, batch, encode_all)

    def __init__(
        self, recipe: Recipe, run: Path, resume: bool | Literal["auto"] = False, allow_changed_data: bool = False
    ) -> None:
        self.recipe, self.run, self.savable, self.device = recipe, run, True, distributed.start()
        console.quiet = distributed.rank() > 0
        keep_freed_memory()
        self._check_ranks()
        directory = RunDirectory(run, recipe)
        checkpoint = directory.checkpoint(resume, type(self).__name__)
        self.modalities = self.make_modalities(recipe)
        warm_start = open_warm_start(recipe, self.modalities) if checkpoint is None else None
        changed = self._open_data(checkpoint, warm_start, allow_changed_data)
        self.costs = costs(recipe, self.modalities, self.data.classes, self.build, self.losses, self.summed)
        text_files = self._make_model(warm_start)
        signature_count = len(signatures(recipe, self.modalities)) if recipe.train.compile else 0
        encode_all = CompiledEncodeAll(self.model, signature_count) if signature_count else self.model.encode_all
        self.encode_all = in_chunks(encode_all, recipe.memory.chunk_size)
        self.updater = Updater(recipe, self.model, self.costs)
        saver = Saver(run, recipe.train.keep_last)
        self.checkpointing = Checkpointing(saver, self.model, self.updater, text_files, self.state)
        state = self.checkpointing.load(checkpoint) if checkpoint else {}
        self.step = state.get("step", 0)
        self.cursors = self.data.load_cursors(state.get("cursors", {}), changed)
        directory.begin(text_files["config.json"])
        self.log = Log(recipe, run, self.modalities, self.costs, self.device, state)
        self.validation = Validation(
            recipe, run, self.modalities, self.data.classes, self.model, self._new_model, self.device
        )
        print_plan(recipe, run, self.model, self.device, self.costs, self.step, signature_count)

    def train(self) -> bool:
        """Trains the remaining steps, evaluates and saves. Returns False if a signal stopped it."""
        failed, bar = self.checkpointing.saver.failed, StepBar(self.recipe.train.steps, self.step)
        with stop_signals(failed) as stop, bar, closing(self.log.metrics):
            try:
                self._loop(stop, bar)
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

    def _loop(self, stop: Stop, bar: StepBar) -> None:
        recipe = self.recipe
        if self.step and self._due(recipe.evaluation.every):
            self.evaluate(stop.watch)  # The interrupted run may have saved this step without evaluating it.
        # The alternation has chosen the task and the view of each batch: `loaded.visit`.
        for loaded in stop.watch(self.log.timer.timed(load_batches(self.data, self.step))):
            losses = self.update(loaded)
            self.record(loaded, losses, bar)
            if self._due(recipe.train.save_every):
                self.save()
            if self._due(recipe.evaluation.every):
                self.evaluate(stop.watch)
        self.save()
        self.evaluate(stop.watch)
        self.checkpointing.wait()

    def update(self, loaded: LoadedBatch) -> Losses:
        """Makes one step: computes a task's losses and gradients, and updates the weights that the task uses."""
        losses = self.forward(loaded)
        losses.total.backward()
        self.apply_gradients(loaded, losses)
        return losses

    def forward(self, loaded: LoadedBatch) -> Losses:
        """The losses of the step's task."""
        task = self.recipe.tasks[loaded.visit.task]
        with autocast(self.device, self.recipe.train.precision):
            return self.losses(self.model, task, loaded.batch.to(self.device), self.encode_all)

    def apply_gradients(self, loaded: LoadedBatch, losses: Losses) -> None:
        """Updates the weights from their gradients, and counts the step. UserError if a gradient is not finite."""
        visit = loaded.visit
        if not self.updater.step(visit.step):
            loss = float(distributed.all_reduce_mean(losses.total.detach()))
            examples = ", ".join(self._suspects(loaded, losses))
            raise UserError(
                f"step {visit.step}, task {visit.task}: the loss ({loss:g}) or its gradient is not finite; nothing was "
                f"updated; the batch of {counted(visit.batch_size, 'example')} includes {examples}"
            )
        self.step = visit.step + 1

    def record(self, loaded: LoadedBatch, losses: Losses, bar: StepBar) -> None:
        """Logs a step, and keeps the position in its streamed source for the next checkpoint."""
        if loaded.cursor is not None:
            self.cursors[loaded.visit.task] = loaded.cursor
        if self.suggest_same:
            self.log.warn_of_duplicate_texts(loaded)
        self.log.record(loaded, losses, self.updater.grad_norm, bar)

    def save(self, wait: bool = False) -> None:
        """Starts saving this step, unless it is saved or cannot be; with `wait`, returns when the files are written."""
        if self.savable:
            self.checkpointing.save()
        if wait:
            self.checkpointing.wait()

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for resuming besides tensors, as JSON values."""
        state = {"step": self.step, "trainer": type(self).__name__, "sources": self.sources, "cursors": self.cursors}
        return state | self.log.state()

    def evaluate(self, progress: Any = None) -> None:
        """Evaluates the EMA if there is one, else the model.

        If the result on the set that `evaluation.best` names is the best so far, this step is saved.
        `progress(items, description)` wraps the loops of the evaluation. `Stop.watch` lets a signal stop them.
        """
        if self.recipe.evaluation.sets:
            ema = self.updater.ema.weights if self.updater.ema else None
            self.validation.evaluate(self.step, ema, self.log.metrics, progress)
            if self.savable:
                self.validation.keep_best(self.step, self.checkpointing)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0 and self.step < self.recipe.train.steps

    def _check_ranks(self) -> None:
        """Raises UserError if the ranks cannot train the recipe."""
        ranks, parallel = distributed.world_size(), self.recipe.parallel
        if ranks > 1 and type(self) is not Trainer:
            raise UserError(f"{type(self).__name__}: a study trains on one rank; start it without torchrun")
        if ranks > 1 and self.recipe.train.compile:
            raise UserError("train.compile works on one rank only; start without torchrun, or set train.compile=false")
        layout_of(self.recipe, ranks, parallel.shard_degree, parallel.expert_degree)

    def _open_data(self, checkpoint: Path | None, warm_start: WarmStart | None, allow_changed_data: bool) -> list[str]:
        """Opens the sources, fits or restores the modalities, and returns the sources that have changed."""
        self.data = StepBatches(self.recipe, self.modalities, track, distributed.rank(), distributed.world_size())
        self.sources = self.data.fingerprints()
        if checkpoint is None:
            self.data.fit(warm_start.stems if warm_start else ())
            return []
        changed = changed_sources(checkpoint, self.sources, allow_changed_data)
        _, classes, learned = read_config(checkpoint, None)
        for modality in self.modalities.values():
            modality.load_state(learned)
        if classes != self.data.classes:
            raise UserError(f"{checkpoint}: the classes in the data have changed since it was saved")
        return changed

    def _make_model(self, warm_start: WarmStart | None) -> dict[str, str]:
        """Creates the model, distributes it over the ranks, and returns the text files of its checkpoints."""
        torch.manual_seed(self.recipe.seed)
        self.model = self._new_model().train()
        if warm_start is not None:
            console.print(warm_start.load(self.model, self.data.classes), soft_wrap=True)
        check_sets(self.model, self.recipe, self.modalities, self.data.classes)
        # Before FSDP2 replaces the model's class, whose name is in config.json.
        text_files = config_files(self.model, self.recipe, self.modalities, self.data.classes)
        layout = choose_layout(self.recipe, self.model, self.device)
        apply_parallelism(
            self.model, self.model.blocks(), self.model.experts(), ("encode", "encode_all", "project", "classify"),
            layout, self.device,
        )  # fmt: skip
        if layout.ranks > 1:
            console.print(f"parallel: {layout}")
        return text_files

    def _new_model(self) -> Embedder:
        sizes = {name: len(values) for name, values in self.data.classes.items()}
        return self.build(self.recipe, self.modalities, sizes)

    def _suspects(self, loaded: LoadedBatch, losses: Losses) -> list[str]:
        """The names of 8 examples of every rank with a non-finite loss; if there is no such rank, of this rank."""
        source = self.data.sources[loaded.visit.task]
        names = [source.row_name(row) for row in loaded.batch.rows[:8]]
        finite = math.isfinite(float(losses.total.detach()))
        return [*chain.from_iterable(distributed.all_gather_object([] if finite else names))] or names
