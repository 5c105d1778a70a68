"""The recipe: one YAML file that describes an experiment completely.

Options of a single modality, such as the size of pictures, are declared in the modality's `Config` and `View`.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from openimp.common.errors import UserError, nearest
from openimp.common.modality import Modality
from openimp.common.schema import FolderName, Strict, Whole, checked, unknown_key
from openimp.recipe.evaluation import ClassHead, Evaluation, EvaluationSet, Probe, Retrieval, ZeroShot
from openimp.recipe.file import read_recipe
from openimp.recipe.inputs import View
from openimp.recipe.model import BATCH_ROUTINGS, Model
from openimp.recipe.registry import modality_class
from openimp.recipe.tasks import Classification, Distill, Source, Task, check_objectives, target_of
from openimp.recipe.training import Alternation, Memory, Optimizer, Parallel, Train


class Recipe(Strict):
    """The complete description of an experiment."""

    renamed = {"batch": "memory"}

    name: FolderName
    """The name of the experiment. By default, the run directory is runs/NAME."""
    seed: Whole = 0
    """Seed of the initial weights, the order of tasks and examples, and the augmentation."""
    model: Model = Model()
    """The shared encoder and its embedding space."""
    modalities: dict[str, Any] = {}
    """Options of each stem. The stem `vision` is for images and videos."""
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    """Data sources by name."""
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    """Training tasks by name."""
    alternation: Alternation = Alternation()
    """The order in which tasks are visited."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and learning rate schedule."""
    memory: Memory = Memory()
    """Options for batches that do not fit into memory."""
    parallel: Parallel = Parallel()
    """How the model is distributed over several ranks."""
    train: Train = Train()
    """The training loop: steps, precision, workers, logs and checkpoints."""
    evaluation: Evaluation = Evaluation()
    """Evaluation sets, and when they are evaluated."""

    @property
    def modality_names(self) -> list[str]:
        """The modalities that tasks read, in the order of first use."""
        return list(dict.fromkeys(name for task in self.tasks.values() for name in task.inputs))

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = (), folder: Path | None = None) -> "Recipe":
        """Reads and checks a recipe: a YAML file, or the name of a recipe that comes with openimp.

        Overrides are changes such as `train.steps=100`. Relative paths in them start at `folder`; None: at the recipe's
        folder, as in the recipe itself.
        """
        data, file = read_recipe(str(path), overrides, folder)
        return cls.build(data, file.resolve().parent, str(file))

    @classmethod
    def build(cls, data: Mapping[str, Any], folder: str | Path = ".", where: str = "recipe") -> "Recipe":
        """Validates plain data. Its paths are relative to `folder`, and `where` names it in messages."""
        recipe = checked(cls, data, where, folder)
        recipe._bind(where, folder)
        return recipe

    def _bind(self, where: str, folder: str | Path) -> None:
        """Checks that the parts of the recipe fit together, and validates the options of modalities."""
        if not any(task.weight for task in self.tasks.values()):
            raise UserError(f"{where}: every task has weight 0; nothing would be trained")
        if self.memory.chunk_size and self.model.moe and self.model.moe.routing in BATCH_ROUTINGS:
            raise UserError(
                f"{where}: memory.chunk_size: routing {self.model.moe.routing} looks at the whole batch at once; "
                "expert_choice does not"
            )
        if self.model.wrap and self.train.compile:
            raise UserError(f"{where}: train.compile: is for openimp's own encoder, not for a wrapped model")
        if self.model.wrap and (self.train.init or "").startswith("timm:"):
            raise UserError(
                f"{where}: train.init: a model of timm is for openimp's own encoder, not for a wrapped model"
            )
        experts, owners = self.model.moe.experts if self.model.moe else 0, self.parallel.expert_degree
        if owners > 1 and (experts == 0 or experts % owners):
            raise UserError(
                f"{where}: parallel.expert_degree: {experts} experts cannot be divided equally among {owners} ranks"
            )
        stems = {}
        for name in self.modality_names:
            try:
                stems[modality_class(name).stem] = self.modality_class(name)
            except UserError as error:
                raise UserError(f"{where}: tasks: {error}") from None
        for stem in self.modalities:
            if stem not in stems:
                raise UserError(f"{where}: modalities: {unknown_key(stem, stems)}")
        for stem, modality in stems.items():
            self.modalities[stem] = checked(
                modality.Config, self.modalities.get(stem, {}), f"{where}: modalities.{stem}", folder
            )
        self._bind_tasks(where)
        self._bind_evaluation(where)

    def _bind_tasks(self, where: str) -> None:
        heads: dict[tuple[str, str], tuple[str, Classification]] = {}
        for task_name, task in self.tasks.items():
            key = f"{where}: tasks.{task_name}"
            self._bind_user(key, task, {f"{key}.views[{i}]": view for i, view in enumerate(task.views)})
            synced = any(view.sync for view in task.views)
            if synced and sum(not modality_class(name).reads_text for name in task.inputs) < 2:
                raise UserError(f"{key}.views: sync is for tasks that read two recordings, such as video and audio")
            if synced and self.sources[task.source].cache != "none":
                raise UserError(
                    f"{key}.views: sync needs recordings as they are, and sources.{task.source}.cache keeps parts of "
                    "long ones; drop one of the two"
                )
            check_objectives(key, task)
            for i, objective in enumerate(task.objectives):
                if isinstance(objective, Distill):
                    self._check_head(f"{key}.objectives.{i}", objective, task)
                if isinstance(objective, Classification):
                    head = heads.setdefault((task.source, objective.label), (task_name, objective))
                    if (objective.loss, objective.classes) != (head[1].loss, head[1].classes):
                        raise UserError(
                            f"{key}: tasks.{head[0]} classifies {objective.label!r} of {task.source} too, by the same "
                            "head, so loss and classes must be the same"
                        )

    def _check_head(self, key: str, objective: Distill, task: Task) -> None:
        """Checks that a modality is distilled by a head that the model has. Messages begin with `key`."""
        if objective.towards:
            _require(f"{key}.towards", "modality", objective.towards, self.modality_names)
        disjoint = self.model.space == "disjoint" and not self.model.wrap
        if disjoint and target_of(objective, task.inputs) == objective.of:
            raise UserError(
                f"{key}: in a disjoint space, distill needs `towards`, another modality to compare {objective.of} "
                "with; or set model.space: joint"
            )

    def _bind_evaluation(self, where: str) -> None:
        best, sets = self.evaluation.best, self.evaluation.sets
        if best is not None:
            _require(f"{where}: evaluation.best", "evaluation set", best, sets)
        for set_name, options in sets.items():
            key = f"{where}: evaluation.sets.{set_name}"
            for name in [*options.inputs, *([options.reader] if isinstance(options, ZeroShot) else [])]:
                if name not in self.modality_names:
                    raise UserError(f"{key}: no task trains modality {name!r}{nearest(name, self.modality_names)}")
            if isinstance(options, Retrieval) and len(options.inputs) != 2:
                raise UserError(f"{key}.inputs: retrieval is between two modalities, found {len(options.inputs)}")
            for name, spec in options.inputs.items():
                if spec.draw > 1:
                    raise UserError(f"{key}.inputs.{name}: evaluation draws nothing; drop draw")
            if (options.view.weight, options.view.batch_size, options.view.sync) != (1, None, False):
                raise UserError(f"{key}.view: weight, batch_size and sync are for training; use evaluation.batch_size")
            self._bind_user(key, options, {f"{key}.view": options.view})
            if isinstance(options, ClassHead):
                self.class_head(options, key)
            if isinstance(options, Probe):
                _require(f"{key}.train", "source", options.train, self.sources)
                if options.train == options.source:
                    raise UserError(f"{key}: train and source are both {options.train}; a probe needs new rows")

    def class_head(self, options: ClassHead, key: str) -> Classification:
        """The objective that trains the head of an evaluation set. If there is none, the message begins with `key`."""
        _require(f"{key}.task", "task", options.task, self.tasks)
        heads = {o.label: o for o in self.tasks[options.task].objectives if isinstance(o, Classification)}
        if options.label not in heads:
            hint = nearest(options.label, heads)
            raise UserError(f"{key}.label: tasks.{options.task} has no classification of {options.label!r}{hint}")
        return heads[options.label]

    def modality_class(self, name: str) -> type[Modality]:
        """The class that reads a modality for the recipe's model. UserError if a wrapped model cannot read it."""
        found = modality_class(name)
        if not self.model.wrap:
            return found
        from openimp.modalities.open_clip import READERS  # It imports the libraries of all media.

        if name not in READERS:
            raise UserError(f"a model of open_clip has no modality {name!r}")
        return READERS[name]

    def make_modalities(self) -> dict[str, Modality]:
        """New instances of the modalities that tasks read, by name."""
        classes = {name: self.modality_class(name) for name in self.modality_names}
        return {name: modality(self.modalities[modality.stem]) for name, modality in classes.items()}

    def _bind_user(self, key: str, user: Task | EvaluationSet, views: Mapping[str, View]) -> None:
        """Checks a source and its views, {key for messages: view}, with the options of their modalities."""
        _require(f"{key}.source", "source", user.source, self.sources)
        classes = {name: self.modality_class(name) for name in user.inputs}
        for place, view in views.items():
            view.bind(classes, place)
            for name, modality in classes.items():
                try:
                    modality(self.modalities[modality.stem]).check(view[name])
                except ValueError as error:
                    raise UserError(f"{place}.{name}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, including all defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as YAML, including all defaults."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def _require(key: str, kind: str, name: str, known: Collection[str]) -> None:
    """Raises UserError, which begins with `key`, if a name is not among the known ones."""
    if name not in known:
        raise UserError(f"{key}: no {kind} {name!r}{nearest(name, known)}")
