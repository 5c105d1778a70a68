"""The content of the page for a query: its parts, and its results in order."""

from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import QueryParams

from openimp.common.errors import UserError, counted
from openimp.search.index import Index
from openimp.search.media_types import UNKNOWN, kind_of
from openimp.search.query import Hit, Like, QueryPart
from openimp.search.ranking import stands_for_file
from openimp.search.state import MAX_RESULTS, PAGE_RESULTS, State
from openimp.search.uploads import Uploads

LESS_WEIGHT = -0.5
"""Weight of an item that results should be less like. With -1, most results would resemble neither this item nor the
other parts of the query."""
EXAMPLES = 12
"""Items that are shown while the query is empty, unless the URL has `k`."""
NO_MATCH = "Nothing is indexed that matches these filters"
MAX_NAME = 200
"""Maximum number of characters of an item's name."""


@dataclass(frozen=True)
class Item:
    """An item as the page shows it."""

    hit: Hit
    kind: str  # "text", "image", "animation", "video", "audio", or "" if browsers cannot display it
    problem: str = ""  # why there is nothing to display
    segments: int = 0  # of the file, if the item stands for all of them

    @property
    def name(self) -> str:
        """A short name: the text that belongs to the media, or the name of the file."""
        if self.kind == "text" or not self.hit.text:
            return Path(self.hit.path).name
        return self.hit.text[:MAX_NAME]

    @property
    def media(self) -> str:
        """The URL of the file. A segment begins and ends at its times."""
        times = "" if self.hit.start is None else f"#t={self.hit.start:.2f},{self.hit.end:.2f}"
        return f"/media/{self.hit.id}{times}"

    @property
    def thumbnail(self) -> str:
        """The URL of a small picture."""
        return f"/thumbnails/{self.hit.id}"


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
    is_incomplete: bool = False  # whether files or items of the query are gone
    code: int = 200  # HTTP status


def answer(index: Index, uploads: Uploads, parameters: QueryParams) -> Answer:
    """Searches for the query in the parameters of a URL. The answer to an impossible query gives the reason."""
    page = Answer()
    try:
        state = page.state = State.parse(parameters)
        parts = _parts(index, uploads, page)
        if parts:
            _search(index, parts, page)
        else:
            filters = (state.modality, state.under or None, state.since, state.until)
            page.status = f"{counted(index.count(*filters), 'item')}. Search them, or start from one of these"
            if page.is_incomplete:
                page.status = "Nothing is left of this query. Start from one of these"
            count = state.k if parameters.get("k") else EXAMPLES
            hits = index.sample(count, *filters)
            page.items = [_item(index, hit) for hit in hits]
            if not hits:
                page.status = NO_MATCH
    except UserError as error:
        page.status = f"This cannot be searched: {error}"
        page.code = 400
    return page


def _parts(index: Index, uploads: Uploads, page: Answer) -> list[QueryPart]:
    """The parts of the query. Adds the chips that show them, and removes parts that no longer exist from the state."""
    asked = page.state
    files = {id: upload for id in asked.file if (upload := uploads.get(id))}
    hits = index.hits({*asked.more, *asked.less})
    if len(files) < len(asked.file):
        page.notes.append("A file of this query is no longer kept. Choose it again.")
    if len(hits) < len({*asked.more, *asked.less}):
        page.notes.append("An item of this query is no longer indexed.")
    page.is_incomplete = bool(page.notes)
    more = tuple(id for id in asked.more if id in hits)
    less = tuple(id for id in asked.less if id in hits)
    page.state = asked.model_copy(update={"file": tuple(files), "more": more, "less": less})
    parts: list[QueryPart] = [index.text_query(asked.q)] if asked.q else []
    for id, upload in files.items():
        page.chips.append(Chip("file", id, upload.name, f"/uploads/{id}" if upload.thumbnail else None))
        parts.append(upload.encoded)
    for kind, ids, weight in (("more", more, 1.0), ("less", less, LESS_WEIGHT)):
        for id in ids:
            item = _item(index, hits[id])
            page.chips.append(Chip(kind, id, item.name, None if item.kind == "text" else item.thumbnail))
            parts.append(Like(id, weight))
    return parts


def _search(index: Index, parts: list[QueryPart], page: Answer) -> None:
    """Adds the results to the page."""
    state = page.state
    hits = index.search(
        parts,
        state.k,
        modalities=state.modality or None,
        under=state.under or None,
        min_score=state.min or None,
        by=state.by,
        since=state.since,
        until=state.until,
    )
    at_least = f" with a score of at least {state.min:.2f}" if state.min else ""
    if hits:
        start = "The first " if len(hits) == state.k > 1 else ""
        page.status = f"{start}{counted(len(hits), 'result')}{at_least}"
    elif state.min:
        page.status = f"No result{at_least}"
    elif state.by == "words" and not page.chips:
        page.status = "No item has these words"
    else:
        page.status = NO_MATCH
    if page.chips and state.by == "words":
        page.notes.append("Files and items are compared by meaning.")
    by_meaning = all(hit.found_by == "meaning" for hit in hits)
    if by_meaning and len(index.groups(hit.modality for hit in hits)) > 1:
        page.notes.append(
            "Kinds have different scores, so the order is by how far a score is above the others of its kind."
        )
    page.items = [_item(index, hit, stands_for_file(hit, state.under or None)) for hit in hits]
    if len(hits) == state.k < MAX_RESULTS:
        page.next = state.link(k=min(state.k + PAGE_RESULTS, MAX_RESULTS))


def _item(index: Index, hit: Hit, is_best_segment: bool = False) -> Item:
    """The item of a hit, made without reading its media."""
    kind = kind_of(index.model.modalities[hit.modality])
    if kind == "text":
        return Item(hit, kind)
    try:
        index.check(hit)
    except UserError as error:
        return Item(hit, "", str(error))
    shown_kind = (hit.media_type or UNKNOWN).partition("/")[0]
    if shown_kind == "image" and kind == "video":
        shown_kind = "animation"
    elif shown_kind not in ("image", "video", "audio"):
        shown_kind = ""
    return Item(hit, shown_kind, segments=hit.parts if is_best_segment else 0)
