"""Everything that imports torch.distributed, except `checkpoint/dcp.py`: the process group, the layout of a model over
it, and shared updates.

In a single process the collectives are the identity.
"""
