"""`openimp eval`: measures a named model on evaluation sets of its own or another recipe."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from openimp.checkpoint.find import model_name
from openimp.checkpoint.folder import load_model, saved_step
from openimp.common.device import pick_device
from openimp.common.errors import UserError
from openimp.common.progress import Progress
from openimp.data.trust import check_sources, trained_here
from openimp.encoding.find import find_model
from openimp.evaluation.evaluate import check_names
from openimp.evaluation.evaluate import evaluate as evaluate_sets
from openimp.recipe.file import override, read_recipe
from openimp.recipe.model_config import class_for
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe


def evaluate(
    model: str | Path,
    sets: str | Iterable[str] | None = None,
    recipe: str | Path | None = None,
    overrides: Iterable[str] = (),
    allow_sources: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measures a model on evaluation sets, as `openimp eval` does.

    Args:
        model: a run, a checkpoint, a model folder, or the name of a model, as `openimp.load` takes it.
        sets: the name of an evaluation set, or several. None: all of them.
        recipe: the recipe that has the evaluation sets and their sources. None: the recipe of the model's training.
        overrides: changes of sources and evaluation sets, as `--set` takes them: `["sources.photos.limit=100"]`.
        allow_sources: whether the recipe of a model that was not trained here may read any source.
        progress: `progress(iterable, description)` wraps an iterable to show its progress.

    Returns:
        A dict of JSON values for each direction of a retrieval set, each classifier of a probe, and each other set
        (docs/metrics.md).

    Raises:
        UserError: there is no such model or evaluation set, the recipe has no evaluation sets, or a set has an
            untrained modality.
        NotMeasured: a set cannot be measured; its `results` are the results of the other sets.
    """
    name = Path(model_name(model)).expanduser()
    if not isinstance(recipe, str | Path | None):
        raise UserError(f"recipe: expected a file or the name of a recipe, found {type(recipe).__name__}")
    folder = find_model(name)
    imp, (config, modalities, saved_recipe) = load_model(folder)
    evaluated_recipe = own_recipe = saved_recipe.validated()
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    if sets is not None:
        sets = [sets] if isinstance(sets, str) else list(sets)
    user_sources: Collection[str] = ()  # names of sources whose path the user gave
    if recipe or overrides:
        evaluated_recipe, user_sources = _with_sets(evaluated_recipe, str(recipe) if recipe else None, overrides, sets)
    if not evaluated_recipe.evaluation.sets:
        hint = "; name a recipe that has some with --recipe" if recipe is None else ""
        raise UserError(f"{recipe or model}: the recipe has no evaluation sets{hint}")
    if not allow_sources:
        check_sources(name, folder, evaluated_recipe, sets or evaluated_recipe.evaluation.sets, user_sources)
    imp = imp.to(pick_device())
    step = saved_step(folder)
    results = evaluate_sets(
        imp,
        evaluated_recipe,
        modalities,
        sets,
        step=step,
        progress=progress,
        classes=config.classes,
        training_sources=own_recipe.training_sources,
    )
    if trained_here(folder):
        return results
    # The sources of a model from elsewhere may have been on another machine, in other folders.
    return [{key: value for key, value in line.items() if key != "trained" or value} for line in results]


def _with_sets(
    recipe: Recipe, other: str | None, overrides: list[str], names: list[str] | None
) -> tuple[Recipe, Collection[str]]:
    """The recipe to evaluate: the model's, with the overrides or with the sources and sets of the recipe `other`, to
    which the overrides then apply. `names` are the sets to keep; None: all.

    Also returns the names of the sources that `other` defines, or that the overrides move.
    """
    for text in overrides:
        if not text.startswith(("sources.", "evaluation.")):
            raise UserError(f"--set {text}: a trained model allows changes of sources and evaluation only")
    ours = recipe.to_dict()
    if other is None:
        for text in overrides:
            override(ours, text)
        evaluated_recipe = _build(ours, names)
        changed_keys = {text.partition("=")[0].strip() for text in overrides}
        moved = [
            name
            for name, source in evaluated_recipe.sources.items()
            if f"sources.{name}" in changed_keys
            or (
                f"sources.{name}.path" in changed_keys
                and (source.root is None or f"sources.{name}.root" in changed_keys)
            )
        ]
        return evaluated_recipe, moved
    theirs, file = read_recipe(other, overrides, Path.cwd())
    # The model's own sources are kept, because its tasks name them.
    user_sources = theirs.get("sources") or {}
    sources = ours["sources"] | user_sources if isinstance(user_sources, dict) else user_sources
    evaluation = theirs.get("evaluation") or {}
    _drop_sizes(recipe, evaluation)
    # `build` refuses unknown keys of `theirs`.
    data = {**theirs, **ours, "sources": sources, "evaluation": evaluation}
    return _build(data, names, file.resolve().parent, other), user_sources


def _build(
    data: dict[str, Any], names: list[str] | None, folder: str | Path = ".", error_prefix: str = "recipe"
) -> Recipe:
    """The recipe with the sets in `names`; None: all. `Recipe.build` explains the other arguments."""
    evaluation = data["evaluation"]
    known = _mapping(evaluation, "sets")
    if names is not None and known:
        check_names(names, known)
        # `best` is for training, and may name a set that is not chosen.
        evaluation = {**evaluation, "best": None, "sets": {name: known[name] for name in names}}
    return Recipe.build({**data, "evaluation": evaluation}, folder, error_prefix)


def _drop_sizes(recipe: Recipe, evaluation: Any) -> None:
    """Removes from views what a tower decides itself, such as the size of pictures."""
    for options in _mapping(evaluation, "sets").values():
        view = _mapping(options, "view")
        for name in recipe.modality_names:
            fields = class_for(name, recipe.modalities).View.model_fields
            decided = modality_class(name).View.model_fields.keys() - fields
            for key in decided & _mapping(view, name).keys():
                del view[name][key]


def _mapping(data: Any, key: str) -> dict[str, Any]:
    """The mapping under a key of data that were not checked yet; empty if there is none."""
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}
