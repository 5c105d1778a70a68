"""Sources of rows, their order, and batches. demo/ contains the bundled data.

Which examples a step sees is a pure function of the recipe, the seed and the step.
"""
