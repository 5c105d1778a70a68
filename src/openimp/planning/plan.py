"""What a run needs in each layout, computed without a GPU: parameters, memory, FLOPs, communication, days.

`costs` (costs.py) counts the FLOPs of a step, and `step_memory` (memory.py) its activations. Weights, optimizer state
and communication are computed from the sizes of tensors, as `parallel/` distributes them. The time is an estimate.
docs/plan.md has the rules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from openimp.alternation import Schedule
from openimp.common.device import Precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.parallel.layout import Layout
from openimp.planning.costs import TaskView, costs, meta_model
from openimp.planning.gpus import GIB, GPU, GPUS, GPUS_PER_NODE
from openimp.planning.layouts import alternatives, default_layout, layout_of
from openimp.planning.memory import step_memory
from openimp.planning.sharding import Sharding
from openimp.planning.step import StepNeeds, StepPlanner
from openimp.recipe.schema import Recipe

MIN_SPEEDUP = 1.1
"""Speedup above which another layout is recommended instead of the recipe's. It is not 1, because times are estimates.
"""
MIN_GAIN_SECONDS = 1e-3
"""Seconds per step that another layout must gain to be recommended. Planned times lack the latencies of collectives,
which can add up to this in a step."""


@dataclass(frozen=True)
class Plan:
    """What a run needs in one layout."""

    layout: Layout
    gpu: GPU
    # --mfu: the assumed FLOP/s, as a share of the GPU's bf16 peak. Unlike in a measured MFU, the FLOPs include those of
    # Muon, and of forward passes that are repeated to save memory.
    utilization: float
    model: Embedder  # on the meta device
    step_needs: dict[TaskView, StepNeeds]  # what one step of this task and view needs
    step_counts: dict[TaskView, int]  # number of steps in the whole run

    @property
    def peak_task_view(self) -> TaskView:
        """The task and view whose steps need the most memory."""
        return max(self.step_needs, key=lambda task_view: self.step_needs[task_view].memory.total)

    @property
    def memory_bytes(self) -> int:
        """Most bytes that one GPU holds."""
        return self.step_needs[self.peak_task_view].memory.total

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.gpu.usable_bytes

    @property
    def flops(self) -> int:
        """FLOPs of the whole run, over all GPUs. An update by AdamW or Muon counts once, even if several
        ranks compute the same update."""
        return sum(self.step_needs[task_view].cost.flops * steps for task_view, steps in self.step_counts.items())

    @property
    def compute_seconds(self) -> float:
        """Seconds of computation in the whole run."""
        return sum(self.step_needs[task_view].compute_seconds * steps for task_view, steps in self.step_counts.items())

    @property
    def wait_seconds(self) -> float:
        """Seconds that the whole run waits for communication."""
        return sum(self.step_needs[task_view].wait_seconds * steps for task_view, steps in self.step_counts.items())

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, without evaluation, checkpoints and waiting for data."""
        return self.compute_seconds + self.wait_seconds


