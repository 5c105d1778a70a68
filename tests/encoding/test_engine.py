"""The engine: items come back in order, with vectors that do not depend on how they are divided between processes."""

from functools import partial

import numpy as np
import pytest
import torch

import openimp
from openimp.common.modality import BadMedia
from openimp.encoding import engine
from openimp.encoding.engine import ItemEncoder, chunks_on_cpu


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return openimp.load(tiny_model_folder, device="cpu", precision="fp32")


@pytest.fixture
def passes(model):
    """The number of clips in each forward pass."""
    clips: list[int] = []
    hook = model.imp.encoder.register_forward_pre_hook(lambda _, inputs: clips.append(sum(map(len, inputs[0]))))
    yield clips
    hook.remove()


def sounds(encoder: ItemEncoder, lengths: list[int | None]) -> list:
    """Items with different sounds of so many samples, by their numbers; None: it cannot be read."""

    def read(number: int, length: int | None) -> np.ndarray:
        if length is None:
            raise BadMedia(f"sound {number} is broken")
        return encoder.read(np.random.default_rng(number).normal(0, 0.1, length).astype(np.float32))

    return [(number, partial(read, number, length)) for number, length in enumerate(lengths)]


# A long sound has two clips, a short one has one.
LENGTHS = [20_000, 8000, None, 8000, 8000, 20_000, 20_000, None, 8000]


def test_items_come_in_order_with_a_vector_or_a_reason(model, passes):
    encoder = model.item_encoder("audio", "text", 4, "test")
    results = list(encoder.encode(sounds(encoder, LENGTHS)))
    assert [number for number, _ in results] == list(range(len(LENGTHS)))
    assert [str(why) for _, why in results if isinstance(why, BadMedia)] == ["sound 2 is broken", "sound 7 is broken"]
    # The first four items have two, one, no and one clip; the next four one, two, two and none; the last one has one.
    assert passes == [4, 3, 2, 1]
    for number, vector in results:
        if isinstance(vector, torch.Tensor):
            ((_, alone),) = encoder.encode(sounds(encoder, LENGTHS)[number : number + 1])
            torch.testing.assert_close(vector, alone, rtol=0, atol=1e-5)


def test_items_that_are_divided_at_whole_batches_have_the_same_vectors_bit_for_bit(model, passes):
    encoder = model.item_encoder("audio", "text", 4, "test")
    lengths = [8000, None, *[8000] * 10]
    items = sounds(encoder, lengths)
    whole = dict(encoder.encode(items))
    clips = [*passes]
    parts = dict(encoder.encode(items[:4])) | dict(encoder.encode(items[4:]))
    assert passes == 2 * clips
    assert all(torch.equal(whole[number], parts[number]) for number, length in enumerate(lengths) if length)


def test_chunks_have_the_vectors_of_their_items_on_the_cpu(model, monkeypatch):
    monkeypatch.setattr(engine, "COPIED_TOGETHER", 4)
    encoder = model.item_encoder("audio", "text", 4, "test")
    items = sounds(encoder, LENGTHS)
    chunks = list(chunks_on_cpu(encoder.encode(items)))
    assert [len(chunk) for chunk in chunks] == [4, 4, 1]
    for (number, vector), (same, array) in zip(encoder.encode(items), (result for chunk in chunks for result in chunk)):
        assert number == same
        assert np.array_equal(array, vector) if isinstance(vector, torch.Tensor) else isinstance(array, BadMedia)
