"""Clips: containers through PyAV, animated WebP, GIF and PNG through Pillow (which keeps what is transparent)."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
import PIL.Image
import torch

from openimp.common.modality import BadMedia, Tokens
from openimp.common.schema import Count, Share
from openimp.modalities.media import (
    MAX_MOVING,
    SHOWN,
    Source,
    clip_starts,
    opened,
    random_start,
    readable,
    reason,
    segments,
    webp,
)
from openimp.modalities.vision import CHANNELS, Vision, check_multiple, colour_array, shrink, shrunk_size, without_alpha

MAX_FRAMES = 256
"""Frames up to which a clip is read whole."""
DURATION = 100
"""Milliseconds that a frame of an animation is shown that does not say; browsers' choice."""
ROUNDING = 1e-6
"""Seconds by which times of frames are rounded."""
STRIP = 4
"""Frames of a clip that a person is shown."""
MAX_FRAME = 2 * 2**20
"""Pixels of a frame once it is shrunk; only absurdly long or wide ones have more."""
MAX_KEPT = 2**29
"""Bytes of all frames of a clip once they are shrunk."""


class Video(Vision):
    """A clip of frames."""

    name = "video"
    extensions = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv", ".gif")
    decoders = ("av", "pillow")

    class View(Vision.View):
        """How a clip is seen."""

        frames: Count = 16
        """Frames a clip; a multiple of the patch's. The paper: 16, and 4 for classification."""
        stride: Count = 2
        """Take every so many frames. A clip too short for that is seen whole, at the stride that spreads `frames` over
        it; if it has fewer, some are repeated."""
        clips: Count = 4
        """Clips in evaluation, linearly spaced, whose embeddings are averaged."""
        crops: Count = 1
        """Crops per clip in evaluation, evenly spaced along the longer side; their embeddings are averaged. 1: the
        center crop, as in the paper. Other protocols use 3."""
        flip: bool = False
        """Mirror half of the training clips; off, because captions tell left from right."""
        jitter: Share = 0.0
        """Brightness, contrast and saturation change in training by a factor of at most 1 ± this; off, as in the paper
        for captioned clips."""

        @property
        def span(self) -> int:
            """Frames of the source that a clip stretches over."""
            return (self.frames - 1) * self.stride + 1

    def grid(self, view: Any) -> tuple[int, int, int]:
        return (view.frames // self.config.patch[0], *super().grid(view)[1:])

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (view.frames, *view.hw, CHANNELS)

    def check(self, view: Any) -> None:
        super().check(view)
        check_multiple("frames: clip", view.frames, self.config.patch[0], self.config.limit(0), "frames")

    def decode(self, raw: Any, views: list[Any], rng: np.random.Generator | None = None) -> np.ndarray:
        """A clip to (T, H, W, 3), or (T, H, W, 4) where it is transparent; uint8.

        `raw` is bytes, a path, or a uint8 array (T, H, W) or (T, H, W, 1 to 4). Without `fps`, and in an array, frames
        are counted and not timed: with a variable frame rate a clip takes longer where frames are rare. Of more than
        256 frames, only those that evaluation sees are read.
        """
        if isinstance(raw, np.ndarray):
            return np.stack([shrink(frame, views) for frame in colour_array(raw, 3)])
        try:
            with readable(raw) as source:
                read = _read_animation if _is_animation(source) else _read_container
                return without_alpha(_stack(read(source, views, rng, self.config.fps)))
        except BadMedia:
            raise
        except Exception as error:  # broken files raise nearly anything
            raise BadMedia(reason(error)) from None

    def transform(self, item: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Frames (T, H, W, C) to one random clip (t, h, w, 3), or (clips * crops, t, h, w, 3) in evaluation; uint8."""
        total = len(item)
        step = min(view.stride, (total - 1) / max(1, view.frames - 1))
        offsets = np.round(np.arange(view.frames) * step).astype(int)
        if rng is not None:
            start = random_start(total, view.span, rng)
            return self._render(item[start + offsets], view, rng)
        windows = crop_windows(item.shape[1:3], view.hw, view.crops)
        clips = [item[start + offsets] for start in clip_starts(total, view.span, view.clips)]
        return np.stack([self._render(clip[window], view, None) for clip in clips for window in windows])

    def tokens(self, items: np.ndarray, view: Any, rngs: list[np.random.Generator] | None) -> Tokens:
        """Frames (B, t, h, w, 3) to patches, (B, L, t * h * w * 3 of a patch) uint8."""
        return self._tokens(torch.from_numpy(items), self.config.patch, view.drop_tokens, rngs)

    def show(self, value: Any, view: Any) -> bytes:
        """Up to 4 frames, evenly spaced from the first to the last that are read, side by side in a small WebP file."""
        item = self.decode(value, [view])
        chosen = item[np.linspace(0, len(item) - 1, min(STRIP, len(item))).round().astype(int)]
        return webp(np.concatenate(list(self._render(chosen, view, None)), axis=1), STRIP * SHOWN)

    def from_tensor(self, batch: torch.Tensor) -> Tokens:
        """Clips (B, T, 3, H, W) in -1..1 to tokens."""
        if batch.ndim != 5 or batch.shape[2] != 3 or not batch.is_floating_point():
            raise TypeError(f"expected float (B, T, 3, H, W) in -1..1, found {batch.dtype} {list(batch.shape)}")
        self.check(self.View(size=(batch.shape[3], batch.shape[4]), frames=batch.shape[1]))
        return self._tokens(batch.permute(0, 1, 3, 4, 2), self.config.patch, 0.0, None)


def crop_windows(size: tuple[int, int], target: tuple[int, int], crops: int) -> list[tuple[slice, slice, slice]]:
    """Index of the pixels of frames (T, H, W) that each crop is made from.

    The windows have the target's aspect ratio, are as large as fits, and are linearly spaced. If `crops` is 1, the
    window is the whole frame.
    """
    if crops == 1:
        return [(slice(None),) * 3]
    scale = min(size[0] / target[0], size[1] / target[1])
    height, width = max(1, round(target[0] * scale)), max(1, round(target[1] * scale))
    tops, lefts = clip_starts(size[0], height, crops), clip_starts(size[1], width, crops)
    return [(slice(None), slice(y, y + height), slice(x, x + width)) for y, x in zip(tops, lefts)]


def _stack(frames: Iterator[np.ndarray]) -> np.ndarray:
    """As `np.stack`, but each frame is let go of once it is copied, so that they are not held twice."""
    kept, size = [], 0
    for frame in frames:
        kept.append(frame)
        size += frame.nbytes
        if size > MAX_KEPT:
            raise BadMedia(f"the frames that are read take more than {MAX_KEPT} bytes")
    if not kept:
        raise BadMedia("no frames")
    out = np.empty((len(kept), *kept[0].shape), np.uint8)
    for i, frame in enumerate(kept):
        if frame.shape != out.shape[1:]:
            raise BadMedia("frames of different sizes")
        out[i], kept[i] = frame, out[i]  # a view, which takes no memory
    return out


def _plan(
    total: int, size: tuple[int, int], views: list[Any], rng: np.random.Generator | None
) -> list[tuple[int, int]]:
    """Which frames to read: see `segments`. Of frames of a large `size`, fewer are read whole."""
    longest = views[0] if rng is not None else max(views, key=lambda view: view.span)
    limit = min(MAX_FRAMES, MAX_KEPT // (size[0] * size[1] * 4))
    return segments(total, longest.span, longest.clips, limit, rng)


def _size(height: int, width: int, views: list[Any]) -> tuple[int, int]:
    """The size that frames are shrunk to; refuses what would not fit into memory."""
    if not 0 < height * width <= MAX_MOVING:
        raise BadMedia(f"frames of {width} x {height} pixels")
    height, width = shrunk_size((height, width), views)
    if height * width > MAX_FRAME:
        raise BadMedia(f"frames of {width} x {height} pixels")
    return height, width


def _is_animation(source: Source) -> bool:
    """Whether the first bytes are those of a WebP, GIF or PNG."""
    head = source.peek(12)[:12]
    return head[:4] == b"GIF8" or head[:8] == b"\x89PNG\r\n\x1a\n" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def at_rate(timed: Iterable[tuple[float, Any]], start: float, fps: float, count: int) -> Iterator[Any]:
    """What is shown at `count` times, 1 / fps seconds apart from `start` on, as far as it lasts.

    Args:
        timed: (seconds, frame) in order; each is shown until the next, and the last for as long as the one before it.
    """
    made, shown, since, length = 0, None, 0.0, 0.0
    for time, frame in timed:
        while shown is not None and made < count and start + made / fps < time - ROUNDING:
            yield shown
            made += 1
        if made == count:
            return
        length = time - since if shown is not None else length
        shown, since = frame, time
    while shown is not None and made < count and (not made or start + made / fps < since + length - ROUNDING):
        yield shown
        made += 1


def _read_animation(
    source: Source, views: list[Any], rng: np.random.Generator | None, fps: float | None
) -> Iterator[np.ndarray]:
    with PIL.Image.open(source, formats=("WEBP", "GIF", "PNG")) as picture:
        height, width = size = _size(picture.height, picture.width, views)
        total = getattr(picture, "n_frames", 1)

        def frame(i: int) -> np.ndarray:
            # Each frame is drawn over the one before, so all are decoded; and a frame may make a GIF larger.
            for step in range(0 if i < picture.tell() else picture.tell() + 1, i + 1):
                picture.seek(step)
                _size(picture.height, picture.width, views)
                source.spend(picture.height * picture.width)
                picture.load()
            return np.asarray(picture.convert("RGBA").resize((width, height), PIL.Image.Resampling.BILINEAR))

        def timed() -> Iterator[tuple[float, np.ndarray]]:
            seconds = 0.0
            for i in range(total):
                yield seconds, frame(i)
                seconds += (picture.info.get("duration") or DURATION) / 1000

        # How long it takes is known only when all frames are decoded, so at a rate it is read from its start.
        for start, count in _plan(0 if fps else total, size, views, rng):
            yield from at_rate(timed(), 0.0, fps, count) if fps else map(frame, range(start, min(start + count, total)))


def _read_container(
    source: Source, views: list[Any], rng: np.random.Generator | None, fps: float | None
) -> Iterator[np.ndarray]:
    with opened(source, "video") as (container, stream):
        native = stream.average_rate or 0
        rate = fps or native
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
        total = ((0 if fps else stream.frames) or int(seconds * rate)) if rate else 0
        size = _size(stream.height or 1, stream.width or 1, views)  # 0 if the header does not tell
        for start, count in _plan(total, size, views, rng):
            begin = start and start / rate
            if fps:  # One frame earlier, for it may still be shown when the part begins.
                frames = _part(source, container, stream, max(0, begin - (1 / native if native else 0)), sys.maxsize)
                zero, base = stream.start_time or 0, stream.time_base
                timed = ((float((frame.pts - zero) * base), frame) for frame in frames if frame.pts is not None)
                frames = at_rate(timed, float(begin), fps, count)
            else:
                frames = _part(source, container, stream, begin, count)
            for frame in frames:
                yield _pixels(frame, views)


def _part(source: Source, container: Any, stream: Any, seconds: Any, count: int) -> Iterator[Any]:
    """`count` frames from a time on, as far as there are; the one shown at that time if none begins after it."""
    first = before = None
    left = count
    if seconds:
        first = (stream.start_time or 0) + int(seconds / stream.time_base)
        container.seek(first, stream=stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadMedia("truncated")
        for frame in packet.decode():
            source.spend(frame.height * frame.width)
            if first is not None and frame.pts is not None and frame.pts < first:
                before = frame
                continue
            yield frame
            left -= 1
            if not left:
                return
    if before is not None and left == count:
        yield before


def _pixels(frame: Any, views: list[Any]) -> np.ndarray:
    """One frame (H, W, 3 or 4), shrunk and the right way up."""
    turns = round(frame.rotation / 90) % 4
    height, width = _size(*((frame.width, frame.height) if turns % 2 else (frame.height, frame.width)), views)
    if turns % 2:
        height, width = width, height
    transparent = any(component.is_alpha for component in frame.format.components)
    form = "rgba" if transparent else "rgb24"
    pixels = frame.to_ndarray(format=form, width=width, height=height, interpolation="BILINEAR")
    return np.rot90(pixels, turns) if turns else pixels
