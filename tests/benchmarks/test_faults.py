"""What a run loses to each fault, as benchmarks/faults.py measures it: at most the steps since a checkpoint."""

import pytest

from benchmarks.faults import FAULTS
from benchmarks.trainings import Bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench.of_little_data(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed_and_costs_at_most_the_steps_since_a_checkpoint(bench, fault):
    for outcome in FAULTS[fault](bench):
        assert outcome.ok, outcome
