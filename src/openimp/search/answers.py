"""What the page shows for a query: its parts, and its results in order."""

from dataclasses import dataclass, field, replace
from functools import partial

from openimp.common.errors import UserError, counted
from openimp.search.display import Item, item
from openimp.search.index import Index, stands_for_file
from openimp.search.query import Hit, Query, QueryPart
from openimp.search.state import MAX_RESULTS, PAGE_RESULTS, State
from openimp.search.table import SHOWN
from openimp.search.uploads import Uploads

EXAMPLES = 12
"""Items that are shown while the query is empty."""


@dataclass(frozen=True)
class Chip:
    """An upload or an item in the query, as the page shows it."""

    kind: str  # the parameter of the URL: "file", "more" or "less"
    id: str
    name: str
    thumbnail: str | None  # URL


@dataclass(frozen=True)
class Answer:
    """The results of a query."""

    status: str  # one sentence
    state: State = field(default_factory=State)  # what is searched: the query without parts that no longer exist
    items: list[Item] = field(default_factory=list)
    chips: list[Chip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next: str = ""  # URL with more results, if there may be more
    code: int = 200  # HTTP status


def answer(index: Index, uploads: Uploads, state: State) -> Answer:
    """Searches. An impossible query is an answer, too, which says why."""
    chips: list[Chip] = []
    notes: list[str] = []
    try:
        parts, chips, notes = parts_of(index, uploads, state)
        left = {kind: tuple(chip.id for chip in chips if chip.kind == kind) for kind in ("file", "more", "less")}
        state = replace(state, file=left["file"], more=left["more"], less=left["less"])
        if not parts:
            status = "Nothing is left of this query. Start from one of these" if notes else _overview(index)
            return Answer(status, state, _examples(index), notes=notes)
        parts = [index.encode(part) if isinstance(part, Query) else part for part in parts]  # For both searches.
        find = partial(index.search, parts, modalities=state.modality or None, under=state.under or None)
        hits = find(state.k, min_score=state.min or None)
        best = hits[:1] or (find(1) if state.min else [])
    except UserError as error:
        return Answer(f"This cannot be searched: {error}", state, [], chips, notes, code=400)
    more = state.link(k=min(state.k + PAGE_RESULTS, MAX_RESULTS)) if len(hits) == state.k < MAX_RESULTS else ""
    return Answer(_status(hits, best, state), state, [_shown(index, hit, state) for hit in hits], chips, notes, more)


def _shown(index: Index, hit: Hit, state: State) -> Item:
    return replace(item(index, hit), segments=hit.parts if stands_for_file(hit, state.under or None) else 0)


def parts_of(index: Index, uploads: Uploads, state: State) -> tuple[list[QueryPart], list[Chip], list[str]]:
    """The parts of a query, the chips that show them, and notes about parts that no longer exist."""
    parts: list[QueryPart] = [index.text_query(state.q)] if state.q else []
    chips: list[Chip] = []
    notes: list[str] = []
    for id in state.file:
        upload = uploads.get(id)
        if upload is None:
            notes.append("A file of this query is no longer kept. Choose it again.")
            continue
        chips.append(Chip("file", id, upload.name, f"/uploads/{id}" if upload.thumbnail else None))
        parts.append(upload.encoded)
    likes = state.likes()
    indexed = index.hits(like.id for like in likes) if likes else {}
    for like, kind in zip(likes, ["more"] * len(state.more) + ["less"] * len(state.less)):
        if like.id not in indexed:
            notes.append("An item of this query is no longer indexed.")
            continue
        found = item(index, indexed[like.id])
        thumbnail = None if found.kind == "text" else found.thumbnail
        chips.append(Chip(kind, like.id, found.name, thumbnail))
        parts.append(like)
    return parts, chips, list(dict.fromkeys(notes))


def _overview(index: Index) -> str:
    return f"{counted(sum(index.counts.values()), 'item')}. Search them, or start from one of these"


def _examples(index: Index) -> list[Item]:
    """A few items, evenly spaced, to start from."""
    return [item(index, Hit(**row, score=1.0)) for row in index.sample(EXAMPLES, SHOWN).to_pylist()]


def _status(hits: list[Hit], best: list[Hit], state: State) -> str:
    if not best:
        return "Nothing is indexed that matches these filters"
    if not hits:
        return f"No result has a score of at least {state.min:.2f}; the best has {best[0].score:.2f}"
    at_least = f" with a score of at least {state.min:.2f}" if state.min else ""
    first = "The first " if len(hits) == state.k else ""
    return f"{first}{counted(len(hits), 'result')}{at_least}"
