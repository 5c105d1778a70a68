"""The recipe mixture as tests train it to measure memory."""

LARGEST_TASK = [
    "evaluation={}",
    "train={num_workers: 0, steps: 12}",
    *(f"tasks.{task}.weight=0" for task in ("clips", "notes")),
    *(f"sources.{source}.limit=400" for source in ("stills", "clips", "notes")),
]
"""Overrides that leave only the largest task. The rows suffice for a batch of at most 400."""
