"""What a folder from somebody else, or another user of the machine, could have openimp read or overwrite."""

import os
import shutil
import stat
from pathlib import Path

import pytest

import openimp
from openimp.checkpoint.folder import checkpoints
from openimp.commands import run_eval
from openimp.common import json_lines, safe_files
from openimp.common.cache import cache_folder
from openimp.common.json_lines import append, forget_after, own_lines, read_lines
from openimp.common.safe_files import private_folder, write_text
from openimp.report.write import write_report
from openimp.training.trainer import train
from tests.messages import refuses
from tests.trained import recipe_of


def test_a_run_forgets_lines_of_a_file_of_any_size(tmp_path, monkeypatch):
    """Only what may come from a stranger has a limit."""
    monkeypatch.setattr(json_lines, "MAX_BYTES", 100)
    file = tmp_path / "metrics.jsonl"
    for step in range(50):
        append(file, {"step": step, "name": "Zoë\u2028"})
    with file.open("a") as stream:
        stream.write('{"step": 50')
    with refuses():
        read_lines(file)
    forget_after(file, 20)
    assert [line["step"] for line in own_lines(file)] == list(range(21))
    assert {line["name"] for line in own_lines(file)} == {"Zoë\u2028"}


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file of the user's that no command may read or write."""
    file = tmp_path / "authorized_keys"
    file.write_text("the user's own keys\n")
    yield file
    assert file.read_text() == "the user's own keys\n"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_under_the_name_of_a_draft_or_a_result_is_not_followed(victim, tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "token_hex", lambda _: "guessed")
    (tmp_path / ".page.html.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "page.html", "text")
    (tmp_path / "page.html").symlink_to(victim)
    (tmp_path / ".page.html.guessed.tmp").unlink()
    write_text(tmp_path / "page.html", "text")
    assert not (tmp_path / "page.html").is_symlink()


def test_files_have_the_mode_that_the_umask_gives(tmp_path, little_data):
    before = os.umask(0o027)
    try:
        train(recipe_of(little_data, "train.steps=2", "evaluation={}"), tmp_path / "run")
        write_report(tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"model.safetensors", "metrics.jsonl", "recipe.yaml", "report.html"} <= {path.name for path in files}
    assert {path.name: mode(path) for path in files if mode(path) != 0o640} == {}


@pytest.mark.parametrize(
    "place",
    ["metrics.jsonl", "recipe.yaml", "tensorboard", "checkpoints/best", "checkpoints/step-00000012/config.json",
     "checkpoints/step-00000012/ema"],
)  # fmt: skip
def test_a_link_that_leads_out_of_a_run_is_refused(victim, tmp_path, little_data, little_run, place):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    link, elsewhere = run / place, victim
    if link.is_dir():
        elsewhere = tmp_path / "elsewhere"
        link.rename(elsewhere)
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    assert_refused(run, little_data)


@pytest.mark.parametrize("place", ["metrics.jsonl", "recipe.yaml"])
def test_a_pipe_in_a_run_is_refused_and_not_waited_for(tmp_path, little_data, little_run, place):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    (run / place).unlink()
    os.mkfifo(run / place)
    assert_refused(run, little_data)


def assert_refused(run, little_data):
    for command in (
        lambda: write_report(run),
        lambda: run_eval(run, None, None, None),
        lambda: openimp.load(run),
        lambda: train(recipe_of(little_data), run, resume=True),
    ):
        with refuses():
            command()


def test_links_that_stay_inside_and_those_of_the_hubs_cache_are_followed(tmp_path, little_run, tiny_model_folder):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    (run / "checkpoints" / "best").symlink_to(checkpoints(run)[-1].name)
    openimp.load(run)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1a2b", tmp_path / "models--a--b" / "blobs"
    (snapshot / "model").mkdir(parents=True)
    blobs.mkdir()
    for file in (path for path in tiny_model_folder.rglob("*") if path.is_file()):
        shutil.copy(file, blobs)
        (snapshot / file.relative_to(tiny_model_folder)).symlink_to(blobs / file.name)
    openimp.load(snapshot)
    (snapshot / "more.json").symlink_to("../../../more.json")
    with refuses():
        openimp.load(snapshot)


def test_cache_folders_are_the_users_alone(tmp_path, monkeypatch, foreign_folder):
    monkeypatch.setenv("OPENIMP_CACHE", str(tmp_path / "cache"))
    assert [mode(path) for path in (cache_folder("decoded"), tmp_path / "cache")] == [0o700, 0o700]
    before = os.umask(0o002)
    try:
        private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [mode(tmp_path / path) for path in ("a", "a/b", "a/b/c")] == [0o700] * 3
    for folder in (tmp_path / "cache" / "decoded", tmp_path / "cache"):
        for others in (0o777, 0o720):
            folder.chmod(others)
            with refuses():
                cache_folder("decoded")
        folder.chmod(0o700)
    (tmp_path / "link").symlink_to(foreign_folder)
    for folder in (foreign_folder, tmp_path / "link"):
        with refuses():
            private_folder(folder)
