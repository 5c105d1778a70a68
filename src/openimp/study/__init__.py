"""Comparison of variants of a recipe at equal FLOPs, with error bars.

Variants of training that only studies use, such as `SUMMED`, are here too.
"""
