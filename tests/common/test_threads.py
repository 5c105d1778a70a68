"""Work in threads."""

import threading
from collections.abc import Iterator

import pytest

from openimp.common.threads import map_ahead


def test_results_come_in_order_and_items_are_read_only_a_few_ahead():
    read = []

    def items() -> Iterator[int]:
        for item in range(100):
            read.append(item)
            yield item

    results = map_ahead(lambda item: item**2, items(), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(read) < 10
    assert list(results) == [item**2 for item in range(3, 100)]


def test_an_error_comes_in_the_place_of_its_item():
    def inverse(item: int) -> float:
        return 1 / item

    results = map_ahead(inverse, [2, 1, 0, 1], threads=2)
    assert [next(results), next(results)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_work_that_nobody_waits_for_is_not_begun():
    """For example if a user interrupts an index of long films."""
    begun = []
    second_begun = threading.Event()
    may_end = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item:
            second_begun.set()
            may_end.wait(60)
        return item

    results = map_ahead(work, range(100), threads=1)
    assert next(results) == 0
    assert second_begun.wait(60)
    threading.Timer(0.1, may_end.set).start()
    results.close()  # Waits for the work that is being done.
    assert begun == [0, 1]