def plans(
    recipe: Recipe, modalities: Modalities, classes: Classes, *, gpus: int, gpu: str, utilization: float
) -> Iterator[Plan]:
    """Computes what a recipe needs on `gpus` GPUs of the type `gpu` (one of `GPUS`), without reading data.

    The first plan is for the recipe's layout, which is the default one if the recipe does not choose. Plans for
    alternative layouts follow. A tokenizer that is not trained yet counts with its largest vocabulary. For
    `utilization`, see `Plan`.

    Raises:
        UserError: an argument is invalid, or a batch or the model cannot be divided evenly among the GPUs.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: no GPU is called {gpu!r}{nearest(gpu, GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, found {gpus}")
    if not 0 < utilization <= 1:
        raise UserError(f"--mfu: expected a share above 0 and at most 1, found {utilization:g}")
    # Raises UserError before the slower `costs`. Without a `shard_degree`, `default_layout` replaces this layout below.
    recipe_layout = layout_of(recipe, gpus, recipe.parallel.shard_degree)
    cost_by_task_view = costs(recipe, modalities, classes)
    uneven = [
        f"{cost.examples} of tasks.{task}.views[{view}]"
        for (task, view), cost in cost_by_task_view.items()
        if cost.examples % gpus
    ]
    if uneven:
        raise UserError(f"--gpus: {gpus} GPUs do not divide a batch evenly: {', '.join(uneven)}")
    model = meta_model(recipe, modalities, classes)
    if recipe.parallel.shard_degree is None:
        bytes_per_gpu = GPUS[gpu].memory_gib * GIB  # `default_layout` subtracts what is not usable, as in a run.
        recipe_layout = default_layout(recipe, model, gpus, min(gpus, GPUS_PER_NODE), bytes_per_gpu)
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"

    step_memories = {
        (task, view): step_memory(recipe, modalities, classes, task, view, precision=precision, gpus=gpus)
        for task, view in cost_by_task_view
    }
    step_counts = Schedule(recipe).counts(recipe.train.steps)
    for layout in dict.fromkeys([recipe_layout, *alternatives(recipe, gpus)]):
        planner = StepPlanner(recipe, Sharding(layout, model, precision))
        step_needs = {
            (task, view): planner.step(recipe.tasks[task], cost, step_memories[task, view], GPUS[gpu], utilization)
            for (task, view), cost in cost_by_task_view.items()
        }
        yield Plan(
            layout=layout,
            gpu=GPUS[gpu],
            utilization=utilization,
            model=model,
            step_needs=step_needs,
            step_counts=step_counts,
        )


def recommended(all_plans: Sequence[Plan]) -> Plan:
    """The plan of the fastest run that fits, or the one that needs the least memory if none fits.

    Plans with shards over several nodes are candidates only if no other plan fits, because planned times lack the
    latencies of collectives, which are large between nodes. The first plan, which is for the recipe's layout, stays if
    it is a candidate and no other candidate is faster by more than both `MIN_SPEEDUP` and `MIN_GAIN_SECONDS`.
    """
    fitting = [plan for plan in all_plans if plan.fits]
    if not fitting:
        return min(all_plans, key=lambda plan: plan.memory_bytes)
    candidates = [plan for plan in fitting if plan.layout.shard_degree <= GPUS_PER_NODE] or fitting
    fastest = min(candidates, key=lambda plan: plan.seconds)
    recipe_plan = all_plans[0]
    gain = recipe_plan.seconds - fastest.seconds
    min_gain = MIN_GAIN_SECONDS * sum(recipe_plan.step_counts.values())
    if recipe_plan in candidates and (gain < min_gain or recipe_plan.seconds <= MIN_SPEEDUP * fastest.seconds):
        return recipe_plan
    return fastest


def parameter_count(module: nn.Module, frozen: bool = False) -> int:
    """Number of parameters of a module; with `frozen`, only of those that are not trained."""
    return sum(weight.numel() for weight in module.parameters() if not (frozen and weight.requires_grad))


def active_parameters(model: IMP) -> int:
    """Number of parameters that a token uses on average.

    It counts the encoder, with only the experts that process the token (`capacity_factor` of them on average), and the
    two linear layers of the token's stem. It does not count embeddings and heads.
    """
    width = model.config.width
    # `Stem.before` and `Stem.after` are width x width, with bias. Without an encoder, there are no such layers.
    stem_parameters = 2 * (width * width + width) if model.config.layers else 0
    # A token passes only through the modality-specific blocks of its stem. Those of all stems are equally large.
    sizes_by_stem = [parameter_count(blocks) for blocks in model.encoder.own.values()]
    parameters = parameter_count(model.encoder) - sum(sizes_by_stem[1:]) + stem_parameters
    moe = model.config.moe
    if moe is None:
        return parameters
    # The first sparse layer's first group, which has `group_sizes[0]` experts.
    expert_size = parameter_count(model.experts()[0]) / moe.group_sizes[0]
    # A token uses at most all experts of its group. If the groups differ in size, the largest counts.
    experts_per_token = min(moe.capacity_factor, max(moe.group_sizes))
    return round(parameters - moe.layers * expert_size * (sum(moe.group_sizes) - experts_per_token))
