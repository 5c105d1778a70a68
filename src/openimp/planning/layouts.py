"""The layout of a run whose recipe does not choose one, and the layouts that a plan compares."""

from contextlib import suppress
from math import gcd

import torch

from openimp.common.errors import UserError
from openimp.model.embedder import Embedder
from openimp.model.learning_rates import muon_stacks
from openimp.parallel import distributed
from openimp.parallel.layout import Layout
from openimp.planning.gpus import GPUS_PER_NODE, USABLE
from openimp.planning.sharding import Sharding
from openimp.recipe.schema import Recipe

STATE_SHARE = 0.5
"""Largest share of the usable memory that weights, gradients, optimizer state and EMA may take in the default layout.
Activations, inputs and gathered weights take the remainder."""


def default_layout(recipe: Recipe, model: Embedder, ranks: int, per_node: int, bytes_per_gpu: float) -> Layout:
    """The layout on GPUs with `bytes_per_gpu`, `per_node` of them in a node, if the recipe has no `shard_degree`.

    Each rank has a replica if it fits (see `STATE_SHARE`), because weights then need not be gathered. If not, the ranks
    of a node share a replica if it fits, because the links in a node are faster than the network. If not, all ranks
    share one replica.
    """
    for shard_degree in (1, per_node):
        with suppress(UserError):
            layout = layout_of(recipe, ranks, shard_degree)
            if state_bytes(recipe, model, layout) <= STATE_SHARE * USABLE * bytes_per_gpu:
                return layout
    return layout_of(recipe, ranks, ranks)


def choose_layout(recipe: Recipe, model: Embedder, device: torch.device) -> Layout:
    """The layout of a training run on the ranks that torchrun has started. Every rank must call this.

    On CPUs the default is that all ranks share one replica: they share one memory, which replicas would fill.
    """
    ranks = distributed.world_size()
    shard_degree = recipe.parallel.shard_degree
    if ranks == 1 or shard_degree is not None or device.type != "cuda":
        return layout_of(recipe, ranks, shard_degree)
    memory = torch.cuda.get_device_properties(device).total_memory
    smallest = min(distributed.all_gather_object(memory))
    return default_layout(recipe, model, ranks, distributed.local_world_size(), smallest)


def layout_of(recipe: Recipe, ranks: int, shard_degree: int | None, expert_degree: int | None = None) -> Layout:
    """The layout of these degrees for the recipe's model. The recipe's `parallel` sets all else.

    If `shard_degree` is None or more than there are ranks, all ranks share one replica.

    Raises:
        UserError: the ranks or the weights of an expert cannot be divided evenly.
    """
    if ranks == 1:
        return Layout(1, 1, 1)
    shards = min(shard_degree or ranks, ranks)
    experts = expert_degree or recipe.parallel.expert_degree
    if ranks % shards:
        raise UserError(f"parallel.shard_degree: {ranks} ranks cannot be divided into groups of {shards}")
    sharing_ranks = shards if shards > 1 else ranks
    if sharing_ranks % experts:
        named = f"the {sharing_ranks} ranks that share a replica" if shards > 1 else f"{sharing_ranks} ranks"
        raise UserError(f"parallel.expert_degree: {named} cannot be divided into groups of {experts}")
    # Without shards, there is nothing to gather again.
    layout = Layout(ranks, shards, experts, recipe.parallel.reshard_after_forward or shards == 1)
    expert_dims = (recipe.model.width, recipe.model.mlp_dim)
    if experts > 1 and any(dim % layout.expert_shards for dim in expert_dims):
        raise UserError(
            f"parallel: an expert's weights cannot be sharded over {layout.expert_shards} ranks (shard_degree / "
            f"expert_degree); make model.width and model.mlp_dim multiples of {layout.expert_shards}, or change "
            "parallel.shard_degree"
        )
    return layout


def alternatives(recipe: Recipe, gpus: int) -> list[Layout]:
    """Layouts that may suit a recipe: replicas, shards within a node, and shards over all GPUs.

    Each of them comes also with the experts of a layer distributed over a node.
    """
    experts = gcd(*recipe.model.moe.group_sizes) if recipe.model.moe else 1
    layouts = []
    for expert_degree in (1, gcd(experts, gpus, GPUS_PER_NODE)):
        for shard_degree in (1, min(GPUS_PER_NODE, gpus), gpus):
            with suppress(UserError):
                layouts.append(layout_of(recipe, gpus, shard_degree, expert_degree))
    return [*dict.fromkeys(layouts)]


def state_bytes(recipe: Recipe, model: Embedder, layout: Layout) -> int:
    """Bytes of a rank's shards of weights, gradients, optimizer state and EMA, in fp32.

    AdamW has two tensors per parameter and Muon one. A frozen parameter has only its weight.
    """
    sharding = Sharding(layout, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    copies = 3 if recipe.optimizer.ema_decay is None else 4
    held_bytes = sharding.held_bytes(model.parameters()) + copies * sharding.held_bytes(trained)
    return held_bytes - sharding.held_bytes(muon_stacks(model, recipe.optimizer))
