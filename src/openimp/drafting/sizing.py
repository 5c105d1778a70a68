"""Chooses views, model, tokenizer, batch sizes and number of steps for the data and the machine."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import ceil, inf
from statistics import mean, median
from typing import Any

from openimp.common.texts import text_key
from openimp.drafting.machine import Machine
from openimp.drafting.probing import MediaInfo

EPOCHS = 65
"""How often training sees each row of a source of `EPOCH_ROWS`; of one with 16 times as many rows, half as often."""
EPOCH_ROWS = 5000
MIN_STEPS = 200
EVALUATIONS = 4
"""Evaluations during the training, besides the one at its end."""
EVALUATED_SHARE = 0.1
"""All evaluations together encode at most this share of the examples that training sees."""
SHORT_SOUND = 2.048
"""Seconds up to which sounds get finer spectrograms."""
WORD_ROWS = 50_000
"""Most rows for which the tokenizer uses whole words; see `min_df` in docs/recipe.md."""
CACHE_SHARE = 0.1
"""Decoded media of all sources together are cached in at most this share of the computer's memory."""
MARGIN = 1.15**2
"""Pixels of a cached picture per pixel of its view."""
SMALL_PICTURE = 32
"""Pixels per side of pictures that are cropped less, and convolved."""
CONV_CHANNELS = 64
"""Channels of the convolution of pictures of at most `SMALL_PICTURE` pixels; with larger ones it was not measured."""
PATCHES = {32: 4, 64: 8}
"""Pixels per side of a patch by the size of the view, so that a small picture has 64 tokens; otherwise 16."""
LONG_CLIP = 128
"""Frames: half of the limit up to which a cache holds all of a clip (`cache` in docs/recipe.md)."""
LONG_SOUND = 150.0
"""Seconds: half of the limit for sounds."""
VECTOR_BATCH = 2048
"""Most examples of a step that only reads vectors. Its similarities take memory with the square of this number."""
VECTOR_STEPS = 100
"""Steps of a task that only reads vectors, if a step has all rows. More of them learn the rows by heart."""
VECTOR_EPOCHS = 40
"""How often training sees the vectors of each row, if they are too many for one step."""
DROPOUT = 0.5
"""Share of the numbers of a vector that a step drops."""


