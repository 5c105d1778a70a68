"""The recipe: one YAML file that describes an experiment completely.

Options of a single modality, such as the size of pictures, are declared in the modality's `Config` and `View`.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, model_validator

from openimp.common.errors import UserError, nearest, one_line
from openimp.common.modality import Classes, Modality
from openimp.common.objective import ClassColumn, head_key
from openimp.common.schema import FolderName, Strict, checked
from openimp.recipe.evaluation import ClassHead, Evaluation, EvaluationSet, Probe, Retrieval, ZeroShot
from openimp.recipe.file import read_recipe, to_yaml
from openimp.recipe.inputs import View
from openimp.recipe.model import Model
from openimp.recipe.model_config import ComparedPair, ModelConfig, fill_stems, make_modalities
from openimp.recipe.registry import modality_class
from openimp.recipe.tasks import Source, Task
from openimp.recipe.training import Alternation, Memory, Optimizer, Parallel, Train


class Recipe(Strict):
    """The complete description of an experiment."""

    name: FolderName
    """The name of the experiment. In a file it may be missing: then it is the file's name without `.yaml`. By default,
    the run directory is runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of the initial weights, the order of tasks and examples, and the augmentation."""
    model: Model = Model()
    """The shared encoder and its embedding space."""
    modalities: dict[str, Any] = {}
    """Options of stems, by name. Most stems have the name of their modality; images and videos share `vision`."""
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

    @property
    def training_sources(self) -> dict[str, Source]:
        """The sources of the tasks that are trained, by name."""
        names = dict.fromkeys(task.source for task in self.tasks.values() if task.weight)
        return {name: self.sources[name] for name in names}

    @property
    def starts_from_weights(self) -> bool:
        """Whether the model has trained weights before the first step: by `train.init`, or by towers alone."""
        has_tower = any(hasattr(options, "tower") for options in self.modalities.values())
        return bool(self.train.init or (has_tower and not self.model.layers))

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = (), folder: Path | None = None) -> "Recipe":
        """Reads and checks a recipe: a YAML file, or the name of a recipe that comes with openimp.

        Overrides are changes such as `train.steps=100`. Relative paths in them start at `folder`; None: at the recipe's
        folder, as in the recipe itself.
        """
        data, file = read_recipe(str(path), overrides, folder)
        return cls.build(data, file.resolve().parent, str(file))

    @classmethod
    def build(cls, data: Mapping[str, Any], folder: str | Path = ".", error_prefix: str = "recipe") -> "Recipe":
        """Validates plain data, whose paths are relative to `folder`."""
        return checked(cls, data, error_prefix, folder)

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo) -> "Recipe":
        """Checks that the parts of the recipe fit together, and fills in the defaults of stems and views."""
        self._check_training()
        fill_stems(self.modalities, self.modality_names, self.model, "tasks", info)
        self._check_tasks()
        self._check_evaluation()
        return self

    def _check_training(self) -> None:
        if not any(task.weight for task in self.tasks.values()):
            raise UserError("every task has weight 0; nothing would be trained")
        degree = self.parallel.expert_degree
        group_sizes = self.model.moe.group_sizes if self.model.moe else []
        if degree > 1 and not group_sizes:
            raise UserError("parallel.expert_degree: the model has no experts (model.moe)")
        for experts in group_sizes:
            if experts % degree:
                raise UserError(
                    f"parallel.expert_degree: {experts} experts cannot be divided equally among {degree} ranks"
                )

    def _check_tasks(self) -> None:
        heads: dict[tuple[str, str], tuple[str, ClassColumn]] = {}
        columns_by_key: dict[str, tuple[str, str]] = {}
        for task_name, task in self.tasks.items():
            key = f"tasks.{task_name}"
            views = {f"{key}.views[{i}]": view for i, view in enumerate(task.views)}
            self._check_source_and_fill_views(key, task, views)
            synced = any(view.sync for view in task.views)
            if synced and sum(not modality_class(name).reads_text for name in task.inputs) < 2:
                raise UserError(f"{key}.views: sync is for tasks that read two recordings, such as video and audio")
            if synced and self.sources[task.source].cache != "none":
                raise UserError(
                    f"{key}.views: sync needs recordings as they are, and sources.{task.source}.cache keeps parts of "
                    "long ones; drop one of the two"
                )
            self._check_objectives(key, task)
            for column in task.class_columns:
                this_column = (task.source, column.name)
                other = columns_by_key.setdefault(head_key(*this_column), this_column)
                if other != this_column:
                    raise UserError(
                        f"{key}: the heads of columns {column.name!r} of {task.source} and {other[1]!r} of {other[0]} "
                        "would have the same name, in which a dot becomes a slash; rename one of the columns"
                    )
                first_task, first_column = heads.setdefault(this_column, (task_name, column))
                if column != first_column:
                    raise UserError(
                        f"{key}: tasks.{first_task} classifies {column.name!r} of {task.source} too, by the same head, "
                        "so loss and classes must be the same"
                    )

    def _check_objectives(self, key: str, task: Task) -> None:
        """Checks that the objectives of a task fit it.

        An objective may come from another package, so any of its errors is a UserError that begins with its location.
        """
        compared: dict[frozenset[str], int] = {}  # by pair of modalities, the first objective that compares them
        for i, objective in enumerate(task.objectives):
            location = f"{key}.objectives.{i}"
            try:
                for name in objective.modalities(task):
                    if name not in task.inputs:
                        raise UserError(f"{location}: {name!r} is not an input of the task{nearest(name, task.inputs)}")
                objective.check(location, task, self)
                for pair in objective.compared_pairs(task):
                    first = compared.setdefault(frozenset(pair), i)
                    if first != i:
                        both = " and ".join(pair)
                        raise UserError(f"{location}: objectives.{first} already compares {both}; drop one of the two")
            except UserError:
                raise
            except Exception as error:
                kind = type(error).__name__
                raise UserError(f"{location}: {objective.type} failed with {kind}: {one_line(error)}") from error

    def _check_evaluation(self) -> None:
        sets = self.evaluation.sets
        if self.evaluation.best is not None:
            _require("evaluation.best", "evaluation set", self.evaluation.best, sets)
        for set_name, options in sets.items():
            key = f"evaluation.sets.{set_name}"
            names = list(options.inputs)
            if isinstance(options, ZeroShot):
                names.append(options.reader)
            for name in names:
                if name not in self.modality_names:
                    raise UserError(f"{key}: no task trains modality {name!r}{nearest(name, self.modality_names)}")
            if isinstance(options, ZeroShot) and not modality_class(options.reader).reads_text:
                raise UserError(f"{key}.reader: {options.reader} reads no texts; name the modality that does, as text")
            if isinstance(options, Retrieval) and len(options.inputs) != 2:
                raise UserError(f"{key}.inputs: retrieval is between two modalities, found {len(options.inputs)}")
            for name, spec in options.inputs.items():
                if spec.draw > 1:
                    raise UserError(f"{key}.inputs.{name}: evaluation draws nothing; drop draw")
            if (options.view.weight, options.view.batch_size, options.view.sync) != (1, None, False):
                raise UserError(f"{key}.view: weight, batch_size and sync are for training; use evaluation.batch_size")
            self._check_source_and_fill_views(key, options, {f"{key}.view": options.view})
            if isinstance(options, ClassHead):
                self.class_column(options, key)
            if isinstance(options, Probe):
                _require(f"{key}.train", "source", options.train, self.sources)
                if options.train == options.source:
                    raise UserError(f"{key}: train and source are both {options.train}; a probe needs new rows")

    def _check_source_and_fill_views(
        self, key: str, task_or_set: Task | EvaluationSet, views: Mapping[str, View]
    ) -> None:
        """Checks that the source exists. Validates the views, by their keys in the recipe, and adds their defaults."""
        _require(f"{key}.source", "source", task_or_set.source, self.sources)
        modalities = make_modalities(task_or_set.inputs, self.modalities)
        for location, view in views.items():
            view.fill(modalities, location)

    def class_column(self, options: ClassHead, key: str) -> ClassColumn:
        """The column with the classes of the head that an evaluation set names. UserError if no task trains this head.

        `key` is that of the set in the recipe.
        """
        if options.task not in self.tasks:
            hint = nearest(options.task, self.tasks)
            raise UserError(f"{key}.task: the model has no task {options.task!r}{hint}")
        columns = {column.name: column for column in self.tasks[options.task].class_columns}
        if options.label not in columns:
            classified = f"classifies {', '.join(map(repr, columns))}, not" if columns else "has no head for"
            raise UserError(f"{key}.label: tasks.{options.task} {classified} {options.label!r}")
        return columns[options.label]

    def inference_view(self, modality: str) -> Any:
        """The view of a modality for inference, of the first trained task that reads it, or else of the first task that
        does.

        It is the task's first view or, if the task trains its views one after the other, the last.
        """
        index = -1 if self.alternation.views == "sequence" else 0
        tasks = sorted(self.tasks.values(), key=lambda task: task.weight == 0)  # Trained tasks first.
        return next(task.views[index][modality] for task in tasks if modality in task.inputs)

    def to_config(self, classes: Classes) -> ModelConfig:
        """The configuration of the recipe's model. `classes` has the classes of each classification head."""
        pairs = set()
        distilled = []
        for task in self.tasks.values():
            for objective in task.objectives:
                pairs |= {(min(pair), max(pair)) for pair in objective.compared_pairs(task)}
                distilled += objective.projected(task)
        return ModelConfig(
            name=self.name,
            model=self.model,
            modalities=self.modalities,
            views={name: self.inference_view(name) for name in self.modality_names},
            pairs=[ComparedPair(modalities=pair) for pair in sorted(pairs)],
            distilled=distilled,
            classes=dict(classes),
            precision=self.train.precision,
        )

    def make_modalities(self) -> dict[str, Modality]:
        """New instances of the modalities that tasks read, by name."""
        return make_modalities(self.modality_names, self.modalities)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, including all defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as YAML, including all defaults."""
        return to_yaml(self.to_dict())


def _require(key: str, kind: str, name: str, known: Collection[str]) -> None:
    """Raises UserError if the name that the recipe gives for `key` is unknown."""
    if name not in known:
        raise UserError(f"{key}: no {kind} {name!r}{nearest(name, known)}")
