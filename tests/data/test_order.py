"""The order of examples: permutations that nobody stores."""

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.data.order import permute, rows_at, seed_key


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), task=st.text(max_size=8), epoch=st.integers(0, 5))
def test_each_epoch_has_every_row_once(n, seed, task, epoch):
    rows = rows_at(seed, task, n, np.arange(epoch * n, (epoch + 1) * n))
    assert np.array_equal(np.sort(rows), np.arange(n))


def test_epochs_tasks_and_seeds_have_orders_of_their_own():
    n = 1000
    keys = ((0, "t", 0), (0, "t", n), (0, "u", 0), (1, "t", 0))
    orders = [rows_at(seed, task, n, np.arange(start, start + n)) for seed, task, start in keys]
    for one, other in combinations([np.arange(n), *orders], 2):
        assert (one == other).sum() < 10


def test_the_order_is_random_enough():
    """Over many keys each row comes equally often to each place, and neighbours do not stay neighbours."""
    n, keys = 7, 4000
    counts = np.zeros((n, n))
    together = 0
    for key in range(keys):
        row = permute(np.arange(n), n, key)
        counts[np.arange(n), row] += 1
        together += int((np.diff(row) == 1).sum())
    # Standard deviation of a count: about 22 around 571.
    assert abs(counts - keys / n).max() < 5 * (keys / n) ** 0.5
    # Of n - 1 neighbours, each stays with chance 1/n: 3429 in all.
    assert abs(together - keys * (n - 1) / n) < 400


def test_a_billion_rows_cost_nothing():
    rows = rows_at(0, "t", 10**9, np.arange(5 * 10**9 - 8, 5 * 10**9 + 8))
    assert len(set(rows.tolist())) > 14
    assert rows.min() >= 0
    assert rows.max() < 10**9


def test_every_process_has_the_same_keys():
    """Python's own `hash` of a string differs from process to process."""
    assert seed_key(3, "näme", 7) == 97670568430045272992186519397937822705
    assert permute(np.arange(9), 9, 4).tolist() == [6, 5, 3, 8, 2, 4, 7, 1, 0]
