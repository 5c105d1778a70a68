"""A wheel that is installed in an environment of its own works outside of the checkout, with everything it bundles."""

import hashlib
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
READ_BUNDLED = """
import sys

import openimp
from openimp.recipe.file import read_recipe
from openimp.study.schema import read_study

assert openimp.__file__.startswith(sys.prefix), openimp.__file__
read_recipe("demo")
read_recipe("evaluation/imagenet")
read_study("moe", smoke=False)
"""


def digests(folder: Path) -> dict[str, str]:
    """The files below `folder`, by their relative paths, without compiled code."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder]
    subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel):
    """The site-packages of a virtual environment that holds the wheel."""
    folder = wheel.parent
    venv.create(folder / "venv", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "venv" / "bin" / "python"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel], check=True)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    # The dependencies come from the environment that runs the tests. Python does not process .pth files in a folder
    # that a .pth file adds, so an editable installation of openimp there has no effect.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    return packages


@pytest.fixture
def outside(installed, tmp_path):
    """Runs a program of the virtual environment in an empty folder, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [installed.parents[2] / "bin" / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_file(installed):
    expected = digests(ROOT / "src" / "openimp")
    for folder in ("recipes", "studies"):
        expected |= {f"{folder}/{name}": digest for name, digest in digests(ROOT / folder).items()}
    assert digests(installed / "openimp") == expected


def test_the_wheel_holds_the_licenses_of_code_and_data(installed):
    (metadata,) = installed.glob("openimp-*.dist-info")
    data = ROOT / "src" / "openimp" / "data" / "demo"
    expected = [ROOT / "LICENSE", *data.glob("NOTICE*"), *(data / "LICENSES").iterdir()]
    assert digests(metadata / "licenses").keys() == {file.relative_to(ROOT).as_posix() for file in expected}


def test_installed_code_finds_the_bundled_recipes_and_studies(outside):
    outside("python", "-c", READ_BUNDLED)


def test_the_demo_trains_on_the_bundled_data(outside):
    changes = ["train.steps=2", "optimizer.warmup_steps=1", "evaluation={}"]
    assert "step 2/2" in outside("openimp", "train", "demo", *(f"--set={change}" for change in changes))


@pytest.mark.parametrize(
    ("python", "others"),
    [
        ("3.10", ["sentence-transformers>=5"]),
        ("3.11", ["lightly-train>=0.14", "pillow<12"]),
        ("3.12", ["rclip>=4", "pillow<13"]),
        ("3.12", ["lightly-train>=0.14", "rclip>=4", "sentence-transformers>=6"]),
    ],
)
def test_others_can_be_installed_beside_it(wheel, tmp_path, python, others):
    """uv finds versions of all that fit each other. It installs nothing."""
    pytest.importorskip("uv")
    (tmp_path / "wanted.txt").write_text("\n".join([f"openimp @ {wheel.as_uri()}", *others]), encoding="utf-8")
    command = ["uv", "pip", "compile", "--quiet", "--no-config", "--python-version", python]
    done = subprocess.run([sys.executable, "-m", *command, "wanted.txt"], cwd=tmp_path, capture_output=True, text=True)
    if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
        pytest.skip(f"the package index cannot be reached: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    found = set(re.findall(r"^([a-z-]+)(?:==| @)", done.stdout, re.MULTILINE))
    assert {"openimp", *(re.split("[<>]", other)[0] for other in others)} <= found
