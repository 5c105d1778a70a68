import av
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.common.modality import BadMedia
from openimp.modalities.media import clip_starts, parts_to_read
from openimp.modalities.video import Video, _stack
from tests.messages import refuses
from tests.recordings import animation, counting, film, picture_file, sound_file

VIDEO = Video(Video.Config())


def rng(seed=0):
    return np.random.default_rng(seed)


def greys(clip, step=5):
    """Which frames of `counting` a clip shows."""
    return np.round(clip.reshape(len(clip), -1).mean(1) / step).astype(int).tolist()


@pytest.mark.parametrize(
    ("form", "codec"), [("mpegts", "mpeg2video"), ("vob", "mpeg2video"), ("asf", "wmv2"), ("3gp", "mpeg4")]
)
def test_films_of_cameras_and_players_give_their_frames_in_order(form, codec):
    out = VIDEO.decode(film(counting(40), form, codec), [Video.View(size=32)])
    assert out.shape == (40, 32, 48, 3)
    assert greys(out) == list(range(40))


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG", "mov"])
def test_animated_pictures_and_films_keep_what_is_transparent(form):
    frames = np.concatenate([counting(6, step=40), np.full((6, 32, 48, 1), 255, np.uint8)], axis=-1)
    frames[:, :16, :, 3] = 0
    raw = film(frames, form, "png", "rgba") if form == "mov" else animation(frames, form)
    out = VIDEO.decode(raw, [Video.View(size=32)])
    assert out.shape == (6, 32, 48, 4)
    assert (out[:, :16, :, 3] == 0).all()
    assert greys(out[:, 16:, :, :3], 40) == list(range(6))


def test_a_still_is_a_clip_of_one_frame():
    item = VIDEO.decode(picture_file(PIL.Image.new("RGB", (64, 48)), "JPEG"), [Video.View(size=32)])
    assert len(item) == 1
    assert VIDEO.transform(item, Video.View(size=32, frames=4), rng()).shape == (4, 32, 32, 3)


def test_turned_films_are_turned_back():
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :16] = 255
    out = VIDEO.decode(film(frames, rotation=-90), [Video.View(size=32)])
    assert out.shape[2] < out.shape[1]
    assert out[0, :, -8:].mean() > 200  # the upper half is now the right one
    assert out[0, :, :8].mean() < 50


def test_a_long_film_is_read_where_evaluation_sees_it():
    frames = counting(300, 16, 16, step=1) // 2
    view = Video.View(size=16, frames=4, stride=2, clips=3)
    raw = film(frames, "matroska", "ffv1", "gray", gop=5)
    part = VIDEO.decode(raw, [view])
    assert len(part) == 3 * 7
    assert VIDEO.decode(raw, [view], rng()).shape[0] == 7
    np.testing.assert_array_equal(VIDEO.transform(part, view, None), VIDEO.transform(frames, view, None))


def test_clips_of_a_long_film_with_fewer_frames_than_its_header_claims():
    """Here the sound is longer than the picture. No clip mixes frames of different moments."""
    grey = np.arange(500)[:, None, None, None] // 2
    frames = np.broadcast_to(grey, (500, 16, 16, 3)).astype(np.uint8)
    view = Video.View(size=16, frames=4, stride=2, clips=3)
    sound = np.zeros(22 * 8000)  # The frames take 20 s.
    raw = film(frames, "matroska", "ffv1", "gray", gop=5, sound=sound, audio="pcm_s16le", rate=8000)
    part = VIDEO.decode(raw, [view])
    assert len(part) == 3 * 7
    first, middle, last = (greys(clip, 1) for clip in VIDEO.transform(part, view, None))
    assert first == [0, 1, 2, 3]
    assert middle == list(range(middle[0], middle[0] + 4))
    assert 120 < middle[0] < 150
    assert last == [249] * 4


def test_a_variable_frame_rate_is_no_trouble():
    raw = film(counting(8, step=30), "matroska", "ffv1", "gray", times=[0, 1, 2, 3, 40, 41, 42, 90])
    for seed in (None, *range(6)):
        view = Video.View(size=32, frames=4, stride=1)
        shown = greys(VIDEO.decode(raw, [view], None if seed is None else rng(seed)), 30)
        assert shown == list(range(shown[0], shown[0] + len(shown)))


MP4, AVI, WEBP = film(counting(12)), film(counting(12), "avi"), animation(counting(5), "WEBP")


@pytest.mark.parametrize(
    "raw",
    [
        *(b"no film" * 99, MP4[: len(MP4) // 2], AVI[:-100], WEBP[: len(WEBP) // 2], sound_file(np.zeros(1000))),
        *(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8))),
    ],
)
def test_what_is_no_film_is_bad_media(raw):
    with pytest.raises(BadMedia) as error:
        VIDEO.decode(raw, [Video.View()])
    assert "\n" not in str(error.value)


