"""The training loop and its parts: optimizers, metrics, pace, and stopping.

Read trainer.py first.
"""
