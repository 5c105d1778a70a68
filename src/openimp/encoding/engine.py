"""The engine that embeds: it reads items of one modality ahead, and encodes them in batches.

A clip is what the encoder takes at once: a picture, a text, or one of the windows of a film or sound.

Shape suffixes: N items, M clips, D width, Z features of the shared embedding space.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.device import Precision, autocast
from openimp.common.modality import BadMedia, Modality, Tokens, UnknownText
from openimp.common.progress import Progress
from openimp.common.protocols import Towered, is_known
from openimp.common.threads import map_ahead
from openimp.model.embedder import Embedder
from openimp.parallel.distributed import in_lockstep
from openimp.parallel.layout import mixed_precision

K = TypeVar("K")
R = TypeVar("R")
COPIED_TOGETHER = 512
"""Vectors that are copied to the CPU together, because a copy waits for the GPU."""

_KeyAndClips = tuple[Any, np.ndarray | BadMedia]
"""The key of an item, and its clips, or why it cannot be read."""


class _Batch(NamedTuple):
    """Items that are encoded in one forward pass."""

    items: list[tuple[Any, int | BadMedia]]  # the key of each item, and its number of clips, or why it cannot be read
    tokens: Tokens | None  # of all clips; None if there are none

    @property
    def shape(self) -> tuple[int, int]:
        """Number of clips, and of tokens per clip."""
        if self.tokens is None:
            return 0, 0
        clip_count, length, _ = self.tokens.coords.shape
        return clip_count, length


@dataclass(frozen=True)
class ItemEncoder:
    """Encodes items of one modality of a model, for comparison with another modality."""

    model: Embedder
    modality: Modality
    view: Any
    towards: str | None  # the modality to compare with; None: vectors are the encoder's features before projection
    precision: Precision
    batch_size: int = 64  # maximum number of clips in a forward pass, unless one item has more; see also `encode`
    normalize: bool = True  # vectors of clips and of items have length 1
    watch: Progress | None = None  # wraps the forward passes, and may stop them

    def read(self, value: Any) -> np.ndarray:
        """The clips of a value that `Modality.decode` takes; BadMedia if it cannot be read."""
        return self.modality.encode_input(value, self.view)

    def read_known(self, value: Any) -> np.ndarray:
        """Like `read`, but raises UnknownText."""
        if not is_known(self.modality, value, self.view):
            raise UnknownText("has no word that the model knows")
        return self.read(value)

    def encode(self, items: Iterable[tuple[K, Callable[[], np.ndarray]]]) -> Iterator[tuple[K, Tensor | BadMedia]]:
        """Yields the key of each item, in order, with its vector or the reason why it cannot be read.

        A vector is (Z,) or (D,) fp32 on the model's device, the mean over the item's clips. An item is a pair of its
        key and a function that reads its clips, as `read` does. The functions are called in several threads, a few
        items ahead.

        Items n * batch_size to (n + 1) * batch_size - 1 are encoded apart from all others, whether they can be read or
        not. So items that are divided between processes at multiples of `batch_size` have the same vectors, bit for
        bit.

        All ranks iterate together until the end, because they share the model. Each encodes its own items.
        """
        results = map_ahead(attempt, items)
        passes: Iterable[Any] = in_lockstep(self._batches(results), lambda batch: batch.shape)
        if self.watch:
            passes = self.watch(passes, self.modality.name)
        for batch, shapes in passes:
            batch = batch or _Batch([], None)
            # All ranks have tokens of the same shape, as in training. Ranks without an item encode zeros.
            clip_count, length = map(max, zip(*shapes))
            vectors = iter(self._vectors(batch, clip_count, length) if clip_count else ())
            for key, count_or_error in batch.items:
                yield key, count_or_error if isinstance(count_or_error, BadMedia) else next(vectors)

    def encode_item(self, clips: np.ndarray, towards: Iterable[str]) -> list[Tensor]:
        """The vectors (Z,) fp32 of one item in the spaces shared with several modalities, from one forward pass."""
        with torch.no_grad():
            features_MD = self._features(self._tokens(clips))
            return [self._item_vectors(self._project(features_MD, other), [len(clips)])[0] for other in towards]

    def encode_tokens(self, tokens: Tokens) -> Tensor:
        """The vectors (M, Z) or (M, D) fp32 of a batch of tokens. They are differentiable."""
        return self._project(self._features(tokens), self.towards)

    def stack(self, vectors: list[Tensor]) -> Tensor:
        """The vectors as one tensor (N, Z) or (N, D), also if there are none."""
        if vectors:
            return torch.stack(vectors)
        config = self.model.config
        size = config.width if self.towards is None else config.embed_dim
        return torch.zeros(0, size, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _batches(self, results: Iterable[_KeyAndClips]) -> Iterator[_Batch]:
        """Divides items into forward passes."""
        batch: list[_KeyAndClips] = []
        clip_count = 0
        for number, (key, result) in enumerate(results):
            item_clips = 0 if isinstance(result, BadMedia) else len(result)
            if batch and (number % self.batch_size == 0 or clip_count + item_clips > self.batch_size):
                yield self._make_batch(batch)
                batch = []
                clip_count = 0
            batch.append((key, result))
            clip_count += item_clips
        if batch:
            yield self._make_batch(batch)

    def _make_batch(self, results: list[_KeyAndClips]) -> _Batch:
        items = [(key, result if isinstance(result, BadMedia) else len(result)) for key, result in results]
        clips = [result for _, result in results if not isinstance(result, BadMedia)]
        return _Batch(items, self._tokens(np.concatenate(clips)) if clips else None)

    def _tokens(self, clips: np.ndarray) -> Tokens:
        """The tokens of clips (M, ...). Towers of other libraries compute them in this encoder's precision."""
        if not isinstance(self.modality, Towered):
            return self.modality.tokens(clips, self.view, None)
        with autocast(self._device, self.precision):  # Also on several ranks: FSDP2 does not know the tower.
            return self.modality.tokens(clips, self.view, None)

    # Not in inference mode: FSDP2 makes tensors here that later training steps use again.
    @torch.no_grad()
    def _vectors(self, batch: _Batch, clip_count: int, length: int) -> list[Tensor]:
        """The vectors of the readable items of a batch, which is padded to `clip_count` clips of `length` tokens."""
        tokens = batch.tokens or self.modality.zeros(clip_count, length)
        if len(tokens.coords) < clip_count:
            tokens = tokens.pad(clip_count)
        z_MZ = self._project(self._features(tokens), self.towards)
        clip_counts = [clips for _, clips in batch.items if isinstance(clips, int)]
        return self._item_vectors(z_MZ[: sum(clip_counts)], clip_counts)

    def _features(self, tokens: Tokens) -> Tensor:
        """The encoder's features (M, D)."""
        with mixed_precision(self._device, self.precision):
            return self.model.encode(self.modality.name, tokens.to(self._device)).features

    def _project(self, features_MD: Tensor, towards: str | None) -> Tensor:
        """The vectors (M, Z) or (M, D) fp32 of clips."""
        if towards is None:
            features_MD = features_MD.float()
            return F.normalize(features_MD, dim=-1) if self.normalize else features_MD
        with mixed_precision(self._device, self.precision):
            return self.model.project(features_MD, self.modality.name, towards, self.normalize)

    def _item_vectors(self, z_MZ: Tensor, clip_counts: list[int]) -> list[Tensor]:
        """The vectors of items: the means of the vectors of their clips, normalized if `normalize`."""
        if not clip_counts:
            return []
        # On a GPU, index_add would sum in another order in each run.
        z_NZ = torch.stack([z.mean(0) for z in z_MZ.split(clip_counts)])
        if self.normalize:
            z_NZ = F.normalize(z_NZ, dim=-1)
        return list(z_NZ)


def chunks_on_cpu(results: Iterable[tuple[K, Tensor | BadMedia]]) -> Iterator[list[tuple[K, np.ndarray | BadMedia]]]:
    """The results of `ItemEncoder.encode` with vectors on the CPU, `COPIED_TOGETHER` items at a time."""
    iterator = iter(results)
    while chunk := list(islice(iterator, COPIED_TOGETHER)):
        vectors = [result for _, result in chunk if isinstance(result, Tensor)]
        vectors_on_cpu = iter(torch.stack(vectors).cpu().numpy() if vectors else ())
        yield [(key, next(vectors_on_cpu) if isinstance(result, Tensor) else result) for key, result in chunk]


def attempt(item: tuple[K, Callable[[], R]]) -> tuple[K, R | BadMedia]:
    """The key of an item, and what its function returns, or why the item cannot be read."""
    key, read = item
    try:
        return key, read()
    except BadMedia as error:
        return key, error
