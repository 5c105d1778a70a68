"""From the rows of an evaluation set to embeddings.

Shape suffixes: N items, M clips, D width, Z features of the common space.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.device import Precision, autocast
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, Tokens
from openimp.data.tables import Table
from openimp.data.templates import columns_of, fill
from openimp.model.embedder import Embedder
from openimp.recipe.evaluation import EvaluationSet
from openimp.recipe.inputs import Input
from openimp.recipe.schema import Recipe

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show how far it is: `progress(iterable, description)`."""

READ_ROWS = 256
"""Rows that are fetched from a source at once."""
THREADS = min(4, os.cpu_count() or 1)
"""Threads that decode while the model computes; Pillow, FFmpeg and libsndfile let go of Python's lock."""


@dataclass(frozen=True)
class Encoded:
    """One input of an evaluation set, each distinct value encoded once.

    Attributes:
        embeddings: (N, Z) unit vectors, or (N, D) features, fp32, of the distinct values, in the order in which they
            first appear.
        item: which of them each row of the source has, -1 where it cannot be read.
        bad: why a row cannot be read, by row.
        keys: of each row what equal values share, made of all that the value holds.
    """

    embeddings: Tensor
    item: np.ndarray
    bad: dict[int, str]
    keys: list[str]


def encode_input(
    model: Embedder,
    recipe: Recipe,
    modalities: Mapping[str, Modality],
    options: EvaluationSet,
    name: str,
    table: Table,
    towards: str | None,
    progress: Progress | None,
) -> Encoded:
    """Encodes the input `name` of an evaluation set, in its view, for all rows of a source; see `encode_rows`."""
    return encode_rows(
        model, table, modalities[name], options.inputs[name], options.view[name], towards,
        recipe.evaluation.batch_size, recipe.train.precision, progress,
    )  # fmt: skip


def encode_rows(
    model: Embedder,
    table: Table,
    modality: Modality,
    spec: Input,
    view: Any,
    towards: str | None,
    batch: int,
    precision: Precision,
    progress: Progress | None = None,
) -> Encoded:
    """Encodes one modality of all rows of a source, in order.

    Values are equal if their texts, or the bytes of their files, are.

    Args:
        model: in evaluation mode.
        table: the source.
        modality: how the values are read.
        spec: where they stand in a row; of several columns the first counts.
        view: the modality's view.
        towards: the modality of the other side, which decides on the projection head; None: the encoder's features as
            they are.
        batch: clips that are encoded at once.
        precision: see `autocast`.
        progress: shows it.
    """
    keys: list[str] = []
    place: dict[str, int] = {}
    bad: dict[str, str] = {}

    def unseen() -> Iterator[tuple[str, Any]]:
        seen = set()
        for key, value in raw_values(table, modality, spec, progress):
            keys.append(key)
            if key not in seen:
                seen.add(key)
                yield key, value

    def read(pair: tuple[str, Any]) -> tuple[str, np.ndarray | BadMedia]:
        key, value = pair
        try:
            if isinstance(value, BadMedia):
                raise value
            return key, modality.encode_input(value, view)
        except BadMedia as error:
            return key, error

    def readable() -> Iterator[np.ndarray]:
        for key, found in ahead(read, unseen()):
            if isinstance(found, BadMedia):
                bad[key] = str(found)
            else:
                place[key] = len(place)
                yield found

    embeddings = embed(model, modality, view, readable(), towards, batch, precision, normalize=towards is not None)
    item = np.array([place.get(key, -1) for key in keys], np.int64)
    return Encoded(embeddings, item, {row: bad[key] for row, key in enumerate(keys) if key in bad}, keys)


