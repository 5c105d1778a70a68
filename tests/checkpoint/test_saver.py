"""Saving in the background, on one and on several ranks: what is written, when, and what a failure costs.

torchrun runs this very file for the work of several ranks.
"""

import errno
import json
import os
import re
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import openimp
from openimp.checkpoint import dcp
from openimp.checkpoint.folder import checkpoints, optimizer_state, verify
from openimp.checkpoint.saver import CheckpointError
from openimp.parallel import distributed
from openimp.parallel.layout import full_tensor
from openimp.training.trainer import Trainer
from tests import processes
from tests.messages import refuses
from tests.processes import torchrun
from tests.ranks import COMMON
from tests.saved import assert_equal
from tests.trained import trainer_of

CHANGES = [*COMMON, "evaluation={}", "train.keep_last=2"]


def training_of(folder: Path, run: Path, *changes: str, resume: bool = False) -> Trainer:
    return trainer_of(folder, run, *CHANGES, *changes, resume=resume)


def save_after(training: Trainer, steps: int, wait: bool = True) -> None:
    """Makes some more steps, and saves a checkpoint."""
    for step in range(training.step, training.step + steps):
        training.make_step(training.batches[step])
    training.save()
    if wait:
        training.checkpointing.wait()


def tensors_of(training: Trainer) -> dict[str, Tensor]:
    """All tensors that a checkpoint has to hold, unsharded, by folder and name."""
    assert training.updater.ema
    training.confirm()
    kinds = {
        "model": training.model.state_dict(),
        "ema": training.updater.ema.weights,
        "optimizer": optimizer_state(training.model, training.updater.optimizers),
    }
    return {
        f"{kind} {name}": full_tensor(tensor).detach().clone()
        for kind, tensors in kinds.items()
        for name, tensor in tensors.items()
    }


def files_of(folder: Path) -> dict[str, Tensor]:
    return {
        f"{kind} {name}": tensor
        for kind in ("model", "ema", "optimizer")
        for name, tensor in dcp.read(folder / kind).items()
    }


class Disk(threading.Event):
    """A disk on which no checkpoint can be begun until the event is set, and which then may be full."""

    full = False


@pytest.fixture
def disk(monkeypatch) -> Disk:
    """Replaces the system's disk."""
    disk, mkdir = Disk(), Path.mkdir

    def slow(path: Path, *args: Any, **options: Any) -> None:
        if path.name.startswith(".step-"):
            assert disk.wait(60)
            if disk.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", slow)
    return disk


def test_training_continues_while_a_checkpoint_is_written(little_data, tmp_path, disk):
    """The checkpoint holds the tensors as they were when it was begun, although the next one uses the same memory."""
    run = tmp_path / "run"
    training = training_of(little_data, run)
    for step in range(3):
        training.make_step(training.batches[step])
    before = tensors_of(training)
    training.save()
    buffers = {kind: {**tensors} for kind, tensors in training.checkpointing.saver._buffers.items()}
    for step in range(3, 6):
        training.make_step(training.batches[step])
    training.confirm_and_gather_bad_examples()
    assert training.step == 6
    assert not checkpoints(run)
    after = tensors_of(training)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items() if name.endswith("norm.weight"))

    disk.set()
    training.save()
    training.checkpointing.wait()
    assert [path.name for path in checkpoints(run)] == ["step-00000003", "step-00000006"]
    for kind, tensors in buffers.items():  # The second save uses the memory of the first.
        assert all(training.checkpointing.saver._buffers[kind][name] is buffer for name, buffer in tensors.items())
    for folder, expected in zip(checkpoints(run), (before, after)):
        verify(folder)
        assert_equal(files_of(folder), expected)
        weights = load_file(folder / "model" / "model.safetensors")
        assert weights.keys() == training.model.state_dict().keys()


def test_a_failure_is_raised_by_the_next_save(little_data, tmp_path, disk):
    """It waits for the one before, so no second one is begun."""
    run = tmp_path / "run"
    training = training_of(little_data, run)
    save_after(training, 1, wait=False)
    training.make_step(training.batches[1])
    disk.full = True
    disk.set()
    told = r"step-00000001: could not be saved: .*No space left on device.*; older checkpoints are un"
    with pytest.raises(CheckpointError, match=told):
        training.save()
    assert not (run / "checkpoints").exists()
    disk.full = False
    training.save()
    training.checkpointing.wait()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_end_of_a_training_waits_for_its_checkpoint(little_data, tmp_path, disk):
    """The disk lets it be written only when the evaluation after the last step has ended."""
    run = tmp_path / "run"
    training = trainer_of(little_data, run, "train.steps=2")
    really_evaluate = training.evaluate

    def evaluate(*arguments, **options):
        really_evaluate(*arguments, **options)
        assert not checkpoints(run)
        disk.set()

    training.evaluate = evaluate
    assert training.train()
    verify(checkpoints(run)[-1])


