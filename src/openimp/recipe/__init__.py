"""The schema of recipes with all defaults, the reading of their YAML, and the registry of modalities.

The options of a modality are declared in the modality.
"""
