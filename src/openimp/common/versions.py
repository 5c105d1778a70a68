"""Versions of openimp and of libraries, which of these have known vulnerabilities, and the processor."""

import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import distributions, version
from pathlib import Path

from openimp.common.progress import console

PACKAGE = Path(__file__).resolve().parents[1]
VULNERABLE_BEFORE = {
    "aiohttp": ("3.14.3", "CVE-2026-69244"),
    "filelock": ("3.20.3", "CVE-2025-68146, CVE-2026-22701"),
    "jinja2": ("3.1.6", "CVE-2024-22195, CVE-2024-34064, CVE-2025-27516"),
    "pillow": ("13", "CVE-2026-25990, CVE-2026-42308, CVE-2026-59200, CGA-6r43-cc9v-c6c4"),
    "starlette": ("1.3.1", "CVE-2026-48710, CVE-2026-48818, CVE-2026-54283"),
}
"""The first version of a library without known vulnerabilities, and the advisories about earlier ones."""


@cache
def openimp_version() -> str:
    """The version. In a checkout also the commit, with "-dirty" if files have changed since."""
    describe = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"]
    # An installed package may be inside the checkout of another project.
    if (PACKAGE.parents[1] / ".git").exists():
        with suppress(OSError):  # no git
            described = subprocess.run(describe, capture_output=True, text=True)
            if described.returncode == 0:
                return f"{version('openimp')} ({described.stdout.strip()})"
    return version("openimp")


def library_version(name: str) -> str | None:
    """The version of a library; None if it is not installed."""
    return next((distribution.version for distribution in distributions(name=name)), None)


def warn_of_vulnerable_libraries() -> None:
    """Prints one sentence if libraries in this environment are older than `VULNERABLE_BEFORE` says."""
    vulnerable = []
    for name, (fixed, advisories) in VULNERABLE_BEFORE.items():
        installed = library_version(name)
        if installed and _release(installed) < _release(fixed):
            vulnerable.append(f"{name} {installed} (fixed in {fixed}: {advisories})")
    if vulnerable:
        console.print(
            f"Warning: the environment has versions with known vulnerabilities: {'; '.join(vulnerable)}.",
            soft_wrap=True,
        )


def _release(text: str) -> list[int]:
    """The numbers of a version: [3, 1, 6] for 3.1.6rc1."""
    return [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]


def processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
