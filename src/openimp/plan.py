"""What a run would need, told without a GPU: parameters, memory, FLOPs, communication, days.

FLOPs are the ledger's, and the memory of a step is counted. The rest is arithmetic on sizes, for FSDP as in torch's
`fully_shard`: weights, gradients and moments in fp32 and sharded over all GPUs, every block gathered when it computes.
docs/plan.md writes it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from openimp.alternation import Alternation
from openimp.device import Precision
from openimp.errors import UserError, nearest
from openimp.gpus import GPU, GPUS, NODE, USABLE
from openimp.ledger import Cost, costs
from openimp.memory import KINDS, StepMemory, step_memory
from openimp.modalities import Modality
from openimp.model.imp import IMP, pairs_of
from openimp.optim import make_optimizers
from openimp.recipe import Contrastive, Recipe, Task

SIMILARITY = 21
"""Bytes that the softmax loss holds at its peak for a pair of items, seen from one side; a test counts them."""


@dataclass(frozen=True)
class Step:
    """A step of one (task, view).

    Attributes:
        cost: examples, tokens and FLOPs, over all GPUs.
        memory: bytes of one GPU when the step needs most, by what they hold.
        received: bytes that come to one GPU; as many leave it.
    """

    cost: Cost
    memory: dict[str, int]
    received: int


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        gpu: what it runs on.
        gpus: how many.
        mfu: share of the bf16 peak that the model's FLOPs are computed at.
        parameters: by part of the model.
        per_token: parameters between a token's embedding and the mean over the tokens that work on it, on average;
            None with soft routing, where no token has a number of experts.
        steps: by (task, view).
        visits: how many of them the run makes.
    """

    gpu: GPU
    gpus: int
    mfu: float
    parameters: dict[str, int]
    per_token: int | None
    steps: dict[tuple[str, int], Step]
    visits: dict[tuple[str, int], int]

    @property
    def largest(self) -> tuple[str, int]:
        """The (task, view) that decides the memory."""
        return max(self.steps, key=lambda key: sum(self.steps[key].memory.values()))

    @property
    def memory(self) -> int:
        """Bytes that one GPU holds at most."""
        return sum(self.steps[self.largest].memory.values())

    @property
    def fits(self) -> bool:
        return self.memory <= USABLE * self.gpu.memory * 2**30

    @property
    def flops(self) -> int:
        """Of the whole run, over all GPUs."""
        return sum(self.steps[key].cost.flops * n for key, n in self.visits.items())

    @property
    def seconds(self) -> float:
        """Of computing, at the MFU, in all."""
        return self.computing(self.flops)

    @property
    def seconds_connected(self) -> float:
        """The same, where a step also waits for those of its bytes that take longer to come than it computes."""
        return sum(
            n * max(self.computing(self.steps[key].cost.flops), self.communicating(self.steps[key].received))
            for key, n in self.visits.items()
        )

    def computing(self, flops: int) -> float:
        """Seconds that all GPUs take for FLOPs at the MFU."""
        return flops / (self.gpus * self.gpu.tflops * 1e12 * self.mfu)

    def communicating(self, received: int) -> float:
        """Seconds that bytes take to come over the slowest connection, if nothing else happens meanwhile."""
        return received / (1e9 * (self.gpu.link if self.gpus <= NODE else self.gpu.network))


