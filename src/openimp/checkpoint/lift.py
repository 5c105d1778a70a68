"""Lifts config.json of an older format to the present one."""

from itertools import combinations
from typing import Any


def lift_6(old: dict[str, Any]) -> dict[str, Any]:
    """Format 8 from format 6, which had the whole recipe in config.json.

    The recipe may have keys that this version does not know. Of the tasks, only inputs, first views and objectives are
    read.
    """
    recipe = old["recipe"]
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
