"""Reads items of one modality and encodes them in batches.

Shape suffixes: N items, M clips, D width, Z features of the shared embedding space.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.device import Precision
from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, Tokens
from openimp.data.tables import Table
from openimp.data.templates import columns_of, fill
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import in_lockstep
from openimp.parallel.layout import mixed_precision
from openimp.recipe.inputs import Input
from openimp.recipe.schema import Recipe

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
"""Wraps an iterable to show its progress: `progress(iterable, description)`."""
Raw = str | bytes | Path | np.ndarray
"""A value that a modality decodes."""

READ_ROWS = 256
"""Number of rows that are read from a source at once."""
THREADS = min(4, os.cpu_count() or 1)
"""Threads that decode while the model computes. Pillow, FFmpeg and libsndfile release Python's lock."""


def embed(
    model: Embedder,
    modality: Modality,
    view: Any,
    items: Iterable[np.ndarray],
    towards: str | None,
    batch: int,
    precision: Precision,
    normalize: bool = True,
    watch: Progress | None = None,
) -> Tensor:
    """Encodes items from `Modality.encode_input`, (N, Z) or (N, D) fp32 on the model's device.

    The vectors of the clips of an item are averaged. If `normalize`, both those of clips and those of items have length
    1. They are in the space that `modality` shares with `towards`; None: the encoder's features, before any projection.
    A forward pass has at most `batch` clips, but the clips of one item are never separated. `watch` wraps the passes,
    and may stop them.

    All ranks call this together, because they share the model. Each encodes its own items and returns their vectors.
    """
    device = next(model.parameters()).device

    def batches() -> Iterator[tuple[list[int], Tokens]]:
        for chunk in _chunks(items, batch):
            yield [len(clips) for clips in chunk], modality.tokens(np.concatenate(chunk), view, None)

    found: list[Tensor] = []
    passes: Iterable[Any] = in_lockstep(batches(), lambda own: own[1].coords.shape[:2])
    # Not in inference mode: FSDP2 keeps some of the tensors that it makes for later training steps.
    with torch.no_grad():
        for own, shapes in watch(passes, modality.name) if watch else passes:
            # All ranks have tokens of the same shape, as in training. Those without an item encode zeros.
            rows, length = map(max, zip(*shapes))
            clips, tokens = own or ([], modality.zeros(rows, length))
            tokens = tokens if len(tokens.coords) == rows else tokens.pad(rows)
            z_MZ = embed_tokens(model, modality.name, tokens.to(device), towards, precision, normalize)
            # On a GPU, index_add would sum in another order in each run.
            found += [z.mean(0) for z in z_MZ[: sum(clips)].split(clips)]
    size = model.config.width if towards is None else model.config.embed_dim
    z_NZ = torch.stack(found) if found else torch.zeros(0, size, device=device)
    return F.normalize(z_NZ, dim=-1) if normalize else z_NZ


def embed_tokens(
    model: Embedder, name: str, tokens: Tokens, towards: str | None, precision: Precision, normalize: bool = True
) -> Tensor:
    """Encodes one batch of tokens of the modality `name` to (M, Z) or (M, D) fp32; see `embed`."""
    with mixed_precision(tokens.coords.device, precision):
        features_MD = model.encode({name: tokens}).features
        if towards is None:
            return F.normalize(features_MD.float(), dim=-1) if normalize else features_MD.float()
        return model.project(features_MD, name, towards, normalize)


def embed_item(
    model: Embedder,
    modality: Modality,
    view: Any,
    clips: np.ndarray,
    towards: Iterable[str],
    precision: Precision,
) -> list[Tensor]:
    """The unit vectors (Z,) fp32 of one item in the spaces that it shares with `towards`, from one forward pass.

    They are those of `embed` on one rank.
    """
    device = next(model.parameters()).device
    tokens = modality.tokens(clips, view, None).to(device)
    with torch.no_grad(), mixed_precision(device, precision):
        features_MD = model.encode({modality.name: tokens}).features
        return [F.normalize(model.project(features_MD, modality.name, other).mean(0), dim=-1) for other in towards]


def first_view(recipe: Recipe, name: str) -> Any:
    """The default view of a modality: the first one of the first task that reads it."""
    return next(task.views[0][name] for task in recipe.tasks.values() if name in task.inputs)


def require_columns(table: Table, modality: Modality, spec: Input, where: str) -> None:
    """Raises UserError if the source lacks a column that an input reads."""
    table.require(_columns(modality, spec), where)


def require_pair(model: Embedder, a: str, b: str, where: str) -> None:
    """Raises UserError if two modalities share no space, because the model was not trained to compare them."""
    if not model.share_a_space(a, b):
        trained = ", ".join("-".join(pair) for pair in model.pairs) or "none"
        raise UserError(
            f"{where}: no task trains {a} and {b} together, so they cannot be compared; trained pairs: {trained}"
        )


def raw_value(table: Table, modality: Modality, spec: Input, row: int) -> Raw:
    """The value of one input in a row, before it is decoded; BadMedia if it cannot be read."""
    (values,) = table.rows([row], _columns(modality, spec))
    return _value(table, modality, spec, values)


def raw_values(
    table: Table, modality: Modality, spec: Input, numbers: range, progress: Progress | None = None
) -> Iterator[tuple[str, Raw | BadMedia]]:
    """For each row of these numbers, a key that equal values share, and the value, or why it cannot be read."""
    columns = _columns(modality, spec)
    chunks = (table.rows(numbers[i : i + READ_ROWS], columns) for i in range(0, len(numbers), READ_ROWS))
    shown: Iterable[int] = progress(numbers, modality.name) if progress else numbers
    for number, row in zip(shown, chain.from_iterable(chunks)):
        try:
            value = _value(table, modality, spec, row)
            yield _key(value), value
        except BadMedia as error:
            yield f"row:{number}", error


def ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in a few threads, in order. It works only a few items ahead, because a long clip takes much memory."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _columns(modality: Modality, spec: Input) -> list[str]:
    """The columns that evaluation reads: the first template or column of the input counts."""
    return columns_of(spec.columns) if modality.reads_text else spec.columns[:1]


def _value(table: Table, modality: Modality, spec: Input, row: dict[str, Any]) -> Raw:
    return fill(spec.columns, row, None) if modality.reads_text else table.media(row[spec.columns[0]])


def _key(value: Raw) -> str:
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
    """Lists of items with at most `batch` clips together, or of one item."""
    chunk: list[np.ndarray] = []
    for item in items:
        if chunk and sum(map(len, chunk)) + len(item) > batch:
            yield chunk
            chunk = []
        chunk.append(item)
    if chunk:
        yield chunk
