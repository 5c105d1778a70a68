"""What processes exchange in a step that train one model together: gradients, and then what each has updated.

There are two ways, by how they hold the model; `make_exchange` picks one.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openimp.parallel.distributed import Group, mean, rank, world
from openimp.parallel.layout import on_one_mesh, own_part, whole

TOGETHER = 2**22
"""Bytes of gradients from which on copies send them: a few pieces of the demo's 14 MB."""


class Exchange:
    """Of a single process, or of processes with shards, which FSDP2 gathers and sums: nothing that is left to do.

    Attributes:
        parameters: all that are trained.
        own: those that this process updates.
        updated_once: those that all have and one process updates.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.own = self.parameters
        self.updated_once: Set[Tensor] = frozenset()

    def gradients(self) -> None:
        """Makes the gradients of `own`, after each backward pass, those of the mean over the processes."""

    def fill_with_zeros(self) -> None:
        """Gives each parameter without a gradient a gradient of zero.

        Every rank must do so, because `updates` exchanges the matrices that have a gradient.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def clip(self, limit: float) -> Tensor:
        """Scales the gradients so that the Euclidean norm of all of them is at most `limit`, and returns the norm that
        they had."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = self._norm(gradients)
        if gradients:  # Of many processes some may have none.
            torch._foreach_mul_([own_part(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        # torch's own function for clipping takes no parameters that are cut up over different processes.
        norms = [whole(torch.nn.utils.get_total_norm(group)) for group in on_one_mesh(gradients)]
        # Of several kinds, those that hold copies may have summed in another order; to stay alike they scale alike.
        return norms[0] if len(norms) == 1 else mean(torch.nn.utils.get_total_norm(norms))

    def updates(self) -> None:
        """Gets what other processes have updated, after each update of `own`."""


class WholeCopies(Exchange):
    """Of processes with copies that they keep alike. Muon takes long, so its matrices are dealt out, and each process
    lets the others have what it has updated; all else is updated in all of them.

    Args:
        copies: the processes that have copies of which parameters.
        matrices: those that Muon updates.
        steps: the parameters that each kind of step updates, so that no process does the work of one for the others.
    """

    def __init__(
        self,
        model: nn.Module,
        copies: "Iterable[tuple[Group, Iterable[nn.Parameter]]]",
        matrices: Iterable[Tensor],
        steps: Iterable[Set[Tensor]],
    ) -> None:
        super().__init__(model)
        self.copies = [Copies(group, parameters) for group, parameters in copies]
        self.shares = deal(matrices, steps, world(), orthogonalising)
        self.updated_once = {matrix for share in self.shares for matrix in share}
        others = self.updated_once - {*self.shares[rank()]}
        self.own = [parameter for parameter in self.parameters if parameter not in others]

    def gradients(self) -> None:
        for group in self.copies:
            group.average()

    def updates(self) -> None:
        updated = [[matrix.detach() for matrix in share if matrix.grad is not None] for share in self.shares]
        sizes = [[matrix.numel() for matrix in share] for share in updated]
        largest = max(map(sum, sizes))
        if not largest:
            return
        own = next(iter(self.updated_once)).new_empty(largest)
        torch.cat([own[:0], *(matrix.flatten() for matrix in updated[rank()])], out=own[: sum(sizes[rank()])])
        found = [torch.empty_like(own) for _ in updated]
        dist.all_gather(found, own)
        for number, share in enumerate(updated):
            if share and number != rank():
                parts = found[number][: sum(sizes[number])].split(sizes[number])
                torch._foreach_copy_(share, [part.view_as(matrix) for part, matrix in zip(parts, share)])


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


def make_exchange(
    model: nn.Module,
    copies: Sequence[tuple[Group, Sequence[nn.Parameter]]],
    matrices: Iterable[Tensor],
    steps: Sequence[Set[Tensor]],
) -> Exchange:
    """How the processes exchange that have a model as `parallel.spread` laid it out, whose result is `copies`; for the
    others see `WholeCopies`."""
    if not copies:
        return Exchange(model)
    return WholeCopies(model, copies, matrices, steps)


def deal(
    tensors: Iterable[Tensor], steps: Iterable[Set[Tensor]], processes: int, work: Callable[[Tensor], int]
) -> list[list[Tensor]]:
    """Tensors in as many shares as there are processes: the largest first, each to the process that has least to do in
    the kinds of steps that update it."""
    shares: list[list[Tensor]] = [[] for _ in range(processes)]
    loads = [(step, [0] * processes) for step in dict.fromkeys(map(frozenset, steps))]
    for tensor in sorted(tensors, key=work, reverse=True):
        of_it = [load for step, load in loads if tensor in step]
        least = min(range(processes), key=lambda process: sum(load[process] for load in of_it))
        shares[least].append(tensor)
        for load in of_it:
            load[least] += work(tensor)
    return shares


def orthogonalising(matrix: Tensor) -> int:
    """The work of Muon, about."""
    return matrix.numel() * min(matrix.shape)
