"""A process group for the processes of one machine without GPUs: tensors go through memory that all of them see.

gloo sends them through TCP, in threads of its own, which take time from those that compute. Here a process writes into
memory of its own, which the others have mapped, meets them, and reads theirs. A collective is done when its call
returns.

Shape suffixes: P processes, N numbers.
"""

import mmap
import os
import select
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

NAME = "shared_memory"
PIECE = 2**20
"""Bytes that a process shows to the others at once: few enough to be in the processor's cache when they are read."""
SPINS = 100
"""How often a process looks whether another one has come before it sleeps: about as long as waking up takes."""
MESSAGE = struct.Struct("q")
REDUCE: dict[Any, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
}

_PROCESS_GROUP: Any = dist.ProcessGroup  # Its stubs have all the ways to call it, of which torch itself takes one.
_groups: "WeakSet[SharedMemory]" = WeakSet()


def _part() -> None:
    for group in _groups:
        group.shutdown()


if hasattr(os, "register_at_fork"):
    # Else the connections of a process that died would live on in the loader's workers, which are forked.
    os.register_at_fork(after_in_child=_part)


def backend() -> str:
    """The name of this process group, where torchrun started all processes on this machine; otherwise gloo's."""
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"] or not hasattr(os, "memfd_create"):
        return "gloo"
    dist.Backend.register_backend(NAME, SharedMemory, extended_api=True, devices=["cpu"])
    return NAME


