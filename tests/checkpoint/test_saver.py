"""Saving in the background, by one process and by several: what is written, when, and what becomes of failures.

torchrun runs this very file for what several processes do.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import COMMON, torchrun
from safetensors.torch import load_file, save_file
from torch import Tensor

import openimp
from openimp.checkpoint.dcp import Snapshot, load
from openimp.checkpoint.folder import checkpoints, moments_of, verify
from openimp.checkpoint.saver import NotSaved
from openimp.checkpoint.shards import read
from openimp.common.errors import UserError
from openimp.parallel import distributed, layout
from openimp.recipe.schema import Recipe
from openimp.training.trainer import Trainer, train

CHANGES = [*COMMON, "evaluation={}", "train.keep_last=2"]


def training_of(folder: Path, run: Path, *changes: str, resume: bool = False) -> Trainer:
    return Trainer(Recipe.load(folder / "recipe.yaml", [*CHANGES, *changes]), run, resume)


def tensors_of(training: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint has to hold, whole, by file and name."""
    assert training.updater.ema
    kinds = {
        "model": training.model.state_dict(),
        "ema": training.updater.ema.weights,
        "optimizer": moments_of(training.model, training.updater.optimizers),
    }
    return {
        f"{kind} {name}": layout.whole(tensor).detach().clone()
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
    }


def files_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{kind} {name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in read(folder, kind).items()
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Disk(threading.Event):
    """One where nothing of a checkpoint can be written until it is set, and then may be full."""

    full = False


@pytest.fixture
def disk(monkeypatch) -> Disk:
    """In the place of the system's."""
    disk, mkdir = Disk(), os.mkdir

    def slow(path: Path, mode: int = 0o777) -> None:
        if Path(path).name.startswith(".step-"):
            assert disk.wait(60)
            if disk.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", slow)
    return disk


def test_training_goes_on_while_a_checkpoint_is_written(little_data, tmp_path, disk):
    """Which holds what the tensors were when it was begun."""
    run = tmp_path / "run"
    training = training_of(little_data, run)
    for step in range(3):
        training.update(training.data[step])
    before = tensors_of(training)
    training.save()
    for step in range(3, 6):
        training.update(training.data[step])
    assert training.step == 6
    assert not checkpoints(run)
    after = tensors_of(training)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith("norm.weight"))

    disk.set()
    training.save()
    training.checkpointing.wait()
    assert [path.name for path in checkpoints(run)] == ["step-00000003", "step-00000006"]
    for folder, expected in zip(checkpoints(run), (before, after)):
        verify(folder)
        assert same(files_of(folder), expected)
        assert load_file(folder / "model.safetensors").keys() == training.model.state_dict().keys()


def test_a_failure_is_raised_by_the_next_save(little_data, tmp_path, disk):
    """Which waits for the one before, so no second one is begun."""
    run = tmp_path / "run"
    training = training_of(little_data, run)
    training.update(training.data[0])
    training.save()
    training.update(training.data[1])
    disk.full = True
    disk.set()
    with pytest.raises(NotSaved, match=r"step-00000001: could not be saved: No space left on device; older"):
        training.save()
    assert not (run / "checkpoints").exists()
    disk.full = False
    training.save()
    training.checkpointing.wait()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_end_of_a_training_waits_for_its_checkpoint(little_data, tmp_path, disk):
    """Let go once the evaluation that follows the last step has come to its end."""
    run, recipe = tmp_path / "run", Recipe.load(little_data / "recipe.yaml", ["train.steps=2"])

    class Watched(Trainer):
        def evaluate(self, progress=None):
            super().evaluate(progress)
            assert not checkpoints(run)
            disk.set()

    assert train(recipe, run, trainer=Watched)
    verify(checkpoints(run)[-1])


def test_what_several_processes_save_one_and_four_load(little_data, tmp_path):
    """Bit for bit, and again what the four save."""
    run = tmp_path / "run"
    for processes, step in ((2, 3), (4, 4)):
        subprocess.run(torchrun(processes, __file__, "save", little_data, run), check=True, timeout=300)
        folder, expected = checkpoints(run)[-1], load_file(run / f"saved {step}.safetensors")
        assert folder.name == f"step-{step:08d}"
        assert len(list(folder.glob(f"model-*-of-{processes:05d}.safetensors"))) == processes
        assert same(files_of(folder), expected)
        assert same(tensors_of(training_of(little_data, run, resume=True)), expected)
        assert openimp.load(run).encode_text(["a red square"]).isfinite().all()
    assert same(load_file(run / "loaded 3.safetensors"), load_file(run / "saved 3.safetensors"))

    lost = next(folder.glob("ema-00002-*"))
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost}: missing"):
        openimp.load(run)
    lost.write_bytes(next(folder.glob("ema-00003-*")).read_bytes())
    with pytest.raises(UserError, match=r"damaged: .* is not whole"):
        openimp.load(run)
    lost.write_bytes(content)
    openimp.load(run)


def test_tensors_of_any_mesh_are_saved_once_and_loaded_into_any_other(tmp_path):
    """Replicas, shards in two dimensions, whole tensors that each process has, scalars, fewer rows than processes."""
    subprocess.run(torchrun(4, __file__, "meshes", tmp_path), check=True, timeout=300)
    expected = whole_tensors()
    assert same(read(tmp_path, "some"), expected)
    held = [load_file(file) for file in sorted(tmp_path.glob("some-*"))]
    assert len(held) == 4
    for name, tensor in expected.items():
        assert sum(some[name].numel() for some in held if name in some) == tensor.numel(), name


