"""The recipe: one YAML file that says everything about an experiment. Every default lives here, with unit and source.

What is measured stands in `recipe_evaluation`, and what all parts are made of in `recipe_types`. What belongs to one
modality only (a picture's size, a sound's seconds) is declared beside that modality as its `Config` and `View`; a
recipe checks those parts against the modality that it finds by name.
"""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from openimp.common.errors import UserError, nearest
from openimp.recipe.evaluation import ClassHead, Evaluation, EvaluationSet, Probe, Retrieval, ZeroShot
from openimp.recipe.file import read_recipe
from openimp.recipe.registry import modality_class
from openimp.recipe.types import (
    Count,
    FolderName,
    Input,
    Inputs,
    Positive,
    RecipePath,
    Share,
    Strict,
    View,
    Whole,
    checked,
)
from openimp.recipe.types import Pair as Pair  # for modalities, as most of the others
from openimp.recipe.types import Triple as Triple

ACROSS = ("expert_choice_batch", "token_choice")
"""Routings that look at the tokens of a whole batch in training."""


class MoE(Strict):
    """Sparse Mixture-of-Experts in place of the MLP of the last blocks (arXiv 2305.06324)."""

    experts: Count = 16
    """Experts a block: 16 in B and L, 4 in S."""
    layers: Count = 6
    """How many of the last blocks are sparse."""
    routing: Literal["expert_choice", "expert_choice_batch", "token_choice", "soft"] = "expert_choice"
    """Who chooses whom: experts choose among the tokens of one example, or of the whole batch (in training only), or
    each token chooses its `top_k` experts (in training up to the experts' capacity), or every slot of an expert takes
    a weighted mean of the example's tokens (Soft MoE, arXiv 2308.00951)."""
    capacity: Positive = 1.0
    """Tokens an expert takes, as a multiple of tokens / experts (of `top_k` x tokens / experts in token choice); not in
    soft routing."""
    top_k: Count = 1
    """Experts a token, in token choice only."""
    slots: Count = 1
    """Slots an expert, in soft routing only; so its cost is by example, not by token."""
    z_loss: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the router z-loss: the mean over tokens of logsumexp(logits)^2, summed over layers (ST-MoE, arXiv
    2202.08906, section 3.2). The release and the `imp_moe_*` recipes use 1, which makes short trainings worse
    (docs/results/paper.md)."""
    balance_loss: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the load-balancing loss, in token choice only (Switch, arXiv 2101.03961, section 2.2)."""


class Model(Strict):
    """The shared encoder and the space it embeds into. The defaults are IMP-S, dense."""

    width: Count = 384
    """Features a token."""
    layers: Count = 12
    """Transformer blocks."""
    heads: Count = 6
    """Attention heads; the paper's are 64 wide."""
    mlp: Count = 1536
    """Hidden features of the MLP, and of each expert."""
    qk_norm: bool = False
    """LayerNorm on queries and keys; on in the paper's MoE models."""
    moe: MoE | None = None
    """Left out: a dense encoder."""
    own_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the first blocks each stem has of its own, to compare one encoder with modality-specific ones: all
    blocks for an encoder a stem, fewer for encoders that shared layers fuse. 0: one encoder, as in the paper."""
    space: Literal["disjoint", "joint"] = "disjoint"
    """One head for each (source, target) pair of modalities, as in the authors' release, or one head per modality."""
    share_heads: bool = True
    """Modalities that share a stem (image and video) also share heads and temperatures, as in the release. So
    image-text tasks train the heads that video uses. false: each modality has its own heads and temperatures."""
    embed_dim: Count = 1024
    """Features of the common space, and of its heads' hidden layer."""
    temperature: Positive = 0.2
    """Where the learned temperature of each pair of modalities starts; the paper: 0.2 dense, 1.0 MoE."""

    @model_validator(mode="after")
    def _fits(self) -> "Model":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        if self.moe and self.moe.layers > self.layers:
            raise ValueError(f"moe.layers {self.moe.layers} is more than layers {self.layers}")
        if self.own_layers > self.layers:
            raise ValueError(f"own_layers {self.own_layers} is more than layers {self.layers}")
        if self.moe and self.moe.top_k > self.moe.experts:
            raise ValueError(f"moe.top_k {self.moe.top_k} is more than moe.experts {self.moe.experts}")
        return self


