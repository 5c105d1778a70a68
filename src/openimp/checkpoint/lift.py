"""Lifts config.json of an older format to the present one."""

import copy
from itertools import combinations
from typing import Any

from openimp.common.errors import UserError

REMOVED: dict[str, tuple[Any, ...]] = {
    "gates": ("softmax",),
    "slots": (1,),
    "routing": ("expert_choice", "expert_choice_batch"),
}
"""Keys of `model.moe` that were removed in formats 6 and 7, with the values for which a model is still the same."""
WITHOUT_EFFECT = ("top_k", "balance_loss")
"""Keys of `model.moe` that were removed in format 7, and had an effect only with other values of `REMOVED`."""


def lift_recipe(old: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an older version saved, without keys that were removed and with the present names of others.

    It may come from a stranger. What is not a mapping or a list where one is expected stays for the schema to refuse.
    """
    recipe = copy.deepcopy(old)
    _lift_experts(recipe)
    _mapping(recipe, "train").pop("upcycle", None)
    tasks = _mapping(recipe, "tasks")
    for name in tasks:
        objectives = _mapping(tasks, name).get("objectives")
        for objective in objectives if isinstance(objectives, list) else ():
            if isinstance(objective, dict) and "same" in objective:
                objective["positives_by"] = objective.pop("same")
    return recipe


def _lift_experts(data: dict[str, Any]) -> None:
    """Removes the keys of `model.moe` that were removed."""
    moe = _mapping(_mapping(data, "model"), "moe")
    for key, supported in REMOVED.items():
        if (value := moe.pop(key, supported[0])) not in supported:
            raise UserError(f"model.moe.{key} is {value!r}, which this version of openimp no longer has")
    for key in WITHOUT_EFFECT:
        moe.pop(key, None)


def _mapping(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping at a key; an empty one if there is none."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def lift_6(old: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """Format 8 from format 6, which had the whole recipe in config.json; `recipe` is what `lift_recipe` makes of it.

    The recipe may have keys that this version does not know. Of the tasks, only inputs, first views and objectives are
    read.
    """
    views: dict[str, Any] = {}
    losses: dict[tuple[str, str], set[str]] = {}
    distilled = []
    for task in recipe["tasks"].values():
        names = [*task["inputs"]]
        for name in names:
            views.setdefault(name, task["views"][0][name])
        for objective in task["objectives"]:
            if objective["type"] == "contrastive":
                for pair in objective.get("pairs") or combinations(names, 2):
                    losses.setdefault((min(pair), max(pair)), set()).add(objective["loss"])
            elif objective["type"] == "distill":
                student = objective["of"]
                others = [name for name in names if name != student]
                partner = objective.get("towards") or (others[0] if len(others) == 1 else student)
                distilled.append([student, partner])
    return {
        "format": 8,
        "class": old["model"],
        "name": recipe["name"],
        "model": recipe["model"],
        "modalities": recipe["modalities"],
        "views": views,
        "pairs": [{"modalities": pair, "sigmoid": losses[pair] == {"sigmoid"}} for pair in sorted(losses)],
        "distilled": distilled,
        "classes": old["classes"],
        "precision": recipe["train"]["precision"],
    }


def lift_7(old: dict[str, Any]) -> dict[str, Any]:
    """Format 8 from format 7, whose experts had routings."""
    config = copy.deepcopy(old)
    _lift_experts(config)
    return config | {"format": 8}
