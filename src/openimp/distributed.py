"""Many processes, as torchrun starts them: one group, a model in shards, and what all of them must know.

In a single process each function here gives back what it got. Nothing else imports torch.distributed. Every process
takes the same steps, each with its part of a step's batch, so all of them call these functions in the same order.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one that still lives; of one that died the connection breaks at once."""
WAIT = timedelta(days=1)
"""How long it waits where the first process works alone."""
_alone, _patient = False, None


def start() -> torch.device:
    """Joins the processes that torchrun started, if it did, and says which device this one computes on."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store, number, processes = next(dist.rendezvous("env://"))
        # Started again, processes would find the addresses of those that died before in torchrun's store.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=PATIENCE)
    return device


def leave() -> None:
    """Parts from the others, when all is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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
        found = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(found, x.contiguous())
        return torch.cat(found)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        own = torch.empty_like(grad.chunk(world())[0])
        # Its name from torch 2.13 on.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, grad.contiguous())
        return own


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


def told_to_all(items: list[Any]) -> list[Any]:
    """The items of all processes, first process first; what JSON can say."""
    if world() == 1 or not total(len(items)):
        return items
    text = json.dumps(items).encode()
    sizes = everywhere(torch.tensor([len(text)])).tolist()
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
    parts = everywhere(padded).chunk(world())
    return [item for part in parts for item in json.loads(part.numpy().tobytes())]


def alone(work: Callable[[], T]) -> T | None:
    """What `work` gives in the first process, which does it as if there were no other; the others wait, up to a day.

    Raises:
        UserError: in all processes, whatever the first one raised.
    """
    global _alone, _patient
    if world() == 1:
        return work()
    _patient = _patient or dist.new_group(backend="gloo", timeout=WAIT)
    found, wrong = None, []
    if rank() == 0:
        _alone = True
        try:
            found = work()
        except Exception as error:
            wrong = [error]
        finally:
            _alone = False
    dist.barrier(_patient)
    if told := told_to_all([str(error) for error in wrong]):
        raise UserError(told[0]) from (wrong[0] if wrong else None)
    return found


def wait() -> None:
    """Goes on when all processes have come here."""
    if world() > 1:
        dist.barrier()


def shard(model: nn.Module, blocks: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Shards parameters, gradients and moments over all processes (FSDP2), block by block.

    Parameters stay fp32 and are cast by autocast as in one process; gradients are averaged in fp32.

    Args:
        model: the same in all processes.
        blocks: its parts whose parameters are gathered when they compute, and given back.
        methods: of the model, that compute with its other parameters.
    """
    if world() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device.type
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (world(),)),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    for method in methods:
        register_fsdp_forward_method(model, method)


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


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, cut into shards as `model` is."""
    if world() == 1 or not tensor.ndim:
        return tensor.to(model.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(model, DTensor)
    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
