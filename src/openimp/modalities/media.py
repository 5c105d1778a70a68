"""What pictures, clips and sounds have in common: opening files and limits on decoding them, which part is read, what a
person is shown, patches on a grid, DropToken."""

import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import av
import numpy as np
import PIL.Image
import torch
from pydantic import model_validator

from openimp.common.modality import BadMedia
from openimp.common.schema import Strict

# What FFmpeg may parse and decode: everything that people keep clips and sounds in. Playlists (hls, concat, ...) are
# left out on purpose: they name other files, which a hostile example could make us read.
CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpeg,mpegvideo,mpegts,flv,ogg,asf,h264,hevc,mjpeg,jpeg_pipe,aac,aiff,caf,mp3,wav"
)
CODECS = (
    "h264,hevc,vp8,vp9,libdav1d,av1,mpeg1video,mpeg2video,mpeg4,msmpeg4v1,msmpeg4v2,msmpeg4,wmv1,wmv2,wmv3,vc1,h261,h263,flv,"
    "vp6f,theora,svq1,svq3,cinepak,mjpeg,prores,dnxhd,dvvideo,ffv1,ffvhuff,huffyuv,utvideo,qtrle,png,rawvideo,"
    "aac,aac_latm,mp1,mp1float,mp2,mp2float,mp3,mp3float,ac3,eac3,dca,vorbis,opus,flac,alac,wmav1,wmav2,wmapro,wmalossless,amrnb,amrwb,gsm,"
    "gsm_ms,speex,nellymoser,qdm2,adpcm_ms,adpcm_ima_wav,adpcm_ima_qt,adpcm_swf,pcm_alaw,pcm_mulaw,pcm_dvd,pcm_bluray,pcm_u8,"
    "pcm_s8,pcm_s16le,pcm_s16be,pcm_s24le,pcm_s24be,pcm_s32le,pcm_s32be,pcm_f32le,pcm_f32be,pcm_f64le,pcm_f64be"
)
MAX_PIXELS = 2**25
"""Pixels of a picture above which it is refused before it takes memory."""
MAX_MOVING = 2**24
"""The same limit for a frame of a clip. It is lower because decoders hold several frames. 4K and 5.3K fit, 8K does
not."""
MAX_WORK = 2**34
"""Pixels and samples that are decoded of one file, and bytes that are read: 2048 frames of 4K."""
MAX_CPU = 60
"""Seconds of CPU time that decoding one file may take."""
CHECKED = 2**20
"""Work between two looks at the clock, because each look takes microseconds."""
LENGTHS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}
"""First bytes of the files that say how long they are, and in what order of bytes."""
INFO, HEADER = re.compile(rb"LIST(.{4})INFO", re.DOTALL), 2**20
"""`INFO` matches a list of titles and names in an AVI or WAV file. It is searched for in the first `HEADER` bytes."""
SLACK = 64
"""Bytes by which programs are known to count wrong."""
SHOWN = 128
"""Pixels of the longer side of a frame that a person is shown, where its view is larger."""


class Source(io.BufferedReader):
    """The open file or the bytes of one example, and a limit on what decoding it costs.

    Decoders never open a path themselves: FFmpeg would take the relative path `http:/host/x.mp4` for a URL.
    """

    def __init__(self, raw: Any) -> None:
        super().__init__(raw)
        self._work, self._checked, self._until = 0, CHECKED, 0.0

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self._work += len(content) + 2**8  # many small ones take time, too
        if self._work >= self._checked:
            self.spend(0)
        return content

    def spend(self, work: int) -> None:
        """Counts pixels or samples that were decoded, or bytes that were read.

        Raises:
            BadMedia: the file has more than is decoded of one, or decoding it has taken too long.
        """
        self._work += work
        if self._work < self._checked:
            return
        self._checked, now = self._work + CHECKED, time.thread_time()
        self._until = self._until or now + MAX_CPU
        if self._work > MAX_WORK:
            raise BadMedia(f"more than {MAX_WORK:,} pixels or samples in all")
        if now > self._until:
            raise BadMedia(f"decoding takes more than {MAX_CPU} s of CPU time")


def readable(raw: Any) -> Source:
    """The file that a path names, or bytes, for a decoder to read; the caller closes it.

    Raises:
        BadMedia: no regular file (a pipe could block for ever), no bytes, neither, or fewer bytes than it says.
    """
    if isinstance(raw, bytes | bytearray | memoryview):
        if not len(raw):
            raise BadMedia("no bytes")
        source, size = Source(io.BytesIO(raw)), len(raw)
    elif isinstance(raw, str | Path):
        if not Path(raw).is_file():
            raise BadMedia("no such file")
        source = Source(open(raw, "rb", buffering=0))  # noqa: SIM115 (the caller closes it)
        size = os.fstat(source.fileno()).st_size
    else:
        raise BadMedia(f"expected bytes, a path or an array, found {type(raw).__name__}")
    _check_length(source.peek(8)[:8], size)
    return source


@contextmanager
def opened(source: Source, kind: Literal["video", "audio"]) -> Iterator[tuple[Any, Any]]:
    """A container that FFmpeg reads and its first stream of a kind, decoded in one thread: the loader's workers are the
    parallel part.

    Raises:
        BadMedia: it has no such stream, or one in a codec that is not read.
    """
    _check_info(source)
    # No protocol is allowed, because the file is open already and must not name others. The limit on the pixels is for
    # what FFmpeg decodes to find out what is in the file; it is higher, so that it tells the size of what is refused.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    options |= {"codec_whitelist": CODECS, "max_pixels": str(4 * MAX_MOVING)}
    container: Any
    with av.open(source, options=options, metadata_errors="ignore") as container:
        if not (streams := getattr(container.streams, kind)):
            raise BadMedia(f"no {kind} stream")
        context = streams[0].codec_context
        if context is None or context.codec.name not in CODECS.split(","):
            raise BadMedia(f"its {kind} has a codec that is not read: {context and context.codec.name}")
        context.options, context.thread_count = {"max_pixels": str(MAX_MOVING)}, 1
        yield container, streams[0]


def _check_info(source: Source) -> None:
    """Refuses an AVI or WAV file if an INFO list in its header claims to be longer than the file.

    FFmpeg sets that much memory aside and fills it with zeros before it reads the list.
    """
    if source.peek(4)[:4] == b"RIFF":
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        claims = [int.from_bytes(claim, "little") for claim in INFO.findall(source.read(HEADER))]
        source.seek(0)
        if max(claims, default=0) > size:
            raise BadMedia(f"truncated: an INFO list of {max(claims):,} bytes in a file of {size:,}")


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
    text = " ".join(message.split(" <Source")[0].split())
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__


class ExampleRng(np.random.Generator):
    """Random generator of one example.

    Attributes:
        sync_start: where all modalities of the example start in training, as a share of the recording's length. Set if the
            view has `sync: true`; None: each modality draws its own start.
    """

    sync_start: float | None = None


def random_start(total: int, span: int, rng: np.random.Generator) -> int:
    """A random start for a training cut of length `span` in a recording of length `total`.

    If `rng` has a shared `moment`, the cut starts there, or as late as it still fits into the recording.
    """
    room = max(0, total - span)
    moment = getattr(rng, "sync_start", None)
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
    """The rows of the position tables for a grid of L patches along A axes: (L, A), one row per patch and axis.

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