def plan(
    recipe: Recipe,
    modalities: Mapping[str, Modality],
    classes: Mapping[str, list[Any]],
    gpus: int,
    gpu: str,
    mfu: float,
) -> Plan:
    """Counts what a recipe needs; reads no data and computes nothing.

    Args:
        modalities: of the recipe; a tokenizer that is yet to be trained counts as large as it may become.
        classes: of each classification head.
        gpus: among which each batch is divided.
        gpu: one of `GPUS`.
        mfu: above 0, at most 1.

    Raises:
        UserError: an unknown GPU, no GPU, an MFU that is none, or batches that cannot be divided evenly.
    """
    if gpu not in GPUS:
        raise UserError(f"--gpu: no GPU is called {gpu!r}{nearest(gpu, GPUS)}")
    if gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, found {gpus}")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: expected a share above 0 and at most 1, found {mfu:g}")
    by_view = costs(recipe, modalities, classes)
    uneven = [f"{cost.examples} of tasks.{t}.views[{i}]" for (t, i), cost in by_view.items() if cost.examples % gpus]
    if uneven:
        raise UserError(f"--gpus: {gpus} GPUs do not divide a batch evenly: {', '.join(uneven)}")
    precision: Precision = "fp32" if recipe.train.precision == "fp32" else "bf16"
    with torch.device("meta"):
        model = IMP.from_recipe(recipe, modalities, {name: len(values) for name, values in classes.items()})
    steps = {}
    for (name, view), cost in by_view.items():
        counted = step_memory(recipe, modalities, classes, name, view, precision, gpus=gpus)
        memory = {
            "parameters": 4 * count(model) // gpus,
            "optimiser": _optimiser_bytes(recipe, model) // gpus,
            "inputs": counted.inputs,
        }
        if gpus == 1:
            parts, received = {kind: counted.peak[kind] for kind in KINDS}, 0
        else:
            task = recipe.tasks[name]
            parts, received = _sharded(recipe, model, task, cost.examples, counted, gpus, precision)
        steps[name, view] = Step(cost, memory | parts, received)
    parameters = {name: count(part) for name, part in model.named_children()}
    return Plan(GPUS[gpu], gpus, mfu, parameters, per_token(recipe, model), steps, Alternation(recipe).visits())


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_per_token(recipe: Recipe, model: IMP) -> int | None:
    """Parameters of the encoder that a token uses on average: all but the experts that it has no part in.

    Expert choice gives a token `capacity` experts on average, token choice `top_k`.
    """
    own = [count(blocks) for blocks in model.encoder.own.values()]
    used = count(model.encoder) - sum(own[1:])  # A token has the first blocks of its own stem, all of them alike.
    moe = recipe.model.moe
    if moe is None:
        return used
    if moe.routing == "soft":
        return None
    experts = moe.top_k if moe.routing == "token_choice" else min(moe.capacity, moe.experts)
    return round(used - moe.layers * 2 * recipe.model.width * recipe.model.mlp * (moe.experts - experts))


def per_token(recipe: Recipe, model: IMP) -> int | None:
    """`encoder_per_token` and the stem's two linear layers, one before the encoder and one after."""
    encoder, width = encoder_per_token(recipe, model), recipe.model.width
    return None if encoder is None else encoder + 2 * (width * width + width)


def _optimiser_bytes(recipe: Recipe, model: IMP) -> int:
    """AdamW's two moments, Muon's one, and the averaged weights, in fp32."""
    size = 4 * count(model) if recipe.optimizer.ema else 0
    for optimizer in make_optimizers(recipe.optimizer, model):
        moments = 1 if isinstance(optimizer, torch.optim.Muon) else 2
        size += sum(4 * moments * p.numel() for group in optimizer.param_groups for p in group["params"])
    return size


def _sharded(
    recipe: Recipe, model: IMP, task: Task, examples: int, counted: StepMemory, gpus: int, precision: Precision
) -> tuple[dict[str, int], int]:
    """Bytes beyond weights and moments that one of several GPUs holds, and bytes that it receives; docs/plan.md."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in counted.touched}
    in_blocks = sum(size for name, size in sizes.items() if name.startswith("encoder.blocks."))
    outside = sum(sizes.values()) - in_blocks
    block = max(count(block) for block in model.encoder.blocks)
    # What stands outside of the blocks, one block and the next, and one block's gradients, before and summed.
    gathered = 4 * (outside + 2 * block) + 8 * block
    # Gathered for the forward pass and again for the backward one, and gradients summed.
    rows = [examples * spec.draw // gpus for spec in task.inputs.values()]
    passes = sum(ceil(n / (recipe.batch.micro or n)) for n in rows)
    received = 12 * (outside + passes * in_blocks)
    for objective in task.objectives:
        for a, b in pairs_of(objective, task.inputs) if isinstance(objective, Contrastive) else []:
            rows_a, rows_b = examples * task.inputs[a].draw, examples * task.inputs[b].draw
            vectors = 4 * (rows_a + rows_b) * recipe.model.embed_dim
            # The vectors of all GPUs and their gradients, and similarities with the other GPUs' from either side.
            gathered += 2 * vectors + 2 * SIMILARITY * rows_a * rows_b * (gpus - 1) // gpus**2
            received += 2 * vectors
    gradients = 4 * sum(sizes.values()) // gpus
    # Autocast's copies of all weights stay until the backward pass has used them, whatever FSDP gives back.
    cast = 0 if precision == "fp32" else 2 * sum(sizes.values())
    memory = {"gradients": gradients, "gathered": gathered, "cast weights": cast, "activations": counted.activations}
    return memory, received * (gpus - 1) // gpus
