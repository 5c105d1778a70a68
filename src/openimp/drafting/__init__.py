"""Drafts recipes: inspects data, and writes a recipe that trains on it, with comments that explain the choices.

The stages are `find` (sources below the paths), `inspect` (what their columns hold), `choose` (the tasks), `Draft` (the
recipe as plain data) and `write` (the recipe as YAML).
"""
