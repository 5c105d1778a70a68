"""Clips: containers through PyAV; animated WebP, GIF and PNG through Pillow, which keeps transparency."""

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
import PIL.Image

from openimp.common.modality import BadMedia, Rng
from openimp.common.protocols import Recorded, TensorInput
from openimp.common.schema import Count, Share
from openimp.modalities import media
from openimp.modalities.vision import CHANNELS, Vision, check_pixels, decoded_size, drop_opaque_alpha, shrink

MAX_FRAMES = 256
"""Most frames of a clip that is read as a whole."""
ANIMATION = re.compile(rb"GIF8|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)
"""First bytes of WebP, GIF and PNG, which Pillow reads instead of FFmpeg."""
MAX_SHRUNK_PIXELS = 2 * 2**20
"""Most pixels of a frame after it is shrunk; only absurdly long or wide frames have more."""
MAX_CLIP_BYTES = 2**29
"""Most bytes of all frames of a clip after they are shrunk. While they are stacked, they take twice the memory."""


class Video(Vision):
    """A clip of frames."""

    name = "video"
    tensor_axes = ("B", "T", "3", "H", "W")
    extensions = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob",
                  ".flv", ".wmv", ".3gp", ".ogv", ".gif")  # fmt: skip
    decoders: ClassVar[tuple[str, ...]] = ("av", "pillow")

    class View(Vision.View):
        """Frames, size, tokens and augmentation of a clip."""

        frames: Count = 16
        """Frames per clip; a multiple of the patch's. The paper: 16, and 4 for classification."""
        stride: Count = 2
        """Distance between frames. If a film is too short, a smaller stride spreads `frames` over all of it; if it has
        fewer, some are repeated."""
        clips: media.Clips = 4
        """Most clips in evaluation, linearly spaced, whose embeddings are averaged. A film no longer than a clip has
        one."""
        crops: media.Clips = 1
        """Most crops per clip in evaluation, evenly spaced along the longer side; their embeddings are averaged. 1: the
        center crop, as in the paper. Other protocols use 3. A square frame has one."""
        flip: bool = False
        """Mirror half of the training clips. It is off because captions mention left and right."""
        jitter: Share = 0.0
        """Brightness, contrast and saturation change in training by a factor between 1 - jitter and 1 + jitter; off, as
        in the paper for captioned clips."""

        @property
        def span(self) -> int:
            """Frames of the recording that a clip stretches over."""
            return (self.frames - 1) * self.stride + 1

    def shape(self, view: Any) -> tuple[int, int, int, int]:
        return (view.frames, *view.hw, CHANNELS)

    def tensor_input(self, view: Any) -> TensorInput:
        pixels = super().tensor_input(view)
        return pixels._replace(
            shape=(view.frames, *pixels.shape),
            preparation=f"{view.frames} frames at a distance of {view.stride}; if the clip is shorter, spread "
            f"them over all of it. Of a longer clip, take {view.clips} such parts, evenly spaced, and average their "
            f"unit vectors. Each frame: {pixels.preparation}",
        )

    def check(self, view: Any) -> None:
        super().check(view)
        self.config.check(0, view.frames, f"frames: clip of {view.frames} frames is")

    @media.decoder_errors()
    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """Decodes a clip to (T, H, W, 3) uint8, or to (T, H, W, 4) if any of it is transparent.

        `raw` is bytes, a path, or an array of 0..255, (T, H, W) or (T, H, W, 1 to 4). If a clip has more than 256
        frames, only those that evaluation uses are read. The times of frames do not matter.
        """
        if isinstance(raw, np.ndarray):
            return np.stack([shrink(PIL.Image.fromarray(frame), views) for frame in check_pixels(raw, 3)])
        with media.open_media(raw) as media_file:
            read = _read_animation if _is_animation(media_file) else _read_container
            return _stack(read(media_file, views, rng))

    @media.decoder_errors()
    def recorded(self, value: Any) -> Recorded:
        """The time and place in the header of a container. Animations have neither."""
        with media.open_media(value) as media_file:
            if _is_animation(media_file):
                return Recorded()
            with media.open_container(media_file, "video") as (container, _, _):
                tags = container.metadata
            return Recorded(_container_time(tags), _container_place(tags))

    def segments(self, value: Any, view: Any) -> list[tuple[float, float]]:
        """The segments of a clip. Animations are not cut, because they can only be decoded from their start."""
        if isinstance(value, np.ndarray):
            return []
        with media.decoder_errors(), media.open_media(value) as media_file:
            if _is_animation(media_file):
                return []
            with media.open_container(media_file, "video") as (_, stream, seconds):
                rate = stream.average_rate
            return media.equal_segments(media_file, float(seconds), float(view.span / rate)) if rate else []

    def encode_segment(self, value: Any, view: Any, start: float, end: float) -> np.ndarray:
        """The view's clips (clips * crops, t, h, w, 3), spaced over the segment."""
        with media.decoder_errors(), media.open_media(value) as media_file:
            frames = _stack(_read_container(media_file, [view], None, (start, end)))
        return self.transform(frames, view, None)

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """Makes one random clip (t, h, w, 3) of frames (T, H, W, C), or (clips * crops, t, h, w, 3) in evaluation,
        with at most the clips and crops of the view."""
        total = len(item)
        step = min(view.stride, (total - 1) / max(1, view.frames - 1))
        offsets = np.round(np.arange(view.frames) * step).astype(int)
        if rng is not None:
            start = media.random_start(total, view.span, rng)
            return self._render(item[start + offsets], view, rng)
        regions = crop_regions(item.shape[1:3], view.hw, view.crops)
        clips = [item[start + offsets] for start in media.clip_starts(total, view.span, view.clips)]
        return np.stack([self._render(clip[region], view, None) for clip in clips for region in regions])

    @media.decoder_errors()
    def thumbnail(self, value: Any, view: Any, side: int, segment: tuple[float, float] | None = None) -> bytes:
        """A frame from the middle."""
        still = Video.View(size=side, frames=1, stride=1, clips=1)
        if segment is None:
            middle = media.ExampleRng(np.random.PCG64(0))
            middle.sync_start = 0.5
            frames = self.decode(value, [still], middle)
        else:
            time = sum(segment) / 2
            with media.open_media(value) as media_file:
                frames = _stack(_read_container(media_file, [still], None, (time, time)))
        return media.encode_webp(frames[len(frames) // 2], side)


def _container_time(tags: Mapping[str, str]) -> datetime | None:
    """The time in the time zone of the camera, which only Apple's phones write, or else of this machine."""
    local_time = tags.get("com.apple.quicktime.creationdate")
    try:
        if local_time:
            return datetime.strptime(local_time, "%Y-%m-%dT%H:%M:%S%z").replace(tzinfo=None)
        # Python 3.10 reads no Z.
        time = datetime.fromisoformat(tags.get("creation_time", "").replace("Z", "+00:00"))
    except ValueError:
        return None
    is_set = time.year > 1970  # Clocks that are not set begin in 1904 or 1970.
    return time.astimezone().replace(tzinfo=None, microsecond=0) if is_set else None


def _container_place(tags: Mapping[str, str]) -> tuple[float, float] | None:
    """The place that phones write: +48.8577+002.2950/ or with a height and a reference, in degrees (ISO 6709)."""
    text = tags.get("com.apple.quicktime.location.ISO6709") or tags.get("location") or ""
    match = re.match(r"([+-]\d{2}(?:\.\d+)?)([+-]\d{3}(?:\.\d+)?)(?=[-+/]|CRS|$)", text)
    return media.valid_place(float(match[1]), float(match[2])) if match else None


def crop_regions(size: tuple[int, int], target: tuple[int, int], crops: int) -> list[tuple[slice, slice, slice]]:
    """The indices into frames (T, H, W) of the pixels that each crop is made from.

    The regions have the target's aspect ratio, are as large as fits, and are linearly spaced. A frame of that ratio has
    a single one. If `crops` is 1, the region is the whole frame.
    """
    if crops == 1:
        return [(slice(None),) * 3]
    scale = min(size[0] / target[0], size[1] / target[1])
    height = max(1, round(target[0] * scale))
    width = max(1, round(target[1] * scale))
    # Along the shorter side there is one start.
    tops = media.clip_starts(size[0], height, crops)
    lefts = media.clip_starts(size[1], width, crops)
    return [(slice(None), slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]


def _stack(frames: Iterator[np.ndarray]) -> np.ndarray:
    """Stacks frames (H, W, C), without an alpha channel that is opaque everywhere. Limits their memory."""
    kept: list[np.ndarray] = []
    clip_bytes = 0
    for frame in frames:
        if kept and frame.shape != kept[0].shape:
            raise BadMedia("frames of different sizes")
        kept.append(frame)
        clip_bytes += frame.nbytes
        if clip_bytes > MAX_CLIP_BYTES:
            raise BadMedia(f"the frames that are read take more than {MAX_CLIP_BYTES} bytes")
    if not kept:
        raise BadMedia("no frames")
    return drop_opaque_alpha(np.stack(kept))


def _parts_to_read(total: int, size: tuple[int, int], views: list[Any], rng: Rng | None) -> list[tuple[int, int]]:
    """The frames to read; see `media.parts_to_read`. If frames are large, fewer of them are read as a whole."""
    longest = views[0] if rng is not None else max(views, key=lambda view: view.span)
    limit = min(MAX_FRAMES, MAX_CLIP_BYTES // (size[0] * size[1] * 4))
    return media.parts_to_read(total, longest.span, longest.clips, limit, rng)


def _shrunk_size(height: int, width: int, views: list[Any]) -> tuple[int, int]:
    """The size that frames are shrunk to. Refuses frames that are too large before or after."""
    _check_size(height, width, media.MAX_FRAME_PIXELS)
    shrunk_height, shrunk_width = decoded_size((height, width), views)
    _check_size(shrunk_height, shrunk_width, MAX_SHRUNK_PIXELS)
    return shrunk_height, shrunk_width


def _check_size(height: int, width: int, limit: int) -> None:
    if not 0 < height * width <= limit:
        raise BadMedia(f"frames of {width} x {height} pixels")


def _is_animation(media_file: media.MediaFile) -> bool:
    return ANIMATION.match(media_file.peek(12)) is not None


def _read_animation(media_file: media.MediaFile, views: list[Any], rng: Rng | None) -> Iterator[np.ndarray]:
    with PIL.Image.open(media_file, formats=("WEBP", "GIF", "PNG")) as picture:
        size = _shrunk_size(picture.height, picture.width, views)
        total = getattr(picture, "n_frames", 1)
        parts = _parts_to_read(total, size, views, rng)
        wanted = {i for start, count in parts for i in range(start, total)[:count]}
        for i in range(max(wanted) + 1):
            picture.seek(i)  # All frames are decoded, because each is drawn over the one before.
            _shrunk_size(picture.height, picture.width, views)  # A frame may enlarge a GIF.
            media_file.spend(picture.height * picture.width)
            picture.load()
            if i in wanted:
                yield np.asarray(picture.convert("RGBA").resize(size[::-1], PIL.Image.Resampling.BILINEAR))


def _read_container(
    media_file: media.MediaFile,
    views: list[Any],
    rng: Rng | None,
    segment: tuple[float, float] | None = None,  # start and end in seconds; None: the whole clip
) -> Iterator[np.ndarray]:
    with media.open_container(media_file, "video") as (container, stream, seconds):
        rate = stream.average_rate or 0
        total = 0  # unknown
        if rate:
            total = stream.frames or int(seconds * rate)
        size = _shrunk_size(stream.height or 1, stream.width or 1, views)  # 0 if the header does not contain the size.
        if segment:
            total = max(1, round((segment[1] - segment[0]) * float(rate)))
        parts = _parts_to_read(total, size, views, rng)
        for start, count in parts:
            begin = start / rate if start else 0
            if segment:
                begin = segment[0] + float(begin)
                count = min(count, total)
            missing = count
            pixels = None
            for frame in _frames_from(media_file, container, stream, begin, count):
                pixels = _pixels(frame, views)
                missing -= 1
                yield pixels
            # A header may claim more frames than there are. `transform` cuts several parts where they should end.
            if len(parts) > 1 and pixels is not None:
                yield from repeat(pixels, missing)


def _frames_from(media_file: media.MediaFile, container: Any, stream: Any, seconds: Any, count: int) -> Iterator[Any]:
    """Up to `count` frames from a time on, or the last frame before it if no frame begins later."""
    start_pts = None
    before = None
    remaining = count
    if seconds:
        start_pts = (stream.start_time or 0) + int(seconds / stream.time_base)
        container.seek(start_pts, stream=stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise BadMedia("truncated")
        for frame in packet.decode():
            media_file.spend(frame.height * frame.width)
            if start_pts is not None and frame.pts is not None and frame.pts < start_pts:
                before = frame
                continue
            yield frame
            remaining -= 1
            if not remaining:
                return
    if before is not None and remaining == count:
        yield before


def _pixels(frame: Any, views: list[Any]) -> np.ndarray:
    """One frame (H, W, 3 or 4), shrunk and turned upright."""
    turns = round(frame.rotation / 90) % 4
    if turns % 2:
        width, height = _shrunk_size(frame.width, frame.height, views)
    else:
        height, width = _shrunk_size(frame.height, frame.width, views)
    transparent = any(component.is_alpha for component in frame.format.components)
    form = "rgba" if transparent else "rgb24"
    pixels = frame.to_ndarray(format=form, width=width, height=height, interpolation="BILINEAR")
    return np.rot90(pixels, turns)
