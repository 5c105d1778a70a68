"""What a run needs in each layout, computed without a GPU: parameters, memory, FLOPs, communication, days.

FLOPs are the ledger's, and the activations of a step are counted. The rest is arithmetic on sizes for what `parallel/`
does on GPUs, and the time is an estimate. docs/plan.md has the rules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from openimp.alternation import Alternation
from openimp.common.device import Precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.parallel.layout import Layout
from openimp.planning.gpus import GIB, GPU, GPUS, NODE
from openimp.planning.layouts import alternatives, default_layout, layout_of
from openimp.planning.ledger import costs, meta_model
from openimp.planning.memory import step_memory
from openimp.planning.sharding import Sharding
from openimp.planning.step import Step, StepPlanner
from openimp.recipe.schema import Recipe

INDISTINCT = 1.1
"""A layout is not better than the recipe's if it is faster by at most this factor: the time is an estimate."""


@dataclass(frozen=True)
class Plan:
    """What a run needs in one layout."""

    layout: Layout
    gpu: GPU
    mfu: float  # share of the bf16 peak at which passes are computed; HFU if `memory` repeats some
    parameters: dict[str, int]  # by part of the model
    frozen: int  # number of frozen parameters
    per_token: int | None  # parameters that a token uses; see the function `per_token`
    steps: dict[tuple[str, int], Step]  # one step of each (task, view)
    visits: dict[tuple[str, int], int]  # number of steps of each (task, view)

    @property
    def largest(self) -> tuple[str, int]:
        """The (task, view) that decides the memory."""
        return max(self.steps, key=lambda key: self.steps[key].memory.total)

    @property
    def memory_bytes(self) -> int:
        """Most that one GPU holds."""
        return self.steps[self.largest].memory.total

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.gpu.usable_bytes

    @property
    def flops(self) -> int:
        """Of the whole run, over all GPUs. An update counts once, although several replicas compute it."""
        return sum(self.steps[key].cost.flops * visits for key, visits in self.visits.items())

    @property
    def compute_seconds(self) -> float:
        """Of the whole run."""
        return sum(self.steps[key].compute_seconds * visits for key, visits in self.visits.items())

    @property
    def wait_seconds(self) -> float:
        """For communication, of the whole run."""
        return sum(self.steps[key].wait_seconds * visits for key, visits in self.visits.items())

    @property
    def seconds(self) -> float:
        """Of the whole run, without evaluation, checkpoints and waiting for data."""
        return self.compute_seconds + self.wait_seconds


def plans(
    recipe: Recipe, modalities: Modalities, classes: Classes, *, gpus: int, gpu: str, mfu: float
) -> Iterator[Plan]:
    """Computes what a recipe needs on `gpus` GPUs of the type `gpu` (one of `GPUS`), without reading data.

    Yields the plan of the layout that the recipe describes, or of the default one, and then those of alternatives. A
    tokenizer that is not trained yet counts at its largest size. If the GPUs cannot divide batches or model evenly,
    that is a UserError.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: no GPU is called {gpu!r}{nearest(gpu, GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, found {gpus}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: expected a share above 0 and at most 1, found {mfu:g}")
    layout = layout_of(recipe, gpus, recipe.parallel.shard_degree)
    by_view = costs(recipe, modalities, classes)
    uneven = [
        f"{cost.examples} of tasks.{task}.views[{view}]"
        for (task, view), cost in by_view.items()
        if cost.examples % gpus
    ]
    if uneven:
        raise UserError(f"--gpus: {gpus} GPUs do not divide a batch evenly: {', '.join(uneven)}")
    model = meta_model(recipe, modalities, classes)
    if recipe.parallel.shard_degree is None:
        layout = default_layout(recipe, model, gpus, min(gpus, NODE), GPUS[gpu].memory_gib * GIB)
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"

    memory = {
        (task, view): step_memory(recipe, modalities, classes, task, view, precision=precision, gpus=gpus)
        for task, view in by_view
    }
    parameters = {name: count(part) for name, part in model.named_children()}
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    visits = Alternation(recipe).visits()
    for planned in dict.fromkeys([layout, *alternatives(recipe, gpus)]):
        planner = StepPlanner(recipe, Sharding(planned, model, precision), GPUS[gpu], mfu)
        yield Plan(
            layout=planned,
            gpu=GPUS[gpu],
            mfu=mfu,
            parameters=parameters,
            frozen=frozen,
            per_token=per_token(model),
            steps={
                (task, view): planner.step(recipe.tasks[task], cost, memory[task, view])
                for (task, view), cost in by_view.items()
            },
            visits=visits,
        )


def recommended(plans: Sequence[Plan]) -> Plan:
    """The plan of the fastest run that fits, or the one that needs the least memory if none fits.

    The recipe's own layout, the first, stays if no other one is faster by more than `INDISTINCT`. Shards over several
    nodes are recommended only if nothing else fits, because the planned time lacks the latency of their collectives.
    """
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory_bytes)
    candidates = [plan for plan in fitting if plan.layout.shard_degree <= NODE] or fitting
    fastest = min(candidates, key=lambda plan: plan.seconds)
    first = candidates[0]
    return first if first is plans[0] and first.seconds <= INDISTINCT * fastest.seconds else fastest


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def per_token(model: Embedder) -> int | None:
    """Parameters that a token uses on average, from its embedding to the mean over the tokens: the encoder without the
    experts that do not process the token, and the stem's two linear layers, one before the encoder and one after.

    With expert choice a token has `capacity_factor` experts on average, with token choice `top_k`. None for a wrapped
    model.
    """
    if not isinstance(model, IMP):
        return None
    width = model.config.width
    moe = model.config.moe
    blocks_by_stem = [count(blocks) for blocks in model.encoder.own.values()]
    # A token has the blocks of its own stem, which are as large as those of any other.
    used = count(model.encoder) - sum(blocks_by_stem[1:]) + 2 * (width * width + width)
    if moe is None:
        return used
    experts = moe.top_k if moe.routing == "token_choice" else min(moe.capacity_factor, moe.experts)
    return round(used - moe.layers * count(model.experts()[0]) * (1 - experts / moe.experts))
