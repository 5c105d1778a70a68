"""Counting and naming the examples that cannot be read."""

from itertools import chain
from operator import itemgetter
from pathlib import Path

from openimp.common.errors import UserError, counted
from openimp.common.json_lines import append, forget_after, own_lines
from openimp.common.progress import console
from openimp.data.tables import REST
from openimp.parallel.distributed import all_gather_object, rank
from openimp.recipe.training import tolerant_fraction

MIN_EXAMPLES = 100
"""`train.max_bad_fraction` applies once a task has read this many examples."""


class BadExamples:
    """Counts the examples that cannot be read, lists them in skipped.jsonl, and stops the run if there are too many.

    `state` has the counts for a checkpoint, by task. It is complete after `gather`.
    """

    def __init__(self, run: Path, step: int, limit: float, state: dict[str, dict[str, int]]) -> None:
        self.file = run / "skipped.jsonl"
        self.limit = limit
        if rank() == 0:
            forget_after(self.file, step - 1)  # Its lines count steps from 0.
        self.state = state
        self._added: list[dict[str, int | str]] = []  # on this rank, since the last `gather`
        self._unchecked: dict[str, list[str]] = {}  # on all ranks, since the last `raise_if_too_many`

    def add(self, step: int, task: str, read: int, bad: list[tuple[str, str]]) -> None:
        """Adds one step: the number of examples that all ranks read, and (name, reason) of this rank's bad examples."""
        self.state.setdefault(task, {"read": 0, "bad": 0})["read"] += read
        self._added += ({"step": step, "task": task, "where": name, "why": reason} for name, reason in bad)

    def gather(self) -> None:
        """Counts and lists what all ranks have added since the last call. Every rank must call this."""
        lines = chain.from_iterable(all_gather_object(self._added))
        self._added = []
        for line in sorted(lines, key=itemgetter("step")):
            task = str(line["task"])
            self.state[task]["bad"] += 1
            self._unchecked.setdefault(task, []).append(f"{line['where']}: {line['why']}")
            if rank() == 0:
                append(self.file, line)
                # Not all, because there may be thousands. The rest of a shard may hold many examples.
                if self.state[task]["bad"] == 1 or str(line["where"]).endswith(REST):
                    console.print(
                        f"task {task}: skipped {line['where']}: {line['why']}; {self.file} lists all such examples",
                        soft_wrap=True,
                    )

    def report(self) -> None:
        """Prints how many examples could not be read in the whole run, and the file that lists them."""
        lines = own_lines(self.file) if rank() == 0 else ()
        if count := len({(line["task"], line["where"]) for line in lines}):
            console.print(f"{counted(count, 'example')} could not be read; {self.file} lists them", soft_wrap=True)

    def raise_if_too_many(self) -> None:
        """Raises UserError if more examples of a task are bad than `train.max_bad_fraction` allows.

        It judges only tasks with a bad example since the last call.
        """
        unchecked = self._unchecked
        self._unchecked = {}
        for task, examples in unchecked.items():
            counts = self.state[task]
            if counts["read"] >= MIN_EXAMPLES and counts["bad"] > self.limit * counts["read"]:
                raise UserError(
                    f"task {task}: {counts['bad']} of {counts['read']} examples could not be read, more than "
                    f"train.max_bad_fraction {self.limit:g}; for example {'; '.join(examples[:3])}; {self.file} lists "
                    "all; to go on with the others, resume with --set train.max_bad_fraction="
                    f"{tolerant_fraction(counts['bad'] / counts['read']):g}"
                )
