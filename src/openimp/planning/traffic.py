"""Which collectives a step of a task makes."""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import NamedTuple

from torch import Tensor, nn

from openimp.common.modality import Modalities
from openimp.data.batch import head_key
from openimp.model.embedder import Embedder, pass_sizes
from openimp.model.encoder import SparseBlock
from openimp.model.imp import IMP
from openimp.planning.communication import Collective, Group
from openimp.planning.memory import StepMemory
from openimp.planning.sharding import MuonDivision, Sharding, UnitTraffic
from openimp.planning.timeline import Traffic
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Contrastive, Distill, Task, classified_by, pairs_of, target_of


class HeadPass(NamedTuple):
    """A pass of a modality's features through a projection or a classification."""

    modality: str
    parts: tuple[str, ...]  # how the names of the parameters begin: the head's, and those of the temperature after it


class Compared(NamedTuple):
    """What the losses of a step compare, over all GPUs."""

    heads: list[HeadPass]  # in the order of the forward pass
    objectives: int  # number of contrastive losses; each all-gathers the numbers of its items
    pairs: list[int]  # for each pair of modalities, the rows whose vectors all GPUs get, and return gradients
    fixed: list[int]  # for each contrastive distillation, the rows whose vectors all GPUs get
    similarities: int  # of all rows

    @classmethod
    def by(cls, model: Embedder, task: Task, examples: int) -> "Compared":
        """What a task compares. The sigmoid loss uses each pair of items once."""
        objectives = similarities = 0
        heads, pairs, fixed = list[HeadPass](), list[int](), list[int]()
        for objective in task.objectives:
            if isinstance(objective, Classification):
                head = f"classifiers.{head_key(task.source, objective.label)}."
                heads += [HeadPass(name, (head,)) for name in classified_by(objective, task.inputs)]
                continue
            if isinstance(objective, Distill):
                heads.append(HeadPass(objective.of, _head(model, objective.of, target_of(objective, task.inputs))))
                if objective.loss == "contrastive":
                    objectives += 1
                    fixed.append(examples)
                    similarities += examples * task.inputs[objective.of].draw * examples
                continue
            objectives += 1
            for a, b in pairs_of(objective, task.inputs):
                rows_a, rows_b = examples * task.inputs[a].draw, examples * task.inputs[b].draw
                sides = 2 if objective.loss == "softmax" else 1
                heads += [HeadPass(a, _head(model, a, b)), HeadPass(b, _head(model, b, a) + _temperature(model, a, b))]
                pairs.append(rows_b + (rows_a if sides == 2 else 0))
                similarities += sides * rows_a * rows_b
        return cls(heads, objectives, pairs, fixed, similarities)


def _head(model: Embedder, source: str, target: str) -> tuple[str, ...]:
    """A wrapped model has no heads apart from its towers."""
    return (f"projections.{model.head_name(source, target)}.",) if isinstance(model, IMP) else ()


