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
    pairs = set()
    distilled = []
    for task in recipe["tasks"].values():
        names = [*task["inputs"]]
        for name in names:
            views.setdefault(name, task["views"][0][name])
        for objective in task["objectives"]:
            if objective["type"] == "contrastive":
                pairs |= {(min(pair), max(pair)) for pair in objective.get("pairs") or combinations(names, 2)}
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
        "pairs": [{"modalities": pair} for pair in sorted(pairs)],
        "distilled": distilled,
        "classes": old["classes"],
        "precision": recipe["train"]["precision"],
    }
