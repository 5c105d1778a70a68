"""What pictures, clips and sounds have in common: readable bytes, which part is read, what a person is
shown, patches on a grid, DropToken."""

import io
import os
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import PIL.Image
import torch
from pydantic import model_validator

from openimp.modalities import BadMedia
from openimp.recipe import Strict

# Everything that people keep clips and sounds in. Playlists (hls, concat, ...) are left out on purpose: they name other
# files, which a hostile example could make us read.
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,ogg,asf,h264,hevc,mjpeg,jpeg_pipe,aac,aiff,caf,mp3,wav"
)
LENGTHS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}
"""First bytes of the files that say how long they are, and in what order of bytes."""
SLACK = 64
"""Bytes by which programs are known to count wrong."""
SHOWN = 128
"""Pixels of the longer side of a frame that a person is shown, where its view is larger."""


def readable(raw: Any) -> io.BytesIO | str:
    """What a decoder can open: a file name, or bytes as a file.

    Raises:
        BadMedia: no regular file (a pipe could block for ever), no bytes, neither, or fewer bytes than it says.
    """
    if isinstance(raw, bytes | bytearray | memoryview):
        if not len(raw):
            raise BadMedia("no bytes")
        _check_length(bytes(raw[:8]), len(raw))
        return io.BytesIO(raw)
    if isinstance(raw, str | Path):
        if not Path(raw).is_file():
            raise BadMedia("no such file")
        with Path(raw).open("rb") as file:
            _check_length(file.read(8), os.fstat(file.fileno()).st_size)
        return str(raw)
    raise BadMedia(f"expected bytes, a path or an array, found {type(raw).__name__}")


def _check_length(head: bytes, size: int) -> None:
    """Raises BadMedia for a WAV, AVI, WebP or AIFF file that was cut: decoders give what is left of sound and clip.

    Who writes to a pipe cannot know the length, and writes the largest number or none.
    """
    if head[:4] in LENGTHS and len(head) == 8:
        claimed = int.from_bytes(head[4:], LENGTHS[head[:4]])
        if size + SLACK < claimed < 2**31 - 2**16:
            raise BadMedia(f"truncated: {size:,} bytes of {claimed + 8:,}")


def reason(error: Exception) -> str:
    """A decoder's complaint in one short line, without the address of our buffer, which differs from run to run."""
    message = getattr(error, "strerror", None) or str(error)  # of FFmpeg's and the system's, without the number
    text = " ".join(message.split(" <_io.")[0].split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


class ExampleRng(np.random.Generator):
    """Random generator of one example.

    Attributes:
        moment: where all modalities of the example start in training, as a share of the recording's length. Set if the
            view has `sync: true`; None: each modality draws its own start.
    """

    moment: float | None = None


def random_start(total: int, span: int, rng: np.random.Generator) -> int:
    """A random start for a training cut of length `span` in a recording of length `total`.

    If `rng` has a shared `moment`, the cut starts there, or as late as it still fits into the recording.
    """
    room = max(0, total - span)
    moment = getattr(rng, "moment", None)
    return int(rng.integers(room + 1)) if moment is None else min(int(moment * total), room)


def clip_starts(total: int, span: int, clips: int) -> list[int]:
    """Where `clips` parts of `span` start, linearly spaced over `total`; a single one is in the middle."""
    room = max(0, total - span)
    return [room * i // (clips - 1) for i in range(clips)] if clips > 1 else [room // 2]


def segments(total: int, span: int, clips: int, limit: int, rng: np.random.Generator | None) -> list[tuple[int, int]]:
    """Which parts to read of an item with `total` frames or samples (0: unknown), as (start, count).

    With `rng`, one random part of `span`. Without, the item up to `limit`; of a longer one, the `clips` parts that
    evaluation sees: laid end to end, they are just what `clip_starts` cuts out again.
    """
    if rng is not None and total > 0:
        return [(random_start(total, span, rng), span)]
    if total <= limit:
        return [(0, limit)]
    return [(start, span) for start in clip_starts(total, span, clips)]


def webp(pixels: np.ndarray, side: int) -> bytes:
    """Pixels (H, W, 3) uint8 as a WebP file of at most `side` pixels a side."""
    picture, file = PIL.Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), PIL.Image.Resampling.BILINEAR)
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


