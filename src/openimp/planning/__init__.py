"""What a step costs in FLOPs and memory, and what a run would need on a given number of GPUs.

Costs are counted on tensors without values, so nothing here needs a GPU.
"""
