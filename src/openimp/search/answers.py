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


@dataclass
class Answer:
    """The results of a query."""

    status: str = ""  # one sentence
    state: State = field(default_factory=State)  # what is searched: the query without parts that no longer exist
    items: list[Item] = field(default_factory=list)
    chips: list[Chip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    next: str = ""  # URL with more results, if there may be more
    code: int = 200  # HTTP status


def answer(index: Index, uploads: Uploads, state: State) -> Answer:
    """Searches. An impossible query is an answer, too, which says why."""
    page = Answer(state=state)
    try:
        parts = _parts(index, uploads, page)
        if parts:
            _search(index, parts, page)
        else:
            total = counted(sum(index.counts.values()), "item")
            start = "Nothing is left of this query. Start" if page.notes else f"{total}. Search them, or start"
            page.status = f"{start} from one of these"
            page.items = [item(index, Hit(**row, score=1.0)) for row in index.sample(EXAMPLES, SHOWN).to_pylist()]
    except UserError as error:
        page.status = f"This cannot be searched: {error}"
        page.code = 400
    return page


def _parts(index: Index, uploads: Uploads, page: Answer) -> list[QueryPart]:
    """The parts of the query. Adds the chips that show them, and removes parts that no longer exist from the state."""
    state = page.state
    parts: list[QueryPart] = [index.text_query(state.q)] if state.q else []
    for id in state.file:
        if upload := uploads.get(id):
            page.chips.append(Chip("file", id, upload.name, f"/uploads/{id}" if upload.thumbnail else None))
            parts.append(upload.encoded)
    if any(uploads.get(id) is None for id in state.file):
        page.notes.append("A file of this query is no longer kept. Choose it again.")
    likes = state.likes()
    hits = index.hits(like.id for like in likes) if likes else {}
    for like in likes:
        if hit := hits.get(like.id):
            shown = item(index, hit)
            kind = "more" if like.weight > 0 else "less"
            page.chips.append(Chip(kind, like.id, shown.name, None if shown.kind == "text" else shown.thumbnail))
            parts.append(like)
    if len(hits) < len({like.id for like in likes}):
        page.notes.append("An item of this query is no longer indexed.")
    kept = {kind: tuple(chip.id for chip in page.chips if chip.kind == kind) for kind in ("file", "more", "less")}
    page.state = replace(state, file=kept["file"], more=kept["more"], less=kept["less"])
    return parts


def _search(index: Index, parts: list[QueryPart], page: Answer) -> None:
    """Adds the results to the page."""
    state = page.state
    encoded = [index.encode(part) if isinstance(part, Query) else part for part in parts]  # Once for both searches.
    find = partial(index.search, encoded, modalities=state.modality or None, under=state.under or None)
    hits = find(state.k, min_score=state.min or None)
    at_least = f" with a score of at least {state.min:.2f}" if state.min else ""
    if hits:
        first = "The first " if len(hits) == state.k else ""
        page.status = f"{first}{counted(len(hits), 'result')}{at_least}"
    elif best := find(1) if state.min else []:
        page.status = f"No result{at_least}; the best has {best[0].score:.2f}"
    else:
        page.status = "Nothing is indexed that matches these filters"
    if len({hit.modality for hit in hits}) > 1:
        page.notes.append("The modalities take turns, because their scores cannot be compared.")
    for hit in hits:
        segments = hit.parts if stands_for_file(hit, state.under or None) else 0
        page.items.append(replace(item(index, hit), segments=segments))
    if len(hits) == state.k < MAX_RESULTS:
        page.next = state.link(k=min(state.k + PAGE_RESULTS, MAX_RESULTS))
