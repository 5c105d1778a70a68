"""Variants of a recipe, trained at equal FLOPs and compared with error bars.

Trainers for study purposes only, such as summed losses, live here too.
"""
