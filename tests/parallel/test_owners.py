"""How Muon's matrices are divided among ranks; what they exchange is in test_distributed.py."""

import torch

from openimp.parallel.owners import assign_owners, muon_work, own_matrices, own_weights


def work(matrix: torch.Tensor) -> int:
    return muon_work(*matrix.shape)


def test_ranks_own_about_equal_work():
    """Large matrices, of which some ranks have one more than others, and small ones, which fill the gaps."""
    matrices = [*(torch.empty(64, 64) for _ in range(6)), *(torch.empty(32, 32) for _ in range(16))]
    owned = assign_owners(matrices, 4, work)
    assert sorted(map(id, matrices)) == sorted(id(matrix) for share in owned for matrix in share)
    assert {sum(map(work, share)) for share in owned} == {sum(map(work, matrices)) / 4}


def test_experts_of_one_weight_have_different_owners_if_they_are_sharded():
    experts = torch.empty(8, 64, 16)
    assert [len(owned) for owned in own_matrices({experts: 8}, 4)] == [2, 2, 2, 2]
    assert [len(owned) for owned in own_weights({experts: 8}, 4)] == [1, 0, 0, 0]
