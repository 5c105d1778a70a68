"""Retrieval, classification and probes, with confidence intervals.

Each kind of evaluation set is checked before training starts, and measured by the module of its name.
"""
