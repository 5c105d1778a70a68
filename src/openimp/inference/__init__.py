"""A trained model in use: embedding, classification, evaluation, export, and publishing.

Nothing here trains.
"""
