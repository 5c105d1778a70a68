"""Drafts recipes: inspects data, and writes a recipe that trains on it, with comments that explain the choices.

docs/init.md has all rules. The stages are `find` (sources below the paths), `inspect` (tasks for what their columns
hold), `split` (the rows to hold out), `Draft` (the recipe as plain data) and `write` (the recipe as YAML).
"""