def view(kind: str, sample: Sequence[MediaInfo], machine: Machine) -> dict[str, Any]:
    """The view of pictures, clips or sounds, by the medians of a sample."""
    seconds = median(probed.seconds for probed in sample)
    if kind == "audio":
        patch = 0.256 if seconds <= SHORT_SOUND else 1.024
        count = max(1, ceil(min(seconds, 8 if machine.is_gpu else 4) / patch))
        return {"seconds": round(count * patch, 3)}
    side = median(probed.side for probed in sample)
    sizes = (32, 64, 128, 224) if machine.is_gpu else (32, 64)
    size = max((size for size in sizes if size <= side), default=sizes[0])
    if kind == "image":
        # Small pictures show one thing that fills them, so the changes that suit photographs hide too much of it.
        small = {"crop": 0.7, "aspect": 1.33, "jitter": 0, "crop_pct": 1}
        return {"size": size} | (small if size <= SMALL_PICTURE else {})
    frames = 16 if machine.is_gpu else 8
    total = median(probed.frames for probed in sample)
    span = total * min(1, 4 / seconds) if seconds else total  # frames of four seconds
    return {"size": size, "frames": frames, "stride": max(1, int((span - 1) // (frames - 1)))}


def stems(views: dict[str, dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """The options of the stems of pictures, clips and sounds."""
    options: dict[str, Any] = {}
    if sizes := [view["size"] for view in views.values() if "size" in view]:
        side = PATCHES.get(max(sizes), 16)
        frames = (4 if machine.is_gpu else 2) if "video" in views else 1
        options["vision"] = {"patch": [frames, side, side]}
        if max(sizes) <= SMALL_PICTURE:
            options["vision"]["conv_channels"] = CONV_CHANNELS
    if "audio" in views and views["audio"]["seconds"] <= SHORT_SOUND:
        options["audio"] = {"window": 1024, "hop": 256, "bins": 64}
    return options


def text(texts: Sequence[str], rows: int, class_names: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The options of the tokenizer, and the length of a text with its end token in most steps of the training.

    The length is enough for 95 % of the texts and for all names of classes: a class that is
    cut could be equal to another one. Nor are words the tokens if the names of two classes have equal words, such as
    "C" and "C++". `positions` is a power of two, so that queries may be longer. The number of subwords is only
    estimated.
    """
    words_by_text = [re.findall(r"\w+", text.lower()) for text in texts]
    counts = Counter(word for words in words_by_text for word in {*words})
    repeated = sum(count >= 2 for count in counts.values())
    distinct_names = {text_key(name) for name in class_names}
    words_differ = len({tuple(re.findall(r"\w+", name)) for name in distinct_names}) == len(distinct_names)
    if 100 <= rows <= WORD_ROWS and 3 * repeated > len(counts) and words_differ:
        options = {"vocab_size": 8192, "min_df": 2}

        def length_of(text: str) -> int:
            return len(re.findall(r"\w+", text)) + 1
    else:
        options = {"vocab_size": 2048 if rows <= WORD_ROWS else 8192 if rows <= 500_000 else 32_768}

        def length_of(text: str) -> int:
            # A subword has about three bytes: half of an English word, or a Chinese letter.
            return len(text.encode()) // 3 + 1

    lengths = sorted(map(length_of, texts))
    longest = max([lengths[int(0.95 * (len(lengths) - 1))], *map(length_of, class_names)])
    positions = next((count for count in (8, 16, 32, 64) if longest <= count), 128)
    length = min(longest, positions) if "min_df" in options else positions
    return {**options, "positions": positions}, length


def model(rows: int, machine: Machine) -> dict[str, Any]:
    """Width and depth of the encoder. Heads have 64 features."""
    width = 384 if rows < 2_000_000 or machine.memory < 40e9 else 768
    layers = 12
    if rows < 50_000:
        width = 256
        layers = 6
    if not machine.is_gpu:
        width = 128
        layers = 4
    return {
        "width": width,
        "layers": layers,
        "heads": width // 64,
        "mlp_dim": 4 * width,
        "qk_norm": True,
        "attention_init": "mimetic",
        "space": "joint",
        "embed_dim": 256,
        "init_temperature": 0.1,
    }


def heads_on_towers(towers: Mapping[str, Any], kinds: Collection[str]) -> dict[str, Any]:
    """The model if each modality has a tower: only heads. With texts, its space is that of the tower of texts."""
    width = towers["text"].features if "text" in kinds else max(towers[kind].features for kind in kinds)
    return {"width": width, "layers": 0, "heads": 1, "space": "joint", "embed_dim": width, "init_temperature": 0.05}


def batch_size(kind: str, rows: int, machine: Machine, decodes: bool) -> int:
    """Examples per step: a power of two, and at most half of the rows, so that batches differ.

    With a tower, a step does not decode media but reads vectors.
    """
    largest = (128 if kind == "image" else 64) * (2 if machine.is_gpu else 1) if decodes else 1024
    return max(2, min(largest, 2 ** (rows.bit_length() - 2)))


def vector_batch_size(rows: int) -> int:
    """Examples per step of a task that only reads vectors: all rows, if they are few."""
    return max(2, min(VECTOR_BATCH, rows))


def steps(rows: int, batch_size: int, only_vectors: bool = False) -> float:
    """The steps that a source needs: the more rows, the less often each is seen."""
    if only_vectors:
        return max(VECTOR_STEPS, VECTOR_EPOCHS * rows / batch_size)
    return rows * max(4.0, min(EPOCHS, EPOCHS * (EPOCH_ROWS / rows) ** 0.25)) / batch_size


def rounded(steps: float, only_vectors: bool = False) -> int:
    """A number of steps, rounded to two significant digits."""
    return max(VECTOR_STEPS if only_vectors else MIN_STEPS, int(float(f"{steps:.2g}")))


def steps_between_evaluations(recipe: Mapping[str, Any], measured_rows: int) -> int | None:
    """The interval that gives `EVALUATIONS` evaluations before the last one, or fewer if training is short or they
    would be slow.

    None: there is only the last one. `measured_rows` are those of all evaluation sets together; without any set, 0.
    """
    if not measured_rows:
        return None
    tasks = recipe["tasks"].values()
    total_weight = sum(task["weight"] for task in tasks)
    mean_batch = sum(task["weight"] * task["batch_size"] for task in tasks) / total_weight
    steps = recipe["train"]["steps"]
    affordable = int(EVALUATED_SHARE * steps * mean_batch / measured_rows)
    every = max(MIN_STEPS, ceil(steps / (min(EVALUATIONS, affordable) + 1)))
    return every if every < steps else None


def decoded_bytes(sample: Sequence[MediaInfo], view: dict[str, Any], rows: int) -> float:
    """The memory that the decoded media of a source take. Infinite if some may be too long to be kept whole."""
    if "seconds" in view:
        is_long = max(probed.seconds for probed in sample) > LONG_SOUND
        size = 2 * 16_000 * mean(probed.seconds for probed in sample)
    else:
        is_long = max(probed.frames for probed in sample) > LONG_CLIP
        size = 3 * MARGIN * view["size"] ** 2 * mean(max(1, probed.frames) for probed in sample)
    return inf if is_long else rows * size
