"""What a measurement depends on: the version and commit of openimp, and the processor."""

import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def openimp_version() -> str:
    """The version. In a checkout also the commit, with "-dirty" if files have changed since."""
    describe = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"]
    # An installed package may be inside the checkout of another project.
    if (PACKAGE.parents[1] / ".git").exists():
        with suppress(OSError):  # no git
            found = subprocess.run(describe, capture_output=True, text=True)
            if found.returncode == 0:
                return f"{version('openimp')} ({found.stdout.strip()})"
    return version("openimp")


def processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