@pytest.mark.parametrize("harm", ["kill", "fill"])
def test_what_befalls_one_process_in_a_save_costs_that_checkpoint_alone(little_data, tmp_path, harm):
    """Killed, or with a full disk, in the middle of its parts of the second checkpoint."""
    run = tmp_path / "run"
    done = subprocess.run(torchrun(2, __file__, harm, little_data, run), capture_output=True, text=True, timeout=300)
    assert done.returncode
    (kept,) = checkpoints(run)
    assert kept.name == "step-00000002"
    verify(kept)
    folder = run / "checkpoints" / "step-00000004"
    if harm == "fill":
        # Counted, for the lines of two processes may run into one another.
        for told in (f"{folder}: could not be saved: ", "File too large", "; older checkpoints are untouched"):
            assert done.stdout.count(told) == 2, done.stdout + done.stderr
        assert not folder.with_name(".step-00000004.tmp").exists()
    else:
        assert folder.with_name(".step-00000004.tmp").exists()
    resumed = training_of(little_data, run, resume=True)
    assert resumed.step == 2
    resumed.update(resumed.data[2])
    resumed.save()
    resumed.saver.wait()
    assert [path.name for path in (run / "checkpoints").iterdir() if path != kept] == ["step-00000003"]


def test_a_checkpoint_is_damaged_without_its_manifests_lines_and_with_files_beyond(little_data, tmp_path):
    training = training_of(little_data, tmp_path / "run")
    training.update(training.data[0])
    training.save()
    training.checkpointing.wait()
    (folder,) = checkpoints(tmp_path / "run")
    verify(folder)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: damaged: is not in manifest\.json"):
        verify(folder)
    (folder / "manifest.json").write_text(manifest)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors: damaged: is not in manifest\.json"):
        verify(folder)


def test_an_older_checkpoint_that_cannot_be_removed_is_told(little_data, tmp_path, monkeypatch):
    """The new one is in place by then."""
    training, replace = training_of(little_data, tmp_path / "run", "train.keep_last=1"), os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).suffix == ".old":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    for step in range(2):
        training.update(training.data[step])
        training.save()
    with pytest.raises(NotSaved, match=r"-00000001: could not be removed: Permission denied; step-00000002 is saved"):
        training.checkpointing.wait()
    for folder in checkpoints(tmp_path / "run"):
        verify(folder)


def whole_tensors() -> dict[str, Tensor]:
    return {
        "sharded": torch.arange(30.0).view(10, 3),
        "few rows": torch.arange(2.0).view(2, 1),
        "one row": torch.ones(1),
        "replicated": torch.arange(12.0).view(4, 3),
        "both ways": torch.arange(56.0).view(8, 7),
        "twice": torch.arange(32.0).view(16, 2),
        "plain": torch.arange(5.0),
        "scalar": torch.tensor(7.0),
        "bf16": torch.arange(6.0).bfloat16(),
    }


def meshes(folder: Path) -> None:
    """Saves tensors in shards on meshes of one and two dimensions, and loads them into shards on others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    distributed.start()
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    row, column, all_of_it = Shard(0), Shard(1), Replicate()
    first = {
        "sharded": (line, [row]), "few rows": (line, [row]), "one row": (square, [all_of_it, row]),
        "replicated": (square, [all_of_it, row]), "both ways": (square, [row, column]), "twice": (square, [row, row]),
        "bf16": (line, [row]),
    }  # fmt: skip
    second = {
        "sharded": (square, [row, column]), "few rows": (square, [row, all_of_it]), "replicated": (line, [row]),
        "both ways": (square, [column, row]), "twice": (line, [all_of_it]), "plain": (line, [row]),
    }  # fmt: skip
    whole = whole_tensors()
    saved, target = (
        {
            name: distribute_tensor(fill(tensor), *where[name]) if name in where else fill(tensor)
            for name, tensor in whole.items()
        }
        for where, fill in ((first, torch.clone), (second, torch.zeros_like))
    )
    Snapshot(saved).save(folder, "some", distributed.own_group())
    distributed.wait()
    load(folder, "some", target)
    assert same({name: layout.whole(tensor) for name, tensor in target.items()}, whole)


def save(folder: Path, run: Path) -> None:
    """Goes on with a run, if there is one, by a step; else by three, of both tasks. Notes all tensors, whole."""
    training = training_of(folder, run, resume=run.exists())
    note(training, run / f"loaded {training.step}.safetensors")
    for step in range(training.step, training.step + 1 if training.step else 3):
        training.update(training.data[step])
    training.save()
    note(training, run / f"saved {training.step}.safetensors")
    training.checkpointing.wait()


def note(training: Trainer, file: Path) -> None:
    tensors = tensors_of(training)
    if distributed.rank() == 0:
        save_file(tensors, file)


def harmed(harm: str, folder: Path, run: Path) -> None:
    """Saves twice; in the second time something befalls the second process."""
    training = training_of(folder, run)
    for step in range(4):
        training.update(training.data[step])
        if step == 1:
            training.save()
            training.checkpointing.wait()
    if distributed.rank() == 1:
        if harm == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        else:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    training.save()
    try:
        training.checkpointing.wait()
    except NotSaved as error:
        print(error, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *paths = sys.argv[1:]
    if what in ("kill", "fill"):
        harmed(what, *map(Path, paths))
    else:
        {"save": save, "meshes": meshes}[what](*map(Path, paths))
    distributed.leave()
