"""Code that media modalities share: opening files safely, choosing clips, previews, patches and DropToken."""

import io
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import av
import numpy as np
import PIL.Image
import torch
from pydantic import Field, model_validator
from torch import Tensor

from openimp.common.modality import CONV_MARGIN, CONV_STRIDE, BadMedia, Rng, Tokens
from openimp.common.names import is_url
from openimp.common.schema import Strict, Whole

# The common containers and codecs, and nothing else, for FFmpeg. Playlists (hls, concat, ...) are excluded because they
# name other files, so a hostile example could make us read those.
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
MAX_PIXELS = 2**26
"""Most pixels of a picture, of a JPEG after its reduced decoding; larger ones are refused before they take memory. A4
scans at 600 dpi and pictures of 64 megapixels fit."""
MAX_FRAME_PIXELS = 2**24
"""Most pixels of a frame of a clip. It is lower because decoders hold several frames. 4K and 5.3K fit, 8K does not."""
MAX_WORK = 2**34
"""Most work per file: decoded pixels and samples, plus bytes read. It is enough for 2048 frames of 4K."""
MAX_CPU = 60
"""Most seconds of CPU time to decode one file."""
READ_WORK = 2**8
"""Work of a read besides its bytes, because many small reads take time, too."""
CHECK_EVERY = 2**20
"""Work between two looks at the clock, because a GIF is read in thousands of small pieces."""
LENGTHS: dict[bytes, Literal["little", "big"]] = {b"RIFF": "little", b"FORM": "big"}
"""Magic numbers of the formats whose header contains the file's length, with the byte order of the length."""
INFO_LIST = re.compile(rb"LIST(.{4})INFO", re.DOTALL)
"""Matches the start of a list of titles and names in an AVI or WAV file, with the list's length."""
INFO_SEARCH_BYTES = 2**20
"""Bytes at the start of a file in which `INFO_LIST` is searched for."""
UNKNOWN_FORMAT_ERRORS = ("UnidentifiedImageError", "InvalidDataError", "ArgumentError")
"""Names of the exceptions that Pillow and FFmpeg raise for a file of a format that they do not know."""
LENGTH_TOLERANCE = 64
"""Bytes by which common programs get the length in the header wrong."""
LARGEST = 10
"""Largest magnitude of samples, and of pixels of a prepared batch. They should be in -1..1, but may be noisy."""
SEGMENT_SECONDS = 5.0
"""Least length of a segment, except for rounding. With shorter ones, one recording would fill a list of results."""
SEGMENT_BYTES = 1024
"""Least bytes of a file per segment. The most frugal codecs need more for `SEGMENT_SECONDS`."""
MAX_SEGMENTS = 10_000
"""Most segments of a recording; with more than 14 hours, they are longer."""
Clips = Annotated[int, Field(ge=1, le=1000)]
"""A number of clips or crops of an item. Its clips are in memory together; published protocols use up to 30."""


class MediaFile(io.BufferedReader):
    """The file or the bytes of one example, with a limit on the work of decoding it.

    Decoders never open a path themselves, because FFmpeg takes the relative path `http:/host/x.mp4` for a URL.
    """

    def __init__(self, stream: Any) -> None:
        """`stream` is opened and unbuffered."""
        super().__init__(stream)
        self._work = 0
        self._next_check = 0
        self._deadline = time.thread_time() + MAX_CPU

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.spend(len(content) + READ_WORK)
        return content

    # Not `readinto`, which soundfile calls where no error can be raised. The samples that it decodes count.

    def spend(self, work: int) -> None:
        """Counts pixels or samples that were decoded, or bytes that were read. Beyond the limits it raises BadMedia."""
        self._work += work
        if self._work > MAX_WORK:
            raise BadMedia(f"more than {MAX_WORK:,} pixels or samples in all")
        if self._work >= self._next_check:
            self._next_check = self._work + CHECK_EVERY
            if time.thread_time() > self._deadline:
                raise BadMedia(f"decoding takes more than {MAX_CPU} s of CPU time")


