"""The state of the search page. All of it is in the URL, so reloading, going back and sharing a link work."""

from dataclasses import dataclass, fields, replace
from typing import Any, get_args
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from openimp.common.errors import UserError, nearest
from openimp.search.query import By

MAX_TEXT = 1000
"""Maximum number of characters of a query."""
MAX_PARTS = 16
"""Maximum number of uploads or items of one query."""
PAGE_RESULTS = 48
"""Results that are shown at once."""
MAX_RESULTS = 480


@dataclass(frozen=True)
class State:
    """The query and the filters of its results. The fields have the names of the URL's parameters."""

    q: str = ""  # a text
    file: tuple[str, ...] = ()  # ids of uploads
    more: tuple[str, ...] = ()  # ids of items
    less: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()  # none: all
    under: str = ""  # a folder, a file or a source
    min: float = 0.0  # score; 0: any
    by: By = "both"
    k: int = PAGE_RESULTS  # results
    since: str = ""  # a day: 2026-05-31
    until: str = ""

    @classmethod
    def parse(cls, parameters: QueryParams) -> "State":
        """Reads the parameters of a URL; UserError if one is unknown, or its value impossible."""
        known = [field.name for field in fields(cls)]
        for name in parameters:
            if name not in known:
                raise UserError(f"there is no parameter {name!r}{nearest(name, known)}")
        lists: dict[str, Any] = {
            name: tuple(dict.fromkeys(parameters.getlist(name))) for name in ("file", "more", "less", "modality")
        }
        texts: dict[str, Any] = {name: parameters.get(name, "").strip() for name in ("q", "under", "since", "until")}
        if max(map(len, lists.values())) > MAX_PARTS:
            raise UserError(f"a query has at most {MAX_PARTS} files or items")
        if max(map(len, texts.values())) > MAX_TEXT:
            raise UserError(f"a query has at most {MAX_TEXT:,} characters")
        try:
            score = float(parameters.get("min") or 0)
            count = int(parameters.get("k") or PAGE_RESULTS)
        except ValueError:
            raise UserError("min and k must be numbers") from None
        if not (-1 <= score <= 1 and 1 <= count <= MAX_RESULTS):
            raise UserError(f"min must be between -1 and 1, and k between 1 and {MAX_RESULTS}")
        by: Any = parameters.get("by") or "both"
        if by not in get_args(By):
            raise UserError(f"by must be {' or '.join(get_args(By))}")
        return cls(**texts, **lists, min=score, by=by, k=count)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to search for."""
        return not (self.q or self.file or self.more or self.less)

    def link(self, k: int = PAGE_RESULTS, **changes: Any) -> str:
        """The URL of this state with some fields changed, and the first `k` results."""
        values = vars(replace(self, k=k, **changes))
        parameters = {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}
        return f"/?{urlencode(parameters, doseq=True)}" if parameters else "/"

    def with_item(self, kind: str, id: str) -> str:
        """The URL that also asks for items more or less like one; `kind` is "more" or "less"."""
        changes: dict[str, Any] = {"more": _without(self.more, id), "less": _without(self.less, id)}
        changes[kind] = (*changes[kind], id)[-MAX_PARTS:]
        return self.link(**changes)

    def without(self, kind: str, id: str) -> str:
        """The URL without an upload or item of the query."""
        changes: dict[str, Any] = {kind: _without(getattr(self, kind), id)}
        return self.link(**changes)


def _without(ids: tuple[str, ...], removed: str) -> tuple[str, ...]:
    return tuple(id for id in ids if id != removed)
