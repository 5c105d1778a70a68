"""Retrieval, classification and probes, with confidence intervals.

Each evaluation set is checked before training starts.
"""
