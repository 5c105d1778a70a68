"""The state of the search page. All of it is in the URL, so reloading, going back and sharing a link work."""

from typing import Annotated, Any
from urllib.parse import urlencode

from pydantic import ConfigDict, Field
from starlette.datastructures import QueryParams

from openimp.common.schema import Strict, checked
from openimp.search.query import By

MAX_TEXT = 1000
"""Maximum number of characters of a query."""
MAX_PARTS = 16
"""Maximum number of uploads or items of one query."""
PAGE_RESULTS = 48
"""Results that are shown at once."""
MAX_RESULTS = 480

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Ids = Annotated[tuple[str, ...], Field(max_length=MAX_PARTS)]


class State(Strict):
    """The query and the filters of its results. The fields have the names of the URL's parameters."""

    model_config = ConfigDict(strict=False)  # A URL has numbers as text.

    q: Text = ""
    file: Ids = ()  # of uploads
    more: Ids = ()  # of items
    less: Ids = ()
    modality: Ids = ()  # none: all
    under: Text = ""  # a folder, a file or a source
    min: Annotated[float, Field(ge=-1, le=1)] = 0.0  # score; 0: any
    by: By = "both"
    k: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = PAGE_RESULTS  # results
    since: Text = ""  # a day: 2026-05-31
    until: Text = ""

    @classmethod
    def parse(cls, parameters: QueryParams) -> "State":
        """Reads the parameters of a URL; UserError if one is unknown, or its value impossible."""
        values: dict[str, Any] = {name: value.strip() for name, value in parameters.items() if value.strip()}
        for name in ("file", "more", "less", "modality"):
            values[name] = tuple(dict.fromkeys(filter(None, parameters.getlist(name))))
        state: State = checked(cls, values, "the URL")
        return state

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to search for."""
        return not (self.q or self.file or self.more or self.less)

    def link(self, k: int = PAGE_RESULTS, **changes: Any) -> str:
        """The URL of this state with some fields changed, and the first `k` results."""
        parameters = self.model_copy(update={"k": k, **changes}).model_dump(exclude_defaults=True)
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
