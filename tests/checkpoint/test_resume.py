"""Resuming from the newest intact checkpoint, with the same data. test_faults.py kills runs."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import openimp
from openimp.checkpoint.folder import checkpoints, manifest_entry, verify
from openimp.commands import run_eval
from openimp.common.errors import UserError
from openimp.common.json_lines import append, read_lines
from openimp.data.loader import load_batches
from openimp.evaluation.results import best_step
from openimp.recipe.schema import Recipe
from openimp.training.run_directory import LOCK
from openimp.training.setup import set_up
from openimp.training.trainer import Trainer, train
from tests import little
from tests.messages import refuses
from tests.saved import hashes

CHANGES = ["train.save_every=4", "train.keep_last=3", "evaluation={}"]
DIFFERS = r"damaged: its size \([\d,]+ bytes\) or SHA-256 differs from the manifest"


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return Recipe.load(folder / "recipe.yaml", [*CHANGES, *changes])


def names(run: Path) -> list[str]:
    """All that is in the folder of the checkpoints, drafts included."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole_run(little_data, tmp_path_factory) -> Path:
    """Steps 1 to 12, with checkpoints at 4, 8 and 12."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_of(little_data), run)
    return run


@pytest.fixture
def run(whole_run, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def flip(file: Path, place: int | None = None) -> None:
    """Changes one bit, by default in the middle, but neither size nor time."""
    data, times = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def weights_of(folder: Path) -> Path:
    return folder / "model" / "model.safetensors"


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "file", "told"),
    [
        (flip, "model/model.safetensors", DIFFERS),
        (flip, "tokenizer.json", DIFFERS),
        (cut, "optimizer/optimizer.safetensors", DIFFERS),
        (cut, "manifest.json", "damaged: "),
        (Path.unlink, "ema/ema.safetensors", "missing"),
        (Path.unlink, "state.json", "missing"),
        (Path.unlink, "manifest.json", "missing"),
    ],
)
def test_damage_is_named_and_the_previous_checkpoint_is_used(run, whole_run, little_data, capsys, harm, file, told):
    damaged = checkpoints(run)[-1] / file
    harm(damaged)
    train(recipe_of(little_data), run, resume=True)
    out = capsys.readouterr().out
    assert re.search(rf"^{damaged}: {told}.*; resuming from step 8, which loses 4 steps$", out, re.MULTILINE)
    assert out.count("which loses") == 1
    assert hashes(run) == hashes(whole_run)
    assert names(run) == names(whole_run)


def test_without_an_intact_checkpoint_all_damage_is_named(run, little_data, capsys):
    flip(weights_of(checkpoints(run)[2]))
    cut(weights_of(checkpoints(run)[1]))
    Trainer(set_up(recipe_of(little_data), run, resume=True))
    assert capsys.readouterr().out.count("; resuming from step 4, which loses 8 steps\n") == 2
    (checkpoints(run)[0] / "config.json").unlink()
    with pytest.raises(UserError) as error:
        train(recipe_of(little_data), run, resume=True)
    message = str(error.value)
    assert message.startswith(f"{run}: no checkpoint to resume from; {weights_of(checkpoints(run)[2])}: damaged")
    assert f"; {weights_of(checkpoints(run)[1])}: damaged: " in message
    assert message.endswith(f"; {checkpoints(run)[0] / 'config.json'}: missing")
    assert "\n" not in message


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_new_one(run, little_data):
    """It has the higher number, and would pass for the newest when older ones are removed."""
    flip(weights_of(checkpoints(run)[-1]))
    training = Trainer(set_up(recipe_of(little_data, "train.keep_last=1"), run, resume=True))
    training.make_step(next(iter(load_batches(training.batches, training.step))))
    training.save()
    training.checkpointing.wait()
    assert names(run) == ["step-00000009"]


def test_an_optimizer_state_of_another_shape_is_refused(run, little_data):
    folder = checkpoints(run)[-1]
    file = folder / "optimizer" / "optimizer.safetensors"
    tensors = load_file(file)
    name = "encoder.norm.weight|exp_avg"
    save_file({**tensors, name: torch.zeros(1, 2)}, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["optimizer/optimizer.safetensors"] = manifest_entry(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refuses():
        set_up(recipe_of(little_data), run, resume=True)


def test_resume_auto_resumes_from_a_checkpoint_and_never_starts_again_if_all_are_damaged(run, whole_run, little_data):
    recipe = recipe_of(little_data)
    shutil.rmtree(checkpoints(run)[-1])
    first_times = [line["seconds"] for line in read_lines(run / "metrics.jsonl")]
    train(recipe, run, "auto")
    times = [line["seconds"] for line in read_lines(run / "metrics.jsonl")]
    assert times[:8] == first_times[:8]
    assert times[8] != first_times[8]
    assert hashes(run) == hashes(whole_run)
    for folder in checkpoints(run):
        flip(weights_of(folder))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK}
    with pytest.raises(UserError, match="no checkpoint to resume from; "):
        train(recipe, run, "auto")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != LOCK} == before


def test_a_source_that_has_changed_is_named(own_data, tmp_path):
    """A row, a file of a folder, and a file that a manifest names; the sizes and times stay. It may be allowed: from
    the next checkpoint on the run is one of the new data."""
    run, recipe = tmp_path / "run", recipe_of(own_data)
    train(recipe, run)
    shutil.rmtree(checkpoints(run)[-1])
    folder = checkpoints(run)[-1]
    caption = (own_data / "sounds.jsonl").read_bytes().index(b"tone")
    for name, source, place in (
        ("pictures/red/3.png", "pictures", -1),
        ("sounds.jsonl", "sounds", caption),
        ("7.wav", "sounds", -1),
        ("7.wav", "sounds", None),
    ):
        flip(own_data / name, place)
        told = rf"^{folder}: source {source} has changed since it was saved; .*--allow-ch"
        with pytest.raises(UserError, match=told):
            train(recipe, run, resume=True)
        flip(own_data / name, place)
        (own_data / name).touch()
    lines = (own_data / "sounds.jsonl").read_text().splitlines()
    (own_data / "sounds.jsonl").write_text("\n".join(lines[:-1]))
    assert train(recipe, run, resume=True, allow_changed_data=True)
    assert checkpoints(run)[-1].name == "step-00000012"
    assert train(recipe, run, resume=True)


@pytest.mark.slow
def test_a_changed_stream_begins_a_new_epoch(streamed, tmp_path):
    """Where it stood in the old shards means nothing in the new ones, which are shorter."""
    folder, changes = streamed
    run, recipe = tmp_path / "run", recipe_of(folder, *changes, "train.save_every=10")
    train(recipe, run)
    shutil.rmtree(checkpoints(run)[-1])
    for picture in sorted((folder / "pictures").rglob("*.png"))[:9]:
        picture.unlink()
    little.write_tars(folder, folder)
    with refuses():
        train(recipe, run, resume=True)
    before = json.loads((checkpoints(run)[-1] / "state.json").read_text())["cursors"]["named"]
    training = Trainer(set_up(recipe, run, resume=True, allow_changed_data=True))
    assert any(cursor["state"] for cursor in before.values()), "at the beginning of an epoch nothing could go wrong"
    position = max(cursor["position"] for cursor in before.values())
    epoch = 1 + max(cursor["epoch"] for cursor in before.values())
    assert training.cursors["named"] == {
        str(lane): {"position": position, "epoch": epoch, "shard": lane, "state": None} for lane in range(2)
    }
    assert train(recipe, run, resume=True, allow_changed_data=True)
    assert train(recipe, run, resume=True)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_found(little_data, tmp_path):
    """It survives the removal of older ones and resuming. The run's model stays the newest."""
    run = tmp_path / "run"
    recipe = Recipe.load(
        little_data / "recipe.yaml",
        ["train.save_every=5", "train.keep_last=1", "evaluation.every=2", "evaluation.best=colours"],
    )
    train(recipe, run)
    lines = [line for line in read_lines(run / "results.jsonl") if line["set"] == "colours"]
    highest = max(line["top1"] for line in lines)
    best = next(line for line in lines if line["top1"] == highest)
    assert best["step"] < 12, "the last one would be kept anyhow"
    expected = ["best", f"step-{best['step']:08d}", "step-00000012"]
    assert names(run) == expected
    run_eval(run / "checkpoints" / "best", ["colours"], None, tmp_path / "best.jsonl")
    assert read_lines(tmp_path / "best.jsonl") == [best]
    run_eval(run, ["colours"], None, tmp_path / "newest.jsonl")
    assert read_lines(tmp_path / "newest.jsonl") == lines[-1:]

    recorded = read_lines(run / "results.jsonl")
    flip(weights_of(checkpoints(run)[-1]))
    train(recipe, run, resume=True)
    assert names(run) == expected
    assert read_lines(run / "results.jsonl") == recorded
    assert (run / "checkpoints" / "best").resolve().name == expected[1]


