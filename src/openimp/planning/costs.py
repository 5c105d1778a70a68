"""What one step of each (task, view) costs, counted, not estimated.

FLOPs are those of the matrix products and attention in the forward pass, the backward pass and the optimizer. They are
counted by `torch.utils.flop_counter` on the meta device, where nothing is computed; a multiply-add is two.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from openimp.alternation import expected_shares
from openimp.common.errors import UserError
from openimp.common.modality import Classes, Modalities
from openimp.common.progress import number_table
from openimp.data.batch import Batch
from openimp.data.targets import target_sizes
from openimp.model.embedder import Embedder, in_chunks
from openimp.model.imp import build_for_training
from openimp.model.learning_rates import freeze, muon_stacks
from openimp.objectives.losses import task_losses
from openimp.parallel.muon import muon_flops
from openimp.recipe.schema import Recipe
from openimp.recipe.training import Memory

META = torch.device("meta")
UNITS = ("steps", "examples", "tokens", "flops")
TaskView = tuple[str, int]
"""The name of a task, and the index of one of its views."""
_cached_costs: dict[Any, dict[TaskView, "Cost"]] = {}


@dataclass(frozen=True)
class Cost:
    """What one step costs."""

    examples: int  # of the batch, over all ranks
    tokens: int  # that enter the encoder, over all modalities
    flops: int  # in all: forward, backward, repeated forward passes, and optimizer
    forward_flops: int  # of one forward pass
    repeated_flops: int  # of the forward passes that the backward pass repeats, as `memory` asks
    optimizer_flops: int  # of Muon
    params_with_grad: frozenset[str]  # names of the parameters that get a gradient

    @property
    def model_flops(self) -> int:
        """FLOPs of one forward and one backward pass, which MFU counts (PaLM, arXiv 2204.02311, appendix B)."""
        return self.hardware_flops - self.repeated_flops

    @property
    def hardware_flops(self) -> int:
        """FLOPs of all passes, which HFU counts."""
        return self.flops - self.optimizer_flops


Costs = Mapping[TaskView, Cost]


def costs(
    recipe: Recipe,
    modalities: Modalities,
    classes: Classes,
    *,
    build: Callable[..., Any] = build_for_training,
    summed: bool = False,
) -> dict[TaskView, Cost]:
    """The cost of a step of each task and view. For a model that is not the recipe's, give its `build`.

    With `summed`, one update follows the losses of all tasks, and its FLOPs are divided equally among their steps.
    """
    data = recipe.to_dict()
    # Views of evaluation count too, because the context of two towers is as long as the longest view.
    sections = [data[name] for name in ("model", "modalities", "tasks", "memory", "evaluation", "optimizer")]
    class_counts = {name: len(values) for name, values in classes.items()}
    key = (build, summed, json.dumps([sections, class_counts]))
    if key not in _cached_costs:  # Counting takes seconds, and a study needs the same costs again and again.
        model = meta_model(recipe, modalities, classes, build).train()
        cost_by_task_view = _count_passes(recipe, modalities, classes, model)
        cost_by_task_view = _with_optimizer(recipe, model, cost_by_task_view, summed)
        if recipe.memory != Memory():
            plain_recipe = recipe.model_copy(update={"memory": Memory()})
            plain = costs(plain_recipe, modalities, classes, build=build, summed=summed)
            for task_view, cost in cost_by_task_view.items():
                cost_by_task_view[task_view] = replace(cost, repeated_flops=cost.flops - plain[task_view].flops)
        _cached_costs[key] = cost_by_task_view
    return _cached_costs[key]


def _count_passes(recipe: Recipe, modalities: Modalities, classes: Classes, model: Embedder) -> dict[TaskView, Cost]:
    """The cost of a step of each task and view, without its update."""
    cost_by_task_view = {}
    for task_name, task in recipe.tasks.items():
        if not task.weight:
            continue
        for i, batch_size in enumerate(task.batch_sizes):
            batch = zero_batch(recipe, task_name, i, modalities, classes, device=META)
            encode_all = in_chunks(model.encode_all, _fewest_chunks(batch, recipe.memory.chunk_size))
            with FlopCounterMode(display=False) as counter:
                try:
                    total = task_losses(model, task, batch, encode_all).total
                except UserError as error:
                    raise UserError(f"tasks.{task_name}: {error}") from None
                forward_flops = counter.get_total_flops()
                if not total.requires_grad:
                    raise UserError(f"tasks.{task_name}: optimizer.lr_scale freezes all that the task trains")
                total.backward()
            with_grad = [name for name, weight in model.named_parameters() if weight.grad is not None]
            cost_by_task_view[task_name, i] = Cost(
                examples=batch_size,
                tokens=sum(tokens.coords[..., 0].numel() for tokens in batch.tokens.values()),
                flops=counter.get_total_flops(),
                forward_flops=forward_flops,
                repeated_flops=0,
                optimizer_flops=0,
                params_with_grad=frozenset(with_grad),
            )
            model.zero_grad()
    return cost_by_task_view


def _fewest_chunks(batch: Batch, chunk_size: int | None) -> int | None:
    """A chunk size that gives at most two chunks, and as many FLOPs for encoding `batch` as `chunk_size`.

    Each example takes the same FLOPs in any chunk. What counts is whether there are several chunks, which are encoded
    again in the backward pass. Counting 64 of them would take minutes.
    """
    if chunk_size is None:
        return None
    largest = max(len(tokens.coords) for tokens in batch.tokens.values())
    return max(chunk_size, ceil(largest / 2))


def _with_optimizer(recipe: Recipe, model: Embedder, cost_by_task_view: Costs, summed: bool) -> dict[TaskView, Cost]:
    """Adds the FLOPs of each step's update to its cost."""
    stacks = muon_stacks(model, recipe.optimizer)
    parameters = dict(model.named_parameters())

    @cache
    def update_flops(names: frozenset[str]) -> int:
        updated = [parameters[name] for name in names]
        return muon_flops({parameter: stacks[parameter] for parameter in updated if parameter in stacks})

    all_with_grad = frozenset[str]().union(*(cost.params_with_grad for cost in cost_by_task_view.values()))
    steps_per_update = len({task for task, _ in cost_by_task_view}) if summed else 1
    with_update = {}
    for task_view, cost in cost_by_task_view.items():
        if recipe.optimizer.zero_missing_grads:
            updated_names = frozenset(parameters)
        else:
            updated_names = all_with_grad if summed else cost.params_with_grad
        flops = update_flops(updated_names) // steps_per_update
        with_update[task_view] = replace(cost, flops=cost.flops + flops, optimizer_flops=flops)
    return with_update