def embed(
    model: Embedder,
    modality: Modality,
    view: Any,
    items: Iterable[np.ndarray],
    towards: str | None,
    batch: int,
    precision: Precision,
    normalize: bool = True,
) -> Tensor:
    """Items to vectors of the space that `modality` shares with `towards`, (N, Z) fp32 on the model's device.

    An item of several clips has the mean of its clips' unit vectors, brought to length 1 again.

    Args:
        model: in evaluation mode.
        modality: what the items are.
        view: as they were transformed.
        items: (clips, ...) each, as `Modality.encode_input` gives them.
        towards: the other modality of the pair; None: the encoder's features (N, D), before any projection.
        batch: clips that are encoded at once; an item's clips stay together.
        precision: see `autocast`.
        normalize: give unit vectors; without it what the head or the encoder gives, averaged over the clips.
    """
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for chunk in _chunks(items, batch):
            tokens = modality.tokens(np.concatenate(chunk), view, None)
            z_MZ = embed_tokens(model, modality.name, tokens.to(device), towards, precision, normalize)
            # No index_add, whose order of summation changes from run to run on a GPU.
            found += [z.mean(0) for z in z_MZ.split([len(clips) for clips in chunk])]
    # Outside inference mode, so that a probe may be trained on the result.
    size = model.config.width if towards is None else model.config.embed_dim
    z_NZ = torch.stack(found) if found else torch.zeros(0, size, device=device)
    return F.normalize(z_NZ, dim=-1) if normalize else z_NZ


def embed_tokens(
    model: Embedder, name: str, tokens: Tokens, towards: str | None, precision: Precision, normalize: bool = True
) -> Tensor:
    """One batch of tokens of the modality `name` to (M, Z) fp32; see `embed`."""
    with autocast(tokens.coords.device, precision):
        features_MD = model.encode({name: tokens}).features
        if towards is None:
            return F.normalize(features_MD.float(), dim=-1) if normalize else features_MD.float()
        return model.project(features_MD, name, towards, normalize)


def first_view(recipe: Recipe, name: str) -> Any:
    """The view in which a modality is seen unless told otherwise: the first one of the first task that has it."""
    return next(task.views[0][name] for task in recipe.tasks.values() if name in task.inputs)


def require_columns(table: Table, modality: Modality, spec: Input, where: str) -> None:
    """Raises UserError unless the source has what one input reads of it."""
    table.require(_columns(modality, spec), where)


def require_pair(model: Embedder, a: str, b: str, where: str) -> None:
    """Raises UserError unless two modalities share a space: their pair was trained, or the space is joint."""
    if not model.share_a_space(a, b):
        trained = ", ".join("-".join(pair) for pair in model.pairs) or "none"
        raise UserError(
            f"{where}: no task trains {a} and {b} together, so they cannot be compared; trained pairs: {trained}"
        )


def raw_value(table: Table, modality: Modality, spec: Input, row: int) -> str | bytes | Path | np.ndarray:
    """What one input of an evaluation set has in a row of its source, as `Modality.decode` takes it.

    Raises:
        BadMedia: nothing that can be read is there.
    """
    (values,) = table.rows([row], _columns(modality, spec))
    return _value(table, modality, spec, values)


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in a few threads, in order, and only a few items ahead, for a long clip takes much memory."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _columns(modality: Modality, spec: Input) -> list[str]:
    return columns_of(spec.columns) if modality.reads_text else spec.columns[:1]


def raw_values(
    table: Table, modality: Modality, spec: Input, progress: Progress | None = None
) -> Iterator[tuple[str, str | bytes | Path | np.ndarray | BadMedia]]:
    """Each row's raw value, or why there is none, after a key that equal values share."""
    columns = _columns(modality, spec)
    numbers = range(len(table))
    chunks = (table.rows(numbers[start : start + READ_ROWS], columns) for start in numbers[::READ_ROWS])
    shown: Iterable[int] = progress(numbers, modality.name) if progress else numbers
    for number, row in zip(shown, chain.from_iterable(chunks)):
        try:
            value = _value(table, modality, spec, row)
            yield _digest(value), value
        except BadMedia as error:
            yield f"row:{number}", error


def _value(table: Table, modality: Modality, spec: Input, row: dict[str, Any]) -> str | bytes | Path | np.ndarray:
    return fill(spec.columns, row, None) if modality.reads_text else table.media(row[spec.columns[0]])


def _digest(value: str | bytes | Path | np.ndarray) -> str:
    if isinstance(value, str):
        return "text:" + value
    if isinstance(value, np.ndarray):
        return f"sha256:{value.shape}{value.dtype}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, bytes):
        return "sha256:" + hashlib.sha256(value).hexdigest()
    try:
        with open(value, "rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadMedia(f"{value}: {error.strerror or error}") from None


def _chunks(items: Iterable[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    """Lists of items of at most `batch` clips together, or of a single item."""
    chunk: list[np.ndarray] = []
    for item in items:
        if chunk and sum(map(len, chunk)) + len(item) > batch:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk
