"""Comparison of variants of a recipe at equal FLOPs, with error bars.

Trainers that only studies use, such as `SummedTrainer`, are here too.
"""
