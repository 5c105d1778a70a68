import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.common.modality import BadMedia
from openimp.modalities.image import Image, upright
from openimp.modalities.media import coordinates, patchify
from openimp.modalities.video import Video
from openimp.modalities.vision import center_box, inception_box, jitter_matrix
from tests.messages import refuses
from tests.recordings import picture_file as file

IMAGE = Image(Image.Config())


def rng(seed=0):
    return np.random.default_rng(seed)


def pixels(height=40, width=60, channels=3, seed=0):
    return rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height, width):
    """A picture whose red grows to the right and whose green grows downwards."""
    out = np.zeros((height, width, 3), np.uint8)
    out[..., 0] = np.linspace(0, 255, width)[None]
    out[..., 1] = np.linspace(0, 255, height)[:, None]
    return out


def drawn(item, view, count):
    """The crops of a picture that training sees in this number of steps."""
    return np.stack([IMAGE.transform(item, view, rng(seed)) for seed in range(count)])


def test_pictures_of_phones_are_read_and_turned_upright(tmp_path):
    """HEIC files, whose pixels are upright, and others whose EXIF data say that the camera was turned."""
    seen = smooth(40, 60)
    stored = PIL.Image.fromarray(np.rot90(seen).copy())
    if find_spec("pillow_heif"):
        PIL.Image.fromarray(seen).save(tmp_path / "x.heic", quality=95)
    for name in ("x.avif", "x.jpg", "x.png"):
        exif = PIL.Image.Exif()  # A new one, because Pillow's AVIF encoder moves its orientation elsewhere.
        exif[0x0112] = 6  # Orientation: to be turned clockwise.
        stored.save(tmp_path / name, exif=exif, quality=95)
    for path in tmp_path.iterdir():
        decoded = IMAGE.decode(path, [Image.View()])
        assert decoded.shape == seen.shape, path
        assert np.abs(decoded.astype(int) - seen).mean() < 3, path


def test_pixels_may_be_integers_of_larger_types():
    """As lists of numbers in tables become them."""
    seen = pixels()
    for kind in (np.int64, np.uint16, np.int32):
        np.testing.assert_array_equal(IMAGE.decode(seen.astype(kind), [Image.View()]), seen)
    for others in (seen.astype(np.int64) + 1, seen / 255):
        with refuses(BadMedia):
            IMAGE.decode(others, [Image.View()])


def test_exif_data_of_a_wrong_type_do_not_make_a_picture_unreadable(tmp_path):
    # Two tags: an orientation to be turned clockwise, and as the width a text.
    tags = struct.pack("<H HHII HHI4s I", 2, 0x0112, 3, 1, 6, 0x0100, 2, 4, b"six", 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags
    seen = smooth(40, 60)
    PIL.Image.fromarray(np.rot90(seen).copy()).save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert IMAGE.decode(tmp_path / "x.jpg", [Image.View()]).shape == seen.shape
    with upright(tmp_path / "x.jpg") as picture:
        assert 0x0112 not in picture.getexif(), "a library would turn the picture again"


def test_what_heic_pictures_need_is_said(tmp_path):
    pytest.importorskip("pillow_heif")
    PIL.Image.fromarray(smooth(40, 60)).save(tmp_path / "x.heic")
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"  # As if it were not installed.
        "from openimp.modalities.image import Image\n"
        "Image(Image.Config()).decode(sys.argv[1], [Image.View()])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.heic"], capture_output=True, text=True)
    assert "a HEIC picture, which needs pillow-heif: pip install 'openimp[heif]'" in done.stderr


def test_16_bits_are_three_equal_channels():
    ramp = np.arange(600).reshape(20, 30) * 100
    wide = IMAGE.decode(file(PIL.Image.fromarray(ramp.astype(np.uint16)), "PNG"), [Image.View()])
    np.testing.assert_array_equal(wide, np.repeat((ramp >> 8)[..., None], 3, axis=2))


def test_alpha_is_kept_only_where_something_is_transparent():
    rgba = pixels(channels=4)
    rgba[..., 3] = 255
    assert IMAGE.decode(rgba, [Image.View()]).shape == (40, 60, 3)
    rgba[0, 0, 3] = 0
    assert IMAGE.decode(rgba, [Image.View()]).shape == (40, 60, 4)
    palette = PIL.Image.fromarray(pixels()).quantize(8)
    assert IMAGE.decode(file(palette, "PNG", transparency=0), [Image.View()]).shape == (40, 60, 4)


