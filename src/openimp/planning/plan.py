"""What a run needs, computed without a GPU: parameters, memory, FLOPs, communication, days.

FLOPs are the ledger's, and the memory of a step is counted. The rest is arithmetic on sizes for what `parallel/` does
on GPUs: weights, gradients and optimizer state in fp32, laid out as the recipe's `parallel` says. docs/plan.md has the
formulas.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openimp.alternation import Alternation
from openimp.common.device import Precision
from openimp.common.errors import UserError, nearest
from openimp.common.modality import Classes, Modalities
from openimp.model.embedder import pass_sizes
from openimp.model.imp import IMP
from openimp.objectives import BLOCK
from openimp.parallel.layout import Layout
from openimp.parallel.owners import assign_owners, muon_work
from openimp.planning.gpus import GPU, GPUS, NODE, USABLE
from openimp.planning.ledger import Cost, costs
from openimp.planning.memory import StepMemory, keep_own_experts, step_memory
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Task, classified_by, pairs_of

PARTS = ("gradients", "gathered", "cast weights", "activations")
"""What a step holds besides weights, optimizer state and its batch."""
SIMILARITY = 21
"""Bytes that a contrastive loss holds at its peak per pair of items and direction; a test counts them."""


@dataclass(frozen=True)
class Step:
    """One step of a (task, view)."""

    cost: Cost  # examples, tokens and FLOPs, over all GPUs
    memory: dict[str, int]  # bytes on one GPU at the peak of the step, by what they hold
    received: Mapping[str, int]  # bytes that come to one GPU, by connection, "link" or "network"; as many leave it


@dataclass(frozen=True)
class Plan:
    """What a run needs. `per_token` counts the parameters between a token's embedding and the mean over the tokens that
    work on it, on average; None with soft routing, where no token has a number of experts."""

    gpu: GPU
    gpus: int
    mfu: float  # share of the bf16 peak that the model's FLOPs are computed at
    parameters: dict[str, int]  # by part of the model
    per_token: int | None
    steps: dict[tuple[str, int], Step]  # by (task, view)
    visits: dict[tuple[str, int], int]  # how many of them the run makes
    prefetched: int  # most bytes of CPU memory, per GPU, of the batches that workers prepare in advance

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
        """FLOPs of the whole run, over all GPUs."""
        return sum(self.steps[key].cost.flops * n for key, n in self.visits.items())

    @property
    def seconds(self) -> float:
        """Seconds that the whole run computes, at the MFU."""
        return self.computing(self.flops)

    @property
    def seconds_connected(self) -> float:
        """The same, but a step lasts as long as its communication if that takes longer than its computation."""
        return sum(
            n * max(self.computing(self.steps[key].cost.flops), self.communicating(self.steps[key].received))
            for key, n in self.visits.items()
        )

    def computing(self, flops: int) -> float:
        """Seconds in which all GPUs compute this many FLOPs at the MFU."""
        return flops / (self.gpus * self.gpu.tflops * 1e12 * self.mfu)

    def communicating(self, received: Mapping[str, int]) -> float:
        """Seconds in which bytes arrive, over both connections at once, if nothing else uses them."""
        return max(size / (1e9 * getattr(self.gpu, connection)) for connection, size in received.items())


class Compared(NamedTuple):
    """What the losses of a step compare, over all GPUs."""

    heads: int  # passes of features through a projection or a classification
    rows: int  # all GPUs get the vectors of these rows
    items: int  # all GPUs get the numbers of these items
    similarities: int  # of all rows


class Shares:
    """Bytes of a model, with the experts that one GPU has or gathers, on one GPU, in fp32."""

    def __init__(self, layout: Layout, model: IMP) -> None:
        self.layout = layout
        self._experts = {weight for module in model.experts() for weight in module.parameters()}

    def held(self, weights: Iterable[Tensor]) -> int:
        """Bytes of its shards of weights."""
        return sum(4 * weight.numel() // self._shards(weight) for weight in weights)

    def gathered(self, weights: Iterable[Tensor]) -> int:
        """Bytes received to all-gather weights in fp32, or to reduce-scatter their gradients."""
        return sum(others(4 * weight.numel(), self._shards(weight)) for weight in weights)

    def reduced(self, weights: Iterable[Tensor]) -> int:
        """Bytes received to all-reduce the gradients of its shards between the replicas, in a ring."""
        return sum(2 * others(self.held([weight]), self._replicas(weight)) for weight in weights)

    def _shards(self, weight: Tensor) -> int:
        return self.layout.expert_mesh_shape[1] if weight in self._experts else self.layout.shard_degree

    def _replicas(self, weight: Tensor) -> int:
        layout = self.layout
        return layout.expert_mesh_shape[0] if weight in self._experts else layout.ranks // layout.shard_degree


def plan(recipe: Recipe, modalities: Modalities, classes: Classes, gpus: int, gpu: str, mfu: float) -> Plan:
    """Computes what a recipe needs on `gpus` GPUs of the type `gpu` (one of `GPUS`), without reading data.

    A tokenizer that is not trained yet counts at its largest size. If the GPUs cannot divide batches or model evenly,
    that is a UserError.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: no GPU is called {gpu!r}{nearest(gpu, GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, found {gpus}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: expected a share above 0 and at most 1, found {mfu:g}")
    expert_dims = (recipe.model.width, recipe.model.mlp_dim)
    layout = Layout.of(gpus, recipe.parallel.shard_degree, recipe.parallel.expert_degree, expert_dims)
    by_view = costs(recipe, modalities, classes)
    uneven = [f"{cost.examples} of tasks.{t}.views[{i}]" for (t, i), cost in by_view.items() if cost.examples % gpus]
    if uneven:
        raise UserError(f"--gpus: {gpus} GPUs do not divide a batch evenly: {', '.join(uneven)}")
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
    parameters, used = {name: count(part) for name, part in model.named_children()}, per_token(recipe, model)
    keep_own_experts(model, layout.expert_degree)
    shares = Shares(layout, model)
    owned = _owned(recipe, model, layout, by_view.values())
    optimizer = _optimizer_bytes(recipe, model, shares, owned)
    held = {"parameters": shares.held(model.parameters()), "optimizer state": optimizer}
    steps = {}
    for (name, view), cost in by_view.items():
        task, owners = recipe.tasks[name], layout.expert_degree
        counted = step_memory(recipe, modalities, classes, name, view, precision, gpus=gpus, owners=owners)
        compared = _compared(task, cost.examples)
        memory = _memory(model, shares, counted, compared, precision, recipe.optimizer.zero_missing_grads)
        received = _received(recipe, model, shares, task, cost.examples, counted, compared, owned, precision)
        steps[name, view] = Step(cost, held | {"inputs": counted.inputs} | memory, received)
    visits = Alternation(recipe).visits()
    ahead = recipe.train.prefetch_factor if recipe.train.num_workers else 0
    prefetched = ahead * max(steps[key].memory["inputs"] for key in visits)
    return Plan(GPUS[gpu], gpus, mfu, parameters, used, steps, visits, prefetched)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_per_token(recipe: Recipe, model: IMP) -> int | None:
    """Parameters of the encoder that a token uses on average: all but the experts that do not process it.

    With expert choice a token has `capacity_factor` experts on average, with token choice `top_k`.
    """
    own = [count(blocks) for blocks in model.encoder.own.values()]
    used = count(model.encoder) - sum(own[1:])  # A token has the first blocks of its own stem, all of them alike.
    moe = recipe.model.moe
    if moe is None:
        return used
    if moe.routing == "soft":
        return None
    experts = moe.top_k if moe.routing == "token_choice" else min(moe.capacity_factor, moe.experts)
    return round(used - moe.layers * 2 * recipe.model.width * recipe.model.mlp_dim * (moe.experts - experts))


def per_token(recipe: Recipe, model: IMP) -> int | None:
    """`encoder_per_token` and the stem's two linear layers, one before the encoder and one after."""
    encoder, width = encoder_per_token(recipe, model), recipe.model.width
    return None if encoder is None else encoder + 2 * (width * width + width)


def others(size: int, among: int) -> int:
    """Bytes of `size` that come from others if `among` GPUs hold equal parts of it."""
    return size * (among - 1) // among


def _muon_matrices(recipe: Recipe, model: IMP) -> list[Tensor]:
    return [*model.hidden_matrices()] if recipe.optimizer.muon_lr else []


def _owned(recipe: Recipe, model: IMP, layout: Layout, by_view: Iterable[Cost]) -> Sequence[Sequence[Tensor]]:
    """For each GPU, the matrices that Muon updates there alone. All GPUs that hold shards of a matrix update it."""
    named, experts = dict(model.named_parameters()), {w for module in model.experts() for w in module.parameters()}
    sharded = {*named.values()} if layout.shard_degree > 1 else experts if layout.expert_degree > 1 else set()
    updated_sets = [{named[name] for name in cost.touched} for cost in by_view]
    replicated = [matrix for matrix in _muon_matrices(recipe, model) if matrix not in sharded]
    return assign_owners(replicated, updated_sets, layout.ranks, muon_work)


def _optimizer_bytes(recipe: Recipe, model: IMP, shares: Shares, owned: Sequence[Sequence[Tensor]]) -> int:
    """Two tensors per parameter for AdamW, one for Muon, and one for the EMA, in fp32, on the GPU with most of them."""
    size = shares.held(model.parameters()) if recipe.optimizer.ema_decay else 0
    by_muon, by_one = {*_muon_matrices(recipe, model)}, {matrix for matrices in owned for matrix in matrices}
    size += 2 * shares.held(weight for weight in model.parameters() if weight not in by_muon)
    return size + shares.held(by_muon - by_one) + max(map(shares.held, owned))


def _compared(task: Task, examples: int) -> Compared:
    """What the losses of a task compare. The sigmoid loss uses each pair of items once."""
    heads = rows = items = similarities = 0
    for objective in task.objectives:
        if isinstance(objective, Classification):
            heads += len(classified_by(objective, task.inputs))
            continue
        items += examples
        for a, b in pairs_of(objective, task.inputs):
            rows_a, rows_b = examples * task.inputs[a].draw, examples * task.inputs[b].draw
            sides = 2 if objective.loss == "softmax" else 1
            heads += 2
            rows += rows_b + (rows_a if sides == 2 else 0)
            similarities += sides * rows_a * rows_b
    return Compared(heads, rows, items, similarities)


def _memory(
    model: IMP, shares: Shares, counted: StepMemory, compared: Compared, precision: Precision, all_grads: bool
) -> dict[str, int]:
    """Bytes that one GPU holds in a step besides weights and optimizer state; see docs/plan.md."""
    gpus = shares.layout.ranks
    touched = {w: None for name, w in model.named_parameters() if all_grads or name in counted.touched}
    # The vectors of all GPUs and their gradients, and similarities with vectors of other GPUs.
    gathered = 0 if gpus == 1 else 8 * model.config.embed_dim * compared.rows
    gathered += SIMILARITY * min(BLOCK, others(compared.similarities, gpus) // gpus)
    if gpus == 1:
        peak = max(counted.peak, Counter(gradients=shares.held(touched)), key=Counter.total)
        return {part: peak[part] for part in PARTS}
    blocks = [count(block) for block in model.blocks()]
    # Weights outside of the blocks, of one block and the next, and gradients of one block before and after reduction,
    # which is in fp32.
    size = weight_bytes(precision)
    gathered += size * (count(model) - sum(blocks) + 2 * max(blocks)) + (size + 4) * max(blocks)
    # Nothing is cast: FSDP2 gathers weights in the type that the model computes with.
    return dict(zip(PARTS, (shares.held(touched), gathered, 0, counted.activations)))


def weight_bytes(precision: Precision) -> int:
    """Bytes of a gathered weight. The temperatures, which stay fp32 in bf16, are too few to count apart."""
    return 4 if precision == "fp32" else 2


def _received(
    recipe: Recipe,
    model: IMP,
    shares: Shares,
    task: Task,
    examples: int,
    counted: StepMemory,
    compared: Compared,
    owned: Sequence[Sequence[Tensor]],
    precision: Precision,
) -> dict[str, int]:
    """Bytes that one GPU receives in a step, by connection; see docs/plan.md."""
    gpus, shard, owners = shares.layout
    touched = {weight: None for name, weight in model.named_parameters() if name in counted.touched}
    in_blocks = {weight for block in model.blocks() for weight in block.parameters()}
    outside = [weight for weight in model.parameters() if weight not in in_blocks]
    among: Counter[int] = Counter()  # By size of the group of consecutive GPUs.
    bytes_of_weight = weight_bytes(precision)
    # After the backward pass through a head, FSDP2 frees the weights outside of the blocks.
    among[shard] += shares.gathered(touched) + (1 + compared.heads) * shares.gathered(outside) * bytes_of_weight // 4
    rows = {name: examples * spec.draw // gpus for name, spec in task.inputs.items()}
    for sizes in pass_sizes(rows, recipe.memory.chunk_size):
        own = [model.encoder.own[model.stem_of[name]] for name in sizes] if model.encoder.own else []
        used = (weight for blocks in (model.encoder.blocks, *own) for weight in blocks.parameters())
        among[shard] += 2 * shares.gathered(used) * bytes_of_weight // 4
    among[owners] += others(counted.slots, owners)
    # Vectors, their gradients, and the numbers of their items.
    vectors, numbers = 8 * model.config.embed_dim * compared.rows, 8 * compared.items
    among[gpus] += shares.reduced(touched) + others(vectors + numbers, gpus)
    updated = dict.fromkeys(model.parameters()) if recipe.optimizer.zero_missing_grads else touched
    # The mean over the GPUs, each of which receives what the others own.
    among[gpus] += others(shares.held(m for matrices in owned for m in matrices if m in updated), gpus)
    # In bf16.
    among[shard] += shares.gathered(m for m in _muon_matrices(recipe, model) if m in updated) // 2
    received = {"link": 0, "network": 0}
    for span, size in among.items():
        received["link" if gpus <= NODE or NODE % span == 0 else "network"] += size
    return received
