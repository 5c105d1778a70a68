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
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

NAME = "shared_memory"
PIECE = 2**21
"""Bytes that a process shows to the others at once: few enough to be in the processor's cache when they are read."""
SPINS = 100
"""How often a process looks whether another one has come before it sleeps: about as long as waking up takes."""
MESSAGE = struct.Struct("q")
REDUCE: dict[Any, Callable[[list[Tensor], list[Tensor]], None]] = {
    ReduceOp.SUM: torch._foreach_add_,
    ReduceOp.AVG: torch._foreach_add_,
    ReduceOp.MAX: torch._foreach_maximum_,
    ReduceOp.MIN: torch._foreach_minimum_,
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
            self._connect(options.store, processes)
        except (OSError, struct.error) as error:  # Of nothing received, where another one died.
            raise dist.DistError(f"processes of this machine do not find each other: {error}") from error
        self.pieces = [memory.view(2, PIECE) for memory in self._memory([2 * PIECE] * processes)]

    def _memory(self, sizes: Sequence[int]) -> list[Tensor]:
        """Bytes that all see, so many from each process."""
        # Seen by no other than whom it is sent to, not counted in /dev/shm, and gone with its last process.
        files = {self.number: os.memfd_create("openimp", os.MFD_CLOEXEC)}
        os.ftruncate(files[self.number], sizes[self.number])
        # Those of lower numbers come first, in all processes, so none waits for one that waits for it.
        for other, connection in self.others.items():
            connection.settimeout(self.seconds)
            try:
                socket.send_fds(connection, [b"m"], [files[self.number]])
                _, (files[other],), *_ = socket.recv_fds(connection, 1, 1)
            except (OSError, ValueError) as error:  # Of nothing received.
                raise dist.DistError(f"a process died, or has not come in time: {error}") from error
            connection.setblocking(False)
        return [_mapped(files[number], size) for number, size in enumerate(sizes)]

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

    @property
    def group_name(self) -> str:
        """By which torch finds it again."""
        return self.name

    def shutdown(self) -> None:
        """Parts from the others."""
        for connection in self.others.values():
            connection.close()
        self.pieces = []

    def _meet(self, what: int = 0) -> None:
        """Goes on when all have come here, for the same."""
        try:
            for connection in self.others.values():
                connection.send(MESSAGE.pack(what))
            for connection in self.others.values():
                message = self._received(connection)
                if not message:
                    raise ConnectionError
                if message != MESSAGE.pack(what):
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

    def _show(self, parts: list[Tensor], what: int | None = None) -> list[Tensor]:
        """The bytes of some flat parts, one after the other, as each process has them; until the next but one call.

        Args:
            parts: of one type.
            what: all mean to show; left out, as many bytes as these.
        """
        self.turn = 1 - self.turn
        shown = [piece[self.turn] for piece in self.pieces]
        if parts:
            numbers = sum(map(len, parts))
            torch.cat(parts, out=shown[self.number].view(parts[0].dtype)[:numbers])
        self._meet(sum(part.nbytes for part in parts) if what is None else what)
        return shown

    def _columns(self, own_PN: Tensor) -> Iterator[tuple[slice, list[list[Tensor]]]]:
        """Some columns after the other, and the rows that each process has there."""
        rows, numbers = own_PN.shape
        step = PIECE // (rows * own_PN.element_size())
        for start in range(0, numbers, step):
            columns = slice(start, start + step)
            own = list(own_PN[:, columns].unbind())
            yield columns, [_like(own, shown) for shown in self._show(own)]

    def _reduce(self, own: list[Tensor], shown: list[list[Tensor]], opts: Any) -> None:
        """Makes what is shown one, in the place of what is this process' own: in the order of the processes, so that
        all have the same, bit for bit. The first two may change places, so each of these begins with its own."""
        kind, begun = opts.reduceOp.op, self.number
        if self.number > 1:
            torch._foreach_copy_(own, shown[0])
            begun = 0
        for parts in (*shown[:begun], *shown[begun + 1 :]):
            REDUCE[kind](own, parts)
        if kind == ReduceOp.AVG:
            torch._foreach_div_(own, len(shown))

    def lay_together(self, shares: Sequence[Sequence[Tensor]]) -> None:
        """Puts tensors, which all processes have alike, where all see the same: a share into the memory of each."""
        sizes = [sum(map(_room, share)) for share in shares]
        for number, (memory, share) in enumerate(zip(self._memory(sizes), shares)):
            for tensor, room in zip(share, memory.split([_room(tensor) for tensor in share])):
                common = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                if number == self.number:
                    common.copy_(tensor)
                tensor.data = common
        self._meet(sum(sizes))

    def average_in_shares(self, shares: Sequence[Sequence[Tensor]]) -> None:
        """Makes the tensors of this process' share the mean over the processes, each of which has its own of all
        shares. They are of one type."""
        pieces = [list(_pieces(tensor.view(-1) for tensor in share)) for share in shares]
        own, processes = pieces[self.number], self.size()
        sizes = hash(tuple(tuple(tensor.numel() for tensor in share) for share in shares))
        for distance in range(1, processes):  # Each sends to the one that comes so many after it.
            sent = pieces[(self.number + distance) % processes]
            for i in range(max(map(len, pieces))):
                shown = self._show(sent[i] if i < len(sent) else [], sizes)
                if i < len(own):
                    torch._foreach_add_(own[i], _like(own[i], shown[self.number - distance]))
        if own:
            torch._foreach_div_(list(shares[self.number]), processes)

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:
        flat = [tensor.contiguous().view(-1) for tensor in tensors]
        for parts in _pieces(flat):
            self._reduce(parts, [_like(parts, shown) for shown in self._show(parts)], opts)
        for tensor, found in zip(tensors, flat):
            if not tensor.is_contiguous():
                tensor.copy_(found.view_as(tensor))
        return _done(tensors)

    def allgather(self, found: list[list[Tensor]], own: list[Tensor], opts: Any = None) -> Any:
        for tensors, tensor in zip(found, own, strict=True):
            for columns, shown in self._columns(tensor.reshape(1, -1)):
                for other, (part,) in zip(tensors, shown, strict=True):
                    other.view(-1)[columns] = part
        return _done(found)

    def all_gather_single(self, found: Tensor, own: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(found.view(self.size(), -1))], [own])

    def all_gather_single_coalesced(self, found: list[Tensor], own: list[Tensor], opts: Any = None) -> Any:
        return self.allgather([list(tensor.view(self.size(), -1)) for tensor in found], own)

    def reduce_scatter_single(self, found: Tensor, own: Tensor, opts: Any) -> Any:
        return self.reduce_scatter_single_coalesced([found], [own], opts)

    def reduce_scatter_single_coalesced(self, found: list[Tensor], own: list[Tensor], opts: Any) -> Any:
        for target, tensor in zip(found, own, strict=True):
            target.view(-1).copy_(tensor.reshape(self.size(), -1)[self.number])
            for columns, shown in self._columns(tensor.reshape(self.size(), -1)):
                self._reduce([target.view(-1)[columns]], [[rows[self.number]] for rows in shown], opts)
        return _done(found)

    def all_to_all_single(
        self, found: Tensor, own: Tensor, there: Sequence[int], here: Sequence[int], opts: Any = None
    ) -> Any:
        if len({*there, *here}) > 1:
            raise NotImplementedError(f"{NAME}: parts of different sizes")
        target = found.view(self.size(), -1)
        for columns, shown in self._columns(own.reshape(self.size(), -1)):
            for row, parts in zip(target, shown, strict=True):
                row[columns] = parts[self.number]
        return _done(found)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        for tensor in tensors:
            for columns, shown in self._columns(tensor.view(1, -1)):
                tensor.view(-1)[columns] = shown[opts.rootRank][0]
        return _done(tensors)

    def scatter(self, found: list[Tensor], own: list[list[Tensor]], opts: Any) -> Any:
        parts = torch.stack(own[0]) if own else found[0].new_empty(self.size(), *found[0].shape)
        for columns, shown in self._columns(parts.flatten(1)):
            found[0].view(-1)[columns] = shown[opts.rootRank][self.number]
        return _done(found)

    def gather(self, found: list[list[Tensor]], own: list[Tensor], opts: Any) -> Any:
        for columns, shown in self._columns(own[0].reshape(1, -1)):
            for tensor, (part,) in zip(found[0], shown, strict=True) if found else ():
                tensor.view(-1)[columns] = part
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


def _mapped(file: int, size: int) -> Tensor:
    memory = mmap.mmap(file, size) if size else b""
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8) if memory else torch.empty(0, dtype=torch.uint8)


def _room(tensor: Tensor) -> int:
    """Its bytes, up to a whole line of the processor's cache."""
    return -(-tensor.nbytes // 64) * 64


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
    if parts:
        yield parts


def _like(parts: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
    """What lies in some memory where these flat parts would."""
    sizes = [len(part) for part in parts]
    return list(memory.view(parts[0].dtype)[: sum(sizes)].split(sizes))


def _done(result: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]