def test_transparency_is_white_in_evaluation_and_any_colour_in_training():
    clear = np.zeros((64, 64, 4), np.uint8)
    view = Image.View(size=64, jitter=0.0)
    assert (IMAGE.transform(clear, view, None) == 255).all()
    assert len(np.unique(drawn(clear, view, 8)[:, 5, 5], axis=0)) == 8


@given(height=st.integers(1, 300), width=st.integers(1, 300), size=st.sampled_from([16, 32, 64]))
@settings(max_examples=25, deadline=None)
def test_decoded_pictures_cover_the_view_and_no_more(height, width, size):
    views = [Image.View(size=16), Image.View(size=(size, 32))]
    out = IMAGE.decode(file(PIL.Image.new("RGB", (width, height)), "JPEG"), views)
    need = max(size / height, 32 / width)
    assert min(height, size) <= out.shape[0] <= np.ceil(min(1, 1.15 * need) * height) + 1
    assert out.shape[1] >= min(width, 32)
    assert IMAGE.transform(out, views[1], rng()).shape == (size, 32, 3)


PNG = file(PIL.Image.fromarray(pixels()), "PNG")


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"no picture", PNG[: len(PNG) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        *("/no/such/file", "/", 7, PIL.Image.new("F", (4, 4))),
        *(np.zeros((4, 4), np.float32), np.zeros((4, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8)),
    ],
)
def test_what_is_no_picture_is_bad_media(raw):
    with pytest.raises(BadMedia) as error:
        IMAGE.decode(raw, [Image.View()])
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)


def test_evaluation_resizes_to_288_and_crops_256_by_default():
    """As the release does, in one step: 256 of 288 pixels are eight ninths of the shorter side."""
    picture = smooth(576, 720)
    out = IMAGE.transform(picture, Image.View(), None)[0]
    resized = PIL.Image.fromarray(picture).resize((360, 288), PIL.Image.Resampling.BILINEAR)
    cropped = np.asarray(resized.crop((52, 16, 52 + 256, 16 + 256)))
    assert np.abs(out.astype(int) - cropped).max() <= 1
    assert IMAGE.decode(picture, [Image.View(size=64, crop_pct=0.5)]).shape[0] == 128  # enough for what is cut away


def test_training_crops_follow_their_options():
    item, view = smooth(80, 80), Image.View(size=32, flip=False, jitter=0.0, crop=0.3)
    crops = drawn(item, view, 60)
    spread = crops[:, :, -1, 0].mean(1) - crops[:, :, 0, 0].mean(1)
    assert 0.33 * 255 < spread.min() < 0.6 * 255  # sqrt(0.3 / 2) = 0.39 of the width at least
    assert spread.max() > 0.85 * 255
    whole = Image.View(size=32, flip=False, jitter=0.0, crop=1.0, crop_pct=1.0)
    np.testing.assert_array_equal(IMAGE.transform(item, whole, rng(1)), IMAGE.transform(item, whole, None)[0])


@pytest.mark.parametrize("largest", [1.0, 1.5, 2.0])
def test_training_crops_are_up_to_a_factor_wider_or_taller_than_the_view(largest):
    boxes = [inception_box((100, 100), (32, 32), 0.3, largest, rng(seed).random(4).tolist()) for seed in range(500)]
    aspects = [(right - left) / (lower - upper) for left, upper, right, lower in boxes]
    assert 0.999 / largest <= min(aspects) < 1.1 / largest
    assert 0.9 * largest < max(aspects) <= 1.001 * largest


def test_half_of_the_training_pictures_are_mirrored_and_one_in_five_keeps_its_colors():
    item, view = smooth(32, 32), Image.View(size=32, crop=1.0, jitter=0.4)
    pictures = drawn(item, view, 400)
    assert 0.4 < np.mean([out[0, 0, 0] > out[0, -1, 0] for out in pictures]) < 0.6
    assert 0.15 < np.mean([(out == item).all() or (out[:, ::-1] == item).all() for out in pictures]) < 0.25


def test_jitter_changes_colours_but_neither_black_nor_grey_from_grey():
    luma = [0.299, 0.587, 0.114, 0]
    np.testing.assert_allclose(np.reshape(jitter_matrix(1, 1, 0), (3, 4)), [luma] * 3, atol=1e-9)
    grey = np.full((32, 32, 3), 100, np.uint8)
    outs = drawn(grey, Image.View(size=32, jitter=0.4), 20)
    assert (np.ptp(outs.astype(int), axis=-1) <= 1).all()
    assert outs[:, 0, 0, 0].std() > 10


boxes = st.tuples(st.integers(1, 500), st.integers(1, 500))


