"""The schema of a recipe, how its YAML is read, and the registry that finds modalities by name.

Every default lives here; options of one modality are declared beside that modality.
"""
