"""Which collectives a step of a task makes."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from openimp.common.modality import Modalities
from openimp.model.embedder import Embedder, pass_sizes
from openimp.model.encoder import SparseBlock
from openimp.model.imp import IMP
from openimp.planning.communication import Collective, Group
from openimp.planning.memory import StepMemory
from openimp.planning.sharding import MuonDivision, Sharding, UnitTraffic
from openimp.planning.timeline import Traffic
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Task, classified_by, pairs_of


class Compared(NamedTuple):
    """What the losses of a step compare, over all GPUs."""

    heads: int  # passes of features through a projection or a classification
    objectives: int  # number of contrastive objectives; each all-gathers the numbers of its items
    pairs: list[int]  # for each pair of modalities, the rows whose vectors all GPUs get
    similarities: int  # of all rows

    @classmethod
    def by(cls, task: Task, examples: int) -> "Compared":
        """What a task compares. The sigmoid loss uses each pair of items once."""
        heads = objectives = similarities = 0
        pairs = []
        for objective in task.objectives:
            if isinstance(objective, Classification):
                heads += len(classified_by(objective, task.inputs))
                continue
            objectives += 1
            for a, b in pairs_of(objective, task.inputs):
                rows_a, rows_b = examples * task.inputs[a].draw, examples * task.inputs[b].draw
                sides = 2 if objective.loss == "softmax" else 1
                heads += 2
                pairs.append(rows_b + (rows_a if sides == 2 else 0))
                similarities += sides * rows_a * rows_b
        return cls(heads, objectives, pairs, similarities)


def step_traffic(
    recipe: Recipe,
    modalities: Modalities,
    model: Embedder,
    sharding: Sharding,
    task: Task,
    examples: int,
    counted: StepMemory,
    muon: MuonDivision,
    updated: Set[Tensor],
) -> Traffic:
    """The collectives of a step with a batch of `examples`. See docs/plan.md."""
    ranks, _, expert_degree = sharding.layout
    everyone, compared = Group.of(ranks, 1, ranks), Compared.by(task, examples)
    touched = {weight for name, weight in model.named_parameters() if name in counted.touched}
    blocks = {block: sharding.unit(block.parameters(), touched) for block in model.blocks()}
    kept = {module: sharding.unit(module.parameters(), touched) for module in sharding.fp32_modules}
    apart = {weight for module in (*blocks, *kept) for weight in module.parameters()}
    outside = sharding.unit([weight for weight in model.parameters() if weight not in apart], touched)
    rows = {name: examples * spec.draw // ranks for name, spec in task.inputs.items()}
    passes = pass_sizes(rows, recipe.memory.chunk_size)
    start, loss, slots = [*outside.gather], compared.heads * outside.gather, list[Collective]()
    used = [temperature for temperature in _temperatures(model, task) if temperature in kept]
    for temperature in (*used, *dict.fromkeys(used)):  # In each forward pass, and once for all backward passes.
        loss += kept[temperature].gather
    # The gradients of temperatures are reduced at the end of the backward pass, because their modules have no inputs.
    head = _part(outside, 1 + compared.heads)
    rest = _together([*(kept[temperature] for temperature in dict.fromkeys(used)), head])
    if ranks > 1:
        start += _counts(recipe, modalities, model, passes) * [Collective("all-reduce", everyone, 4)]
        loss += compared.objectives * [Collective("all-gather", everyone, 8 * examples)]
        for vectors in compared.pairs:
            size = 4 * model.config.embed_dim * vectors
            loss += [Collective("all-gather", everyone, size), Collective("reduce-scatter", everyone, size)]
    if expert_degree > 1:
        slots = [Collective("all-to-all", Group.of(expert_degree, 1, ranks), size) for size in counted.slots]
    return Traffic(
        start=start,
        passes=[[blocks[block] for block in model.blocks_of(sizes)] for sizes in passes],
        loss=loss,
        heads=[*compared.heads * [head], rest],
        slots=slots,
        update=[*sharding.norm(), *muon.collectives(updated)],
    )


def _temperatures(model: Embedder, task: Task) -> list[nn.Module]:
    """The learned temperature of each pair that a task compares."""
    contrastive = (objective for objective in task.objectives if not isinstance(objective, Classification))
    return [model.temperature(*pair) for each in contrastive for pair in pairs_of(each, task.inputs)]


def _counts(recipe: Recipe, modalities: Modalities, model: Embedder, passes: Sequence[Mapping[str, int]]) -> int:
    """The number of all-reduces that count tokens: those of inputs with a mask (`valid_tokens_per_rank`), those that
    choose an expert first, and those of chunks."""
    encoded = 2 if len(passes) > 1 else 1  # Chunks are encoded again in the backward pass, and so are blocks.
    again, moe = encoded + recipe.memory.activation_checkpointing, recipe.model.moe
    found = len(passes[0]) if len(passes) > 1 else 0
    if not isinstance(model, IMP):
        return found
    for name in chain.from_iterable(passes):
        own = [model.encoder.own[model.stem_of[name]]] if model.encoder.own else []
        for part in (*own, model.encoder.blocks):
            sparse = sum(isinstance(block, SparseBlock) for block in part.children())
            found += encoded * (sparse > 0 and modalities[name].masked)
            found += again * sparse * (moe is not None and moe.routing == "token_choice")
    return found


def _part(unit: UnitTraffic, parts: int) -> UnitTraffic:
    """One of equal parts of the gradients of weights outside of the blocks. FSDP2 reduces each head's separately."""
    return UnitTraffic([], *([replace(c, size=c.size // parts) for c in some] for some in (unit.scatter, unit.reduce)))


def _together(units: Iterable[UnitTraffic]) -> UnitTraffic:
    """The collectives of all units."""
    return UnitTraffic(*([*chain.from_iterable(same)] for same in zip(*units)))
