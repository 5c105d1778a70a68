"""The training loop and its parts: optimizers, metrics, step times, and stopping.

Read trainer.py first.
"""