class SharedMemory(_PROCESS_GROUP):
    """Collectives that all processes call in the same order, as they do with every group.

    Each process has two pieces of memory, which take turns: when it meets the others, all have read the piece that it
    writes next. They meet through sockets, not through numbers in the memory: so the system sees to it that what was
    written before is seen after, on any processor, and one that died is noticed at once.

    Args:
        options: torch's, of a backend: the store in which processes find each other, who they are, and how long they
            wait.

    Raises:
        dist.DistError: from every collective: a process died, has not come in time, or exchanges another size.
    """

    def __init__(self, options: Any, _: Any) -> None:
        self.number, processes = options.group_rank, options.group_size
        super().__init__(self.number, processes)
        self.name, self.seconds, self.turn = options.group_id, options.timeout.total_seconds(), 0
        self.others: dict[int, socket.socket] = {}
        self.pieces: list[Tensor] = []
        _groups.add(self)
        try:
            # Seen by no other than whom it is sent to, not counted in /dev/shm, and gone with its last process.
            file = os.memfd_create("openimp", os.MFD_CLOEXEC)
            os.ftruncate(file, 2 * PIECE)
            files = {self.number: file}
            self._connect(options.store, processes)
            # Those of lower numbers come first, in all processes, so none waits for one that waits for it.
            for other, connection in self.others.items():
                socket.send_fds(connection, [b"m"], [file])
                _, (files[other],), *_ = socket.recv_fds(connection, 1, 1)
                connection.setblocking(False)
        except (OSError, ValueError, struct.error) as error:  # Of nothing received, where another one died.
            raise dist.DistError(f"processes of this machine do not find each other: {error}") from error
        self.pieces = [_mapped(files[number]) for number in range(processes)]

    def _connect(self, store: dist.Store, processes: int) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(b"")  # Linux finds a name.
            listener.listen(processes)
            listener.settimeout(self.seconds)
            store.set(f"address {self.number}", listener.getsockname())
            for other in range(self.number):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                connection.connect(store.get(f"address {other}"))
                connection.send(MESSAGE.pack(self.number))
                self.others[other] = connection
            while len(self.others) < processes - 1:
                connection, _ = listener.accept()
                _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if user == os.getuid():
                    (other,) = MESSAGE.unpack(connection.recv(MESSAGE.size))
                    self.others[other] = connection
        for connection in self.others.values():
            connection.settimeout(self.seconds)

    @property
    def group_name(self) -> str:
        """By which torch finds it again."""
        return self.name

    def shutdown(self) -> None:
        """Parts from the others."""
        for connection in self.others.values():
            connection.close()
        self.pieces = []

    def _meet(self, size: int = 0) -> None:
        """Goes on when all have come here, each with as many bytes to show."""
        try:
            for connection in self.others.values():
                connection.send(MESSAGE.pack(size))
            for connection in self.others.values():
                message = self._received(connection)
                if not message:
                    raise ConnectionError
                if message != MESSAGE.pack(size):
                    raise dist.DistError("processes do not exchange the same")
        except ConnectionError:
            raise dist.DistError("a process died") from None

    def _received(self, connection: socket.socket) -> bytes:
        for _ in range(SPINS):
            try:
                return connection.recv(MESSAGE.size)
            except BlockingIOError:
                pass
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        if not waiting.poll(1000 * self.seconds):
            raise dist.DistError(f"a process has not come within {self.seconds:.0f} s")
        return connection.recv(MESSAGE.size)

    def _show(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Flat parts of one type, one after the other, of each process; until the next but one call."""
        numbers, dtype = sum(len(part) for part in parts), parts[0].dtype
        self.turn = 1 - self.turn
        shown = [piece[self.turn].view(dtype)[:numbers] for piece in self.pieces]
        torch.cat(list(parts), out=shown[self.number])
        self._meet(numbers * dtype.itemsize)
        return shown

    def _columns(self, own_PN: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """Some columns after the other, and what each process has there."""
        rows, numbers = own_PN.shape
        step = PIECE // (rows * own_PN.element_size())
        for start in range(0, numbers, step):
            columns = slice(start, start + step)
            yield columns, [shown.view(rows, -1) for shown in self._show(own_PN[:, columns].unbind())]

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        flat = [tensor.contiguous().view(-1) for tensor in tensors]
        for parts in _pieces(flat):
            reduced = _reduced(self._show(parts), opts)
            torch._foreach_copy_(parts, list(reduced.split([len(part) for part in parts])))
        for tensor, found in zip(tensors, flat):
            if not tensor.is_contiguous():
                tensor.copy_(found.view_as(tensor))
        return _done(tensors)

    def allgather(self, found: list[list[Tensor]], own: list[Tensor], opts: Any = None) -> Any:
        for tensors, tensor in zip(found, own, strict=True):
            for columns, shown in self._columns(tensor.reshape(1, -1)):
                for other, part in zip(tensors, shown, strict=True):
                    other.view(1, -1)[:, columns].copy_(part)
        return _done(found)

    def all_gather_single(self, found: Tensor, own: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(found.view(self.size(), -1))], [own])

    def all_gather_single_coalesced(self, found: list[Tensor], own: list[Tensor], opts: Any = None) -> Any:
        return self.allgather([list(tensor.view(self.size(), -1)) for tensor in found], own)

    def reduce_scatter_single(self, found: Tensor, own: Tensor, opts: Any) -> Any:
        return self.reduce_scatter_single_coalesced([found], [own], opts)

    def reduce_scatter_single_coalesced(self, found: list[Tensor], own: list[Tensor], opts: Any) -> Any:
        for target, tensor in zip(found, own, strict=True):
            for columns, shown in self._columns(tensor.reshape(self.size(), -1)):
                target.view(-1)[columns] = _reduced([part[self.number] for part in shown], opts)
        return _done(found)

    def all_to_all_single(
        self, found: Tensor, own: Tensor, there: Sequence[int], here: Sequence[int], opts: Any = None
    ) -> Any:
        if len({*there, *here}) > 1:
            raise NotImplementedError(f"{NAME}: parts of different sizes")
        target = found.view(self.size(), -1)
        for columns, shown in self._columns(own.reshape(self.size(), -1)):
            for row, part in zip(target, shown, strict=True):
                row[columns].copy_(part[self.number])
        return _done(found)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        for tensor in tensors:
            target = tensor.view(1, -1)
            for columns, shown in self._columns(target):
                target[:, columns].copy_(shown[opts.rootRank])
        return _done(tensors)

    def scatter(self, found: list[Tensor], own: list[list[Tensor]], opts: Any) -> Any:
        parts = torch.stack(own[0]) if own else found[0].new_empty(self.size(), *found[0].shape)
        for columns, shown in self._columns(parts.flatten(1)):
            found[0].view(-1)[columns].copy_(shown[opts.rootRank][self.number])
        return _done(found)

    def barrier(self, opts: Any = None) -> Any:
        self._meet()
        return _done([])

    allreduce_coalesced = allreduce
    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _mapped(file: int) -> Tensor:
    memory = mmap.mmap(file, 2 * PIECE)
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8).view(2, PIECE)


def _pieces(flat: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Flat tensors, as many at a time as make a piece, and cut where they are larger."""
    parts: list[Tensor] = []
    room = PIECE
    for tensor in flat:
        while tensor.nbytes > room:
            numbers = room // tensor.element_size()
            yield [*parts, tensor[:numbers]]
            tensor, parts, room = tensor[numbers:], [], PIECE
        parts.append(tensor)
        room -= tensor.nbytes
    yield parts


def _reduced(parts: Sequence[Tensor], opts: Any) -> Tensor:
    """In the order of the processes, so that all have the same, bit for bit."""
    kind = opts.reduceOp.op
    found = reduce(REDUCE[kind], parts)
    return found / len(parts) if kind == ReduceOp.AVG else found


def _done(result: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]
