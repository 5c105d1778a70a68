"""From items to features in batches, as both evaluation and inference need it.

Training does not come through here: its batches are made in data/.
"""
