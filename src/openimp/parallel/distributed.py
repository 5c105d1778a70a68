"""The process group that torchrun starts, and the collectives that openimp uses.

On a single rank every function is the identity, so that callers need no second code path. Every rank takes the same
steps, each with its part of the batch, and so calls these functions in the same order as the others. Work outside of
that order, such as saving in the background, needs a process group of its own.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.progress import console

T = TypeVar("T")
R = TypeVar("R")
Group = dist.ProcessGroup
TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another rank that is alive. The connection to a rank that died breaks at once."""
LONG_TIMEOUT = timedelta(days=1)
"""How long the ranks wait while rank 0 works, or while a disk is slow."""
_works_alone = False
_patient_group: Group | None = None


def start() -> torch.device:
    """Joins the ranks that torchrun started, if it did, and returns the device of this rank. Only rank 0 prints."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU; start torchrun with --nproc-per-node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if dist.is_initialized():
        return device
    # torchrun's own store survives a restart, and with it the addresses of dead ranks (pytorch/pytorch#135712).
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; without it, "
            "restarted ranks connect to dead ones"
        )
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if cuda else None)
    except ValueError as error:  # Some schedulers set RANK and nothing else.
        raise UserError(f"RANK is set, as if by torchrun, but {error}; use torchrun") from None
    global _patient_group
    _patient_group = new_group(LONG_TIMEOUT)
    console.quiet = rank() > 0
    return device


def shut_down() -> None:
    """Leaves the process group once every rank is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def leave_after_errors() -> Iterator[None]:
    """For all that a process does with other ranks: `report_dead_ranks`, and a UserError ends the process group."""
    try:
        with report_dead_ranks():
            yield
    except UserError:
        _leave()
        raise


@contextmanager
def report_dead_ranks() -> Iterator[None]:
    """Turns a failed collective into a UserError that tells how to resume: a rank died, or did not answer in time.

    It does not name the rank that died: torchrun does, with its exit code or signal, as the root cause.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, and would end this rank before it reports.
        _leave()
        raise UserError(
            "a rank died or does not answer, and the other ranks cannot continue without it; torchrun's report names "
            "it; the run is saved up to its last checkpoint; resume with --resume auto"
        ) from None


def _leave() -> None:
    """Leaves the process group, because gloo's threads would abort a process that exits, and replace its exit code.

    It is not called after other errors, because a checkpoint that is still being written needs the group.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This rank's number; rank 0 writes the files of a run."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 within `alone`."""
    return dist.get_world_size() if dist.is_initialized() and not _works_alone else 1


def local_world_size() -> int:
    """Number of ranks on each node; all ranks if nodes have different numbers of them. Every rank must call this."""
    sizes = {*all_gather_object(ranks_on_node())}
    return sizes.pop() if len(sizes) == 1 else world_size()


def all_gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Concatenates the rows of each tensor over all ranks, in the order of the ranks, in one collective.

    The gradient of a row goes to its rank. Each tensor has the same shape on every rank. The tensors may differ from
    each other only in their number of rows.
    """
    if world_size() == 1 or tensors[0].is_meta:
        return tensors
    import torch.distributed._functional_collectives as funcol

    # torch 2.13 renamed it.
    gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd
    rows = [len(tensor) for tensor in tensors]
    gathered = funcol.wait_tensor(gather(torch.cat(tensors), 0, cast(Group, dist.group.WORLD)))
    by_tensor = gathered.unflatten(0, (world_size(), -1)).split(rows, dim=1)
    return tuple(part.flatten(0, 1) for part in by_tensor)


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over the ranks, without a gradient."""
    if world_size() == 1 or x.is_meta:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def all_gather_object(value: T, group: Group | None = None) -> list[T]:
    """The values of all ranks, in the order of the ranks.

    torch pickles them. Inside of a process group that is no risk: every rank runs the same program as the same user.
    """
    if group is None and world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group)
    return gathered


def run_on_all_ranks(work: Callable[[], T], group: Group | None = None) -> list[T]:
    """Runs `work` on every rank, and returns all results on every rank.

    If it fails on some ranks, all ranks raise a UserError with the message of the first of them.
    """
    if group is None and world_size() == 1:
        return [work()]
    result: T | None = None
    cause: Exception | None = None
    message: str | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
        message = str(error)
        if not isinstance(error, (UserError, OSError)):  # A bug. Only this rank can print its traceback.
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
    outcomes = all_gather_object((result, message), group)
    for _, failure in outcomes:
        if failure is not None:
            raise UserError(failure) from cause
    return [cast(T, result) for result, _ in outcomes]


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 as if there were no other ranks, and returns its result on every rank.

    If it fails, all ranks raise a UserError.
    """
    if world_size() == 1:
        return work()

    def work_alone() -> T | None:
        if rank():
            return None
        with alone():
            return work()

    return cast(T, run_on_all_ranks(work_alone, _patient_group)[0])


@contextmanager
def alone() -> Iterator[None]:
    """Within it, this rank computes as if there was no other."""
    global _works_alone
    before = _works_alone
    _works_alone = True
    try:
        yield
    finally:
        _works_alone = before


def own_part(n: int) -> range:
    """This rank's part of the numbers below `n`: consecutive ones, as many as any other rank's, plus or minus one."""
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_gather_uneven(x: Tensor) -> Tensor:
    """Concatenates the rows of all ranks, which may have different numbers of them, in the order of the ranks."""
    if world_size() == 1:
        return x
    rows = all_gather_object(len(x))
    most = max(rows)
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    (gathered,) = all_gather(padded)
    return torch.cat([part[:count] for part, count in zip(gathered.split(most or 1), rows)])


def in_lockstep(items: Iterable[T], describe: Callable[[T], R]) -> Iterator[tuple[T | None, list[R]]]:
    """Yields this rank's items, and None after them until every rank has yielded all of its items.

    With each item it yields the results of `describe` for the items that the ranks yield at the same time. If one rank
    fails to get its next item, all ranks raise a UserError.
    """
    iterator = iter(items)
    item: T | None = None

    def advance() -> R | None:
        nonlocal item
        item = next(iterator, None)
        return None if item is None else describe(item)

    while described := [result for result in run_on_all_ranks(advance) if result is not None]:
        yield item, described


def run_first_on_node(work: Callable[[], T]) -> T:
    """Runs `work` on one rank of each node, and then on the others, which find what it has cached on the node's disk.

    If it fails on some ranks, all ranks raise a UserError.
    """
    result: T | None = None

    def work_if(is_my_turn: bool) -> None:
        nonlocal result
        if is_my_turn:
            result = work()

    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for is_my_turn in (is_first, not is_first):
        run_on_all_ranks(partial(work_if, is_my_turn), _patient_group)
    return cast(T, result)


def ranks_on_node() -> int:
    """Number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def new_group(timeout: timedelta) -> Group | None:
    """Another process group of all ranks, for collectives that run beside those of the steps; None on a single rank."""
    return dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None


def barrier() -> None:
    """Waits until every rank has called this."""
    if world_size() > 1:
        dist.barrier()
