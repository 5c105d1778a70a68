"""Sources of rows, their order, and batches made in worker processes; demo/ holds the bundled data.

Which example a step sees is a pure function of recipe, seed and step.
"""