class Source(Strict):
    """Where examples come from. Exactly one of `path` and `hub`; several tasks may share a source."""

    path: RecipePath | None = None
    """A folder (one sub-folder a class), a .csv/.jsonl manifest, .parquet or .tar files (`*` allowed), a URL that
    fsspec opens, or `openimp:NAME` for bundled data. Relative to the recipe."""
    hub: str | None = None
    """A data set's name on the Hugging Face hub."""
    config: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """The commit, tag or branch of a hub data set. Left out: the newest version, which its owner may change."""
    format: Literal["folder", "manifest", "parquet", "webdataset"] | None = None
    """Left out: told by the path."""
    root: RecipePath | None = None
    """The folder to which paths in the rows are relative. Left out: the manifest's folder; for a hub data set, its own
    folder in the hub's cache. Files outside of this folder are never read."""
    where: dict[str, str | int | bool | list[str] | list[int]] = {}
    """Keep the rows whose column has this value, or one of these values."""
    stream: bool = False
    """Read in order, shard after shard, without an index: for what does not fit the disk."""
    window: Count = 1024
    """Streams only: examples that are shuffled together."""
    limit: Count | None = None
    """Tables only: keep at most so many of those rows, evenly spaced; for a quick try."""
    cache: Literal["none", "memory", "disk"] = "none"
    """Where decoded pictures, clips and sounds are kept, for data small enough to be decoded once. Of clips above 256
    frames and sounds above 300 s only the parts that evaluation sees are kept, end to end; do not cache those."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of path and hub")
        if self.stream and self.cache != "none":
            raise ValueError("a streamed source cannot be cached; drop stream or cache")
        if self.stream and self.limit:
            raise ValueError("a streamed source has no limit; drop stream or limit")
        # Defaults are written out in a resolved recipe, so only other values can be told to be in vain.
        if self.path and (self.config, self.split, self.revision) != (None, "train", None):
            raise ValueError("config, split and revision are for hub data sets; to select rows of a path, use where")
        if self.hub and self.format:
            raise ValueError("format is for a path; drop it")
        if not self.stream and self.window != type(self).model_fields["window"].default:
            raise ValueError("window is for streams; drop it, or set stream: true")
        return self


class Contrastive(Strict):
    """Symmetric contrastive loss over pairs of the task's modalities."""

    type: Literal["contrastive"]
    """What kind of objective this is."""
    pairs: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)] | None = None
    """Left out: every pair of the task's modalities."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax NCE with the positives of an item log-summed (MIL-NCE, arXiv 1912.06430), or SigLIP's sigmoid loss
    (arXiv 2303.15343)."""
    same: str | None = None
    """Rows with equal values in this column count as one item: positives of each other, never negatives. A row
    without a value is an item of its own."""
    weight: Positive = 1.0
    """How much its loss counts in the task's sum."""


class Classification(Strict):
    """One linear head for each (source, label column) on the pooled features."""

    type: Literal["classification"]
    """What kind of objective this is."""
    label: str
    """The column with the class, or (sigmoid) with a list of classes; where it is empty there, the row has none."""
    of: str | None = None
    """The modality to classify. Left out: each of the task's modalities that is not text-like (has no mask)."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """One class an example, or any number of them."""
    classes: list[str] | list[int] | None = None
    """The classes, in the order of the head's outputs; left out: every value that the column has. Streams need it."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over all classes."""
    weight: Positive = 1.0
    """How much its loss counts in the task's sum."""


Objective = Annotated[Contrastive | Classification, Field(discriminator="type")]


class Task(Strict):
    """A source, the modalities read from it, their views, one or more objectives, a batch size and a weight."""

    source: str
    """The name of one of `sources`."""
    inputs: Inputs
    """Which column, or text template, feeds which modality."""
    objectives: Annotated[list[Objective], Field(min_length=1)]
    """Summed with their weights."""
    views: Annotated[list[View], Field(min_length=1, default_factory=lambda: [View()])]
    """How its examples are seen; one view is drawn at each of the task's steps."""
    batch: Count = 256
    """Examples a step, over all processes."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """How often the task is drawn, against the other tasks (alternation random and cycle)."""
    interval: Count = 1
    """Visited every so many rounds (alternation intervals)."""


class Alternation(Strict):
    """The function step -> (task, view)."""

    kind: Literal["random", "intervals", "cycle", "sequence"] = "random"
    """Drawn by weight (the paper's figure 1), each task every `interval` rounds (the authors' release), a
    low-discrepancy sequence by weight, or one task after the other, each for its share of the steps."""


class Optimizer(Strict):
    """Fused AdamW with one schedule for all tasks (arXiv 2305.06324); Muon beside it by option."""

    lr: Positive = 8e-4
    """Peak learning rate; the paper: S 8e-4, B 1e-3, L 5e-4."""
    muon_lr: Positive | None = None
    """Peak learning rate of Muon (arXiv 2502.16982), which then updates the encoder's dense matrices and the linear
    layers about it, while AdamW keeps the rest; four times `lr` is a good start. null: AdamW updates everything."""
    warmup: Whole | None = None
    """Steps of linear warm-up; null: one step in twenty, as the paper's S and B."""
    final_lr: Annotated[float, Field(ge=0)] = 0.0
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Weight decay of AdamW and Muon. It applies to the kernels of linear layers and experts; not to tables, norms,
    biases and temperatures."""
    eps: Positive = 1e-7
    """AdamW's epsilon."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of AdamW's means of the gradient and of its square."""
    zero_grads: bool = False
    """Update parameters that a step's task does not use with a gradient of zero, as in the authors' release: their
    optimizer state decays, and AdamW's momentum still moves them. false: their values and state stay unchanged."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the averaged weights that are evaluated and saved beside the trained ones; null: none are kept."""


