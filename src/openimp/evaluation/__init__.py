"""Retrieval, zero-shot classification, trained heads and probes, with confidence intervals.

Each kind of evaluation set has a file of its own.
"""
