"""What a run needs, computed without a GPU: parameters, memory, FLOPs, communication, days.

FLOPs are the ledger's, and the memory of a step is counted. The rest is arithmetic on sizes for what `parallel/` does
on GPUs: weights, gradients and optimizer state in fp32, laid out as the recipe's `parallel` says. docs/plan.md has the
formulas.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from openimp.alternation import Alternation
from openimp.common.device import Precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Classes, Modalities
from openimp.model.build import build_model
from openimp.model.embedder import Embedder
from openimp.model.imp import IMP
from openimp.model.learning_rates import freeze, muon_stacks
from openimp.objectives import BLOCK
from openimp.parallel.layout import Layout
from openimp.planning.gpus import GPU, GPUS, NODE, USABLE
from openimp.planning.layouts import alternatives, default_layout, layout_of
from openimp.planning.ledger import Cost, Costs, costs
from openimp.planning.memory import StepMemory, keep_own_experts, step_memory
from openimp.planning.sharding import MuonDivision, Sharding
from openimp.planning.timeline import Traffic
from openimp.planning.traffic import Compared, step_traffic
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task

PARTS = ("gradients", "gathered", "cast weights", "activations")
"""What a step holds besides weights, optimizer state and its batch."""
SIMILARITY = 21
"""Bytes that a contrastive loss holds at its peak per pair of items and direction; a test counts them."""

ADAMW, MUON, EMA = 40, 60, 12
"""Bytes of a GPU's memory that an update reads and writes per parameter, in fp32: the gradient norm, clipping, and
AdamW (28) or Muon without its products (48); the EMA."""


@dataclass(frozen=True)
class Step:
    """One step of a (task, view)."""

    cost: Cost  # examples, tokens and FLOPs, over all GPUs
    memory: dict[str, int]  # bytes on one GPU at the peak of the step, by what they hold
    traffic: Traffic  # of one GPU
    muon_share: float  # of the optimizer's FLOPs, on the GPU that computes most of them
    update_bytes: int  # that the optimizers read from the memory of a GPU and write to it

    @property
    def received(self) -> int:
        """Bytes that come to one GPU; as many leave it."""
        return sum(collective.received for collective in self.traffic.collectives)


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
    prefetched: int  # bytes of CPU memory per GPU for the batches that workers prepare in advance, at most

    @property
    def largest(self) -> tuple[str, int]:
        """The (task, view) that decides the memory."""
        return max(self.steps, key=lambda key: sum(self.steps[key].memory.values()))

    @property
    def memory(self) -> int:
        """Most bytes that one GPU holds."""
        return sum(self.steps[self.largest].memory.values())

    @property
    def fits(self) -> bool:
        return self.memory <= USABLE * self.gpu.memory * 2**30

    @property
    def flops(self) -> int:
        """FLOPs of the whole run, over all GPUs. An update counts once, although several replicas compute it."""
        return sum(self.steps[key].cost.flops * n for key, n in self.visits.items())

    @property
    def computing(self) -> float:
        """Seconds that the whole run computes."""
        return sum(n * self.computes(self.steps[key]) for key, n in self.visits.items())

    @property
    def waiting(self) -> float:
        """Seconds that the whole run waits for communication."""
        return sum(n * self.waits(self.steps[key]) for key, n in self.visits.items())

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, without evaluation, checkpoints and waiting for data."""
        return self.computing + self.waiting

    def computes(self, step: Step) -> float:
        """Seconds that the busiest GPU computes in a step: FLOPs at the MFU, and an update as fast as its memory."""
        flops = step.cost.hardware_flops / self.layout.ranks + step.cost.optimizer_flops * step.muon_share
        return self._seconds(flops) + step.update_bytes / (self.gpu.bandwidth * 1e12)

    def waits(self, step: Step) -> float:
        """Seconds that a step waits for communication."""
        passes = self._seconds(step.cost.hardware_flops / self.layout.ranks)
        forward = self._seconds(step.cost.forward_flops / self.layout.ranks)
        return step.traffic.waits(forward, passes - forward, self.gpu)

    def _seconds(self, flops: float) -> float:
        return flops / (self.gpu.tflops * 1e12 * self.mfu)


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
    if shard_degree is None:
        model = _model(recipe, modalities, classes)
        layout = default_layout(recipe, model, gpus, min(gpus, NODE), GPUS[gpu].memory * 2**30)
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"

    @cache  # Layouts with the same experts on a GPU have the same activations.
    def count_memory(task: str, view: int, owners: int) -> StepMemory:
        return step_memory(recipe, modalities, classes, task, view, precision, gpus=gpus, owners=owners)

    ahead = recipe.train.prefetch_factor if recipe.train.num_workers else 0
    for each in dict.fromkeys([layout, *alternatives(recipe, gpus)]):
        model = _model(recipe, modalities, classes)
        parameters, used = {name: count(part) for name, part in model.named_children()}, per_token(recipe, model)
        frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
        keep_own_experts(model, each.expert_degree)  # From here on, the model is what one GPU has or gathers.
        sharding = Sharding(each, model, precision)
        steps = _steps(recipe, modalities, model, sharding, by_view, partial(count_memory, owners=each.expert_degree))
        visits = Alternation(recipe).visits()
        prefetched = ahead * max(steps[key].memory["inputs"] for key in visits)
        yield Plan(each, GPUS[gpu], mfu, parameters, frozen, used, steps, visits, prefetched)


