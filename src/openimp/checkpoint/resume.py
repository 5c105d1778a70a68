"""Resuming a run: the choice of the checkpoint, and checks that recipe, trainer and data are still the same."""

from collections.abc import Mapping
from pathlib import Path

from openimp.checkpoint.folder import CHECKPOINTS, checkpoints, read_config, read_state, step_of, verify
from openimp.common.errors import UserError, counted
from openimp.common.names import has_scheme
from openimp.common.progress import console
from openimp.parallel.distributed import run_on_rank_zero
from openimp.recipe.file import differences
from openimp.recipe.schema import Recipe

FREE = {
    "train.num_workers",
    "train.prefetch_factor",
    "train.log_every",
    "train.loggers",
    "train.save_every",
    "train.keep_last",
    "train.max_bad_fraction",
    "memory.chunk_size",
    "memory.activation_checkpointing",
}
"""Keys that may change when a run is resumed, in addition to `parallel` and those of `only_evaluates`."""


ONLY_AT_START = {"train.init", "modalities.text.tokenizer"}
"""Keys with paths that a resumed run does not open. The files may have moved, but not been renamed."""


def only_evaluates(key: str, recipe: Recipe) -> bool:
    """Whether a key changes nothing but evaluation: it is in `evaluation`, or in a source that no task reads."""
    trained_sources = tuple(f"sources.{task.source}." for task in recipe.tasks.values())
    return key.startswith("evaluation.") or (key.startswith("sources.") and not key.startswith(trained_sources))


def require_same_run(folder: Path, recipe: Recipe, trainer: str, allow_changed_data: bool) -> None:
    """Raises UserError if another recipe or trainer saved the checkpoint, and names the difference.

    With `allow_changed_data`, the lanes of a stream may change, because new shards may need another number of them.
    """
    _, _, saved_recipe = read_config(folder, any_class=True)  # Before `read_state`, because it refuses other formats.
    saved_by = read_state(folder)["trainer"]
    if saved_by != trainer:
        raise UserError(
            f"{folder}: saved by {saved_by}, but {trainer} is to resume it; a run of a study is resumed by its study"
        )
    for key, theirs, ours in differences(saved_recipe.validated().to_dict(), recipe.to_dict()):
        # Data may have moved. `changed_sources` compares its content instead of its path.
        is_location = key.startswith("sources.") and key.endswith((".path", ".root", ".license"))
        if key in ONLY_AT_START and isinstance(theirs, str) and isinstance(ours, str):
            is_moved = not (has_scheme(theirs) or has_scheme(ours) or Path(theirs).exists())
            is_location = is_moved and Path(theirs).name == Path(ours).name
        is_free = any(key == free_key or key.startswith(f"{free_key}.") for free_key in FREE)  # Loggers are a list.
        is_free |= allow_changed_data and key.startswith("sources.") and key.endswith(".lanes")
        if not (is_location or is_free or key.startswith("parallel.") or only_evaluates(key, recipe)):
            advice = "change it back, or use a new directory"
            if key == "train.steps" and ours > theirs:
                advice = (
                    "a run cannot be made longer: change it back, or use a new directory, where train.init can start "
                    "from this run's weights"
                )
            raise UserError(f"{folder}: made by another recipe: {key} is {theirs!r} there, {ours!r} here; {advice}")


def changed_sources(folder: Path, sources: Mapping[str, str], allowed: bool) -> list[str]:
    """Prints and returns the names of sources with other data than when a checkpoint was saved.

    `sources` are the present `TaskData.fingerprints`. Unless changes are `allowed`, they are a UserError.
    """
    saved_fingerprints = read_state(folder)["sources"]
    changed = [name for name, fingerprint in sources.items() if saved_fingerprints.get(name) != fingerprint]
    if changed:
        message = f"{folder}: source {', '.join(changed)} has changed since it was saved"
        if not allowed:
            raise UserError(f"{message}; restore the data, or resume with --allow-changed-data")
        console.print(f"{message}; resuming with the data as it is now", soft_wrap=True)
    return changed


def common_checkpoints(run: Path) -> list[Path]:
    """The checkpoints that rank 0 sees, oldest first.

    On a network file system, other ranks may see fewer for a while, but all ranks must resume from the same one.
    """
    names = run_on_rank_zero(lambda: [folder.name for folder in checkpoints(run)])
    return [run / CHECKPOINTS / name for name in names]


def newest_intact(run: Path) -> Path:
    """The newest intact checkpoint of a run; without one, a UserError."""
    saved = common_checkpoints(run)
    damage = []
    for folder in reversed(saved):
        try:
            verify(folder)
        except UserError as error:
            damage.append(str(error))
            continue
        step = step_of(folder)
        lost = counted(step_of(saved[-1]) - step, "step")
        for message in damage:
            console.print(f"{message}; resuming from step {step}, which loses {lost}", soft_wrap=True)
        return folder
    reasons = damage or ["--resume auto starts a run that has made no step yet"]
    raise UserError(f"{run}: no checkpoint to resume from; {'; '.join(reasons)}")
