"""Compares batches in tests."""

import torch

from openimp.data.loaded_batch import LoadedBatch


def assert_same(ours: list[LoadedBatch], theirs: list[LoadedBatch]) -> None:
    """The batches are bitwise equal, and so is what is known about them."""
    assert [a.visit for a in ours] == [b.visit for b in theirs]
    for a, b in zip(ours, theirs):
        assert (a.names, a.bad, a.cursors, a.digest) == (b.names, b.bad, b.cursors, b.digest)
        assert a.rows == b.rows
        for mine, other in zip(a.batch.targets, b.batch.targets, strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine)
        assert a.batch.tokens.keys() == b.batch.tokens.keys()
        for name, tokens in a.batch.tokens.items():
            for mine, other in zip(tokens, b.batch.tokens[name]):
                assert (mine is None) == (other is None)
                assert mine is None or torch.equal(mine, other), name
