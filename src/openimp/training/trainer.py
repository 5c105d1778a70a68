"""Training: alternating gradient descent, one task and one view a step."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openimp.checkpoint.folder import checkpoints, load_training, mark_best, moments_of, read_config, step_of, texts_of
from openimp.checkpoint.resume import changed_sources, common_checkpoints, resumable
from openimp.checkpoint.saver import NotSaved, Saver
from openimp.checkpoint.warm_start import open_start
from openimp.common.device import autocast, keep_freed_memory, precision_of
from openimp.common.errors import UserError
from openimp.common.modality import Modality, Tokens
from openimp.common.progress import StepBar, console, track
from openimp.common.safe_files import cache_folder, private_folder, refuse_links, write_text
from openimp.data.batch import Batch
from openimp.data.loader import Loaded, StepBatches, make_loader
from openimp.data.trust import record_training
from openimp.evaluation.evaluate import evaluate, open_sets
from openimp.evaluation.figures import table
from openimp.evaluation.results import best_step
from openimp.model.embedder import Embedder, Encode, Encoded, in_pieces, piece_sizes
from openimp.model.imp import IMP
from openimp.objectives import Losses, equal_texts, task_losses
from openimp.parallel import distributed, layout
from openimp.parallel.exchange import make_exchange
from openimp.planning.ledger import costs, mixture_table
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from openimp.training.bad_examples import BadExamples
from openimp.training.metrics import Metrics
from openimp.training.optimizers import make_optimizers, muon_matrices, schedule, set_learning_rate
from openimp.training.pace import Pace, shown
from openimp.training.stopping import Stopped, stop_signals

EQUAL_TEXTS = 0.1
"""The share of equal texts in a batch from which on it is told how to make one item of their examples."""


@distributed.deaths_told()
def train(
    recipe: Recipe,
    run: Path,
    resume: bool | Literal["auto"] = False,
    loop: "type[Training] | None" = None,
    allow_changed_data: bool = False,
) -> bool:
    """Trains a recipe into a run directory, evaluates it, and says whether it came to its end or was stopped.

    Args:
        recipe: what to train.
        run: the directory to write; with `resume`, one that holds an interrupted run of the same recipe.
        resume: go on from its newest intact checkpoint; "auto": but start it if it has no checkpoint. What torchrun
            starts again does so unasked.
        loop: what makes the steps, for studies of other ways to train; left out: `Training`.
        allow_changed_data: resume even if a source is not what it was when the checkpoint was made.

    Raises:
        UserError: bad data, a run that is already there, no intact checkpoint, one of another recipe, loop or data, a
            model that cannot be started from, or a loss that is not finite. The steps before it are saved. Or another
            process died; the steps since the last checkpoint are lost.
        NotSaved: a checkpoint cannot be written. The steps since the one before it are lost.
    """
    training = (loop or Training)(recipe, run, resume, allow_changed_data)
    if training.step == recipe.train.steps:
        console.print(f"{run}: all {training.step:,} steps are made already", soft_wrap=True)
    with (
        stop_signals(training.saver.failed) as stop,
        StepBar(recipe.train.steps, training.step) as bar,
        closing(training.metrics),
    ):
        try:
            if training.step and training.due(recipe.evaluation.every):
                training.evaluate(stop.watch)  # What ended the run may have come before this was done.
            for loaded in stop.watch(training.pace.batches(make_loader(training.data, training.step))):
                losses = training.update(loaded)
                training.record(loaded, losses, bar)
                if training.due(recipe.train.save_every):
                    training.save()
                if training.due(recipe.evaluation.every):
                    training.evaluate(stop.watch)
            training.save()
            training.evaluate(stop.watch)
            training.saver.wait()
        except Stopped:
            training.save()
            training.saver.wait()
            kept = "saved" if training.saved == training.step else f"saved up to step {training.saved}"
            told = f"{kept} in {run}; go on with --resume" if training.saved else "nothing is saved"
            console.print(f"stopped at step {training.step}, {told}", soft_wrap=True)
            distributed.leave()
            return False
        except NotSaved:
            raise
        except UserError:
            training.save()
            training.saver.wait()
            raise
    distributed.leave()
    return True


class Training:
    """All that one training holds.

    Its three static methods say what is trained. A subclass that puts another model there gets data, steps, resuming,
    metrics and evaluation as they are.
    """

    @staticmethod
    def read(recipe: Recipe) -> dict[str, Modality]:
        """The modalities, as the model wants their tokens."""
        return recipe.make_modalities()

    @staticmethod
    def build(recipe: Recipe, modalities: Mapping[str, Modality], classes: Mapping[str, int]) -> Embedder:
        """The model, with random weights."""
        return IMP.from_recipe(recipe, modalities, classes)

    @staticmethod
    def losses(model: Any, task: Task, batch: Batch, encode: Encode | None = None) -> Losses:
        """What a task wants of the model; `encode` is the model's, or the same compiled."""
        return task_losses(model, task, batch, encode)

    def __init__(
        self, recipe: Recipe, run: Path, resume: bool | Literal["auto"], allow_changed_data: bool = False
    ) -> None:
        self.recipe, self.run, self.step = recipe, run, 0
        self.device = distributed.start()
        console.quiet = distributed.rank() > 0
        keep_freed_memory()
        if distributed.world() > 1 and type(self) is not Training:
            raise UserError(f"{type(self).__name__}: a study trains in one process; start it without torchrun")
        self.compile = recipe.train.compile and distributed.world() == 1
        if run.exists() and not run.is_dir():
            raise UserError(f"{run}: is a file; name a directory with --run-dir")
        distributed.alone(lambda: refuse_links(run))
        saved, job = bool(common_checkpoints(run)), run / "torchrun.job"
        recipe_file = run / "recipe.yaml"
        begun = saved or (run / "tensorboard").exists()
        # Else it is of a run that died before it began, or what somebody wrote by hand.
        if recipe_file.exists() and not begun and not _holds(recipe_file, recipe.to_yaml()):
            raise UserError(f"{recipe_file}: a run would write over it; name another directory with --run-dir")
        # Not after a start that was refused, which torchrun repeats too.
        again = distributed.restarted() and job.exists() and _holds(job, distributed.job())
        if resume == "auto" or again:
            resume = saved  # A run that died before it saved any loses nothing when it starts anew.
        elif recipe_file.exists():
            if not saved:
                raise UserError(
                    f"{run}: holds a run that saved no checkpoint; start it anew with --resume auto, or name another "
                    "directory with --run-dir"
                )
            if not resume:
                raise UserError(
                    f"{run}: holds a run already; go on with --resume, or name another directory with --run-dir"
                )
        latest = resumable(recipe, run, type(self).__name__) if resume else None
        self.modalities = self.read(recipe)
        start = open_start(recipe, self.modalities) if latest is None else None
        self.data = StepBatches(recipe, self.modalities, track, distributed.rank(), distributed.world())
        self.sources = self.data.fingerprints()
        changed = changed_sources(latest, self.sources, allow_changed_data) if latest else []
        if latest is None:
            self.data.fit(start.stems if start else ())
        else:
            _, classes, learned = read_config(latest, None)
            for modality in self.modalities.values():
                modality.load_state(learned)
            if classes != self.data.classes:
                raise UserError(f"{latest}: was trained on other classes than the data has now")
        self.costs = costs(recipe, self.modalities, self.data.classes, self.build, self.losses)
        torch.manual_seed(recipe.seed)
        sizes = {name: len(values) for name, values in self.data.classes.items()}
        self.model = self.build(recipe, self.modalities, sizes).train()
        if start is not None:
            console.print(start.load(self.model, self.data.classes), soft_wrap=True)
        open_sets(self.model, recipe, self.modalities, classes=self.data.classes)
        # Of the model as it was made, for one in shards has another class.
        self.texts = texts_of(self.model, recipe, self.modalities, self.data.classes)
        copies = layout.spread(
            self.model, self.model.blocks(), self.model.experts(), ("encode", "project", "classify"),
            recipe.parallel.shard_degree, recipe.parallel.expert_degree, self.device,
        )  # fmt: skip
        encode = compiled_encode(self.model, len(self._signatures())) if self.compile else self.model.encode
        self.encode = in_pieces(encode, recipe.memory.chunk_size)
        named = dict(self.model.named_parameters())
        # With zero gradients every step updates everything.
        updated = [{*named}] if recipe.optimizer.zero_missing_grads else [cost.touched for cost in self.costs.values()]
        steps = [{named[name] for name in names} for names in updated]
        self.exchange = make_exchange(self.model, copies, muon_matrices(recipe.optimizer, self.model), steps)
        self.optimizers = make_optimizers(recipe.optimizer, self.model, self.exchange.own)
        self.averaged: dict[str, Tensor] | None = None
        if recipe.optimizer.ema_decay:
            self.averaged = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        state: dict[str, Any] = {}
        if latest is not None:
            state = load_training(latest, self.model, self.optimizers, self.averaged)
            self.step = state["step"]
        self.saved, self.saver = self.step, Saver(run, recipe.train.keep_last)
        self.cursors = self.data.load_cursors(state.get("cursors", {}), changed)
        distributed.wait()  # Until none looks for a run that is there already.

        def begin() -> None:
            if distributed.rank() == 0:
                run.mkdir(parents=True, exist_ok=True)
                write_text(recipe_file, recipe.to_yaml())
                record_training(self.texts["config.json"])
                if distributed.job():
                    write_text(job, distributed.job())

        distributed.agreed(begin)
        self.metrics = Metrics(run, self.step, state.get("totals"))
        self.pace = Pace(self.model, self.device)
        self.bad = BadExamples(run, self.step, recipe.train.max_bad_fraction, state.get("bad"))
        self.grad_norm = 0.0
        self.texts_looked_at: set[str] = set()
        self._print_plan()

    def update(self, loaded: Loaded) -> Losses:
        """One step: one task's losses, their gradients, and one update of the parameters that the task touches."""
        losses = self.forward(loaded)
        losses.total.backward()
        self.exchange.gradients()
        self.apply_gradients(loaded, losses)
        return losses

    def forward(self, loaded: Loaded) -> Losses:
        """The losses of the step's task."""
        task = self.recipe.tasks[loaded.visit.task]
        with autocast(self.device, self.recipe.train.precision):
            return self.losses(self.model, task, loaded.batch.to(self.device), self.encode)

    def apply_gradients(self, loaded: Loaded, losses: Losses) -> None:
        """Clips the gradients, updates the parameters that have one (all with `zero_grads`), and forgets them.

        Raises:
            UserError: the loss or its gradient is not finite.
        """
        visit, recipe = loaded.visit, self.recipe
        if recipe.optimizer.zero_missing_grads:
            self.exchange.fill_with_zeros()
        norm = self.exchange.clip(recipe.optimizer.max_grad_norm or math.inf)
        # This waits for a GPU to end the backward pass: the price of never updating with what is not finite.
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            rows = ", ".join(self._suspects(loaded, losses))
            loss = float(distributed.mean(losses.total.detach()))
            raise UserError(
                f"step {visit.step}, task {visit.task}: the loss ({loss:g}) or its gradient is not finite; nothing was "
                f"updated; among its {visit.batch} examples are {rows}"
            )
        set_learning_rate(self.optimizers, schedule(recipe, visit.step))
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.limit_temperatures()
        self.exchange.updates()
        # None, not zero: what the next task does not touch keeps its value and its moments.
        self.model.zero_grad(set_to_none=True)
        if self.averaged is not None:
            # A short history is averaged over a short time (as in timm's ModelEmaV3 with warm-up).
            decay = min(recipe.optimizer.ema_decay or 0, (1 + visit.step) / (10 + visit.step))
            averaged, weights = (
                [layout.own_part(tensor) for tensor in tensors.values()]
                for tensors in (self.averaged, self.model.state_dict())
            )
            torch._foreach_lerp_(averaged, weights, 1 - decay)
        self.step = visit.step + 1

    def _suspects(self, loaded: Loaded, losses: Losses) -> list[str]:
        """Names of the first examples of the processes whose loss is not finite; of all where every loss is."""
        source = self.data.sources[loaded.visit.task]
        names = [source.where(row) for row in loaded.batch.rows[:8]]
        finite = math.isfinite(float(losses.total.detach()))
        return distributed.told_to_all([] if finite else names) or names

    def record(self, loaded: Loaded, losses: Losses, bar: StepBar) -> None:
        """Adds a step to the metrics, and writes and shows a line when one is due."""
        visit = loaded.visit
        if loaded.cursor is not None:
            self.cursors[visit.task] = loaded.cursor
        self.pace.step(visit.task)
        self.warn_of_equal_texts(loaded)
        self.metrics.add(visit.task, losses, self.costs[visit.task, visit.view], loaded.digest)
        bar.step(self.step)
        if self.due(self.recipe.train.log_every) or self.step == self.recipe.train.steps:
            rate = self.recipe.optimizer.lr * schedule(self.recipe, visit.step)
            line = self.metrics.write(self.step, rate, self.grad_norm, self.pace.line())
            told = {name: line["tasks"][name]["loss"] for name in self.recipe.tasks if name in line["tasks"]}
            bar.report(self.step, told, *shown(line))
            if warning := self.pace.warning(line, self.recipe, self.modalities):
                console.print(warning, soft_wrap=True)
        # Last, for it may end the run, whose checkpoint then holds all of this step.
        self.bad.add(visit.step, visit.task, visit.batch, distributed.told_to_all(loaded.bad))

    def warn_of_equal_texts(self, loaded: Loaded) -> None:
        """Tells of the first batch of a task whose texts are not told apart well enough to be negatives."""
        name = loaded.visit.task
        if name not in self.texts_looked_at:
            self.texts_looked_at.add(name)
            if (share := equal_texts(self.recipe.tasks[name], loaded.batch)) > EQUAL_TEXTS:
                console.print(
                    f"task {name}: {share:.0%} of a batch's texts belong to other examples too, and the loss pushes "
                    "these apart; with `same: COLUMN`, a contrastive objective takes rows of equal values for one item",
                    soft_wrap=True,
                )

    def due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0 and self.step < self.recipe.train.steps

    def save(self) -> None:
        """Lets a checkpoint be written in the background, if there were steps since the last; waits for that one.

        Raises:
            NotSaved: that one could not be written.
        """
        if self.step == self.saved:
            return
        state = {
            "step": self.step,
            "loop": type(self).__name__,
            "sources": self.sources,
            "cursors": self.cursors,
            "bad": self.bad.state,
            "totals": {task: dict(units) for task, units in self.metrics.totals.items()},
        }
        texts = {**self.texts, "state.json": json.dumps(state, indent=1)}
        moments = moments_of(self.model, self.optimizers)
        tensors = {"model": self.model.state_dict(), "optimizer": moments}
        if self.averaged is not None:
            tensors["ema"] = self.averaged
        once = {name for name, p in self.model.named_parameters() if p in self.exchange.updated_once}
        only_here = {key for key in moments if key.partition("|")[0] in once}
        self.saver.start(self.step, texts, tensors, only_here)
        self.saved = self.step

    def evaluate(self, progress: Any = None) -> None:
        """Measures the model, with the averaged weights where there are any, and writes and prints the results.

        Raises:
            NotSaved: it is the best so far, which the recipe keeps, and cannot be saved.
        """
        if not self.recipe.evaluation.sets:
            return
        model, best_of = self.whole_model(self.averaged), self.recipe.evaluation.best

        def measure() -> bool:
            assert model is not None
            try:
                results = evaluate(
                    model.to(self.device), self.recipe, self.modalities, step=self.step, progress=progress,
                    classes=self.data.classes,
                )  # fmt: skip
            except Stopped:
                return False
            self.metrics.results(self.run, results)
            console.print(table(results))
            return True

        if not distributed.alone(measure):
            raise Stopped
        if best_of:
            self.saver.wait()
            there = {self.step, *map(step_of, checkpoints(self.run))}
            best = distributed.alone(lambda: best_step(self.run / "results.jsonl", best_of, there))
            if best == self.step:
                self.save()
                self.saver.wait()
            if distributed.rank() == 0:
                mark_best(self.run, best)

    def whole_model(self, tensors: Mapping[str, Tensor] | None = None) -> Embedder | None:
        """The model, or one with these tensors in the place of its own, in the first process; in others None."""
        if tensors is None and distributed.world() == 1:
            return self.model
        found = layout.gathered(self.model.state_dict() if tensors is None else tensors)
        if distributed.rank():
            return None
        sizes = {name: len(values) for name, values in self.data.classes.items()}
        with torch.random.fork_rng(devices=[]):
            model = self.build(self.recipe, self.modalities, sizes)
        model.load_state_dict(found)
        return model

    def _signatures(self) -> set[tuple[str, int, int]]:
        """The shapes of all passes: modality, examples, tokens."""
        return {
            (name, rows, self.modalities[name].length(view[name]))
            for task in self.recipe.tasks.values()
            if task.weight
            for view in task.views
            for name, spec in task.inputs.items()
            for rows in piece_sizes((view.batch_size or task.batch_size) * spec.draw, self.recipe.memory.chunk_size)
        }

    def _print_plan(self) -> None:
        console.print(mixture_table(self.recipe, self.costs))
        parameters = sum(p.numel() for p in self.model.parameters())
        how: str = precision_of(self.device, self.recipe.train.precision)
        if distributed.world() > 1:
            how += f", {distributed.world()} processes"
        size = f"{parameters / 1e6:.2f}M parameters"
        if self.compile:
            how += f", compiled for {len(self._signatures())} signatures"
        elif self.recipe.train.compile:
            how += ", not compiled, which is for one process"
        console.print(f"{self.recipe.name}: {size} on {self.device.type}, {how}, into {self.run}", soft_wrap=True)
        if self.step:
            console.print(f"going on from step {self.step}", soft_wrap=True)
        warmup, steps = self.recipe.optimizer.warmup_steps, self.recipe.train.steps
        if warmup is not None and warmup >= steps:
            longer = f"warm-up of {warmup} steps is not shorter than the {steps} steps of training"
            console.print(f"{longer}; set optimizer.warmup_steps", soft_wrap=True)


