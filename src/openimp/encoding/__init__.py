"""Encodes items in batches, for evaluation and for inference. Training makes its batches in data/."""