class BatchMemory(Strict):
    """How much of a batch is in memory at once: the same gradients for less memory, and one more forward pass."""

    micro: Count | None = None
    """Examples of one modality that the encoder takes at a time; their activations are forgotten and computed again
    when the gradient of the whole batch's loss is known (GradCache, arXiv 2101.06983). null: all at once."""
    recompute: bool = False
    """Forget the activations within each block of the encoder and compute them again (arXiv 1604.06174)."""


class Parallel(Strict):
    """How torchrun's processes hold the model between them; losses and gradients are the same in any way."""

    shard: Count | None = None
    """Processes that share one copy of weights, gradients and moments (FSDP2); each such group has its own (HSDP). 1: a
    whole copy in every process, for small models; processes on the CPUs of one Linux machine then have one together,
    unless `experts` is above 1. null: all processes share one."""
    experts: Count = 1
    """Processes that share the experts of each sparse layer, each with some of them whole; tokens travel to them and
    back (expert parallelism). They are among those that share a copy, unless every process has a whole one."""


class Train(Strict):
    """The loop."""

    steps: Count = 200_000
    """Gradient steps, over all tasks; the paper: S 200k, B and L 500k."""
    init: RecipePath | None = None
    """Initial weights and tokenizer: a run, a checkpoint or a model's folder, relative to the recipe, or a model of the
    Hugging Face Hub as hub:OWNER/NAME@REVISION. Heads and stems that it lacks are initialized randomly. null:
    everything is initialized randomly."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where it is faster."""
    compile: bool = False
    """torch.compile, once for each signature (modality, view, batch); needs a C++ compiler."""
    workers: Whole = 2
    """Processes that read and decode; 0: the training process does."""
    prefetch: Count = 4
    """Batches that each worker prepares ahead."""
    log_every: Count = 50
    """Steps between two lines of metrics."""
    save_every: Count = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep: Count = 2
    """Checkpoints that are kept."""
    max_bad: Share = 0.01
    """The share of unreadable examples, of all that a task has read, above which the run stops (from 100 on)."""