def patchify(grid: torch.Tensor, patch: tuple[int, ...], keep: torch.Tensor | None = None) -> torch.Tensor:
    """Cuts a batch (B, *axes, C) into patches (B, L, P): tokens by the axes in their order, and so a patch's values.

    `keep` (B, K) are the tokens that are copied, all if None.
    """
    axes, (batch, *sizes, _) = len(patch), grid.shape
    counts = [size // side for size, side in zip(sizes, patch)]
    split = grid.reshape(batch, *(n for pair in zip(counts, patch) for n in pair), grid.shape[-1])
    cut = split.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    if keep is None:
        return cut.reshape(batch, prod(counts), -1)
    rows = torch.arange(batch, device=keep.device)[:, None]
    return cut[(rows, *torch.unravel_index(keep, counts))].flatten(2)


def coordinates(
    counts: tuple[int, ...], tables: tuple[int, ...], spans: tuple[int | None, ...] | None = None
) -> torch.Tensor:
    """For each of L patches the row that it uses in the position table of each of A axes, (L, A).

    Patch i of n along an axis uses row floor(i / n * rows). This coordinate is relative, so the same place has the same
    row at every resolution (arXiv 2305.06324). If an axis has a span, its coordinate is absolute: patch i uses row
    floor(i / span * rows), whatever n is.
    """
    spans = spans or (None,) * len(tables)
    rows = [torch.arange(n) * table // (span or n) for n, table, span in zip(counts, tables, spans)]
    return torch.cartesian_prod(*rows).view(-1, len(rows))


class PatchGrid(Strict):
    """Base of the options of a stem that splits its input into patches along named axes."""

    axes: ClassVar[tuple[str, ...]]
    patch: tuple[int, ...]
    tables: tuple[int, ...]
    absolute: dict[Any, int]

    @model_validator(mode="after")
    def _spans_are_whole(self) -> Self:
        for name, side in zip(self.axes, self.patch):
            if self.absolute.get(name, 0) % side:
                raise ValueError(f"absolute: {name} {self.absolute[name]} is not a multiple of the patch's {side}")
        return self

    def limit(self, axis: int) -> int:
        """The longest input along an axis: as many patches as the table has rows, or the axis' absolute span."""
        return self.absolute.get(self.axes[axis], self.tables[axis] * self.patch[axis])

    def coordinates(self, counts: tuple[int, ...]) -> torch.Tensor:
        """The rows (L, A) of the position tables for `counts` patches along the axes; see `media.coordinates`."""
        spans = tuple(self.absolute.get(name, 0) // side or None for name, side in zip(self.axes, self.patch))
        return coordinates(counts, self.tables, spans)


def kept(length: int, drop: float) -> int:
    """Tokens of `length` that DropToken leaves in training: at least one."""
    return max(1, round(length * (1 - drop)))


def drop_tokens(length: int, drop: float, rngs: list[np.random.Generator] | None) -> torch.Tensor | None:
    """DropToken (VATT, arXiv 2104.11178): a random subset (B, K) for each example, in order; None where all stay."""
    count = kept(length, drop)
    if rngs is None or count == length:
        return None
    noise = np.stack([rng.random(length, dtype=np.float32) for rng in rngs])
    return torch.from_numpy(np.sort(np.argpartition(noise, count - 1, axis=1)[:, :count], axis=1))


def batch_coordinates(coords: torch.Tensor, batch: int, keep: torch.Tensor | None) -> torch.Tensor:
    """The coordinates (L, A) of one example for a batch of them, (B, L, A), or (B, K, A) of the tokens kept."""
    return coords.expand(batch, -1, -1).contiguous() if keep is None else coords[keep]