def recommended(found: Sequence[Plan]) -> Plan:
    """The plan of the fastest run that fits, or the one that needs the least memory if none fits.

    If the first one is at most 1 % slower, it is that, because a smaller difference means nothing.
    """
    fitting = [each for each in found if each.fits]
    if not fitting:
        return min(found, key=lambda each: each.memory)
    fastest = min(fitting, key=lambda each: each.seconds)
    return found[0] if found[0].fits and found[0].seconds <= 1.01 * fastest.seconds else fastest


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_per_token(recipe: Recipe, model: Embedder) -> int | None:
    """Parameters of the encoder that a token uses on average: all but the experts that do not process it.

    With expert choice a token has `capacity_factor` experts on average, with token choice `top_k`. None for a wrapped
    model.
    """
    if not isinstance(model, IMP):
        return None
    own = [count(blocks) for blocks in model.encoder.own.values()]
    used = count(model.encoder) - sum(own[1:])  # A token has the first blocks of its own stem, all of them alike.
    moe = recipe.model.moe
    if moe is None:
        return used
    experts = moe.top_k if moe.routing == "token_choice" else min(moe.capacity_factor, moe.experts)
    width, hidden = recipe.model.width, recipe.model.mlp_dim
    expert = 2 * width * hidden + (width + hidden if recipe.model.bias else 0)
    return round(used - moe.layers * expert * (moe.experts - experts))


def per_token(recipe: Recipe, model: Embedder) -> int | None:
    """`encoder_per_token` and the stem's two linear layers, one before the encoder and one after."""
    encoder, width = encoder_per_token(recipe, model), recipe.model.width
    return None if encoder is None else encoder + 2 * (width * width + width)


def _model(recipe: Recipe, modalities: Modalities, classes: Classes) -> Embedder:
    with torch.device("meta"):
        model = build_model(recipe, modalities, {name: len(values) for name, values in classes.items()})
    freeze(model, recipe.optimizer)
    return model