class Recipe(Strict):
    """Everything about an experiment."""

    name: FolderName
    """Also the run directory's name: runs/NAME unless told otherwise."""
    seed: Whole = 0
    """Of the weights, the schedule, the order of the data and its augmentation."""
    model: Model = Model()
    """The shared encoder and the common space."""
    modalities: dict[str, Any] = {}
    """Options of each modality's stem (vision serves image and video)."""
    sources: Annotated[dict[str, Source], Field(min_length=1)]
    """Where examples come from, by name."""
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    """What is trained, by name."""
    alternation: Alternation = Alternation()
    """Which task a step takes."""
    optimizer: Optimizer = Optimizer()
    """How weights are updated."""
    batch: BatchMemory = BatchMemory()
    """How large batches fit into memory."""
    parallel: Parallel = Parallel()
    """How several processes hold the model."""
    train: Train = Train()
    """How long, how, and what is kept."""
    evaluation: Evaluation = Evaluation()
    """What is measured, and when."""

    @property
    def modality_names(self) -> list[str]:
        """Every modality that a task reads, in the order of first use."""
        return list(dict.fromkeys(name for task in self.tasks.values() for name in task.inputs))

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Reads a recipe from a YAML file, or a bundled one by name, and applies `a.b.c=value` overrides.

        Raises:
            UserError: no such file, no YAML, or anything that the schema refuses.
        """
        data, file = read_recipe(str(path), overrides)
        return cls.build(data, file.resolve().parent, str(file))

    @classmethod
    def build(cls, data: Mapping[str, Any], folder: str | Path = ".", where: str = "recipe") -> "Recipe":
        """A checked recipe from plain data; relative paths of its sources start at `folder`."""
        recipe = checked(cls, data, where, folder)
        recipe._bind(where, folder)
        return recipe

    def _bind(self, where: str, folder: str | Path) -> None:
        """Checks what one part says of another: sources by name, and the options of each modality."""
        if not any(task.weight for task in self.tasks.values()):
            raise UserError(f"{where}: every task has weight 0; nothing would be trained")
        if self.batch.micro and self.model.moe and self.model.moe.routing in ACROSS:
            raise UserError(
                f"{where}: batch.micro: routing {self.model.moe.routing} looks at the whole batch at once; "
                "expert_choice and soft do not"
            )
        experts, owners = self.model.moe.experts if self.model.moe else 0, self.parallel.experts
        if owners > 1 and (experts == 0 or experts % owners):
            raise UserError(f"{where}: parallel.experts: {owners} processes cannot share {experts} experts evenly")
        stems = {}
        for name in self.modality_names:
            try:
                stems[modality_class(name).stem] = modality_class(name)
            except UserError as error:
                raise UserError(f"{where}: tasks: {error}") from None
        for stem in self.modalities:
            if stem not in stems:
                raise UserError(f"{where}: modalities: unknown key {stem!r}{nearest(stem, stems)}")
        for stem, modality in stems.items():
            self.modalities[stem] = checked(
                modality.Config, self.modalities.get(stem, {}), f"{where}: modalities.{stem}", folder
            )
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
            for objective in task.objectives:
                _check_objective(key, objective, task.inputs)
                if isinstance(objective, Classification):
                    head = heads.setdefault((task.source, objective.label), (task_name, objective))
                    if (objective.loss, objective.classes) != (head[1].loss, head[1].classes):
                        raise UserError(
                            f"{key}: tasks.{head[0]} classifies {objective.label!r} of {task.source} too, by the same "
                            "head, so loss and classes must be the same"
                        )
        best, sets = self.evaluation.best, self.evaluation.sets
        if best is not None and best not in sets:
            raise UserError(f"{where}: evaluation.best: no evaluation set {best!r}{nearest(best, sets)}")
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
            if (options.view.share, options.view.batch, options.view.sync) != (1, None, False):
                raise UserError(f"{key}.view: share, batch and sync are for training; use evaluation.batch")
            self._bind_user(key, options, {f"{key}.view": options.view})
            if isinstance(options, ClassHead):
                self.class_head(options, key)
            if isinstance(options, Probe):
                self._require_source(f"{key}.train", options.train)
                if options.train == options.source:
                    raise UserError(f"{key}: train and source are both {options.train}; a probe needs new rows")

    def class_head(self, options: ClassHead, key: str) -> Classification:
        """The objective that trains the head of an evaluation set.

        Raises:
            UserError: no task has such an objective; the message begins with `key`.
        """
        if options.task not in self.tasks:
            raise UserError(f"{key}.task: no task {options.task!r}{nearest(options.task, self.tasks)}")
        heads = {o.label: o for o in self.tasks[options.task].objectives if isinstance(o, Classification)}
        if options.label not in heads:
            hint = nearest(options.label, heads)
            raise UserError(f"{key}.label: tasks.{options.task} has no classification of {options.label!r}{hint}")
        return heads[options.label]

    def _bind_user(self, key: str, user: Task | EvaluationSet, views: Mapping[str, View]) -> None:
        self._require_source(f"{key}.source", user.source)
        for place, view in views.items():
            view.bind(user.inputs, place)
            for name in user.inputs:
                modality = modality_class(name)
                try:
                    modality(self.modalities[modality.stem]).check(view[name])
                except ValueError as error:
                    raise UserError(f"{place}.{name}: {error}") from None

    def _require_source(self, key: str, name: str) -> None:
        if name not in self.sources:
            raise UserError(f"{key}: no source {name!r}{nearest(name, self.sources)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


def _check_objective(key: str, objective: Contrastive | Classification, inputs: Mapping[str, Input]) -> None:
    """An objective may name only modalities of its task."""
    named = chain(*(objective.pairs or [])) if isinstance(objective, Contrastive) else [objective.of]
    for modality in named:
        if modality is not None and modality not in inputs:
            raise UserError(f"{key}: objective {objective.type}: {modality!r} is no input{nearest(modality, inputs)}")
    if isinstance(objective, Contrastive):
        pairs = [frozenset(pair) for pair in objective.pairs or []]
        if any(len(pair) < 2 for pair in pairs) or len(set(pairs)) < len(pairs):
            raise UserError(f"{key}: objective contrastive: pairs needs different modalities, and each pair once")
    if isinstance(objective, Contrastive) and len(inputs) < 2:
        raise UserError(f"{key}: a contrastive objective needs two modalities in inputs")
    if isinstance(objective, Classification) and not objective.of and all(modality_class(n).masked for n in inputs):
        raise UserError(f"{key}: a classification of {', '.join(inputs)} only must name it as its `of`")
