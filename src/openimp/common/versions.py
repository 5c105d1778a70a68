"""Versions of openimp and of libraries, libraries that must be installed, and the processor."""

import importlib
import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path

from openimp.common.cache import stable_hash
from openimp.common.errors import UserError
from openimp.common.safe_files import sha256

PACKAGE = Path(__file__).resolve().parents[1]


@cache
def openimp_version() -> str:
    """The version. In a checkout also the commit, with "-dirty" if files have changed since."""
    # An installed package may be inside the checkout of another project.
    if (PACKAGE.parents[1] / ".git").exists():
        describe = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"]
        with suppress(OSError, subprocess.CalledProcessError):
            commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout
            return f"{version('openimp')} ({commit.strip()})"
    return version("openimp")


def library_version(name: str) -> str | None:
    """The version of a library; None if it is not installed."""
    return next((distribution.version for distribution in distributions(name=name)), None)


@cache
def source_hash(name: str) -> str:
    """Hash of the source files of a package, without those in its subpackages. Of a module, its package counts."""
    module = importlib.import_module(name)
    file = getattr(module, "__file__", None)
    if file is None:  # Typed into an interpreter.
        return ""
    files = sorted(Path(file).parent.glob("*.py")) if module.__package__ else [Path(file)]
    return stable_hash((path.name, sha256(path)) for path in files)


def require_library(name: str, extra: str) -> None:
    """Raises UserError if a library of one of openimp's extras is not installed. `name` is what is imported."""
    if find_spec(name) is None:
        raise UserError(f"{name} is not installed: pip install 'openimp[{extra}]'")


@cache
def cpu_info(key: str) -> str:
    """What Linux says of the processor, such as its "vendor_id"; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    line = re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE)
    return line[1] if line else ""


def processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    return cpu_info("model name") or platform.processor() or platform.machine()