def _steps(
    recipe: Recipe,
    modalities: Modalities,
    model: Embedder,
    sharding: Sharding,
    by_view: Costs,
    count_memory: Callable[..., StepMemory],
) -> dict[tuple[str, int], Step]:
    """The steps of each (task, view) in a layout. The model has only the experts that one GPU has or gathers."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    all_grads, hidden = recipe.optimizer.zero_missing_grads, muon_stacks(model, recipe.optimizer)
    updated = {key: {trained[n] for n in (trained if all_grads else cost.touched)} for key, cost in by_view.items()}
    muon = MuonDivision(sharding, hidden)
    # Two tensors per parameter for AdamW, one for Muon, and one for the EMA.
    optimizer = 2 * sharding.held({*trained.values()} - hidden.keys()) + muon.momentum(hidden.keys())
    averaged = sharding.held(trained.values()) if recipe.optimizer.ema_decay else 0
    held = {"parameters": sharding.held(model.parameters()), "optimizer state": optimizer + averaged}
    steps = {}
    for (name, view), cost in by_view.items():
        task, some, counted = recipe.tasks[name], updated[name, view], count_memory(name, view)
        traffic = step_traffic(recipe, modalities, model, sharding, task, cost.examples, counted, muon, some)
        memory = held | {"inputs": counted.inputs} | _memory(model, sharding, counted, task, cost, some)
        if hidden:  # By then there is nothing else but all gradients.
            buffers, peak = muon.buffers(some), sum(memory[part] for part in PARTS)
            memory["Muon's buffers"] = max(0, sharding.held(some) + buffers - peak)
        numbers = [sharding.held(some - hidden.keys()) // 4, muon.momentum(some & hidden.keys()) // 4]
        update_bytes = ADAMW * numbers[0] + MUON * numbers[1] + EMA * averaged // 4
        steps[name, view] = Step(cost, memory, traffic, muon.share(some), update_bytes)
    return steps


def _memory(
    model: Embedder,
    sharding: Sharding,
    counted: StepMemory,
    task: Task,
    cost: Cost,
    updated: Set[Tensor],
) -> dict[str, int]:
    """Bytes that one GPU holds in a step besides weights, optimizer state and inputs; see docs/plan.md."""
    gpus, compared = sharding.layout.ranks, Compared.by(model, task, cost.examples)
    # The vectors of all GPUs and their gradients, and similarities with vectors of other GPUs.
    gathered = 0 if gpus == 1 else 4 * model.config.embed_dim * (2 * sum(compared.pairs) + sum(compared.fixed))
    gathered += SIMILARITY * min(BLOCK, compared.similarities * (gpus - 1) // gpus // gpus)
    if gpus == 1:
        peak = max(counted.peak, Counter(gradients=sharding.held(updated)), key=Counter.total)
        return {part: peak[part] for part in PARTS}
    # Weights outside of the blocks, and of one block (and of the next, if they are sharded), or of all.
    blocks = [[*block.parameters()] for block in model.blocks()]
    inside = {weight for block in blocks for weight in block}
    outside = [weight for weight in model.parameters() if weight not in inside]
    weights, reshards = [sharding.gathered(block) for block in blocks], sharding.layout.reshard_after_forward
    ahead = 1 if sharding.dense.shards.size > 1 else 0
    kept = (1 + ahead) * max(weights, default=0) if reshards else sum(weights)
    gathered += sharding.gathered(outside) + kept
    reduced, first = _reduction(model, sharding, counted)
    # A rank keeps its shards of complete gradients.
    shards_at, named, complete = {0: 0}, dict(model.named_parameters()), 0
    for name, size in counted.touched.items():
        complete += sharding.held([named[name]])
        shards_at[size] = complete
    stages = [
        (shards_at[size], gathered + (reduced if size >= first else 0), 0, activations)
        for size, activations in counted.stages.items()
    ]
    # At the end, the gradients outside of the blocks are reduced.
    still_gathered = sharding.gathered(outside) + (0 if reshards else sum(weights))
    stages.append((sharding.held(updated), still_gathered + _reduced_bytes(sharding, updated & {*outside}), 0, 0))
    # Nothing is cast: FSDP2 gathers weights in the type that the model computes with.
    return dict(zip(PARTS, max(stages, key=sum)))


def _reduction(model: Embedder, sharding: Sharding, counted: StepMemory) -> tuple[int, int]:
    """The `_reduced_bytes` of the largest block, and how many bytes of gradients are complete when the first block is
    reduced."""
    names, size, first = {weight: name for name, weight in model.named_parameters()}, 0, max(counted.stages)
    for block in model.blocks():
        if trained := [weight for weight in block.parameters() if names[weight] in counted.touched]:
            size = max(size, _reduced_bytes(sharding, trained))
            first = min(first, max(counted.touched[names[weight]] for weight in trained))
    return size, first


def _reduced_bytes(sharding: Sharding, weights: Collection[Tensor]) -> int:
    """Bytes of the gradients of gathered weights, and of their fp32 copy for the reduction."""
    return sharding.gathered(weights) + 4 * sum(weight.numel() for weight in weights)
