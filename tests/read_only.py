"""Runs code in a process that sees a folder on a read-only file system. `chmod` would not hinder root."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ["unshare", "--mount", "--map-root-user", "sh", "-c"]


def run_read_only(folder: Path, code: str) -> str:
    """What Python code prints. It skips the test on systems that do not let this user mount."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode:
        pytest.skip("this user may mount nothing")
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$1" -c "$2"'
    command = [*UNSHARE, script, str(folder), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
