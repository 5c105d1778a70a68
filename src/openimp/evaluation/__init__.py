"""Retrieval, classification and probes, with confidence intervals."""
