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
    """What a run needs in one layout. `per_token` counts the parameters between a token's embedding and the mean over
    the tokens that work on it, on average; None for a wrapped model."""

    layout: Layout
    gpu: GPU
    mfu: float  # share of the bf16 peak at which passes are computed; HFU if `memory` repeats some
    parameters: dict[str, int]  # by part of the model
    frozen: int  # how many of them are frozen
    per_token: int | None
    steps: dict[tuple[str, int], Step]  # by (task, view)
    visits: dict[tuple[str, int], int]  # how many of them the run makes

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
        return sum(self.steps[key].cost.flops * n for key, n in self.visits.items())

    @property
    def compute_seconds(self) -> float:
        """Of the whole run."""
        return sum(self.steps[key].compute_seconds * n for key, n in self.visits.items())

    @property
    def wait_seconds(self) -> float:
        """For communication, of the whole run."""
        return sum(self.steps[key].wait_seconds * n for key, n in self.visits.items())

    @property
    def seconds(self) -> float:
        """Of the whole run, without evaluation, checkpoints and waiting for data."""
        return self.compute_seconds + self.wait_seconds


def plan(recipe: Recipe, modalities: Modalities, classes: Classes, gpus: int, gpu: str, mfu: float) -> Plan:
    """The first of `plans`."""
    return next(plans(recipe, modalities, classes, gpus, gpu, mfu))


def plans(recipe: Recipe, modalities: Modalities, classes: Classes, gpus: int, gpu: str, mfu: float) -> Iterator[Plan]:
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
    shard_degree = recipe.parallel.shard_degree
    layout = layout_of(recipe, gpus, shard_degree)
    by_view = costs(recipe, modalities, classes)
    uneven = [f"{cost.examples} of tasks.{t}.views[{i}]" for (t, i), cost in by_view.items() if cost.examples % gpus]
    if uneven:
        raise UserError(f"--gpus: {gpus} GPUs do not divide a batch evenly: {', '.join(uneven)}")
    model = meta_model(recipe, modalities, classes)
    if shard_degree is None:
        layout = default_layout(recipe, model, gpus, min(gpus, NODE), GPUS[gpu].memory_gib * GIB)
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"

    counted = {
        (task, view): step_memory(recipe, modalities, classes, task, view, precision, gpus=gpus)
        for task, view in by_view
    }
    parameters = {name: count(part) for name, part in model.named_children()}
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    visits = Alternation(recipe).visits()
    for planned in dict.fromkeys([layout, *alternatives(recipe, gpus)]):
        planner = StepPlanner(recipe, Sharding(planned, GPUS[gpu], model, precision), mfu)
        yield Plan(
            layout=planned,
            gpu=GPUS[gpu],
            mfu=mfu,
            parameters=parameters,
            frozen=frozen,
            per_token=per_token(model),
            steps={visit: planner.step(recipe.tasks[visit[0]], by_view[visit], counted[visit]) for visit in by_view},
            visits=visits,
        )


def recommended(plans: Sequence[Plan]) -> Plan:
    """The plan of the fastest run that fits, or the one that needs the least memory if none fits.

    It is the first one if that is not slower by more than `INDISTINCT`. Shards over several nodes are recommended only
    if nothing else fits, because the estimate lacks the latency of their collectives, which grows with their number.
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
    own_blocks = [count(blocks) for blocks in model.encoder.own.values()]
    used = count(model.encoder) - sum(own_blocks[1:])  # A token has those of its own stem, all of them alike.
    width = model.config.width
    moe = model.config.moe
    used += 2 * (width * width + width)
    if moe is None:
        return used
    experts = moe.top_k if moe.routing == "token_choice" else min(moe.capacity_factor, moe.experts)
    unused = moe.layers * count(model.experts()[0]) * (1 - experts / moe.experts)
    return round(used - unused)
