"""Layout of a model over the ranks: replicas, shards, and expert parallelism.

torch does the work: FSDP2 shards, gathers, and reduces gradients over a device mesh, and a tensor that is sharded or
replicated over a mesh is a DTensor.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.common.errors import UserError
from openimp.parallel.distributed import all_reduce_mean, rank, world_size


class Layout(NamedTuple):
    """Numbers of ranks that share a model.

    Attributes:
        ranks: number of ranks.
        shard_degree: consecutive ranks that share one replica; 1: every rank has a full one, except for the experts.
        expert_degree: consecutive ranks that share the experts of a layer.
    """

    ranks: int
    shard_degree: int
    expert_degree: int

    @classmethod
    def of(cls, ranks: int, shard_degree: int | None, expert_degree: int, expert_dims: Iterable[int]) -> "Layout":
        """The layout that a recipe's `parallel` describes. If there are fewer ranks than `shard_degree`, they share one
        replica.

        Args:
            ranks: number of ranks.
            shard_degree: of the recipe; None: all ranks.
            expert_degree: of the recipe.
            expert_dims: input and hidden width of an expert.

        Raises:
            UserError: the ranks, or the weights of an expert, cannot be divided evenly.
        """
        if ranks == 1:
            return cls(1, 1, 1)
        shards = min(shard_degree or ranks, ranks)
        if ranks % shards:
            raise UserError(f"parallel.shard_degree: {ranks} ranks cannot be divided into groups of {shards}")
        sharing = shards if shards > 1 else ranks
        if sharing % expert_degree:
            who = f"the {sharing} ranks that share a replica" if shards > 1 else f"{sharing} ranks"
            raise UserError(f"parallel.expert_degree: {who} cannot be divided into groups of {expert_degree}")
        layout = cls(ranks, shards, expert_degree)
        _, parts, _ = layout.expert_mesh
        if expert_degree > 1 and any(dim % parts for dim in expert_dims):
            raise UserError(
                f"parallel: an expert's weights cannot be sharded over {parts} ranks, shard_degree / expert_degree; "
                f"make model.width and model.mlp_dim multiples of {parts}, or change parallel.shard_degree"
            )
        return layout

    @property
    def expert_mesh(self) -> tuple[int, int, int]:
        """Replicas of an expert, shards of each replica, and ranks that share the experts of a layer."""
        shards = max(1, self.shard_degree // self.expert_degree)
        return self.ranks // (shards * self.expert_degree), shards, self.expert_degree


def apply_parallelism(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module],
    methods: Iterable[str],
    layout: Layout,
    device: torch.device,
) -> None:
    """Distributes a model over the ranks: FSDP2 with `layout.shard_degree` shards per replica, and expert parallelism.

    A replica of one shard goes through FSDP2 as well. In every layout, FSDP2 averages the gradients over the ranks in
    fp32, and a parameter that a step does not use keeps its gradient of None. Parameters stay fp32 and are cast by
    autocast, as on one rank.

    Args:
        model: with the same weights on all ranks.
        blocks: parts of the model whose parameters are gathered when they compute, and freed again.
        experts: parts of the model whose parameters have the experts as their first dimension.
        methods: names of methods of the model that compute with its other parameters.
        layout: degrees of parallelism.
        device: device of this rank. It never holds the full model, unless a replica is one shard.
    """
    if layout.ranks == 1:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    experts = list(experts)
    replicas = layout.ranks // layout.shard_degree
    mesh = init_device_mesh(device.type, (replicas, layout.shard_degree), mesh_dim_names=("replicate", "shard"))
    groups = [(module, mesh) for module in (*blocks, model)]
    if layout.expert_degree > 1:
        expert_mesh = init_device_mesh(
            device.type, layout.expert_mesh, mesh_dim_names=("replicate", "shard", "experts")
        )
        expert_mesh["shard", "experts"]._flatten()  # DTensor then takes one all-reduce for a norm over both dimensions.
        groups = [*((module, expert_mesh) for module in experts), *groups]
        for module in experts:
            for name, weight in list(module.named_parameters()):
                local = distribute_tensor(weight.detach(), expert_mesh["experts"], [Shard(0)])
                setattr(module, name, nn.Parameter(local))
    # The first dimension of an expert weight is the experts. With expert parallelism it is sharded already, and without
    # it there are few experts, so that FSDP2 would pad it for many ranks.
    second = {
        weight
        for module in experts
        for weight in module.parameters()
        if layout.expert_degree > 1 or weight.shape[1] % layout.shard_degree == 0
    }
    for module, mesh in groups:
        wrapped = fully_shard(
            module,
            mesh=mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"],
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            shard_placement_fn=lambda weight: Shard(int(weight in second)),
        )
        # gloo's own average is wrong in some versions of torch: https://github.com/pytorch/pytorch/issues/162338
        wrapped.set_force_sum_reduction_for_comms(device.type == "cpu")
    for method in methods:
        register_fsdp_forward_method(model, method)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; gradients flow through it."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks. Every rank must call this."""
    return cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_on_rank_zero(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors in the CPU memory of rank 0, gathered one after the other; other ranks get none of them."""
    if world_size() == 1:
        return dict(tensors)
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if rank() == 0:
            gathered[name] = full.cpu()
    return gathered


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors grouped by device mesh, because one operation on several DTensors needs all of them on the same mesh."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients so that their Euclidean norm is at most `max_norm`, and returns the norm before that.

    `torch.nn.utils.clip_grad_norm_` does not take parameters on several device meshes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [full_tensor(torch.nn.utils.get_total_norm(group)) for group in by_mesh(gradients)]
    # Ranks may have summed several norms in another order. To stay equal, replicas must be scaled equally.
    norm = norms[0] if len(norms) == 1 else all_reduce_mean(torch.nn.utils.get_total_norm(norms))
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class LocalExperts(NamedTuple):
    """The experts of this rank.

    Attributes:
        weights: their weights, experts first.
        group: the ranks that share all experts of the layer; None if this rank has all of them.
    """

    weights: list[Tensor]
    group: Any


def local_experts(weights: Iterable[Tensor]) -> LocalExperts:
    """This rank's part of weights whose first dimension is the experts.

    Every rank's loss is a mean over its own examples. The gradient of an expert is the sum over the ranks that send it
    tokens, and FSDP2 then averages over its replicas only. So it is divided here by the number of those ranks.
    """
    weights = list(weights)
    mesh = getattr(weights[0], "device_mesh", None)
    if mesh is None:
        return LocalExperts(weights, None)
    local = [local_shard(weight) for weight in weights]
    for weight in local:
        if weight.requires_grad:
            weight.register_hook(lambda grad: grad / mesh.size())
    return LocalExperts(local, mesh.get_group())


def to_owners(x_ESD: Tensor, group: Any) -> Tensor:
    """Sends the slots of this rank's tokens for all experts, (E, S, D), to the ranks that own the experts.

    Returns:
        The slots of all P ranks of the group for this rank's experts, (E / P, P S, D).
    """
    if group is None:
        return x_ESD
    received = _all_to_all(x_ESD, group).unflatten(0, (dist.get_world_size(group), -1))
    return received.transpose(0, 1).flatten(1, 2)


def from_owners(x_ESD: Tensor, group: Any) -> Tensor:
    """The inverse of `to_owners`: returns the results of the experts to the ranks of the tokens."""
    if group is None:
        return x_ESD
    return _all_to_all(x_ESD.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1).flatten(0, 1), group)


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    """Splits the first dimension evenly and sends part i to rank i of the group."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))
