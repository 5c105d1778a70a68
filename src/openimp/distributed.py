"""Many processes, as torchrun starts them: one group, a model in shards, and what all of them must know.

In a single process each function here gives back what it got. Nothing else but `dcp` imports torch.distributed. Every
process takes the same steps, each with its part of a step's batch, so all of them call these functions in the same
order. What does not keep to that order, such as a save in the background, has a group of its own.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.errors import UserError

T = TypeVar("T")
Group = dist.ProcessGroup
Copies = list[tuple[Group | None, list[nn.Parameter]]]
"""Parameters of which each process of a group has a copy, by group."""
PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one that still lives; of one that died the connection breaks at once."""
WAIT = timedelta(days=1)
"""How long it waits where the first process works alone."""
LOOKS = 50
"""How often, ten times a second, it looks which process died."""
_alone = False
_patient: Group | None = None
_store: dist.Store
_members: list[tuple[str, int]] = []


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
        """As the recipe's `parallel` says; fewer processes than a group has are one group, and one has everything.

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
            raise UserError(f"parallel.experts: {among} processes cannot be divided into groups of {owners}")
        return cls(processes, shard, owners)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Copies of an expert, the parts that each is cut into, and the owners that share all of them."""
        parts = max(1, self.shard // self.owners)
        return self.processes // (parts * self.owners), parts, self.owners


def start() -> torch.device:
    """Joins the processes that torchrun started, if it did, and says which device this one computes on."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    global _store, _members
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, number, processes = next(dist.rendezvous("env://"))
        # Started again, processes would find the addresses of those that died before in torchrun's store.
        _store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=processes, timeout=PATIENCE)
        _members = told_to_all([(socket.gethostname(), os.getpid())])
    return device


def leave() -> None:
    """Parts from the others, when all is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def deaths_told() -> Iterator[None]:
    """Names the process that died, where what needs all of them fails.

    Raises:
        UserError: one died, or has not answered for `PATIENCE`.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if not _members or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        dead = ", ".join(map(str, _dead()))
        who = f"process {dead} of 0 to {len(_members) - 1} died" if dead else "a process died or does not answer"
        raise UserError(
            f"{who}, and the others cannot go on without it; the run is saved up to its last checkpoint, go on with "
            "--resume"
        ) from None


def _dead() -> list[int]:
    """The processes that died, by who found it out first: one on the same machine, for others see no more than that
    the connection broke. Whoever asks later finds those that have left because of it, too."""
    for _ in range(LOOKS):
        with suppress(RuntimeError):  # The store may be gone as well.
            if _store.check(["dead"]):
                return cast(list[int], json.loads(_store.get("dead")))
        here = ((number, pid) for number, (host, pid) in enumerate(_members) if host == socket.gethostname())
        if dead := [number for number, pid in here if not _runs(pid)]:
            with suppress(RuntimeError):
                _store.set("dead", json.dumps(dead))
            return dead
        time.sleep(0.1)
    return []


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # It is another user's, or the system has no /proc.
        return True
    return state not in "ZX"  # It ended, and its parent has not asked how.


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def rank() -> int:
    """This process' number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def everywhere(x: Tensor) -> Tensor:
    """The rows of all processes, first process first; the gradient goes back to whose rows they are."""
    return x if world() == 1 or x.is_meta else cast(Tensor, _Everywhere.apply(x))


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _rows_of_all(x, None)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        own = torch.empty_like(grad.chunk(world())[0])
        # Its name from torch 2.13 on.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, grad.contiguous())
        return own


def _rows_of_all(x: Tensor, group: Group | None) -> Tensor:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return torch.cat(found)


def mean(x: Tensor) -> Tensor:
    """The mean over the processes, without a gradient."""
    if world() == 1 or x.is_meta:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world()


def total(number: int) -> int:
    """The sum over the processes."""
    if world() == 1:
        return number
    count = torch.tensor(int(number))  # Of a bool the sum would be one byte.
    dist.all_reduce(count)
    return int(count)


def own_group() -> Group | None:
    """All processes again, for what happens beside the steps and may take up to a day; None in a single process."""
    return dist.new_group(backend="gloo", timeout=WAIT) if world() > 1 else None


def told_to_all(items: list[Any], group: Group | None = None) -> list[Any]:
    """The items of all processes, first process first; what JSON can say."""
    if group is None and world() == 1:
        return items
    text = json.dumps(items).encode()
    sizes = _rows_of_all(torch.tensor([len(text)]), group).tolist()
    if max(sizes) == len("[]"):
        return []
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
    parts = _rows_of_all(padded, group).chunk(len(sizes))
    return [item for part in parts for item in json.loads(part.numpy().tobytes())]


def agreed(work: Callable[[], T], group: Group | None = None) -> list[T]:
    """What `work` gives in each process, told to all; what JSON can say.

    Raises:
        UserError: in all processes, what the first of those that failed has raised.
    """
    if group is None and world() == 1:
        return [work()]
    found, wrong = [], []
    try:
        found = [work()]
    except Exception as error:
        wrong = [error]
    if told := told_to_all([str(error) for error in wrong], group):
        raise UserError(told[0]) from (wrong[0] if wrong else None)
    return told_to_all(found, group)


def alone(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, which does it as if there were no other, told to all, who wait up to a
    day; what JSON can say.

    Raises:
        UserError: in all processes, whatever the first one raised.
    """
    global _patient
    if world() == 1:
        return work()
    _patient = _patient or own_group()

    def first() -> T | None:
        global _alone
        if rank():
            return None
        _alone = True
        try:
            return work()
        finally:
            _alone = False

    return cast(T, agreed(first, _patient)[0])


def wait() -> None:
    """Goes on when all processes have come here."""
    if world() > 1:
        dist.barrier()


def spread(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    experts: Iterable[nn.Module],
    methods: Iterable[str],
    shard: int | None,
    owners: int,
) -> Copies:
    """Lays a model out over the processes as the recipe's `parallel` says, and tells which gradients to average.

    Parameters stay fp32 and are cast by autocast as in one process; gradients are averaged in fp32.

    Args:
        model: the same in all processes.
        blocks: its parts whose parameters FSDP2 gathers when they compute, and gives back.
        experts: its parts whose parameters have the experts as their first dimension.
        methods: of the model, that compute with its other parameters.
        shard: processes that share one copy; None: all.
        owners: processes that share the experts.

    Raises:
        UserError: the processes cannot be divided so.
    """
    if world() == 1:
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    device = next(model.parameters()).device.type
    layout = Layout.of(world(), shard, owners)
    mesh = init_device_mesh(device, layout.sizes, mesh_dim_names=("replicate", "shard", "experts"))
    experts = list(experts)
    apart = experts if owners > 1 else []
    for module in apart:
        for name, weight in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(weight.detach(), mesh["experts"], [Shard(0)])))
    if layout.shard == 1:
        owned = {weight: None for module in apart for weight in module.parameters()}
        others = [weight for weight in model.parameters() if weight not in owned]
        return [(dist.group.WORLD, others), (mesh.get_group("replicate"), list(owned))]
    # FSDP2 pads a first dimension to a part a process: of few experts many processes would gather mostly padding.
    second = {w for module in experts for w in module.parameters() if apart or w.shape[1] % layout.shard == 0}
    for module in apart:
        _fully_shard(module, mesh, second)  # Their first dimension is dealt out already.
    mesh = init_device_mesh(device, (layout.sizes[0], layout.shard), mesh_dim_names=("replicate", "shard"))
    for module in (*blocks, model):
        _fully_shard(module, mesh, second)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return []


def _fully_shard(module: nn.Module, mesh: Any, second: set[nn.Parameter]) -> None:
    """Cuts a module's parameters along their first dimension, and some along their second one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    fully_shard(
        module,
        mesh=mesh["shard"] if mesh["replicate"].size() == 1 else mesh["replicate", "shard"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        shard_placement_fn=lambda weight: Shard(int(weight in second)),
    )


def average_gradients(copies: Copies) -> None:
    """Makes the gradients of parameters of which each process has a copy those of the whole batch, in one exchange."""
    for group, parameters in copies:
        gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
        if gradients and (count := dist.get_world_size(group)) > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=group)
            flat /= count
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients)])


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; with its gradient."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
    norm = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)
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
