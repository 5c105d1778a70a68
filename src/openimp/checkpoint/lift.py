"""Lifts config.json of an older format to the present one."""

from itertools import combinations
from typing import Any

from openimp.common.errors import UserError

REMOVED = {"gates": "softmax", "slots": 1}
"""Keys of `model.moe` that went during format 6, with the only values that present models have."""


def lift_6(old: dict[str, Any]) -> dict[str, Any]:
    """Format 7 from format 6, which had the whole recipe in config.json.

    The recipe may have keys that this version does not know: of what is about training, only inputs, the first views
    and objectives of tasks are read.
    """
    recipe = old["recipe"]
    model = dict(recipe["model"])
    if model.get("moe"):
        model["moe"] = dict(model["moe"])
        for key, only in REMOVED.items():
            if (value := model["moe"].pop(key, only)) != only:
                raise UserError(f"model.moe.{key} is {value!r}, which this version of openimp no longer has")
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
                others = [name for name in names if name != objective["of"]]
                target = objective.get("towards") or (others[0] if len(others) == 1 else objective["of"])
                distilled.append([objective["of"], target])
    return {
        "format": 7,
        "class": old["model"],
        "name": recipe["name"],
        "model": model,
        "modalities": recipe["modalities"],
        "views": views,
        "pairs": [{"modalities": pair, "sigmoid": losses[pair] == {"sigmoid"}} for pair in sorted(losses)],
        "distilled": distilled,
        "classes": old["classes"],
        "precision": recipe["train"]["precision"],
    }
