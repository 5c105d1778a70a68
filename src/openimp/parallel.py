"""How processes hold a model between them: in shards, as copies, with the experts apart; and what a step does then.

In a single process nothing is exchanged. A tensor of which this process has a part is a DTensor.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.distributed import Group, mean, rank, world
from openimp.errors import UserError

TOGETHER = 2**22
"""Bytes of gradients from which on they are sent. A few pieces of the demo's 14 MB; chosen for processes on CPUs."""


class Copies:
    """Parameters of which each process of a group has a copy. Their gradients are summed while others are computed: a
    shared encoder's when the backward pass comes to the modality that was encoded first.

    What goes together is what the backward pass brings one after the other. It brings them in the same order in all
    processes, whose graphs are the same, and brings nothing of what the step's task does not touch.

    Attributes:
        ready: gradients that are complete and not yet sent.
        sent: what waits for gradients that are on their way, and these.
    """

    def __init__(self, group: Group, parameters: Iterable[nn.Parameter]) -> None:
        self.group = group
        # Some versions of gloo give a wrong mean: https://github.com/pytorch/pytorch/issues/162338
        self.sums = dist.get_backend(group) == "gloo"
        self.options = dist.AllreduceCoalescedOptions()
        self.options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM if self.sums else dist.ReduceOp.AVG)
        self.ready: list[Tensor] = []
        self.sent: list[tuple[Any, list[Tensor]]] = []
        for parameter in parameters if group.size() > 1 else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._add)

    def _add(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ready.append(own_part(parameter.grad))
        if sum(gradient.nbytes for gradient in self.ready) >= TOGETHER:
            self._send()

    def _send(self) -> None:
        self.sent.append((self.group.allreduce_coalesced(self.ready, self.options), self.ready))
        self.ready = []

    def average(self) -> None:
        """Makes the gradients, after each backward pass, those of the mean over the processes."""
        if self.ready:
            self._send()
        sent, self.sent = self.sent, []
        for work, gradients in sent:
            work.wait()
            if self.sums:
                torch._foreach_div_(gradients, self.group.size())


def average_gradients(copies: Iterable[Copies]) -> None:
    """`Copies.average` of all."""
    for group in copies:
        group.average()


class Dealt:
    """Matrices that all processes have alike, of which each updates its share and lets the others have it: an update
    that takes long, such as Muon's, is not made once in every process. Where processes have parts, all is their own.

    Args:
        steps: what each kind of step updates, so that no process does the work of one for the others.

    Attributes:
        own: those that this process updates.
    """

    def __init__(self, matrices: Iterable[Tensor], steps: Iterable[Set[Tensor]]) -> None:
        matrices = list(matrices)
        self.shares = deal(matrices, steps, 1 if any(map(is_part, matrices)) else world())
        self.own = self.shares[rank() % len(self.shares)]

    def exchange(self) -> None:
        """Gets what the others have updated: the matrices that have a gradient."""
        if len(self.shares) == 1:
            return
        updated = [[matrix.detach() for matrix in share if matrix.grad is not None] for share in self.shares]
        sizes = [[matrix.numel() for matrix in share] for share in updated]
        own = self.shares[0][0].new_empty(max(map(sum, sizes)))
        torch.cat([own[:0], *(matrix.flatten() for matrix in updated[rank()])], out=own[: sum(sizes[rank()])])
        found = [torch.empty_like(own) for _ in updated]
        dist.all_gather(found, own)
        for number, share in enumerate(updated):
            if share and number != rank():
                parts = found[number][: sum(sizes[number])].split(sizes[number])
                torch._foreach_copy_(share, [part.view_as(matrix) for part, matrix in zip(parts, share)])


def deal(matrices: Iterable[Tensor], steps: Iterable[Set[Tensor]], processes: int) -> list[list[Tensor]]:
    """Matrices in as many shares as there are processes: the largest first, each to the process that has least to do in
    the kinds of steps that update it."""
    shares: list[list[Tensor]] = [[] for _ in range(processes)]
    loads = [(step, [0] * processes) for step in dict.fromkeys(map(frozenset, steps))]
    for matrix in sorted(matrices, key=_work, reverse=True):
        of_it = [load for step, load in loads if matrix in step]
        least = min(range(processes), key=lambda process: sum(load[process] for load in of_it))
        shares[least].append(matrix)
        for load in of_it:
            load[least] += _work(matrix)
    return shares


def _work(matrix: Tensor) -> int:
    """To orthogonalise it, about."""
    return matrix.numel() * min(matrix.shape)


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
            raise UserError(f"parallel.shard: {processes} processes cannot be divided into groups of {shard}")
        among = shard if shard > 1 else processes
        if among % owners:
            told = f"the {among} processes that share a copy" if shard > 1 else f"{among} processes"
            raise UserError(f"parallel.experts: {told} cannot be divided into groups of {owners}")
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
                    f"make model.width and model.mlp multiples of {self.sizes[1]}, or change parallel.shard"
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
) -> list[Copies]:
    """Lays a model out over the processes as the recipe's `parallel` says, on their devices; what it returns has
    gradients to average.

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
    dealt: list[nn.Parameter] = []
    if owners > 1:
        expert_mesh = init_device_mesh(device.type, layout.sizes, mesh_dim_names=("replicate", "shard", "experts"))
        for module in experts:
            for name, weight in list(module.named_parameters()):
                part = distribute_tensor(weight.detach(), expert_mesh["experts"], [Shard(0)])
                setattr(module, name, nn.Parameter(part))
        dealt = [weight for module in experts for weight in module.parameters()]
    if layout.shard == 1:
        model.to(device)  # Before hooks are put on the parameters: torch makes new ones of DTensors here.
        apart = set(dealt)
        alike = (weight for weight in model.parameters() if weight not in apart)
        copies = [Copies(cast(Group, dist.group.WORLD), alike)]
        return [*copies, Copies(expert_mesh.get_group("replicate"), dealt)] if dealt else copies
    # Experts that are dealt out are cut along their second dimension. So are others: FSDP2 pads a first dimension to a
    # part a process, and of few experts many processes would gather mostly padding.
    second = {w for module in experts for w in module.parameters() if dealt or w.shape[1] % layout.shard == 0}
    if dealt:
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


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients so that their Euclidean norm is at most `limit`, and returns the norm that they had.

    torch's own function takes no parameters that are cut up over different processes.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [whole(torch.nn.utils.get_total_norm(group)) for group in on_one_mesh(gradients)]
    # Of several kinds, those that hold copies may have summed in another order; they must scale alike to stay alike.
    norm = norms[0] if len(norms) == 1 else mean(torch.nn.utils.get_total_norm(norms))
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


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
