"""How work is dealt out to processes; what they exchange is in test_distributed.py."""

import torch

from openimp.parallel.owners import assign_owners, muon_work


def test_matrices_are_dealt_out_so_that_each_kind_of_step_is_shared():
    """Three kinds of steps, each with a large matrix of its own and one that all have."""
    own = [torch.empty(64, 64) for _ in range(3)]
    common = [torch.empty(64, 64), *(torch.empty(8, 16) for _ in range(8))]
    steps = [{matrix, *common} for matrix in own]
    shares = assign_owners([*own, *common], steps, 2, muon_work)
    assert sorted(map(id, [*own, *common])) == sorted(id(matrix) for share in shares for matrix in share)
    for step in steps:
        work = [sum(m.numel() * min(m.shape) for m in share if m in step) for share in shares]
        assert max(work) < 1.1 * min(work)
    # As one kind of step all matrices are shared alike, but not what each task makes of them.
    (large, _) = assign_owners([*own, *common], [{*own, *common}], 2, muon_work)
    assert sum(matrix.numel() == 64 * 64 for matrix in large) == 2


def test_kinds_of_steps_count_once_however_many_views_are_of_one():
    a, b, c, d, e = (torch.empty(n, n) for n in (10, 9, 8, 7, 6))
    once, often = ([{a, e}, *[{b, c, d, e}] * n] for n in (1, 9))
    assert (
        assign_owners([a, b, c, d, e], once, 2, muon_work)
        == assign_owners([a, b, c, d, e], often, 2, muon_work)
        == [[a, b], [c, d, e]]
    )
