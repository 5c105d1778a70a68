"""Saving in the background: training continues while a checkpoint is written."""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from openimp.checkpoint import dcp
from openimp.checkpoint.folder import (
    BEST,
    CHECKPOINTS,
    MANIFEST,
    checkpoint_folder,
    checkpoints,
    manifest_entry,
    replaced_folder,
    step_of,
)
from openimp.common.errors import UserError
from openimp.common.progress import notice
from openimp.common.safe_files import sync
from openimp.parallel import distributed


class CheckpointError(UserError):
    """A checkpoint could not be written."""


class Saver:
    """Writes the checkpoints of a run, one at a time, together with the savers of all other ranks.

    Each rank writes its shards into a draft folder. When all have, rank 0 writes the manifest, renames the draft, and
    removes all checkpoints except the last `keep` and the best. A thread does this, and its collectives have a
    process group of their own, so they cannot mix with those of the training steps.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run = run
        self.keep = keep
        # A long timeout, because disks may be slow. The group uses gloo, which notices a dead rank at once.
        self.group = distributed.new_group(distributed.LONG_TIMEOUT)
        # At exit Python waits for the thread, so an error elsewhere costs no checkpoint.
        self._thread = ThreadPoolExecutor(1, "saver")
        self._saving: Future[None] | None = None
        # CPU copies of the tensors, by part (model, optimizer or ema) and name. Each checkpoint overwrites them.
        self._buffers: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)

    def start(self, step: int, text_files: Mapping[str, str], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Waits for the previous checkpoint, copies the tensors to CPU memory, and lets the thread write them.

        `text_files` has the content of each text file by file name; rank 0 writes them. The tensors are by part and
        name, as in `_buffers`.
        CheckpointError if the previous checkpoint could not be written.
        """
        self.wait()
        copies = {}
        for part, tensors_of_part in tensors.items():
            copies[part] = dcp.stage(tensors_of_part, self._buffers[part])
        self._saving = self._thread.submit(self._save, checkpoint_folder(self.run, step), text_files, copies)

    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Returns when no checkpoint is being written. If one rank could not write, all raise CheckpointError."""
        saving = self._saving
        self._saving = None
        if saving is not None:
            saving.result()

    def _save(self, folder: Path, text_files: Mapping[str, str], copies: Mapping[str, Mapping[str, Tensor]]) -> None:
        draft = folder.with_name(f".{folder.name}.tmp")
        is_rank_zero = distributed.rank() == 0

        def on_rank_zero(work: Callable[[], None]) -> None:
            """Runs `work` on rank 0. If it fails, all ranks raise.

            Not `distributed.run_on_rank_zero`: it enters `distributed.alone()`, which is global, so the training thread
            would take its rank for the only one.
            """
            distributed.run_on_all_ranks(lambda: work() if is_rank_zero else None, self.group)

        def write_shards() -> dict[str, Any]:
            """Writes and syncs the files of this rank, and returns their manifest entries."""
            files = []
            for part, tensors in copies.items():
                files += dcp.save(draft / part, tensors, self.group)
            if is_rank_zero:
                files += [draft / name for name in text_files]
            for file in files:
                sync(file)
            return {file.relative_to(draft).as_posix(): manifest_entry(file) for file in files}

        try:
            on_rank_zero(lambda: _begin(draft, text_files))
            manifest: dict[str, Any] = {}
            # `run_on_all_ranks` returns the results of all ranks. If one rank fails, it raises on all of them.
            for entries_of_rank in distributed.run_on_all_ranks(write_shards, self.group):
                manifest |= entries_of_rank
            on_rank_zero(lambda: _publish(draft, folder, manifest))
        except (UserError, OSError) as error:
            if is_rank_zero:  # No rank writes to the draft anymore.
                shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(f"{folder}: could not be saved: {error}; older checkpoints are untouched") from None
        if is_rank_zero:
            try:
                _remove_others(folder, self.keep)
            except OSError as error:  # For example, another process has one of its files open.
                notice(f"{folder}: is saved, but an older one could not be removed: {error}")


def _begin(draft: Path, text_files: Mapping[str, str]) -> None:
    remove_leftovers(draft.parents[1])  # Also of a save of this process that failed.
    draft.mkdir(parents=True)
    for name, text in text_files.items():
        (draft / name).write_text(text, encoding="utf-8")


def remove_leftovers(run: Path) -> None:
    """Cleans up after a process that was killed: removes drafts (.tmp) and half-removed checkpoints (.old), and gives
    a checkpoint that was being replaced its name back."""
    for leftover in (run / CHECKPOINTS).glob(".step-*"):
        if leftover not in checkpoints(run):
            shutil.rmtree(leftover, ignore_errors=True)  # One that stays is harmless.
        else:
            os.replace(leftover, checkpoint_folder(run, step_of(leftover)))


def _publish(draft: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    run = folder.parents[1]  # `folder` is RUN/checkpoints/step-...
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    # All other files are synced already.
    for path in (draft / MANIFEST, *filter(Path.is_dir, draft.iterdir()), draft):
        sync(path)
    # After a power failure, the run's logs must not be older than its checkpoint.
    for log in run.glob("*.jsonl"):
        sync(log)
    # The folder exists in two cases: this step's checkpoint was damaged, and the run resumed from an earlier one; or
    # the run resumed from this checkpoint with a changed recipe, and saves the step again. It may be the only one, and
    # no portable call puts a folder into the place of another, so `checkpoints` finds it under its new name.
    replaced = replaced_folder(folder)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(draft, folder)
    sync(folder.parent)
    sync(run)
    shutil.rmtree(replaced, ignore_errors=True)  # `remove_leftovers` tries again.


def _remove_others(folder: Path, keep: int) -> None:
    """Removes all checkpoints but `folder`, the `keep` - 1 before it, and the best one if that is not later."""
    run = folder.parents[1]  # `folder` is RUN/checkpoints/step-...
    link = folder.parent / BEST
    if link.is_dir() and not link.is_symlink():
        # The run was copied by a program that follows links. Which checkpoint is best is unknown until `mark_best`
        # makes the link again.
        return
    saved = checkpoints(run)
    best = link.resolve().name
    # Later checkpoints are damaged; otherwise the run would have resumed from them. They must not stay the newest.
    up_to_this = [path for path in saved if step_of(path) <= step_of(folder)]
    kept = {path for path in up_to_this if path.name == best} | set(up_to_this[-keep:])
    for path in saved:
        if path not in kept:
            removed = path.with_name(f".{path.name}.old")  # So that a crash leaves no half of it.
            os.replace(path, removed)
            shutil.rmtree(removed)