@pytest.mark.slow
def test_a_checkpoint_of_several_ranks_loads_on_one_and_four(little_data, tmp_path):
    """Bit for bit, replicas and shards of experts too. Each number is saved once."""
    run = tmp_path / "run"
    experts = "parallel={shard_degree: 1, expert_degree: 2}"
    for ranks, step, layout in ((2, 3, "parallel={}"), (4, 4, experts)):
        processes.run(*torchrun(ranks, __file__, "save", little_data, run, layout), check=True)
        folder, expected = checkpoints(run)[-1], load_file(run / f"saved {step}.safetensors")
        assert folder.name == f"step-{step:08d}"
        shards = [load_file(file) for file in (folder / "model").iterdir()]
        assert len(shards) == ranks
        for name, tensor in dcp.read(folder / "model").items():
            assert sum(shard[name].numel() for shard in shards if name in shard) == tensor.numel(), name
        assert_equal(files_of(folder), expected)
        assert_equal(tensors_of(training_of(little_data, run, resume=True)), expected)
        assert openimp.load(run).encode_text(["a red square"]).isfinite().all()
    assert_equal(load_file(run / "loaded 3.safetensors"), load_file(run / "saved 3.safetensors"))

    for kind in ("ema", "optimizer"):
        for lost in sorted((folder / kind).iterdir()):
            moved = lost.rename(tmp_path / "lost")
            with refuses():
                verify(folder)
            if kind == "ema":
                with refuses():  # "damaged", or "does not fit the model"
                    openimp.load(run)
            moved.rename(lost)
    openimp.load(run)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["kill", "fill"])
def test_a_rank_that_fails_during_a_save_loses_only_that_checkpoint(little_data, tmp_path, harm):
    """It is killed, or its disk is full, while it writes its shards of the second checkpoint."""
    run = tmp_path / "run"
    done = processes.run(*torchrun(2, __file__, harm, little_data, run))
    assert done.returncode
    (kept,) = checkpoints(run)
    assert kept.name == "step-00000002"
    verify(kept)
    folder = run / "checkpoints" / "step-00000004"
    if harm == "fill":
        # Counted, because the lines of two ranks may run into one another.
        for told in (f"{folder}: could not be saved: ", "File too large", "; older checkpoints are untouched"):
            assert done.stdout.count(told) == 2, done.stdout + done.stderr
        assert not folder.with_name(".step-00000004.tmp").exists()
    else:
        assert folder.with_name(".step-00000004.tmp").exists()
    resumed = training_of(little_data, run, resume=True)
    assert resumed.step == 2
    save_after(resumed, 1)
    assert [path.name for path in (run / "checkpoints").iterdir() if path != kept] == ["step-00000003"]


def test_a_file_that_the_manifest_does_not_list_is_damage(little_data, tmp_path):
    training = training_of(little_data, tmp_path / "run")
    save_after(training, 1)
    (folder,) = checkpoints(tmp_path / "run")
    verify(folder)
    listed = folder / "manifest.json"
    manifest = listed.read_text()
    listed.write_text("{}")
    with refuses():
        verify(folder)
    listed.write_text(manifest)
    # A stranger's manifest opens no other file.
    listed.write_text(json.dumps({**json.loads(manifest), "/etc/passwd": {"size": 0, "sha256": ""}}))
    with refuses():
        verify(folder)
    listed.write_text(manifest)
    (folder / "model" / "more.safetensors").write_bytes(b"")
    with refuses():
        verify(folder)


def test_an_older_checkpoint_that_cannot_be_removed_is_told(little_data, tmp_path, monkeypatch, capsys):
    training, replace = training_of(little_data, tmp_path / "run", "train.keep_last=1"), os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).suffix == ".old":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    save_after(training, 1, wait=False)
    save_after(training, 1, wait=False)
    training.checkpointing.wait()
    told = r"step-00000002: is saved, but an older one could not be removed: .*Perm"
    assert re.search(told, capsys.readouterr().err)
    for folder in checkpoints(tmp_path / "run"):
        verify(folder)


def save(folder: Path, run: Path, layout: str) -> None:
    """Resumes a run, if there is one, for one step; otherwise trains three, of both tasks. Records all tensors."""
    training = training_of(folder, run, layout, resume=run.exists())
    record(training, run / f"loaded {training.step}.safetensors")
    save_after(training, 1 if training.step else 3, wait=False)
    record(training, run / f"saved {training.step}.safetensors")
    training.checkpointing.wait()


def record(training: Trainer, file: Path) -> None:
    tensors = tensors_of(training)
    if distributed.rank() == 0:
        save_file(tensors, file)


def harmed(harm: str, folder: Path, run: Path) -> None:
    """Saves twice. The second time, rank 1 fails."""
    training = training_of(folder, run)
    save_after(training, 2)
    for step in (2, 3):
        training.make_step(training.batches[step])
    if distributed.rank() == 1:
        if harm == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        else:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    training.save()
    try:
        training.checkpointing.wait()
    except CheckpointError as error:
        print(error, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, data, directory, *layout = sys.argv[1:]
    if what == "save":
        save(Path(data), Path(directory), *layout)
    else:
        harmed(what, Path(data), Path(directory))
    distributed.shut_down()
