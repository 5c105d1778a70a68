"""Saving in the background: the steps go on while a checkpoint is written."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from openimp.checkpoint.folder import BEST, MANIFEST, checkpoints, facts_of, folder_of
from openimp.common.errors import UserError
from openimp.common.safe_files import sync
from openimp.parallel import distributed, layout

if TYPE_CHECKING:
    from openimp.checkpoint.dcp import Snapshot

T = TypeVar("T")


class NotSaved(UserError):
    """A checkpoint could not be written, for the disk is full or broken, or none of the older ones removed for it."""


class Saver:
    """Writes the checkpoints of a run, one at a time, together with the savers of all other processes.

    Each process writes its own parts into a draft beside the others' place. When all have, the first one writes the
    manifest, moves the draft into place, and removes all but the last `keep` checkpoints up to it and the one that is
    marked as the best. A thread does it, whose messages to the other processes are in a group of its own.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.group = distributed.own_group(distributed.WAIT)  # Disks may be slow; a death is known at once.
        # At the end of the program Python waits for its thread, so an error elsewhere costs no checkpoint.
        self._thread = ThreadPoolExecutor(1, "saver")
        self._saving: Future[None] | None = None

    def start(
        self,
        step: int,
        texts: Mapping[str, str],
        tensors: Mapping[str, Mapping[str, Tensor]],
        only_here: Collection[str] = (),
    ) -> None:
        """Copies the tensors to the CPU's memory, once the checkpoint before is in place, and leaves the rest to the
        thread.

        Args:
            step: after which this is.
            texts: what the first process writes, by file name.
            tensors: whole or sharded ones, by the name of their file.
            only_here: names of whole ones that no other process has; others all have alike.

        Raises:
            NotSaved: the one before could not be written.
        """
        from openimp.checkpoint.dcp import Snapshot

        self.wait()
        first = distributed.rank() == 0
        # What all processes have alike, the first one writes; the others need not copy it.
        own = (
            {key: x for key, x in some.items() if first or key in only_here or layout.is_part(x)}
            for some in tensors.values()
        )
        copies = {name: Snapshot(some) for name, some in zip(tensors, own)}
        self._saving = self._thread.submit(self._save, folder_of(self.run, step), texts, copies)

    def failed(self) -> bool:
        """Whether the checkpoint that was begun last could not be written, as far as this is known already."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Goes on when no checkpoint is being written.

        Raises:
            NotSaved: in all processes, if one of them could not write its parts. Nothing of the checkpoint is left.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _save(self, folder: Path, texts: Mapping[str, str], copies: "Mapping[str, Snapshot]") -> None:
        draft = folder.with_name(f".{folder.name}.tmp")
        first = distributed.rank() == 0

        def write() -> dict[str, Any]:
            files = [copy.save(draft, name, self.group) for name, copy in copies.items()]
            files += [draft / name for name in texts] if first else []
            for file in files:
                sync(file)
            return {file.name: facts_of(file) for file in files}

        try:
            self._together(folder, lambda: _begin(draft, texts) if first else None)
            facts = self._together(folder, write)
            manifest = {name: fact for some in facts for name, fact in some.items()}
            self._together(folder, lambda: _place(draft, folder, manifest) if first else None)
        except NotSaved:
            if first:  # By now nobody writes there.
                shutil.rmtree(draft, ignore_errors=True)
            raise
        self._together(folder, lambda: _remove_older(folder, self.keep) if first else None)

    def _together(self, folder: Path, work: Callable[[], T]) -> list[T]:
        def told() -> T:
            try:
                return work()
            except OSError as error:
                raise NotSaved(
                    f"{folder}: could not be saved: {_reason(error)}; older checkpoints are untouched"
                ) from None

        try:
            return distributed.agreed(told, self.group)
        except UserError as error:
            raise NotSaved(str(error)) from error


def _begin(draft: Path, texts: Mapping[str, str]) -> None:
    for left in draft.parent.glob(".step-*"):  # by a crash
        shutil.rmtree(left)
    draft.mkdir(parents=True)
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")


def _place(draft: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    sync(draft / MANIFEST)
    sync(draft)
    if folder.exists():  # Damaged, or the run would have gone on from it.
        _remove(folder)
    # What the run wrote down before this must not be younger than its checkpoint, if the power fails.
    for written in folder.parents[1].glob("*.jsonl"):
        sync(written)
    os.replace(draft, folder)
    sync(folder.parent)
    sync(folder.parents[1])


def _remove_older(folder: Path, keep: int) -> None:
    # One of a later step is damaged, or the run would have gone on from it. Left there, it would pass for the newest.
    found, best = checkpoints(folder.parents[1]), (folder.parent / BEST).resolve().name
    earlier = [path for path in found if path <= folder]
    kept = {*earlier[-keep:], *(path for path in earlier if path.name == best)}
    for other in found:
        if other not in kept:
            try:
                _remove(other)
            except OSError as error:
                raise NotSaved(f"{other}: could not be removed: {_reason(error)}; {folder.name} is saved") from None


def _remove(folder: Path) -> None:
    """Moved aside first: a crash may not leave half of it in its place."""
    aside = folder.with_name(f".{folder.name}.old")
    os.replace(folder, aside)
    shutil.rmtree(aside)


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split())
