"""Names of sources and tasks, made of paths."""

import re
from pathlib import Path

from openimp.drafting.choosing import TaskDraft
from openimp.drafting.finding import ROLE


def source_name(place: str) -> str:
    """A short name for a path, a pattern or a data set of the hub: letters, digits and underscores."""
    path = Path(re.sub(r"^\w+:(//)?", "", place))
    stem = path.name.split(".")[0] if path.suffix else path.name
    without_role = ROLE.sub("", stem)
    parts = [part for part in re.split(r"\W+|_", without_role) if part and not part.isdigit() and part != "of"]
    if not parts and path.parent.name:
        return source_name(path.parent.name)
    return "_".join(parts).lower() or "data"


def task_names(tasks: list[TaskDraft]) -> list[str]:
    """A name for each task, and no name twice. If a source has several tasks, their names end in the modality."""
    places = [task.data.candidate.place for task in tasks]
    names: list[str] = []
    for task, place in zip(tasks, places):
        name = source_name(place) + (f"_{task.media[0].kind}" if places.count(place) > 1 else "")
        if name in names and (suffix := Path(place).suffix[1:].lower()).isalnum():
            name = f"{name}_{suffix}"
        number = next(n for n in range(1, len(tasks) + 1) if (f"{name}_{n}" if n > 1 else name) not in names)
        names.append(f"{name}_{number}" if number > 1 else name)
    return names
