"""Going on with a run: from which checkpoint, and whether recipe, loop and data are those that it was made with."""

from collections.abc import Mapping
from pathlib import Path

from openimp.checkpoint.folder import CHECKPOINTS, checkpoints, read_config, read_state, step_of, verify
from openimp.common.errors import UserError
from openimp.common.progress import console
from openimp.parallel.distributed import alone
from openimp.recipe.file import flat
from openimp.recipe.schema import Recipe

FREE = {"train.num_workers", "train.prefetch_factor", "train.log_every", "train.save_every", "train.keep_last",
        "train.max_bad_fraction", "memory.chunk_size", "memory.activation_checkpointing"}  # fmt: skip
"""Keys that change nothing of what a resumed run computes, like all of `evaluation` and `parallel`."""


def resumable(recipe: Recipe, run: Path, trainer: str) -> Path:
    """The newest intact checkpoint of a run, of this very recipe and trainer.

    Raises:
        UserError: there is none.
    """
    folder = _newest_intact(run)
    made_by = read_state(folder)["trainer"]
    if made_by != trainer:
        raise UserError(
            f"{folder}: saved by {made_by}, but {trainer} is to resume it; a run of a study is resumed by its study"
        )
    before, _, _ = read_config(folder, None)
    ours, theirs = flat(recipe.to_dict()), flat(before.to_dict())
    for key in sorted(ours.keys() | theirs.keys()):
        free = key in FREE or key.startswith(("evaluation.", "parallel."))
        # Data may move: what is in it is compared, not where it is.
        free = free or (key.startswith("sources.") and key.endswith((".path", ".root")))
        if not free and ours.get(key) != theirs.get(key):
            was, now = theirs.get(key), ours.get(key)
            raise UserError(
                f"{folder}: made by another recipe: {key} is {was!r} there, {now!r} here; what --set changed then has "
                "to be given again"
            )
    return folder


def changed_sources(folder: Path, sources: Mapping[str, str], allowed: bool) -> list[str]:
    """The sources whose data is not what it was when a checkpoint was made.

    Args:
        folder: the checkpoint.
        sources: what each source holds now, by `StepBatches.fingerprints`.
        allowed: tell of them only.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    before = read_state(folder)["sources"]
    changed = [name for name, now in sources.items() if before.get(name) != now]
    if changed:
        told = f"{folder}: source {', '.join(changed)} has changed since it was saved"
        if not allowed:
            raise UserError(f"{told}; bring back the data, or go on with --allow-changed-data")
        console.print(f"{told}; going on with the data as it is now", soft_wrap=True)
    return changed


def common_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that the first process sees, oldest first: on a network's disk the others may see less
    for a while, and all must go on from the same one."""
    names = alone(lambda: [folder.name for folder in checkpoints(run)])
    return [run / CHECKPOINTS / name for name in names]


def _newest_intact(run: Path) -> Path:
    found = common_checkpoints(run)
    damage: list[str] = []
    for folder in reversed(found):
        try:
            verify(folder)
        except UserError as error:
            damage.append(str(error))
            continue
        for told in damage:
            lost = f"going on from step {step_of(folder)}, {step_of(found[-1]) - step_of(folder)} steps are lost"
            console.print(f"{told}; {lost}", soft_wrap=True)
        return folder
    raise UserError(f"{run}: no checkpoint to resume from{''.join(f'; {told}' for told in damage)}")
