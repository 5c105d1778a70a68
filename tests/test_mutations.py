"""Mutated media files, a few of those that benchmarks/mutations.py decodes."""

import mutations


def test_mutated_files_are_decoded_or_refused_within_memory():
    report = mutations.run(25 * len(mutations.FORMATS), seed=1)
    assert not report.failures
    assert 50e6 < report.memory < mutations.MOST_MEMORY
    assert sum(counts["decoded"] for counts in report.outcomes.values()) > 50
    assert all(counts["refused"] for counts in report.outcomes.values())


def test_an_exception_and_a_hang_are_failures(monkeypatch):
    """What the benchmark looks for is found, or it would prove nothing."""
    monkeypatch.setattr(mutations.IMAGE, "decode", lambda *_: 1 / 0)
    assert mutations.decode("PNG", b"", 0).startswith("ZeroDivisionError")
