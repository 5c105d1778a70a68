"""Checkpoints: writing them in the background, verifying them, resuming, and starting from another model.

Weights are safetensors and everything else is JSON. Nothing is unpickled.
"""
