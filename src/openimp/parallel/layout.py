"""How processes hold a model between them: in shards, as copies, with the experts apart.

A tensor of which this process has a part is a DTensor.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.common.errors import UserError
from openimp.parallel.distributed import Group, rank, world


class Layout(NamedTuple):
    """How processes hold a model between them.

    Attributes:
        processes: how many there are.
        shard: consecutive ones that share a copy; 1: each has a whole one, but for the experts.
        owners: consecutive ones that share the experts.
    """

    processes: int
    shard: int
    owners: int

    @classmethod
    def of(cls, processes: int, shard: int | None, owners: int) -> "Layout":
        """As the recipe's `parallel` says; fewer than `shard` share one copy, and a single process has all.

        Raises:
            UserError: the processes cannot be divided so.
        """
        if processes == 1:
            return cls(1, 1, 1)
        shard = min(shard or processes, processes)
        if processes % shard:
            raise UserError(f"parallel.shard_degree: {processes} processes cannot be divided into groups of {shard}")
        among = shard if shard > 1 else processes
        if among % owners:
            told = f"the {among} processes that share a copy" if shard > 1 else f"{among} processes"
            raise UserError(f"parallel.expert_degree: {told} cannot be divided into groups of {owners}")
        return cls(processes, shard, owners)

    def check(self, weights: Iterable[Tensor]) -> None:
        """Whether experts that are dealt out can be cut evenly between those that share them.

        Raises:
            UserError: they cannot.
        """
        for weight in weights if self.owners > 1 else ():
            if weight.shape[1] % self.sizes[1]:
                shape = " x ".join(map(str, weight.shape[1:]))
                raise UserError(
                    f"parallel: an expert's {shape} weights cannot be cut into {self.sizes[1]}, shard by experts; "
                    f"make model.width and model.mlp_dim multiples of {self.sizes[1]}, or change parallel.shard_degree"
                )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Copies of an expert, the parts that each is cut into, and the owners that share all of them."""
        parts = max(1, self.shard // self.owners)
        return self.processes // (parts * self.owners), parts, self.owners


def spread(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module],
    methods: Iterable[str],
    shard: int | None,
    owners: int,
    device: torch.device,
) -> list[tuple[Group, list[nn.Parameter]]]:
    """Lays a model out over the processes as the recipe's `parallel` says, on their devices, and returns which of them
    have copies of which parameters, that FSDP2 does not keep alike.

    Parameters stay fp32 and are cast by autocast as in one process; gradients are averaged in fp32.

    Args:
        model: the same in all processes.
        blocks: its parts whose parameters FSDP2 gathers when they compute, and gives back.
        experts: its parts whose parameters have the experts as their first dimension.
        methods: of the model, that compute with its other parameters.
        shard: processes that share one copy; None: all.
        owners: processes that share the experts.
        device: where this process computes; of a model in shards it never has to hold the whole.

    Raises:
        UserError: the processes, or the experts, cannot be divided so.
    """
    if world() == 1:
        model.to(device)
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    layout, experts = Layout.of(world(), shard, owners), list(experts)
    layout.check(weight for module in experts for weight in module.parameters())
    if owners > 1:
        expert_mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=("replicate", "shard", "experts"))
        for module in experts:
            for name, weight in list(module.named_parameters()):
                part = distribute_tensor(weight.detach(), expert_mesh["experts"], [Shard(0)])
                setattr(module, name, nn.Parameter(part))
    if layout.shard == 1:
        model.to(device)  # Of DTensors it makes new parameters.
        everywhere = cast(Group, dist.group.WORLD)
        if owners == 1:
            return [(everywhere, list(model.parameters()))]
        dealt = [weight for module in experts for weight in module.parameters()]
        apart = set(dealt)
        alike = [weight for weight in model.parameters() if weight not in apart]
        return [(everywhere, alike), (expert_mesh.get_group("replicate"), dealt)]
    # Experts that are dealt out are cut along their second dimension. So are others: FSDP2 pads a first dimension to a
    # part a process, and of few experts many processes would gather mostly padding.
    second = {w for module in experts for w in module.parameters() if owners > 1 or w.shape[1] % layout.shard == 0}
    if owners > 1:
        for module in experts:
            _fully_shard(module, expert_mesh, second)
    groups = world() // layout.shard
    sizes = {"replicate": groups, "shard": layout.shard} if groups > 1 else {"shard": layout.shard}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for module in (*blocks, model):
        _fully_shard(module, mesh, second)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return []


def _fully_shard(module: nn.Module, mesh: Any, second: set[nn.Parameter]) -> None:
    """Cuts a module's parameters along their first dimension, and some along their second one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    several = "replicate" in mesh.mesh_dim_names and mesh["replicate"].size() > 1
    fully_shard(
        module,
        mesh=mesh["replicate", "shard"] if several else mesh["shard"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        shard_placement_fn=lambda weight: Shard(int(weight in second)),
    )


def is_part(tensor: Tensor) -> bool:
    """Whether this process has but a part of a tensor, or others may have."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; with its gradient."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


def on_one_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in the groups that one operation takes at once: those that are cut up over the same processes."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(groups.values())


class Owned(NamedTuple):
    """The experts of this process.

    Attributes:
        weights: theirs.
        group: the processes that share all experts; None where this one has all of them.
    """

    weights: list[Tensor]
    group: Any


def owned(weights: Iterable[Tensor]) -> Owned:
    """The part that this process has of weights whose first dimension is the experts.

    Each process' gradient is that of the mean over its own examples. An expert gets those of all that share the
    experts in a sum, and then takes the mean over as many fewer processes as have a copy of it, so it is divided here.
    """
    weights = list(weights)
    mesh = getattr(weights[0], "device_mesh", None)
    if mesh is None:
        return Owned(weights, None)
    parts = [own_part(weight) for weight in weights]
    for part in parts:
        if part.requires_grad:
            part.register_hook(lambda grad: grad / mesh.size())
    return Owned(parts, mesh.get_group())


def to_owners(x_ESD: Tensor, group: Any) -> Tensor:
    """The slots of all experts here, (E, S, D), to those of this process' experts everywhere, (E / P, P S, D)."""
    if group is None:
        return x_ESD
    there = _exchanged(x_ESD, group).unflatten(0, (dist.get_world_size(group), -1))
    return there.transpose(0, 1).flatten(1, 2)


def from_owners(x_ESD: Tensor, group: Any) -> Tensor:
    """What `to_owners` sent, the other way."""
    if group is None:
        return x_ESD
    there = x_ESD.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)
    return _exchanged(there.flatten(0, 1), group)


def _exchanged(x: Tensor, group: Any) -> Tensor:
    """The first dimension in as many equal parts as there are processes, and part i to process i."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(x.contiguous(), None, None, group))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all processes."""
    if world() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first process, one after the other; nothing in the others."""
    if world() == 1:
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if rank() == 0:
            found[name] = full.cpu()
    return found
