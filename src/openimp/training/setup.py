"""Makes the parts of a training run: data, model, optimizers, log, checkpoints and evaluation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from openimp.alternation import Schedule
from openimp.checkpoint.folder import CONFIG, RECIPE, read_config, read_state, text_files
from openimp.checkpoint.resume import changed_sources
from openimp.checkpoint.saver import Saver
from openimp.checkpoint.warm_start import open_warm_start
from openimp.common.device import keep_freed_memory, precision_of
from openimp.common.errors import UserError
from openimp.common.modality import Classes, Modalities, Modality
from openimp.common.objective import Teacher
from openimp.common.progress import console, track
from openimp.common.protocols import load_learned
from openimp.data.step_batches import StepBatches
from openimp.data.streams import Cursor
from openimp.data.tables import Table
from openimp.data.task_data import TaskData
from openimp.encoding.frozen import release_encoders
from openimp.encoding.tower import Tower, make_teachers
from openimp.evaluation.evaluate import check_sets
from openimp.model.embedder import Embedder
from openimp.model.imp import build_for_training
from openimp.model.learning_rates import freeze
from openimp.parallel import distributed
from openimp.parallel.layout import apply_parallelism
from openimp.planning.costs import Costs, costs
from openimp.planning.layouts import choose_layout, layout_of
from openimp.recipe.schema import Recipe
from openimp.training.checkpointing import Checkpointing
from openimp.training.compilation import compile_blocks
from openimp.training.log import Log
from openimp.training.loggers import check_loggers
from openimp.training.run_directory import RunDirectory
from openimp.training.updater import Updater


@dataclass(frozen=True)
class Variant:
    """What a study changes in a training run. The defaults are what `openimp train` does.

    Attributes:
        name: stored as `trainer` in checkpoints, which another variant cannot resume; "Trainer" is ordinary training.
        make_modalities: returns the modalities by name, not fitted. Their tokens are the model's inputs.
        build_model: returns the model with random weights.
        sum_tasks: each update sums the losses of a round, which is one step of each task.
        prints_warnings: whether to print what the objectives warn of in the first batch of each task; a variant may
            have no use for their advice.
        before_step: called with the trainer and the number of each step, before the step is made.
    """

    name: str = "Trainer"
    make_modalities: Callable[[Recipe], dict[str, Modality]] = Recipe.make_modalities
    build_model: Callable[[Recipe, Modalities, Classes], Embedder] = build_for_training
    sum_tasks: bool = False
    prints_warnings: bool = True
    before_step: Callable[[Any, int], None] | None = None

    def costs(self, recipe: Recipe, modalities: Modalities, classes: Classes) -> Costs:
        """The cost of a step of each (task, view index)."""
        return costs(recipe, modalities, classes, build=self.build_model, summed=self.sum_tasks)


ORDINARY = Variant()


@dataclass
class Parts:
    """The parts of a training run on this rank.

    Attributes:
        batches: this rank's part of the batch of each step.
        constant_state: the part of a checkpoint's state.json that is the same in all of them.
        evaluated_tables: the sources of the evaluation sets, by name.
        cursors: where the streams of each task resume, by lane.
    """

    recipe: Recipe
    run: Path
    variant: Variant
    device: torch.device
    data: TaskData
    batches: StepBatches
    constant_state: dict[str, Any]
    evaluated_tables: dict[str, Table]
    model: Embedder
    updater: Updater
    checkpointing: Checkpointing
    log: Log
    cursors: dict[str, dict[str, Cursor]]


def set_up(
    recipe: Recipe,
    run: Path,
    resume: bool | Literal["auto"] = False,
    variant: Variant = ORDINARY,
    allow_changed_data: bool = False,
) -> Parts:
    """Opens the data, makes or loads the model, and begins or resumes the run. `train` explains the arguments."""
    device = distributed.start()  # Does nothing more if `train` has called it.
    keep_freed_memory()
    world_size = distributed.world_size()
    layout_of(recipe, world_size, recipe.parallel.shard_degree)  # UserError if the ranks do not divide as asked.
    check_loggers(recipe)

    directory = RunDirectory(run, recipe)
    checkpoint = directory.checkpoint(resume, variant.name, allow_changed_data)
    modalities = variant.make_modalities(recipe)
    warm_start = open_warm_start(recipe, modalities) if checkpoint is None else None
    saved_classes = None
    if checkpoint is not None:
        saved_config, learned_files, _ = read_config(checkpoint, any_class=True)
        saved_classes = saved_config.classes
        load_learned(modalities.values(), learned_files)

    data = distributed.run_first_on_node(lambda: TaskData(recipe, modalities, world_size))
    batches = StepBatches(data, distributed.rank())
    fingerprints = distributed.run_on_rank_zero(data.fingerprints)  # Not on all ranks: it reads a part of every file.
    changed_source_names = []
    if checkpoint is None:
        data.fit(warm_start.stems if warm_start else ())
    else:
        changed_source_names = changed_sources(checkpoint, fingerprints, allow_changed_data)
        if saved_classes != data.classes:
            raise UserError(f"{checkpoint}: the classes in the data have changed since it was saved")
    # Opens the towers (frozen encoders of modalities), whose sizes the model needs, and which draw random numbers.
    distributed.run_first_on_node(lambda: [modality.stem_spec() for modality in modalities.values()])
    torch.manual_seed(recipe.seed)
    model = variant.build_model(recipe, modalities, data.classes).train()
    freeze(model, recipe.optimizer)
    # Before the model is sharded, and before media are decoded and embedded, which may take hours.
    evaluated_tables = distributed.run_first_on_node(lambda: check_sets(model, recipe, modalities, data.classes))
    step_costs = variant.costs(recipe, modalities, data.classes)
    constant_state: dict[str, Any] = {"trainer": variant.name, "sources": fingerprints}
    if teacher_states := _prepare(recipe, data, checkpoint):
        constant_state["teachers"] = teacher_states

    # Before FSDP2 replaces the model's class, whose name is in config.json.
    model_files = text_files(model, recipe.to_config(data.classes), modalities, recipe.to_yaml())
    if warm_start is not None:
        report = warm_start.load(model, data.classes)
        console.print(report, soft_wrap=True)
    _distribute(recipe, model, device)
    updater = Updater(recipe, model, work_before_step(batches.schedule, recipe.alternation.views, step_costs))
    checkpointing = Checkpointing(Saver(run, recipe.train.keep_last), model, updater, model_files)
    state = checkpointing.load(checkpoint) if checkpoint else {}
    cursors = data.load_cursors(state.get("cursors", {}), changed_source_names)
    directory.begin(model_files[CONFIG], model_files[RECIPE], trains_on=resume is True or checkpoint is None)

    log = Log(run, recipe, step_costs, device, state)
    log.print_start(model, device, checkpointing.newest_step)
    return Parts(
        recipe=recipe,
        run=run,
        variant=variant,
        device=device,
        data=data,
        batches=batches,
        constant_state=constant_state,
        evaluated_tables=evaluated_tables,
        model=model,
        updater=updater,
        checkpointing=checkpointing,
        log=log,
        cursors=cursors,
    )


def _prepare(recipe: Recipe, data: TaskData, checkpoint: Path | None) -> dict[str, dict[str, str]]:
    """Decodes and embeds the data, and returns what `Tower.state` says of each teacher, by `Teacher.column`."""
    teachers = make_teachers(recipe)
    teacher_states = _load_teacher_states(teachers, checkpoint)
    distributed.run_first_on_node(lambda: data.prepare(track, teachers))
    if teachers:
        teachers.clear()  # They hold encoders. The model needs that memory.
        release_encoders()
    return teacher_states


def work_before_step(schedule: Schedule, views: str, step_costs: Costs) -> Callable[[int], int]:
    """The number of steps before a step or, if `views` is "sequence", their FLOPs; see `LRSchedule`.

    With views in a sequence, the last steps cost several times as many FLOPs as the first. By the number of steps, the
    learning rate would be near zero for a large share of the FLOPs.
    """
    if views != "sequence":
        return lambda step: step
    # Without passes that are repeated to save memory, which may change when the run is resumed.
    flops_of = {task_view: cost.flops - cost.repeated_flops for task_view, cost in step_costs.items()}
    return lambda step: sum(flops_of[task_view] * steps for task_view, steps in schedule.counts(step).items())


def _load_teacher_states(teachers: Mapping[Teacher, Tower], checkpoint: Path | None) -> dict[str, dict[str, str]]:
    """Gives the teachers their states, and returns these. A resumed run has them in its checkpoint, so it opens no
    teacher for them, and a teacher that has changed since is refused once it is opened."""
    saved = read_state(checkpoint).get("teachers", {}) if checkpoint else {}
    unsaved_teachers = {teacher: tower for teacher, tower in teachers.items() if teacher.column not in saved}
    states = saved | distributed.run_on_rank_zero(
        lambda: {teacher.column: tower.state() for teacher, tower in unsaved_teachers.items()}
    )
    for teacher, tower in teachers.items():
        tower.load_state(states[teacher.column])
    return states


def _distribute(recipe: Recipe, model: Embedder, device: torch.device) -> None:
    """Distributes the model over the ranks, and compiles its blocks if the recipe says so."""
    layout = choose_layout(recipe, model, device)
    if recipe.train.compile:
        # With expert parallelism, FSDP2 wraps a block's experts separately. Its hooks would break the compiled graph.
        uncompiled = model.experts() if layout.expert_degree > 1 else ()
        compile_blocks(model.blocks(), uncompiled)
    # All ranks must gather weights in the same type, even if only some processors compute in bf16.
    precisions = distributed.all_gather_object(precision_of(device, recipe.train.precision))
    apply_parallelism(
        model,
        layout,
        device,
        blocks=model.blocks(),
        experts=model.experts(),
        methods=("encode_all", "project", "classify"),
        param_dtype=torch.float32 if "fp32" in precisions else torch.bfloat16,
        fp32_modules=model.fp32_modules(),
    )
    if layout.ranks > 1:
        console.print(f"parallel: {layout}")
