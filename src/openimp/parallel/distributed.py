"""Many processes, as torchrun starts them: one group, and what all of them must know.

In a single process each function here gives back what it got. Nothing else but `parallel`, `exchange` and `dcp` imports
torch.distributed. Every process takes the same steps, each with its part of a step's batch, so all of them call these
functions in the same order. What does not keep to that order, such as a save in the background, has a group of its own.
"""

import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from openimp.common.errors import UserError

T = TypeVar("T")
Group = dist.ProcessGroup
TIMEOUT = timedelta(minutes=10)
"""How long a process waits for another one that still lives; of one that died the connection breaks at once."""
LONG_TIMEOUT = timedelta(days=1)
"""How long it waits where the first process works alone."""
LOOKS = 50
"""How often, ten times a second, it looks which process died."""
_alone = False
_patient: Group | None = None
_store: dist.Store
_members: list[tuple[str, int]] = []


def start() -> torch.device:
    """Joins the processes that torchrun started, if it did, and says which device this one computes on."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return torch.device("cuda" if cuda else "cpu")
    global _store, _members
    here = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and here >= torch.cuda.device_count():
        raise UserError(
            f"process {here} of this machine has no GPU of its own; start {torch.cuda.device_count()} at most"
        )
    device = torch.device("cuda", here) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            store, number, processes = next(dist.rendezvous("env://"))
        except ValueError as error:  # Some schedulers set RANK and nothing else.
            raise UserError(f"RANK is set, as for one of several processes, but {error}; use torchrun") from None
        # Otherwise processes would find the addresses of an earlier start, or an earlier training, in torchrun's store.
        _store = dist.PrefixStore(_name_of_start(store, number, processes), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=_store, rank=number, world_size=processes, timeout=TIMEOUT,
            device_id=device if cuda else None,
        )  # fmt: skip
        _members = told_to_all([(socket.gethostname(), os.getpid())])
    return device


def _name_of_start(store: dist.Store, number: int, processes: int) -> str:
    """A name that these processes have for this start and no others had before; torchrun counts its starts on each node
    by itself. What a store holds of an earlier start can be told by the greetings, which are new each time.

    Raises:
        UserError: some have not come within `TIMEOUT`.
    """
    own, others = uuid4().hex, range(1, processes)
    end = time.monotonic() + TIMEOUT.total_seconds()
    if number:
        store.set(f"greeting {number}", own)
    while time.monotonic() < end:
        if number == 0:
            came = [n for n in others if store.check([f"greeting {n}"])]
            told = {str(n): store.get(f"greeting {n}").decode() for n in came}
            store.set("start", json.dumps({"name": own, "greetings": told}))
            if all(store.check([f"{own} {n}"]) for n in others):
                return own
        elif store.check(["start"]):
            start = json.loads(store.get("start"))
            if start["greetings"].get(str(number)) == own:
                store.set(f"{start['name']} {number}", "")
                return cast(str, start["name"])
        time.sleep(0.05)
    raise UserError(f"process {number}: the other processes have not come within {TIMEOUT}")


def shut_down() -> None:
    """Parts from the others, when all is done."""
    global _patient, _members
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        _patient, _members = None, []


@contextmanager
def report_dead_ranks() -> Iterator[None]:
    """Names the process that died, where what needs all of them fails.

    Raises:
        UserError: one died, or has not answered for `TIMEOUT`.
    """
    try:
        yield
    except UserError:
        # Threads of gloo's that still run when the interpreter ends abort the process, with an exit code of their own.
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if not _members or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun, which sees the death too, would end this unsaid.
        dead = ", ".join(map(str, _dead()))
        who = f"process {dead} of 0 to {len(_members) - 1} died" if dead else "a process died or does not answer"
        raise UserError(
            f"{who}, and the others cannot go on without it; the run is saved up to its last checkpoint, if there is "
            "one; go on with --resume auto"
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


def job_id() -> str:
    """What torchrun calls all its starts of these processes; nothing without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them died. Only that one's node counts it."""
    return any(told_to_all([os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"]))


def rank() -> int:
    """This process' number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def all_gather(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of all processes, first process first, of tensors that are alike but for their number of rows; the
    gradients go back to whose rows they are. All of them in one exchange, for each makes the processes wait."""
    if world_size() == 1 or tensors[0].is_meta:
        return tensors
    rows = [len(tensor) for tensor in tensors]
    found: Tensor = _Everywhere.apply(torch.cat(tensors))
    return tuple(part.flatten(0, 1) for part in found.unflatten(0, (world_size(), -1)).split(rows, dim=1))


class _Everywhere(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return _rows_of_all(x, None)

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        own = torch.empty_like(grad.chunk(world_size())[0])
        # Its name from torch 2.13 on.
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(own, grad.contiguous())
        return own


def _rows_of_all(x: Tensor, group: Group | None) -> Tensor:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return torch.cat(found)


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over the processes, without a gradient."""
    if world_size() == 1 or x.is_meta:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def total(number: int) -> int:
    """The sum over the processes."""
    if world_size() == 1:
        return number
    count = torch.tensor(int(number))  # Of a bool the sum would be one byte.
    dist.all_reduce(count)
    return int(count)


def new_group(timeout: timedelta = TIMEOUT) -> Group | None:
    """All processes again, for what happens beside the steps; None in a single process."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timeout)


def told_to_all(items: list[Any], group: Group | None = None) -> list[Any]:
    """The items of all processes, first process first; what JSON can say."""
    if group is None and world_size() == 1:
        return items
    text = json.dumps(items).encode()
    sizes = _rows_of_all(torch.tensor([len(text)]), group).tolist()
    if max(sizes) == len("[]"):
        return []
    padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
    parts = _rows_of_all(padded, group).chunk(len(sizes))
    return [item for part in parts for item in json.loads(part.numpy().tobytes())]


def run_on_all_ranks(work: Callable[[], T], group: Group | None = None) -> list[T]:
    """What `work` gives in each process, told to all; what JSON can say.

    Raises:
        UserError: in all processes, what the first of those that failed has raised.
    """
    if group is None and world_size() == 1:
        return [work()]
    found: list[T] = []
    wrong: list[Exception] = []
    said: list[str] = []
    try:
        found = [work()]
    except (UserError, OSError) as error:
        wrong, said = [error], [str(error)]
    except Exception as error:  # A mistake of ours: whoever made it shows where.
        traceback.print_exc()
        wrong, said = [error], [f"{type(error).__name__}: {error}"]
    if told := told_to_all(said, group):
        raise UserError(told[0]) from (wrong[0] if wrong else None)
    return told_to_all(found, group)


def run_on_rank_zero(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, which does it as if there were no other, told to all, who wait up to a
    day; what JSON can say.

    Raises:
        UserError: in all processes, whatever the first one raised.
    """
    global _patient
    if world_size() == 1:
        return work()
    _patient = _patient or new_group(LONG_TIMEOUT)

    def first() -> T | None:
        global _alone
        if rank():
            return None
        _alone = True
        try:
            return work()
        finally:
            _alone = False

    return cast(T, run_on_all_ranks(first, _patient)[0])


def barrier() -> None:
    """Goes on when all processes have come here."""
    if world_size() > 1:
        dist.barrier()
