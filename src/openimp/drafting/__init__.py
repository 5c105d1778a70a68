"""Drafts recipes: looks at data, and writes a recipe that trains on it, with comments that explain the choices.

Its stages are `find` (sources below the paths), `inspect` (what their columns hold), `draft` (the recipe as data), and
`write` (the recipe as YAML).
"""