@given(boxes, boxes, st.floats(0.01, 1), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
def test_boxes_lie_in_the_picture(size, target, smallest, draw):
    for left, upper, right, lower in (inception_box(size, target, smallest, 2.0, draw), center_box(size, target)):
        assert 0 <= left < right <= size[1]
        assert 0 <= upper < lower <= size[0]


def test_tokens_are_patches_in_order_with_their_coordinates():
    items = np.stack([pixels(32, 48, seed=i) for i in range(3)])
    tokens = IMAGE.tokens(items, Image.View(size=(32, 48)), None)
    assert tokens.values.shape == (3, 6, 16 * 16 * 3)
    np.testing.assert_array_equal(tokens.values[1, 4].reshape(16, 16, 3), items[1, 16:, 16:32])
    assert tokens.coords[0].tolist() == [[0, 0, 0], [0, 0, 10], [0, 0, 21], [0, 16, 0], [0, 16, 10], [0, 16, 21]]
    with refuses(TypeError):
        IMAGE.from_tensor(torch.zeros(1, 32, 32, 3))


def test_tensors_and_grids_that_are_not_whole_patches_are_refused():
    with pytest.raises(ValueError, match="size: height of 40 pixels is not a multiple of 16"):
        IMAGE.from_tensor(torch.zeros(1, 3, 40, 32))
    with pytest.raises(ValueError, match=r"\[40, 32\] does not consist of whole patches of \[16, 16\]"):
        patchify(torch.zeros(1, 40, 32, 3), (16, 16))


@given(drop=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_dropped_tokens_leave_the_others_in_place(drop, seed):
    view = Image.View(size=64, drop_tokens=drop)
    items = np.stack([pixels(64, 64, seed=i) for i in range(2)])
    every = IMAGE.tokens(items, view, None)
    some = IMAGE.tokens(items, view, [rng(seed), rng(seed + 1)])
    assert some.values.shape[1] == IMAGE.length(view) == max(1, round(16 * (1 - drop)))
    for b in range(2):
        index = some.coords[b, :, 1] // 8 * 4 + some.coords[b, :, 2] // 8
        assert (index.diff() > 0).all()
        assert torch.equal(some.values[b], every.values[b, index])


def test_a_place_has_the_same_position_at_any_resolution():
    """The release's rows: a 16 x 16 grid uses every second row of a table of 32, and an 8 x 8 grid every fourth."""
    for patches, step in ((32, 1), (16, 2), (8, 4)):
        rows = coordinates((1, patches, patches), (16, 32, 32))
        assert rows[:, 0].unique().tolist() == [0]
        assert rows[:, 1].unique().tolist() == rows[:patches, 2].tolist() == list(range(0, 32, step))
    assert coordinates((4, 1, 1), (16, 32, 32))[:, 0].tolist() == [0, 4, 8, 12]
    assert coordinates((24,), (32,))[:, 0].tolist() == [i * 32 // 24 for i in range(24)]


def test_each_place_of_a_grid_has_a_position_of_its_own():
    """Also at lower resolutions. A table of its own counts the frames."""
    grid = Image.Config(patch=(2, 8, 8), tables=(4, 3, 5), positions="grid")
    low = Image(grid).tokens(pixels(8, 16)[None], Image.View(size=(8, 16)), None).coords[0]
    assert low.tolist() == [[0, 0], [0, 2]]
    view = Video.View(size=(24, 40), frames=4)
    clip = Video(grid).tokens(np.zeros((1, 4, 24, 40, 3), np.uint8), view, None).coords[0]
    assert clip.tolist() == [[frame, place] for frame in (0, 2) for place in range(15)]


def test_an_absolute_axis_has_the_same_row_however_many_patches_there_are():
    grid = Image.Config(absolute={"frames": 64, "width": 512})
    rows = coordinates((2, 4, 4), grid.tables, spans=(16, 0, 32))
    assert rows[:, 0].unique().tolist() == [0, 1]
    assert rows[:4, 2].tolist() == [0, 1, 2, 3]
    assert rows[:, 1].unique().tolist() == [0, 8, 16, 24]
    with pytest.raises(ValueError, match="absolute: width 100 is not a multiple of the patch's 16"):
        Image.Config(absolute={"width": 100})
    with refuses(ValueError):
        Image(Image.Config(absolute={"height": 128})).check(Image.View(size=256))


@pytest.mark.parametrize("size", [250, 528, (64, 70)])
def test_sizes_that_make_no_whole_patch_are_refused(size):
    with refuses(ValueError):
        IMAGE.check(Image.View(size=size))


def test_a_convolution_needs_patches_with_even_sides():
    with pytest.raises(ValueError, match=r"conv_channels needs patches with even sides, found \[4, 7\]"):
        Image.Config(patch=(1, 4, 7), conv_channels=8)
