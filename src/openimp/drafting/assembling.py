"""Puts the parts of a recipe together as plain data, with a comment for each choice."""

from statistics import mean
from typing import Any

from openimp.common.errors import counted
from openimp.drafting import sizing
from openimp.drafting.choosing import TaskDraft
from openimp.drafting.finding import shown
from openimp.drafting.inspecting import MediaColumn
from openimp.drafting.machine import Machine
from openimp.drafting.naming import task_names
from openimp.drafting.probing import Probed

Key = tuple[str, ...]
CACHE_SHARE, CACHE_BYTES = 0.1, 4e9
"""The recipe caches decoded media if they take at most this share of the memory, and at most this many bytes."""
MARGIN = 1.15**2
"""Pixels of a cached picture, relative to those of its view."""
LONG_CLIP, LONG_SOUND = 128, 150
"""Frames and seconds: half of the limits up to which a cache holds all of a clip or a sound (see docs/data.md)."""
BAD_ROWS_WARNING = 0.005
"""Share of bad rows in the sample above which the recipe sets `max_bad_fraction`."""


class Draft:
    """A recipe that is being drafted.

    Attributes:
        recipe: the recipe as plain data.
        comments: the reason for each choice, by the path of its key.
    """

    def __init__(self, name: str, tasks: list[TaskDraft], machine: Machine) -> None:
        """Makes a complete recipe. Its batches may not fit into memory yet, and its training may take too long."""
        rows = sum(task.split.rows for task in tasks)
        model = sizing.model(rows, machine)
        self._machine = machine
        self.recipe: dict[str, Any] = {"name": name, "model": model.value, "modalities": {}, "sources": {}, "tasks": {}}
        self.comments: dict[Key, str] = {("model",): model.why}
        self._views = self._add_modalities(tasks)
        sets: dict[str, Any] = {}
        for task_name, task in zip(task_names(tasks), tasks):
            measured = self._add_sources(task_name, task)
            self._add_task(task_name, task)
            sets |= self._sets(task_name, measured, task)
        steps = self._add_weights(tasks)
        self.recipe["optimizer"] = {"lr": 1e-3, "muon_lr": 4e-3, "weight_decay": 0.1}
        self.explain("optimizer", "As in the demo. To fine-tune a model (train.init), divide the rates by 3 or more.")
        if rows < sizing.MANY_ROWS:
            self.recipe["parallel"] = {"shard_degree": 1}
            self.explain("parallel", "With several GPUs, each has all of the model, because it is small.")
        bad = max(task.bad for task in tasks)
        allowed = {"max_bad_fraction": round(min(1, 1.5 * bad + 0.02), 2)} if bad > BAD_ROWS_WARNING else {}
        self.recipe["train"] = {"steps": steps, "num_workers": machine.workers, "save_every": 500, **allowed}
        if allowed:
            self.explain("train", f"{bad:.0%} of the sampled rows cannot be read or have no text; they are skipped.")
        if sets:
            self.recipe["evaluation"] = {"sets": sets}
            self.explain("evaluation", "Measured at the end; with every: 500, also every 500 steps.")

    def explain(self, *key_and_why: str) -> None:
        """Adds a line to the comment of a key."""
        *key, why = key_and_why
        before = self.comments.get(tuple(key))
        self.comments[tuple(key)] = f"{before}\n{why}" if before else why

    def _add_modalities(self, tasks: list[TaskDraft]) -> dict[str, dict[str, Any]]:
        """Adds the options of the stems, and returns the view of each modality."""
        probed: dict[str, list[Probed]] = {}
        for media in (media for task in tasks for media in task.media):
            probed.setdefault(media.kind, []).extend(media.sample)
        self.explain("tasks", "Three of four steps drop half of the tokens, which makes them nearly twice as fast.")
        views = self._add_vision({kind: probed[kind] for kind in ("image", "video") if kind in probed})
        if "audio" in probed:
            sound, config = sizing.sound(probed["audio"], self._machine)
            views["audio"] = {"seconds": sound.value}
            if config:
                self.recipe["modalities"]["audio"] = config
            self.explain(*(("modalities", "audio") if config else ("tasks",)), sound.why)
        if any(task.templates for task in tasks):
            words = sizing.count_words(row for task in tasks for row in task.sampled_texts())
            rows = sum(task.split.rows for task in tasks if task.templates)
            self.recipe["modalities"]["text"], length, why = sizing.text(words, rows)
            views["text"] = {"length": length}
            self.explain("modalities", "text", why)
            if words.sides and "image" in views:
                views["image"]["flip"] = False
                self.explain("tasks", "flip: pictures are not mirrored, because some texts mention left or right.")
        return views

    def _add_vision(self, probed: dict[str, list[Probed]]) -> dict[str, dict[str, Any]]:
        views: dict[str, dict[str, Any]] = {}
        patches = []
        for kind, sample in probed.items():
            size = sizing.picture(sample, self._machine)
            pixels, patch = size.value
            views[kind] = {"size": pixels}
            patches.append(patch)
            self.explain("modalities", "vision", size.why)
        if "video" in probed:
            clip = sizing.clip(probed["video"], self._machine)
            views["video"] |= clip.value
            self.explain("modalities", "vision", clip.why)
        if probed:
            frames = (4 if self._machine.is_gpu else 2) if "video" in probed else 1
            self.recipe["modalities"]["vision"] = {"patch": [frames, max(patches), max(patches)]}
            self.explain("modalities", "vision", "patch: frames, height and width of a token. Smaller ones cost more.")
        return views

    def _add_sources(self, name: str, task: TaskDraft) -> str:
        """Adds the sources of a task, and returns the name of the one to measure."""
        split, sources = task.split, self.recipe["sources"]
        size = split.rows * sum(_decoded_bytes(media, self._views[media.kind]) for media in task.media)
        fits = size <= min(CACHE_BYTES, CACHE_SHARE * self._machine.host_memory)
        sources[name] = {**split.train, **({"cache": "memory"} if fits else {})}
        rows = counted(split.rows, "row") + (f", and {split.test_rows:,} for evaluation" if split.test else "")
        kept = f" Decoded, they take about {max(1, round(size / 1e6)):,} MB." if fits else ""
        self.explain("sources", name, f"{rows}: {split.why}.{kept}")
        if fits:
            self.comments["sources",] = "cache: media are decoded once, before training, and kept in memory."
        if split.test is None:
            return name
        sources[f"{name}_test"] = split.test
        return f"{name}_test"

    def _add_task(self, name: str, task: TaskDraft) -> None:
        inputs: dict[str, Any] = {media.kind: media.column for media in task.media}
        if templates := task.templates:
            inputs["text"] = templates if len(templates) > 1 else templates[0]
        objectives: list[dict[str, Any]] = []
        if len(inputs) > 1:
            objectives.append({"type": "contrastive", **({"same": task.same} if task.same else {})})
            if task.same:
                why = f"same: rows with equal {shown(task.same)} are positives of each other, and not negatives."
                self.explain("tasks", name, why)
        if task.label:
            weight = {"weight": 0.2} if objectives else {}
            objectives.append({"type": "classification", "label": task.label.name, **weight})
            classes = f"classification: {counted(len(task.split.classes), 'class')} of {shown(task.label.name)}"
            role = "as a second loss" if weight else "which are numbers, so no text can name them"
            self.explain("tasks", name, f"{classes}, {role}.")
        full = {kind: self._views[kind] for kind in inputs}
        fast = {kind: view if kind == "text" else {**view, "drop_tokens": 0.5} for kind, view in full.items()}
        self.recipe["tasks"][name] = {
            "source": name,
            "inputs": inputs,
            "objectives": objectives,
            "batch_size": min(sizing.batch_size(media.kind, task.split.rows, self._machine) for media in task.media),
            "views": [{**full, "weight": 1}, {**fast, "weight": 3}],
        }

    def _add_weights(self, tasks: list[TaskDraft]) -> int:
        """Sets how often each task is drawn, so that each source is seen as often as `sizing.epochs` says.

        Returns the number of steps.
        """
        by_name = self.recipe["tasks"]
        rows = {name: task.split.rows for name, task in zip(by_name, tasks)}
        needed = {name: rows[name] * sizing.epochs(rows[name]) / by_name[name]["batch_size"] for name in by_name}
        if len(tasks) > 1:
            self.explain("tasks", "weight: how often a task is drawn, in proportion to the steps that its rows need.")
            for name, steps in needed.items():
                weight = float(f"{steps / min(needed.values()):.2g}")
                by_name[name]["weight"] = int(weight) if weight.is_integer() else weight
        return sizing.rounded(sum(needed.values()))

    def _sets(self, name: str, source: str, task: TaskDraft) -> dict[str, Any]:
        """The evaluation sets of a task: retrieval if it has texts, else classification by the names of classes."""
        sets: dict[str, Any] = {}
        media: dict[str, Any] = {each.kind: each.column for each in task.media}
        view = {kind: {k: v for k, v in self._views[kind].items() if k != "flip"} for kind in media}
        if task.texts or len(media) > 1:
            inputs = {**media, **({"text": task.templates[0]} if task.texts else {})}
            views = {**view, **({"text": self._views["text"]} if task.texts else {})}
            sets[name] = {"type": "retrieval", "source": source, "inputs": inputs, "view": views}
        about = {"source": source, "inputs": media, "label": task.label and task.label.name}
        if task.templates and not task.texts:
            sets[name] = {"type": "zero_shot", **about, "prompts": [task.prompt], "view": view}
        if task.label and task.split.test and task.split.trains_test_classes:
            sets[f"{name}_classes"] = {"type": "classification", "task": name, **about, "view": view}
        return sets


def _decoded_bytes(media: MediaColumn, view: dict[str, Any]) -> float:
    """Bytes of a decoded example on average; infinite if some are too long for a cache."""
    if media.kind == "audio":
        seconds = [probed.seconds for probed in media.sample]
        return 2 * 16_000 * mean(seconds) if max(seconds) <= LONG_SOUND else float("inf")
    frames = [max(1, probed.frames) for probed in media.sample]
    return 3 * MARGIN * view["size"] ** 2 * mean(frames) if max(frames) <= LONG_CLIP else float("inf")