def _holds(file: Path, text: str) -> bool:
    """Whether a file has exactly this text; if it is longer, the rest is not read."""
    content = text.encode()
    with file.open("rb") as stream:
        return stream.read(len(content) + 1) == content


def compiled_encode(model: Embedder, signatures: int) -> Encode:
    """`model.encode`, compiled once for each shape of its input; one shape more than `signatures` is an error, not a
    silent fall back."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch runs the code that it finds in its folder, by default one in the temporary folder that another user could
    # have made. It keeps precompiled headers in that one whatever the variable says.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
    private_folder(Path(default_cache_dir()), "TMPDIR")
    torch._dynamo.reset()  # Shapes are counted by function, so those of a model before would count too.
    torch._dynamo.config.recompile_limit = signatures
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(model.encode, dynamic=False)

    def encode(inputs: Mapping[str, Tokens]) -> Encoded:
        try:
            return compiled(inputs)
        except FailOnRecompileLimitHit:
            shapes = {name: tuple(tokens.coords.shape[:2]) for name, tokens in inputs.items()}
            raise UserError(
                f"train.compile: {shapes} (examples, tokens) is none of the {signatures} shapes of the recipe's views"
            ) from None
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, InvalidCxxCompiler | CppCompileError):
                raise
            raise UserError(
                "train.compile: torch's C++ code does not compile here; install a compiler, such as g++, and Python's "
                "headers, or set train.compile=false"
            ) from None

    return encode
