"""A trained model in use: openimp.load, the embed command, and the interface of mteb.

Nothing here trains or evaluates.
"""
