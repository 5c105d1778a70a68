"""Folders of weights: writing them in the background, checking them, resuming, and starting from another model.

Weights are safetensors and everything else is JSON; nothing is unpickled.
"""
