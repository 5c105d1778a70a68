"""Starting several ranks in tests."""

import sys

COMMON = ["train.precision=fp32", "tasks.heard.batch_size=8", "tasks.named.views.1.batch_size=8", "train.steps=24"]
"""Overrides with which the small recipe of little.py trains alike on 1, 2 and 4 ranks."""


def torchrun(ranks: int, *command: object, restarts: int = 0) -> list[str]:
    """The command that starts `command` on several ranks of this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", str(restarts), *map(str, command)]  # fmt: skip