def test_a_film_cut_short_behind_its_index_is_bad_media(tmp_path):
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for pixels in rng().integers(0, 256, (30, 32, 48, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    raw = path.read_bytes()
    assert len(VIDEO.decode(raw, [Video.View()])) == 30
    with refuses(BadMedia):
        VIDEO.decode(raw[: len(raw) * 2 // 3], [Video.View()])


def test_training_takes_a_random_start_with_the_stride():
    item, view = counting(50), Video.View(size=32, frames=8, stride=3, crop=1.0)
    clips = [greys(VIDEO.transform(item, view, rng(seed))) for seed in range(30)]
    assert all(clip == list(range(clip[0], clip[0] + 22, 3)) for clip in clips)
    assert min(clips)[0] < 5 < 23 < max(clips)[0]


def test_evaluation_takes_linearly_spaced_clips():
    for count, starts in ((4, [0, 10, 20, 30]), (1, [15])):
        clips = VIDEO.transform(counting(37), Video.View(size=32, frames=4, stride=2, clips=count), None)
        assert [greys(clip)[0] for clip in clips] == starts


@given(total=st.integers(1, 40), frames=st.sampled_from([4, 8, 16]), stride=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_short_clips_are_spread_over_all_of_their_frames(total, frames, stride):
    view = Video.View(size=16, frames=frames, stride=stride, crop=1.0)
    shown = greys(VIDEO.transform(counting(total, 16, 16), view, rng(total)))
    assert len(shown) == frames
    assert shown == sorted(shown)
    if total < view.span:
        assert (shown[0], shown[-1]) == (0, total - 1)


def test_all_frames_share_crop_flip_background_and_colours():
    item = np.repeat(rng().integers(0, 256, (1, 50, 50, 4), dtype=np.uint8), 16, axis=0)
    for seed in range(4):
        clip = VIDEO.transform(item, Video.View(size=32, flip=True, jitter=0.5), rng(seed))
        assert (clip == clip[:1]).all()


def test_tokens_are_blocks_of_frames_in_order_with_their_coordinates():
    items = rng().integers(0, 256, (2, 8, 32, 48, 3), dtype=np.uint8)
    tokens = VIDEO.tokens(items, Video.View(size=(32, 48), frames=8), None)
    assert tokens.values.shape == (2, 12, 4 * 16 * 16 * 3)
    np.testing.assert_array_equal(tokens.values[1, 6 + 4].reshape(4, 16, 16, 3), items[1, 4:, 16:, 16:32])
    assert tokens.coords[0, [0, 1, 3, 6]].tolist() == [[0, 0, 0], [0, 0, 10], [0, 16, 0], [8, 0, 0]]


def test_views_that_make_no_whole_patch_are_refused():
    with refuses(ValueError):
        VIDEO.check(Video.View(frames=15))


@given(st.integers(1, 10_000), st.integers(1, 50), st.integers(1, 9))
def test_what_is_read_of_a_long_item_is_what_evaluation_cuts(total, span, clips):
    """And each frame is read once, and each clip cut once."""
    frames = [*range(total)]
    wanted = [frames[start : start + span] for start in clip_starts(total, span, clips)]
    assert len({*map(tuple, wanted)}) == len(wanted) == max(1, min(clips, total - span + 1))
    for limit in (0, 10_000):
        read = [
            i for start, count in parts_to_read(total, span, clips, limit, None) for i in frames[start : start + count]
        ]
        assert len({*read}) == len(read) <= max(limit, clips * span)
        assert [read[start : start + span] for start in clip_starts(len(read), span, clips)] == wanted


def test_a_long_film_is_scaled_and_a_random_part_of_it_is_its_frames():
    """H.264 with a single key frame and frames that refer to later ones; frame i has value i."""
    view, frames = Video.View(size=64), counting(250, 144, 320, step=1)
    raw = film(frames, codec="libx264", gop=250)
    whole = VIDEO.decode(raw, [view])
    assert whole.shape == (250, 74, 164, 3)
    np.testing.assert_allclose(whole.reshape(250, -1).mean(1), np.arange(250), atol=4)
    starts = set()
    for seed in range(6):
        part = VIDEO.decode(raw, [view], rng(seed))
        assert len(part) == view.span
        starts |= {i for i in range(250 - view.span + 1) if np.array_equal(whole[i : i + view.span], part)}
    assert len(starts) == 6


@pytest.mark.parametrize("turned", [False, True])
def test_evaluation_takes_crops_along_the_longer_side_of_each_clip(turned):
    """Frames whose columns (rows) are of one grey each, brighter to the right (downwards)."""
    frames = np.broadcast_to((np.arange(96) * 2)[None, None, :, None], (20, 32, 96, 3)).astype(np.uint8)
    frames = frames.transpose(0, 2, 1, 3) if turned else frames
    view = {"size": 32, "frames": 4, "stride": 1, "clips": 2}
    out = VIDEO.transform(frames, VIDEO.View(**view, crops=3), None)
    assert [crop.mean() for crop in out] == pytest.approx(2 * [31, 95, 159], abs=1)
    single = VIDEO.transform(frames, VIDEO.View(**view), None)
    assert (single == out[[1, 4]]).all(), "the middle one of three is the only one of one"
    square = frames[:, :32, :32]
    assert len(VIDEO.transform(square, VIDEO.View(**view, crops=3), None)) == 2, "a square film has one crop"


def test_frames_of_different_sizes_are_bad_media():
    with pytest.raises(BadMedia, match="frames of different sizes"):
        _stack(np.zeros((side, 8, 3), np.uint8) for side in (8, 6))


def test_a_long_clip_is_cut_into_segments_that_cover_it():
    raw = film(counting(250, step=1))
    view = Video.View(size=32, frames=4, stride=1, clips=3, crop_pct=1)
    assert VIDEO.segments(raw, view) == [(0.0, 5.0), (5.0, 10.0)]
    first, second = (VIDEO.encode_segment(raw, view, *segment) for segment in VIDEO.segments(raw, view))
    for clips, start in ((first, 0), (second, 125)):
        frames = [start, start + 60, start + 121]
        assert [clip[0].mean() for clip in clips] == pytest.approx(frames, abs=3)


def test_a_short_clip_an_animation_and_an_array_are_not_cut():
    view = Video.View(size=32, frames=4, stride=1)
    assert VIDEO.segments(film(counting(150, step=1)), view) == []
    assert VIDEO.segments(animation(counting(20), "GIF"), view) == []
    assert VIDEO.segments(counting(20), view) == []