def open_media(raw: Any) -> MediaFile:
    """Opens a path or bytes for a decoder. The caller closes it.

    It refuses a path that is not a regular file, because a pipe could block forever.
    """
    if isinstance(raw, bytes | bytearray | memoryview):
        media_file = MediaFile(io.BytesIO(raw))
    elif isinstance(raw, str | Path):
        if not raw:
            raise BadMedia("an empty path")
        if not Path(raw).is_file():
            if is_url(str(raw)):
                raise BadMedia("no file on this machine; download it first")
            raise BadMedia("not a file" if Path(raw).exists() else "no such file")
        media_file = MediaFile(open(raw, "rb", buffering=0))  # noqa: SIM115 (the caller closes it)
    else:
        raise BadMedia(f"expected bytes, a path or an array, found {type(raw).__name__}")
    try:
        size = media_file.seek(0, os.SEEK_END)
        media_file.seek(0)
        if not size:
            raise BadMedia("an empty file")
        _check_length(media_file.peek(8)[:8], size)
    except BaseException:
        media_file.close()
        raise
    return media_file


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Turns any exception into BadMedia, because decoders raise nearly anything for broken files. Also a decorator.

    The message is one short line, without the address of our buffer, which differs from run to run.
    """
    try:
        yield
    except BadMedia:
        raise
    except Exception as error:
        message = getattr(error, "strerror", None) or str(error)  # `strerror` has no error number.
        text = " ".join(message.split(" <MediaFile")[0].split())
        name = type(error).__name__
        if name in UNKNOWN_FORMAT_ERRORS:
            raise BadMedia("damaged, or of a format that is not read") from None
        raise BadMedia(f"{name}: {text[:120]}" if text else name) from None


@contextmanager
def open_container(media_file: MediaFile, kind: Literal["video", "audio"]) -> Iterator[tuple[Any, Any, Any]]:
    """Opens a container with FFmpeg; yields it, its first stream of `kind`, and the length in seconds (0: unknown).

    It decodes in one thread, because the workers of the loader are parallel already.
    """
    _check_info(media_file)
    # No protocol is allowed, because the file is open already and must not name others. Probing has a higher limit than
    # `MAX_FRAME_PIXELS`, so that the error of `video._check_size` can name the size of a frame.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    options |= {"codec_whitelist": CODECS, "max_pixels": str(4 * MAX_FRAME_PIXELS)}
    container: Any
    with av.open(media_file, options=options, metadata_errors="ignore") as container:
        if not (streams := getattr(container.streams, kind)):
            raise BadMedia(f"no {kind} stream")
        stream = streams[0]
        context = stream.codec_context
        if context is None or context.codec.name not in CODECS.split(","):
            raise BadMedia(f"{kind} codec that is not read: {context and context.codec.name}")
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        context.thread_count = 1
        seconds = (container.duration or 0) / av.time_base
        if stream.duration:
            seconds = stream.duration * stream.time_base
        yield container, stream, seconds


def _check_info(media_file: MediaFile) -> None:
    """Refuses an AVI or WAV file if an INFO list in its header claims to be longer than the file.

    FFmpeg allocates and clears that much memory before it reads the list.
    """
    if media_file.peek(4)[:4] == b"RIFF":
        size = media_file.seek(0, os.SEEK_END)
        media_file.seek(0)
        lengths = [int.from_bytes(length, "little") for length in INFO_LIST.findall(media_file.read(INFO_SEARCH_BYTES))]
        media_file.seek(0)
        if max(lengths, default=0) > size:
            raise BadMedia(f"truncated: an INFO list of {max(lengths):,} bytes in a file of {size:,}")


def _check_length(head: bytes, size: int) -> None:
    """Refuses a truncated WAV, AVI, WebP or AIFF file; decoders would return the part that is there.

    Programs that write to a pipe do not know the length. They write the largest number or 0.
    """
    if head[:4] in LENGTHS and len(head) == 8:
        claimed = int.from_bytes(head[4:], LENGTHS[head[:4]])
        if size + LENGTH_TOLERANCE < claimed < 2**31 - 2**16:
            raise BadMedia(f"truncated: {size:,} bytes of {claimed + 8:,}")


class ExampleRng(np.random.Generator):
    """Random generator of one example.

    If the view has `sync: true`, all modalities of the example start at `sync_start` in training, a fraction of the
    recording's length. None: each modality draws its own start.
    """

    sync_start: float | None = None


def valid_place(latitude: float, longitude: float) -> tuple[float, float] | None:
    """The place, or None: devices that do not know their position write zeros, or numbers out of range."""
    is_valid = abs(latitude) <= 90 and abs(longitude) <= 180 and (latitude, longitude) != (0, 0)  # False for NaN.
    return (latitude, longitude) if is_valid else None


def random_start(total: int, span: int, rng: Rng) -> int:
    """A random start for a training clip of length `span` in a recording of length `total`.

    If `rng` has a `sync_start`, the clip starts there, or as late as it still fits into the recording.
    """
    room = max(0, total - span)
    sync_start = getattr(rng, "sync_start", None)
    return int(rng.integers(room + 1)) if sync_start is None else min(int(sync_start * total), room)


def clip_starts(total: int, span: int, clips: int) -> list[int]:
    """The starts of `clips` clips of length `span`, linearly spaced over `total`. A single clip is in the middle.

    Equal starts are returned once, so there may be fewer than `clips`. An item of at most `span` has one.
    """
    room = max(0, total - span)
    starts = [room * i // (clips - 1) for i in range(clips)] if clips > 1 else [room // 2]
    return [*dict.fromkeys(starts)]


def parts_to_read(total: int, span: int, clips: int, limit: int, rng: Rng | None) -> list[tuple[int, int]]:
    """The parts to read of an item with `total` frames or samples (0: unknown), as (start, count).

    In training, with `rng` and a known length, one random part of length `span` is read. Evaluation reads the whole
    item if it is at most `limit` long, or if the `clips` parts that it uses cover the item. Otherwise it reads only
    these parts. In the concatenation of the parts, `clip_starts` finds the same clips as in the whole item. If the
    length is unknown, the first `limit` are read.
    """
    if rng is not None and total > 0:
        return [(random_start(total, span, rng), span)]
    if total <= limit:
        return [(0, limit)]
    if total <= clips * span:
        return [(0, total)]
    return [(start, span) for start in clip_starts(total, span, clips)]


def equal_segments(media_file: MediaFile, seconds: float, span: float) -> list[tuple[float, float]]:
    """Equal segments of a recording, as (start, end) in seconds. Empty if it is too short to be divided.

    A segment is about as long as the `span` that a clip of the view sees, but at least `SEGMENT_SECONDS`. The size of
    the file bounds the number of segments, because its header may claim any length.
    """
    limit = min(MAX_SEGMENTS, media_file.seek(0, os.SEEK_END) // SEGMENT_BYTES)
    count = min(limit, round(seconds / max(span, SEGMENT_SECONDS)))
    if count <= 1:
        return []
    return [(i * seconds / count, (i + 1) * seconds / count) for i in range(count)]


def narrowed(numbers: np.ndarray, kind: type[np.integer[Any]]) -> np.ndarray:
    """Converts a larger integer type, as that of lists in tables, to a smaller one, if all of the numbers fit."""
    limits = np.iinfo(kind)
    is_larger = numbers.dtype.kind in "iu" and numbers.itemsize > limits.dtype.itemsize
    fits = is_larger and numbers.size and limits.min <= numbers.min() and numbers.max() <= limits.max
    return numbers.astype(kind) if fits else numbers


def check_range(batch: Tensor) -> None:
    """Raises ValueError if a value of a batch is far outside of -1..1, or not finite. An exported graph does not."""
    if not torch.compiler.is_exporting() and not (largest := batch.abs().max()) <= LARGEST:
        raise ValueError(f"expected values in -1..1, found {largest:g}")


def encode_webp(pixels: np.ndarray, side: int) -> bytes:
    """Encodes pixels (H, W, 3 or 4) uint8 as a WebP file. Its longer side has at most `side` pixels."""
    file = io.BytesIO()
    picture = PIL.Image.fromarray(pixels)
    picture.thumbnail((side, side), PIL.Image.Resampling.BILINEAR)
    picture.save(file, "WEBP", quality=80)
    return file.getvalue()


class PatchGrid(Strict):
    """Base for the options of a stem that splits its input into patches along named axes.

    Per axis, `patch` is the size of a patch, and `tables` the rows of the position table. `absolute` maps an axis' name
    to the span of its positions, if these are absolute. The convolution is along the last two axes.
    """

    axes: ClassVar[tuple[str, ...]]
    patch: tuple[int, ...]
    tables: tuple[int, ...]
    absolute: dict[Any, int]
    conv_channels: Whole = 0
    """Channels of a convolution before the patch embedding, with kernels of 4 x 4 pixels (of a sound: frames and bins),
    stride 2 and GELU. With it, models learn faster from little data (arXiv 2106.14881). Height and width of `patch`
    must be even. Each token also sees the 2 pixels around its patch; outside the picture, those of its border. 0: no
    convolution, as in the paper."""

    @model_validator(mode="after")
    def _patches_fit(self) -> "PatchGrid":
        if self.conv_channels and any(side % CONV_STRIDE for side in self.patch[-2:]):
            raise ValueError(f"conv_channels needs patches with even sides, found {list(self.patch[-2:])}")
        for name, side in zip(self.axes, self.patch):
            if self.absolute.get(name, 0) % side:
                raise ValueError(f"absolute: {name} {self.absolute[name]} is not a multiple of the patch's {side}")
        return self

    def cut(self, grid: Tensor, patch: tuple[int, ...], drop: float, rngs: list[Rng] | None) -> Tokens:
        """The tokens of a batch (B, *axes, C), cut into patches of the size `patch`; see `patch_tokens`.

        For a picture, `patch` is one frame of `self.patch`.
        """
        # The number of patches that each absolute axis spans; 0 for a relative axis.
        spans = tuple(self.absolute.get(name, 0) // side for name, side in zip(self.axes, self.patch))
        return patch_tokens(grid, patch, self.tables, drop, rngs, spans=spans, margin=self.margin)

    @property
    def margin(self) -> int:
        """How far a token reaches beyond its patch along the last two axes, on each side."""
        return CONV_MARGIN if self.conv_channels else 0

    def token_values(self, frames: int, height: int, width: int, channels: int) -> int:
        """The values of a token with a patch of this size."""
        return frames * (height + 2 * self.margin) * (width + 2 * self.margin) * channels

    def check(self, axis: int, size: int, beginning: str, scale: float = 1, unit: str = "") -> None:
        """Raises ValueError if an input of this size along an axis is not a whole number of patches, or too long.

        The message starts with `beginning`. It suggests the nearest valid sizes, each times `scale`, followed by
        `unit`.
        """
        side = self.patch[axis]
        # An axis is as long as its absolute span, or has one patch per row of its table.
        limit = self.absolute.get(self.axes[axis], self.tables[axis] * side)
        if 0 < size <= limit and size % side == 0:
            return
        below = min(max(side, size - size % side), limit)
        nearest_sizes = sorted({below, min(below + side, limit)})
        suggestion = " or ".join(f"{valid_size * scale:.6g}" for valid_size in nearest_sizes)
        raise ValueError(f"{beginning} not a multiple of {side} up to {limit}; use {suggestion}{unit}")


def patch_tokens(
    grid: Tensor,
    patch: tuple[int, ...],
    tables: tuple[int, ...],
    drop: float,
    rngs: list[Rng] | None,
    spans: tuple[int, ...] = (),
    margin: int = 0,
) -> Tokens:
    """Cuts a batch (B, *axes, C) into tokens: one patch of `patchify` each, with the coordinates of `coordinates`.

    With `rngs`, one per example, a random share `drop` of each example's tokens is left out: DropToken (VATT, arXiv
    2104.11178). The others stay in order.
    """
    counts = tuple(size // side for size, side in zip(grid.shape[1:], patch))
    coords = coordinates(counts, tables, spans).to(grid.device)
    total = len(coords)
    kept_count = tokens_kept(total, drop)
    if rngs is None or kept_count == total:
        return Tokens(patchify(grid, patch, margin=margin), coords.expand(grid.shape[0], -1, -1).contiguous())
    noise = np.stack([rng.random(total, dtype=np.float32) for rng in rngs])
    chosen = np.argpartition(noise, kept_count - 1, axis=1)[:, :kept_count]
    kept = torch.from_numpy(np.sort(chosen, axis=1))
    return Tokens(patchify(grid, patch, kept, margin), coords[kept])


def patch_count(sizes: Iterable[int], patch: Iterable[int]) -> int:
    """The number of patches in a grid."""
    return prod(size // side for size, side in zip(sizes, patch))


def tokens_kept(total: int, drop: float) -> int:
    """The number of tokens that DropToken leaves of `total`: at least one."""
    return max(1, round(total * (1 - drop)))


def patchify(grid: Tensor, patch: tuple[int, ...], kept: Tensor | None = None, margin: int = 0) -> Tensor:
    """Cuts a batch (B, *axes, C) into patches (B, L, P). Patches, and the values in a patch, are in the axes' order.

    With `kept` (B, K), only the patches with these indices are copied. With a `margin`, a patch also has that many
    values around it along the last two axes; outside the grid, those of its border.
    """
    axes = len(patch)
    batch, *sizes, _ = grid.shape
    if any(size % side for size, side in zip(sizes, patch)):
        raise ValueError(f"{sizes} does not consist of whole patches of {list(patch)}")
    counts = [size // side for size, side in zip(sizes, patch)]
    for axis, (size, side) in enumerate(zip(sizes, patch), 1):
        axis_margin = margin if axis > axes - 2 else 0
        if axis_margin:
            places = torch.arange(-margin, size + margin, device=grid.device).clamp(0, size - 1)
            grid = grid.index_select(axis, places)
        grid = grid.unfold(axis, side + 2 * axis_margin, side)
    patches = grid.movedim(1 + axes, -1)
    if kept is None:
        return patches.reshape(batch, prod(counts), -1)
    examples = torch.arange(batch, device=kept.device)[:, None]
    return patches[(examples, *torch.unravel_index(kept, counts))].flatten(2)


def coordinates(counts: tuple[int, ...], tables: tuple[int, ...], spans: tuple[int, ...] = ()) -> Tensor:
    """The rows of the position tables for a grid of L patches along A axes: (L, A), one row per patch and axis.

    Patch i of n along an axis uses row floor(i / n * rows). This coordinate is relative, so the same place has the same
    row at every resolution (arXiv 2305.06324). If an axis has a span other than 0, its coordinate is absolute: patch i
    uses row floor(i / span * rows), whatever n is.
    """
    rows = [torch.arange(n) * table // (span or n) for n, table, span in zip(counts, tables, spans or counts)]
    return torch.cartesian_prod(*rows).view(-1, len(rows))