def _temperature(model: Embedder, a: str, b: str) -> tuple[str, ...]:
    return (f"temperatures.{model.temperature_name(a, b)}.",) if isinstance(model, IMP) else ()


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
    ranks, _, expert_degree, reshard_after_forward = sharding.layout
    everyone, compared = Group.of(ranks, 1, ranks), Compared.by(model, task, examples)
    touched = {weight for name, weight in model.named_parameters() if name in counted.touched}
    blocks = {block: sharding.unit(block.parameters(), touched) for block in model.blocks()}
    kept = {module: sharding.unit(module.parameters(), touched) for module in sharding.fp32_modules}
    apart = {weight for module in (*blocks, *kept) for weight in module.parameters()}
    outside = {name: weight for name, weight in model.named_parameters() if weight not in apart}
    gather_outside = sharding.unit(outside.values(), touched).gather
    rows = {name: examples * spec.draw // ranks for name, spec in task.inputs.items()}
    passes = pass_sizes(rows, recipe.memory.chunk_size)
    # FSDP2 frees the weights outside of blocks after the backward pass of a head whose features have a gradient.
    freeing = [head for head in compared.heads if head.modality in counted.differentiated]
    start, loss, slots = [*gather_outside], len(freeing) * gather_outside, list[Collective]()
    used = [temperature for temperature in _temperatures(model, task) if temperature in kept]
    trained = [each for each in dict.fromkeys(used) if touched & {*each.parameters()}]
    for temperature in (*used, *trained):  # In each forward pass, and once for all backward passes.
        loss += kept[temperature].gather
    *heads, rest = (
        sharding.unit([outside[name] for name in names], touched)._replace(gather=[])
        for names in _reduced_together(compared.heads, {*outside} & counted.touched.keys(), counted.differentiated)
    )
    # The gradients of temperatures are reduced at the end of the backward pass, because their modules have no inputs.
    rest = _together([*(kept[temperature] for temperature in trained), rest])
    if ranks > 1:
        counts = _counts(recipe, modalities, model, passes, counted.differentiated)
        start += counts * [Collective("all-reduce", everyone, 4)]
        loss += compared.objectives * [Collective("all-gather", everyone, 8 * examples)]
        for vectors in compared.pairs:
            size = 4 * model.config.embed_dim * vectors
            loss += [Collective("all-gather", everyone, size), Collective("reduce-scatter", everyone, size)]
        loss += [Collective("all-gather", everyone, 4 * model.config.embed_dim * n) for n in compared.fixed]
    if expert_degree > 1:
        slots = [Collective("all-to-all", Group.of(expert_degree, 1, ranks), size) for size in counted.slots]
    return Traffic(
        start=start,
        passes=[[blocks[block] for block in model.blocks_of(sizes)] for sizes in passes],
        backward=[[blocks[block] for block in _gathered_again(model, sizes, counted, len(passes))] for sizes in passes],
        loss=loss,
        heads=[*heads, rest],
        slots=slots,
        update=[*sharding.norm(updated), *muon.collectives(updated)],
        reshard_after_forward=reshard_after_forward,
    )


def _gathered_again(model: Embedder, sizes: Mapping[str, int], counted: StepMemory, passes: int) -> Sequence[nn.Module]:
    """The blocks of a pass that are gathered for the backward pass.

    A chunk is encoded again, unless its features have no gradient. Otherwise, these are the blocks through which
    gradients flow, and the one before each of them, because FSDP2 gathers it ahead even if it is not needed.
    """
    blocks = model.blocks_of(sizes)
    if passes > 1:
        return blocks if counted.differentiated & {*sizes} else []
    names = {module: name for name, module in model.named_modules()}
    flows = [names[block] in counted.differentiated for block in blocks]
    return [block for block, *needed in zip(blocks, flows, [*flows[1:], False]) if any(needed)]


def _temperatures(model: Embedder, task: Task) -> list[nn.Module]:
    """The learned temperature of each pair that a task compares."""
    contrastive = (objective for objective in task.objectives if isinstance(objective, Contrastive))
    return [model.temperature(*pair) for each in contrastive for pair in pairs_of(each, task.inputs)]


def _counts(
    recipe: Recipe,
    modalities: Modalities,
    model: Embedder,
    passes: Sequence[Mapping[str, int]],
    differentiated: Set[str],
) -> int:
    """The number of all-reduces that count tokens: those of inputs with a mask (`valid_tokens_per_rank`), those that
    choose an expert first, and those of chunks."""
    # Chunks are encoded again in the backward pass, and so are blocks.
    encoded = 2 if len(passes) > 1 and differentiated & {*passes[0]} else 1
    found, moe = len(passes[0]) if len(passes) > 1 else 0, recipe.model.moe
    if not isinstance(model, IMP):
        return found
    names = {module: block for block, module in model.named_modules()}
    for name in chain.from_iterable(passes):
        own = [model.encoder.own[model.stem_of[name]]] if model.encoder.own else []
        for part in (*own, model.encoder.blocks):
            sparse = [names[block] for block in part.children() if isinstance(block, SparseBlock)]
            found += encoded * (bool(sparse) and modalities[name].masked)
            if moe is not None and moe.routing == "token_choice":
                again = recipe.memory.activation_checkpointing * len(differentiated & {*sparse})
                found += encoded * len(sparse) + again
    return found


def _reduced_together(heads: Sequence[HeadPass], names: Set[str], differentiated: Set[str]) -> list[list[str]]:
    """The names of parameters outside of blocks, in the groups in which FSDP2 reduces their gradients.

    That is after the backward pass through each head, and for the rest at the end. A gradient is complete after the
    backward pass of the parameter's first use.
    """
    groups: list[list[str]] = []
    left, complete = {*names}, list[str]()
    for i, head in [*enumerate(heads)][::-1]:
        used_before = tuple(part for earlier in heads[:i] for part in earlier.parts)
        complete += [n for n in sorted(left) if n.startswith(head.parts) and not n.startswith(used_before)]
        left.difference_update(complete)
        if complete and head.modality in differentiated:
            groups.append(complete)
            complete = []
    return [*groups, [*complete, *sorted(left)]]


def _together(units: Iterable[UnitTraffic]) -> UnitTraffic:
    """The collectives of all units."""
    return UnitTraffic(*([*chain.from_iterable(same)] for same in zip(*units)))
