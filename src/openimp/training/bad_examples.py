"""Counting and naming the examples that cannot be read."""

from pathlib import Path

from openimp.common.errors import UserError
from openimp.common.json_lines import append, forget_after
from openimp.parallel.distributed import rank

ENOUGH = 100
"""Examples of a task after which the share of bad ones is judged."""


class BadExamples:
    """Counts the examples that cannot be read, lists them in skipped.jsonl, and stops the run if there are too many."""

    def __init__(self, run: Path, step: int, limit: float, state: dict[str, dict[str, int]] | None = None) -> None:
        self.file, self.limit = run / "skipped.jsonl", limit
        if rank() == 0:
            forget_after(self.file, step - 1)  # Its lines count steps from 0.
        self.state = state or {}

    def add(self, step: int, task: str, read: int, bad: list[tuple[str, str]]) -> None:
        """Counts the examples of all ranks in one step. Raises UserError above `train.max_bad_fraction`."""
        counts = self.state.setdefault(task, {"read": 0, "bad": 0})
        counts["read"] += read
        counts["bad"] += len(bad)
        for where, why in bad if rank() == 0 else []:
            append(self.file, {"step": step, "task": task, "where": where, "why": why})
        if bad and counts["read"] >= ENOUGH and counts["bad"] > self.limit * counts["read"]:
            named = "; ".join(f"{where}: {why}" for where, why in bad[:3])
            raise UserError(
                f"task {task}: {counts['bad']} of {counts['read']} examples could not be read, more than "
                f"train.max_bad_fraction {self.limit:g}; for example {named}; {self.file} lists all"
            )
