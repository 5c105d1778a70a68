"""The process group of one machine against gloo: the same results of every collective, whatever the sizes and types.

torchrun runs this very file, in whose processes hypothesis draws the same examples.
"""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openimp.parallel import distributed, exchange, shared_memory

TYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
OPERATIONS = [dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN]
DIES = "dies"


@pytest.mark.parametrize("processes", [2, 3])
def test_every_collective_gives_what_gloo_gives(processes):
    done = torchrun(processes)
    assert not done.returncode, done.stderr
    assert done.stdout.count("the same in 60 draws") == processes


def test_a_process_that_dies_ends_the_others_at_once():
    done = torchrun(3, DIES)
    assert done.returncode
    assert done.stdout.count("a process died") == 2, done.stderr


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def compare() -> None:
    group, gloo = dist.group.WORLD, dist.new_group(backend="gloo")
    assert type(group) is shared_memory.SharedMemory
    rank, processes, draws = dist.get_rank(), dist.get_world_size(), 0

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(st.integers(1, 700), st.sampled_from(TYPES), st.sampled_from(OPERATIONS), st.integers(0, processes - 1))
    def alike(size: int, dtype: torch.dtype, operation: Any, source: int) -> None:
        nonlocal draws
        draws += 1
        # Whole numbers, whose sums are the same in any order.
        own = torch.randint(0, 9, (processes, size), generator=torch.Generator().manual_seed(rank)).to(dtype)
        for found, expected in zip(results(own, operation, source, group), results(own, operation, source, gloo)):
            assert torch.equal(found, expected)

    alike()
    # In a part of the processes, and in one alone.
    for members in ([0, 1], [processes - 1]):
        groups = [dist.new_group(members, backend=name) for name in (shared_memory.NAME, "gloo")]
        if rank in members:
            own = torch.arange(2.0 * len(members)).view(len(members), 2) + rank
            found, expected = (results(own, dist.ReduceOp.SUM, members[-1], some) for some in groups)
            assert all(map(torch.equal, found, expected))
    # Of tensors that are together larger than a piece, and one that is not contiguous.
    several = [torch.full((n, 3), float(rank)).T for n in (1, 100, 10, 1000)]
    options = dist.AllreduceCoalescedOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
    group.allreduce_coalesced(several, options).wait()
    assert all(torch.equal(tensor, torch.full_like(tensor, (processes - 1) / 2)) for tensor in several)
    share_one_copy(group)
    for one_copy in (False, True):
        update_shares(group, one_copy)
    with pytest.raises(dist.DistError, match="do not exchange the same"):
        dist.all_reduce(torch.zeros(4 + rank), group=dist.new_group())
    slow = dist.new_group(timeout=timedelta(seconds=0.5))
    if rank == 0:
        with pytest.raises(dist.DistError, match="has not come within"):
            dist.barrier(slow)
    dist.barrier(gloo)
    print(f"the same in {draws} draws")


def share_one_copy(group: Any) -> None:
    """In any number of shares, of which some may be empty, and of tensors larger and smaller than a piece."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    sizes = [[700, 3, 5], *([[1, 300]] * (processes - 2)), []]
    shares = [[torch.arange(float(size)) for size in row] for row in sizes]
    before = [tensor.clone() for share in shares for tensor in share]
    group.lay_together(shares)
    assert all(map(torch.equal, (tensor for share in shares for tensor in share), before))
    dist.barrier()
    for tensor in shares[rank]:
        tensor += 1
    dist.barrier()
    assert all(map(torch.equal, (tensor - 1 for share in shares for tensor in share), before))
    dist.barrier()
    for turn in range(3):
        gradients = [[torch.arange(float(size)) * (rank + turn) for size in row] for row in sizes]
        group.average_in_shares(gradients)
        for tensor in gradients[rank]:
            torch.testing.assert_close(tensor, torch.arange(float(len(tensor))) * ((processes - 1) / 2 + turn))


def update_shares(group: Any, one_copy: bool) -> None:
    """Of fewer parameters than there are shares of them: some processes have nothing to update."""
    processes = dist.get_world_size()
    model = nn.ParameterList([torch.ones(3, 2), torch.ones(1)])
    matrices, steps, copies = [model[0]], [{*model.parameters()}], [(group, [*model.parameters()])]
    make = exchange.make_exchange if one_copy else exchange.WholeCopies
    made = make(model, copies, matrices, steps)
    assert isinstance(made, exchange.OneCopy) == one_copy
    assert distributed.total(sum(p is model[0] for p in made.own)) == 1
    (sum(parameter.sum() for parameter in model) * (dist.get_rank() + 1)).backward()
    made.gradients()
    each = (processes + 1) / 2
    assert float(made.clip(each)) == pytest.approx(each * 7**0.5)
    for parameter in made.own:
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, each * 7**-0.5))
        parameter.data -= 1
    made.updates()
    assert not any(parameter.any() for parameter in model)
    dist.barrier()


def results(own: Tensor, operation: Any, source: int, group: Any) -> list[Tensor]:
    """Of all collectives."""
    processes = len(own)
    summed, sent, copied, scattered, part = own.clone(), torch.empty_like(own), own.clone(), own[0].clone(), own[0]
    dist.all_reduce(summed, operation, group=group)
    gathered = [torch.empty_like(own) for _ in range(processes)]
    dist.all_gather(gathered, own, group=group)
    in_one = torch.empty(processes * own.numel(), dtype=own.dtype)
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(in_one, own.flatten(), group=group)
    dist.all_to_all_single(sent, own, group=group)
    dist.broadcast(copied, source, group=group)
    collected = [torch.zeros_like(own) for _ in range(processes)] if dist.get_rank() == source else None
    dist.gather(own, collected, source, group=group)
    dist.scatter(scattered, list(own) if dist.get_rank() == source else None, source, group=group)
    reduced = torch.empty_like(part)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(reduced, own.flatten(), operation, group=group)
    dist.barrier(group=group)
    return [summed, *gathered, *(collected or []), in_one, sent, copied, scattered, reduced]


def die() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, who sees it too.
    try:
        dist.barrier()
    except dist.DistError as error:
        print(error, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared_memory.PIECE = 2**10
    distributed.start()
    if sys.argv[1:] == [DIES]:
        die()
    compare()
    distributed.leave()
