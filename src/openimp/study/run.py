"""Studies: the same recipe in several variants and seeds, at equal FLOPs, with a table and a plot at the end.

A study is a YAML file of `studies/`. Each arm is the study's recipe with some keys changed, or several such parts that
share the arm's FLOPs, each a model of its own. What is trained already is not trained again.
"""

import os
import shlex
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from openimp.checkpoint.folder import checkpoints, read_state
from openimp.checkpoint.resume import FREE
from openimp.common.errors import UserError, nearest
from openimp.common.progress import console
from openimp.evaluation.clip_benchmark import clip_benchmark_recalls, require_pictures_and_texts
from openimp.inference.model import load
from openimp.recipe.evaluation import Retrieval
from openimp.recipe.file import flat
from openimp.recipe.schema import Recipe
from openimp.study.budget import part_recipe
from openimp.study.outcome import Outcome, lines_of
from openimp.study.schema import Part, Study, read_study
from openimp.study.training import ConflictTrainer, SummedTrainer, peak_memory
from openimp.study.two_towers import TwoTowerTrainer, load_two_towers
from openimp.training.trainer import Trainer, train


def run_study(name: str, runs: Path, out: Path, smoke: bool = False) -> bool:
    """Trains what is not trained yet, and writes NAME.md and its pictures into `out`; False if it was stopped before.

    Args:
        name: a study's file, or the name of one that comes with openimp.
        runs: where the trainings are kept, in a folder for each study.
        out: where the results are written.
        smoke: a small part of the FLOPs and of the data and one seed, to see that all of it works.

    Raises:
        UserError: no such study, an invalid one, no folder for the results, or what stops a training.
    """
    if "RANK" in os.environ:
        raise UserError(f"{name}: a study trains in one process; start it without torchrun")
    # Here, so that a missing matplotlib is told before hours of training.
    from openimp.study.results import write_results

    study, title = read_study(name, smoke)
    plan = [(seed, arm, i) for seed in study.seeds for arm, parts in study.arms.items() for i in range(len(parts))]
    recipes = {}
    for seed, arm, i in plan:  # All of them first, so that a mistake in the last arm is told at once.
        try:
            recipes[seed, arm, i] = part_recipe(study, study.arms[arm][i], seed, smoke)
        except UserError as error:
            raise UserError(f"{name}: arm {arm!r}: {error}") from None
    _check_figures(study, name, recipes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: --out needs a folder, and none can be made there: {error.strerror}") from None
    found: dict[str, dict[int, Outcome]] = {arm: {seed: Outcome() for seed in study.seeds} for arm in study.arms}
    for done, (seed, arm, i) in enumerate(plan):
        recipe, kind = recipes[seed, arm, i], _kind(study, study.arms[arm][i])
        run = runs / title / f"{arm}-{i}-seed{seed}".replace(" ", "_")
        console.print(f"\n{title}, training {done + 1} of {len(plan)}: {arm}, seed {seed}", style="bold")
        if not _finished(run, recipe, kind.__name__):
            if (run / "recipe.yaml").exists() and not checkpoints(run):  # Stopped before it saved anything.
                shutil.rmtree(run)
            if not train(recipe, run, bool(checkpoints(run)), kind):
                return False
        model = load_two_towers(run) if study.arms[arm][i].two_towers else load(run)
        found[arm][seed].add(run, sum(parameter.numel() for parameter in model.parameters()))
        for measured in study.clip_benchmark:
            if measured in recipe.evaluation.sets:
                recalls = clip_benchmark_recalls(model, recipe, measured)
                found[arm][seed].judged.update({(measured, figure): value for figure, value in recalls.items()})
        if seed == study.seeds[0]:
            with TemporaryDirectory() as folder, console.capture():
                found[arm][seed].count_memory(peak_memory(recipe, Path(folder), kind))
    command = f"openimp study {shlex.quote(name)}{' --smoke' if smoke else ''}"
    write_results(study, {arm: list(by_seed.values()) for arm, by_seed in found.items()}, out, title, command)
    console.print(f"\nwritten: {out / title}.md", soft_wrap=True)
    return True


def _kind(study: Study, part: Part) -> type[Trainer]:
    if part.two_towers:
        return TwoTowerTrainer
    if part.summed:
        return SummedTrainer
    return ConflictTrainer if study.conflict else Trainer


def _check_figures(study: Study, name: str, recipes: Mapping[tuple[int, str, int], Recipe]) -> None:
    """Tells before anything is trained what would be missed once all is."""
    sets: dict[str, set[str]] = {arm: set() for arm in study.arms}
    for (seed, arm, _), recipe in recipes.items():
        if seed != study.seeds[0]:
            continue
        own = {title for title, options in recipe.evaluation.sets.items() if isinstance(options, Retrieval)}
        if twice := own & sets[arm]:
            raise UserError(f"{name}: arm {arm!r}: two of its models measure {min(twice)}; one figure would be lost")
        sets[arm] |= own
        for title in own & set(study.clip_benchmark):
            require_pictures_and_texts(recipe, title)
    complete = max(sets.values(), key=len)
    if not complete:
        raise UserError(f"{name}: recipe {study.recipe} has no evaluation set of type retrieval, by which arms compare")
    if not all(known <= complete for known in sets.values()):
        raise UserError(f"{name}: no arm has all evaluation sets, so no mean can be compared")
    for title in study.clip_benchmark:
        if title not in complete:
            raise UserError(f"{name}: clip_benchmark: no retrieval set is called {title!r}{nearest(title, complete)}")
    if study.clip_benchmark and find_spec("clip_benchmark") is None:
        raise UserError("CLIP_benchmark is not installed: pip install 'openimp[peers]'")


def _finished(run: Path, recipe: Recipe, trainer: str) -> bool:
    """Whether this very recipe was trained here to the end, which is its results, by this trainer.

    Raises:
        UserError: the run is of another: the study was changed, and its old figures may not pass as new ones; or its
            results are damaged.
    """
    if not (run / "results.jsonl").exists():
        return False
    before, now = (flat(r.to_dict()) for r in (Recipe.load(str(run / "recipe.yaml")), recipe))
    for key in sorted((before.keys() | now.keys()) - FREE):
        if before.get(key) != now.get(key):
            was, wanted = before.get(key), now.get(key)
            raise UserError(f"{run}: trained with {key} {was!r}, now {wanted!r}; remove the folder to train it again")
    made_by = read_state(checkpoints(run)[-1])["trainer"] if checkpoints(run) else trainer
    if made_by != trainer:
        raise UserError(f"{run}: trained by {made_by}, now by {trainer}; remove the folder to train it again")
    return any(line["step"] == recipe.train.steps for line in lines_of(run, "results.jsonl", "step"))