def meta_model(
    recipe: Recipe, modalities: Modalities, classes: Classes, build: Callable[..., Any] = build_for_training
) -> Any:
    """The recipe's model, with frozen parts, on the meta device: it has shapes and no values."""
    with META:
        model = build(recipe, modalities, classes)
    freeze(model, recipe.optimizer)
    return model


def mixture(recipe: Recipe, cost_by_task_view: Costs) -> dict[str, dict[str, float]]:
    """What each task contributes to the mean step: its share of the steps, and examples, tokens and FLOPs."""
    rows = {}
    for task, share in expected_shares(recipe).items():
        views = recipe.tasks[task].views
        view_shares = [view.weight / sum(other.weight for other in views) for view in views]
        rows[task] = {"steps": share}
        for unit in UNITS[1:]:
            view_costs = [getattr(cost_by_task_view[task, i], unit) for i in range(len(views))]
            rows[task][unit] = share * sum(view_share * cost for view_share, cost in zip(view_shares, view_costs))
    return rows


def mixture_table(recipe: Recipe, cost_by_task_view: Costs) -> Table:
    """Each task's expected share of steps, examples, tokens and FLOPs, and the totals of the whole run."""
    by_task = mixture(recipe, cost_by_task_view)
    totals = {unit: sum(row[unit] for row in by_task.values()) for unit in UNITS}
    rows = [(name, *(f"{row[unit] / totals[unit]:.1%}" for unit in UNITS)) for name, row in by_task.items()]
    whole_run = ("in all", *(short(recipe.train.steps * totals[unit]) for unit in UNITS))
    return number_table("mixture: expected share by task", ("task", *UNITS[:-1], "FLOPs"), rows, [whole_run])


def short(number: float) -> str:
    """A number with a prefix of the SI: 1234567 is 1.23 M."""
    for power, prefix in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:,.0f}"


def zero_batch(
    recipe: Recipe,
    name: str,
    view: int,
    modalities: Modalities,
    classes: Classes,
    device: torch.device,
    ranks: int = 1,
) -> Batch:
    """A batch of zeros of a task, with the shapes that the loader makes, for one of `ranks` ranks that share it."""
    task = recipe.tasks[name]
    examples = task.batch_sizes[view] // ranks
    tokens = {}
    with device:
        for modality, spec in task.inputs.items():
            length = modalities[modality].length(task.views[view][modality])
            tokens[modality] = modalities[modality].zeros(examples * spec.draw, length)
        sizes = target_sizes(recipe, classes)
        targets = [objective.zeros(task, examples, sizes) for objective in task.objectives]
    return Batch(tokens, targets)
