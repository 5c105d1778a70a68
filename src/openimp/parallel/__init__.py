"""Everything that imports torch.distributed, except `checkpoint/dcp.py`: the process group, the layout of a model over
it, and shared updates.

In a single process each function here is the identity, so no other folder has a second code path.
"""
