"""How Muon's matrices are divided among ranks; what they exchange is in test_distributed.py."""

import torch

from openimp.parallel.owners import assign_owners, matrices_of, muon_work, own_matrices, own_weights


def work(matrix: torch.Tensor) -> int:
    return muon_work(*matrix.shape)


def test_matrices_are_dealt_out_so_that_each_kind_of_step_is_shared():
    """Three kinds of steps, each with a large matrix of its own and one that all have."""
    own = [torch.empty(64, 64) for _ in range(3)]
    common = [torch.empty(64, 64), *(torch.empty(8, 16) for _ in range(8))]
    steps = [{matrix, *common} for matrix in own]
    shares = assign_owners([*own, *common], steps, 2, work)
    assert sorted(map(id, [*own, *common])) == sorted(id(matrix) for share in shares for matrix in share)
    for step in steps:
        loads = [sum(work(m) for m in share if m in step) for share in shares]
        assert max(loads) < 1.1 * min(loads)
    # As one kind of step all matrices are shared alike, but not what each task makes of them.
    (large, _) = assign_owners([*own, *common], [{*own, *common}], 2, work)
    assert sum(matrix.numel() == 64 * 64 for matrix in large) == 2


def test_kinds_of_steps_count_once_however_many_views_are_of_one():
    a, b, c, d, e = (torch.empty(n, n) for n in (10, 9, 8, 7, 6))
    once, often = ([{a, e}, *[{b, c, d, e}] * n] for n in (1, 9))
    assert (
        assign_owners([a, b, c, d, e], once, 2, work)
        == assign_owners([a, b, c, d, e], often, 2, work)
        == [[a, b], [c, d, e]]
    )


def test_rows_of_a_matrix_on_each_rank_are_those_of_its_shards():
    """FSDP2 divides two-dimensional weights like torch.chunk, here queries, keys and values, and experts evenly."""
    stacked, short, experts = torch.empty(9, 4), torch.empty(3, 4), torch.empty(2, 8, 4)
    found = matrices_of({stacked: 3, short: 1, experts: 2}, 4)
    by_weight = {weight: [m.rows for m in found if m.weight is weight] for weight in (stacked, short, experts)}
    assert [len(shard) for shard in stacked.chunk(4)] == [3, 3, 3]
    assert by_weight[stacked] == [(3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 3, 0)]
    assert by_weight[short] == [(1, 1, 1, 0)]
    assert by_weight[experts] == [(2, 2, 2, 2)] * 2
    assert [m.rows for m in matrices_of({stacked: 3}, 2)] == [(3, 0), (2, 1), (0, 3)]


def test_experts_of_one_weight_have_different_owners_if_they_are_sharded():
    experts = torch.empty(8, 64, 16)
    assert [len(owned) for owned in own_matrices({experts: 8}, [{experts}], 4)] == [2, 2, 2, 2]
    assert [len(owned) for owned in own_weights({experts: 8}, [{experts}], 4)] == [1, 0, 0, 0]
