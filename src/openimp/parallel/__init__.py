"""Everything that imports torch.distributed: ranks, how they hold a model between them, and what they exchange.

In a single process each function here is the identity, so no other folder has a second code path.
"""
