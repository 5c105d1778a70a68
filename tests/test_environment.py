"""What a fresh checkout installs and runs: the lock, the names on Python's path, and tests that need a browser."""

import re
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import processes

ROOT = Path(__file__).resolve().parents[1]


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, with all extras."""
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    wanted = [Requirement(line) for line in (*project["dependencies"], *extras)]
    return [requirement for requirement in wanted if requirement.name != project["name"]]


def test_no_package_of_the_checkout_has_the_name_of_an_installed_one():
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")} | {file.stem for file in ROOT.glob("*.py")}
    assert {"benchmarks", "tests", "tools"} <= packages
    assert not packages & packages_distributions().keys()


@pytest.mark.parametrize("python", ["3.10.12", "3.11.9", "3.12.3", "3.13.1"])
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_lock_has_an_allowed_version_of_every_requirement(python, system):
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": system,
        "platform_machine": "x86_64",
    }
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    applicable = [pin for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
    versions = {re.sub(r"[-_.]+", "-", pin.name).lower(): pin.specifier for pin in applicable}
    assert len(versions) == len(applicable), "two versions of one package"
    for requirement in requirements():
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        pinned = versions.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert pinned is not None, f"{requirement.name}: not in constraints.txt; run `make lock`"
        (pin,) = pinned
        # torch has an upper bound only: its builds for CPUs and for CUDA have versions of their own.
        if pin.operator == "==":
            assert requirement.specifier.contains(pin.version), f"{requirement}: {pin}; run `make lock`"
        else:
            assert requirement.name in ("torch", "torchvision")


@pytest.mark.slow
@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_without_a_browser_the_last_lines_say_which_tests_were_skipped(tmp_path, ci, code):
    test = "tests/search/test_page.py::test_the_keyboard_alone_searches_for_texts_and_files"
    done = processes.run(
        *("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", test),
        folder=ROOT,
        PATH=str(tmp_path),
        PLAYWRIGHT_BROWSERS_PATH=str(tmp_path),
        CI=ci,
    )
    assert done.returncode == code, done.stdout
    sentence = "needs a browser: `make browser` installs Chromium"
    assert sentence in done.stdout
    skipped = f"1 tests of pages were skipped (tests/search/test_page.py): each {sentence}."
    assert (skipped in done.stdout) == (not ci)