def test_files_that_macos_adds_to_a_run_are_ignored(run):
    newest = checkpoints(run)[-1]
    for file in (newest / "config.json", newest / "model" / "model.safetensors", newest / "manifest.json"):
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(range(256)))
    (newest / ".AppleDouble").mkdir()
    (newest / ".AppleDouble" / "config.json").write_bytes(b"\0\5")
    openimp.load(run)
    verify(newest)


def test_a_copy_of_a_run_whose_links_became_folders_goes_on(little_data, tmp_path):
    """As scp makes it."""
    colours = json.dumps(Recipe.load(little_data / "recipe.yaml").to_dict()["evaluation"]["sets"]["colours"])
    best = f"evaluation={{every: 4, best: colours, sets: {{colours: {colours}}}}}"
    train(recipe_of(little_data, best), tmp_path / "run")
    copy = Path(shutil.copytree(tmp_path / "run", tmp_path / "copy"))  # Follows links.
    shutil.rmtree(checkpoints(copy)[-1])
    assert not (copy / "checkpoints" / "best").is_symlink()
    training = Trainer(set_up(recipe_of(little_data, best, "train.keep_last=1"), copy, resume=True))
    training.make_step(training.batches[8])
    training.save(wait=True)
    assert names(copy) == ["best", "step-00000004", "step-00000008", "step-00000009"], "which one is best is unknown"
    assert train(recipe_of(little_data, best), copy, resume=True)
    assert (copy / "checkpoints" / "best").is_symlink()
    openimp.load(copy / "checkpoints" / "best")


def test_the_best_checkpoint_is_so_by_the_mean_of_both_ways(little_data, tmp_path):
    """Of the steps that are saved. Of equally good ones the first counts."""
    file = tmp_path / "results.jsonl"
    for step, shares in enumerate(((0.5, 0.1), (0.2, 0.6), (0.8, 0), (0.9, 0.9)), 1):
        for share in shares:
            append(file, {"set": "tones", "step": step, "r1": share})
        append(file, {"set": "colours", "step": step, "top1": 1 / step})
    assert best_step(file, "tones", {1, 2, 3}) == 2
    with refuses():
        Recipe.load(little_data / "recipe.yaml", ["evaluation.best=tone"])
