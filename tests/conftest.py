"""What several tests share: a tiny sparse model of all four modalities, and a folder with small files of each."""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
from hypothesis import settings
from playwright.sync_api import sync_playwright

from openimp import cli
from openimp.common.modality import Modality
from openimp.model.imp import IMP
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests import little, messages
from tests.made_models import untrained, write_untrained
from tests.recordings import film

# CI tries the same cases each time, so that it tells of a change and not of luck; elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# mteb needs Python 3.11.
collect_ignore = [] if find_spec("mteb") else ["inference/test_evaluators.py"]

# The tests run in one process per core. More threads than cores would slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Tests start their own file on several ranks, and benchmarks as modules, in whatever folder.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])

NO_BROWSER = "needs a browser: `make browser` installs Chromium"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-messages", action="store_true", help="write tests/messages.json; needs -n 0")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-messages"):
        os.environ["OPENIMP_UPDATE_MESSAGES"] = "1"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--update-messages"):
        messages.update()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells at the end what was not tested, because a line of dots hides it."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(report.longrepr)]
    if skipped:
        files = sorted({report.nodeid.split("::")[0] for report in skipped})
        terminalreporter.line(f"{len(skipped)} tests of pages were skipped ({', '.join(files)}): each {NO_BROWSER}.")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests leave nothing in the cache folder of whoever runs them."""
    os.environ["OPENIMP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A folder that belongs to another user."""
    if os.getuid():
        return Path("/")
    folder = tmp_path / "foreign"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    return folder


TEXTS = ["a red square", "a green circle", "a blue line that is rather longer than the other ones", "noise", "a"]
IMAGE, TEXT = {"size": 32, "drop_tokens": 0.5}, {"length": 8}
VIDEO = {"size": 16, "frames": 4, "stride": 1, "clips": 2, "drop_tokens": 0.5}
AUDIO = {"seconds": 0.512, "clips": 2, "drop_tokens": 0.5}


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """Makes the recipe of a sparse model of width 32, 2 layers and four modalities, three of them paired with text.

    Keyword arguments replace its top-level keys, those of the model one by one.
    """

    def make(model: dict[str, Any] | None = None, folder: str | Path = ".", **changes: Any) -> Recipe:
        sizes = {
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_dim": 64,
            "embed_dim": 32,
            "moe": {"experts": 4, "layers": 1},
        }
        task = {"source": "all", "objectives": [{"type": "contrastive"}]}
        views = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
        data = {
            "name": "tiny",
            "model": sizes | (model or {}),
            "modalities": {"vision": {"patch": [2, 8, 8]}, "audio": {"window": 512, "hop": 256, "bins": 32}},
            "sources": {"all": {"path": "all.parquet"}},
            "tasks": {
                name: {**task, "inputs": {name: name, "text": "text"}, "views": [{name: view, "text": TEXT}]}
                for name, view in views.items()
            },
        }
        return Recipe.build(data | changes, folder)

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[Recipe], tuple[IMP, dict[str, Modality]]]:
    """Makes the untrained model of a recipe, in evaluation mode, and its modalities, fitted to a few texts."""

    return lambda recipe: untrained(recipe, [TEXTS])


@pytest.fixture(scope="session")
def write_tiny() -> Callable[[Recipe, Path], Path]:
    """Writes the untrained model of a recipe to a folder that `openimp.load` opens, and returns the folder."""
    return lambda recipe, folder: write_untrained(recipe, [TEXTS], folder)


@pytest.fixture(scope="session")
def tiny_model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_recipe: Callable[..., Recipe],
    write_tiny: Callable[[Recipe, Path], Path],
) -> Path:
    """The folder of an untrained sparse model of image, video, audio and text."""
    return write_tiny(tiny_recipe(), tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of each modality: 0.png, 0.mp4, 0.wav, 0.txt and so on; each of another size or length."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for i in range(3):
        PIL.Image.fromarray(rng.integers(0, 256, (40 + i, 50, 3), np.uint8)).save(folder / f"{i}.png")
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, 9000 + 4000 * i), 16_000)
        (folder / f"{i}.txt").write_text(TEXTS[i], encoding="utf-8")
        grey = rng.integers(0, 256, (6 + 2 * i, 1, 1, 1), np.uint8)
        (folder / f"{i}.mp4").write_bytes(film(np.broadcast_to(grey, (len(grey), 32, 48, 3))))
    return folder


@pytest.fixture(scope="session")
def little_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml of two tasks, and their data: 24 pictures by class and 15 captioned sounds."""
    return little.write(tmp_path_factory.mktemp("little"))


@pytest.fixture
def own_data(little_data: Path, tmp_path: Path) -> Path:
    """A copy of `little_data` that a test may spoil."""
    return Path(shutil.copytree(little_data, tmp_path / "data"))


@pytest.fixture(scope="session")
def little_run(little_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe in `little_data`."""
    run = tmp_path_factory.mktemp("runs") / "little"
    train(Recipe.load(little_data / "recipe.yaml"), run)
    return run


@pytest.fixture
def own_run(little_run: Path, tmp_path: Path) -> Path:
    """A copy of `little_run` that a test may spoil."""
    return Path(shutil.copytree(little_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def streamed(own_data: Path) -> tuple[Path, list[str]]:
    """The pictures in two tars, and the changes of the recipe that stream them."""
    return own_data, [*little.write_tars(own_data, own_data), "train.steps=20"]


@pytest.fixture
def openimp(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["openimp", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")  # While it is open, other tests of the process could run no asyncio.
def browser():
    """Chromium, driven by Playwright."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, programs) if path), None)
    # A sandbox needs rights that containers do not give. The fake microphone beeps.
    options = [
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
    ]
    with sync_playwright() as playwright:
        program = program or playwright.chromium.executable_path  # Where `playwright install` puts its own.
        if not Path(program).exists():
            # CI must not pass without having looked at the pages.
            (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_BROWSER)
        browser = playwright.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()
