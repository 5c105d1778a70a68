"""What the page shows for a query: its parts, and its results in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest

from openimp.common.errors import UserError, counted
from openimp.search.display import Item, item
from openimp.search.index import Index, stands_for_file
from openimp.search.query import Hit, QueryPart
from openimp.search.state import MAX_RESULTS, PAGE_RESULTS, State
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
        hits = search(index, parts, state)
    except UserError as error:
        return Answer(f"This cannot be searched: {error}", state, [], chips, notes, code=400)
    kept = [hit for hit in hits if not state.min or hit.score >= state.min]
    more = state.link(k=min(state.k + PAGE_RESULTS, MAX_RESULTS)) if len(kept) == state.k < MAX_RESULTS else ""
    return Answer(_status(hits, kept, state), state, _shown(index, kept, state), chips, notes, more)


def search(index: Index, parts: Sequence[QueryPart], state: State) -> list[Hit]:
    """The best `state.k` items.

    Cosines with a text are not comparable between modalities: in most models all pictures are nearer to texts than all
    sounds are, or the other way round. So the results of a text alternate between the modalities.
    """

    def find(modalities: Sequence[str] | None) -> list[Hit]:
        return index.search(parts, state.k, modalities, state.under or None)

    if not state.q:
        return find(state.modality or None)
    found, refused = [], None
    for name in state.modality or index.counts:
        try:
            found.append(find([name]))
        except UserError as error:  # For example, no task compares this modality with texts.
            refused = error
    if refused and not found:
        raise refused
    return _alternate(found)[: state.k]


def _shown(index: Index, hits: list[Hit], state: State) -> list[Item]:
    cut = {hit.path for hit in hits if stands_for_file(hit, state.under or None)}
    segments = index.parts(cut) if cut else {}
    return [replace(item(index, hit), segments=segments.get(hit.path, 0)) for hit in hits]


def _alternate(lists: list[list[Hit]]) -> list[Hit]:
    """The first of each list, then the second of each, and so on. The list with the best first hit begins."""
    ordered = sorted(filter(None, lists), key=lambda hits: -hits[0].score)
    return [hit for hit in chain.from_iterable(zip_longest(*ordered)) if hit]


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
    for like, kind in zip(state.likes(), ["more"] * len(state.more) + ["less"] * len(state.less)):
        try:
            found = item(index, index.hit(like.id))
        except UserError:
            notes.append("An item of this query is no longer indexed.")
            continue
        thumbnail = None if found.kind == "text" else found.thumbnail
        chips.append(Chip(kind, like.id, found.name, thumbnail))
        parts.append(like)
    return parts, chips, list(dict.fromkeys(notes))


def _overview(index: Index) -> str:
    return f"{counted(sum(index.counts.values()), 'item')}. Search them, or start from one of these"


def _examples(index: Index) -> list[Item]:
    """A few items, evenly spaced, to start from."""
    return [item(index, index.hit(id)) for id in index.sample(EXAMPLES, ["id"])["id"].to_pylist()]


def _status(hits: list[Hit], kept: list[Hit], state: State) -> str:
    if not hits:
        return "Nothing is indexed that matches these filters"
    if not kept:
        best = max(hit.score for hit in hits)
        return f"No result has a score of at least {state.min:.2f}; the best has {best:.2f}"
    at_least = f" with a score of at least {state.min:.2f}" if state.min else ""
    first = "The first " if len(kept) == state.k else ""
    return f"{first}{counted(len(kept), 'result')}{at_least}"
