"""Chooses views, model, vocabulary and number of steps for the data and the machine."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

from openimp.common.errors import counted
from openimp.drafting.machine import Machine
from openimp.drafting.probing import Probed

WORD = re.compile(r"\w+")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Letters of languages that are written without spaces: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""
EPOCHS, EPOCH_ROWS = 40, 5000
"""A source of `EPOCH_ROWS` rows is seen `EPOCHS` times, and one of 16 times as many rows half as often. The demo sees
its stills 89 times, and the recipe for 48,000 icons sees those 22 times."""
MIN_STEPS = 200
MANY_ROWS = 2_000_000
"""Rows above which a large GPU gets a large model."""
WORD_ROWS = 50_000
"""Most rows for which the tokenizer uses whole words; see `min_df` in docs/recipe.md."""


@dataclass(frozen=True)
class Choice:
    """Values of the recipe, and the reason for them."""

    value: Any
    why: str


def picture(sample: Sequence[Probed], machine: Machine) -> Choice:
    """Size and patch of pictures and frames, in pixels."""
    side = median(probed.side for probed in sample)
    sizes = (32, 64, 128, 224) if machine.is_gpu else (32, 64)
    size = max([each for each in sizes if each <= side], default=sizes[0])
    noun = "clips" if sample[0].kind == "video" else "pictures"
    why = f"The shorter side of the {noun} has {side:.0f} pixels (the median of a sample of {len(sample)})."
    if size == sizes[-1] and side > size:
        why += " Larger pictures show more, but a step costs with their area." if machine.is_gpu else (
            " Larger pictures are for a GPU: a step costs with their area.")  # fmt: skip
    return Choice((size, 16 if size >= 128 else 8), why)


def clip(sample: Sequence[Probed], machine: Machine) -> Choice:
    """Frames of a clip and the distance between them."""
    frames = 16 if machine.is_gpu else 8
    total = max(1, median(probed.frames for probed in sample))
    rates = [probed.frames / probed.seconds for probed in sample if probed.seconds]
    span = min(total, 4 * median(rates)) if rates else total
    stride = max(1, int((span - 1) // (frames - 1)))
    seconds = median(probed.seconds for probed in sample)
    return Choice(
        {"frames": frames, "stride": stride}, f"The clips have {total:.0f} frames in {seconds:.1f} s (median)."
    )


def sound(sample: Sequence[Probed], machine: Machine) -> tuple[Choice, dict[str, Any]]:
    """Seconds of a sound, a whole number of patches, and the options of the spectrogram."""
    length = median(probed.seconds for probed in sample)
    config: dict[str, Any] = {"window": 1024, "hop": 256, "bins": 64} if length < 2 else {}
    patch = 0.256 if config else 1.024  # seconds: 16 hops
    count = max(1, ceil(min(length, 8 if machine.is_gpu else 4) / patch))
    why = f"The sounds have {length:.1f} s (median)."
    if count * patch < length:
        why += " Training hears a random part, and evaluation the mean of four parts."
    return Choice(round(count * patch, 3), why), config


@dataclass(frozen=True)
class Words:
    """What the texts of a recipe are made of."""

    counts: Counter[str]  # in the texts of how many rows each word occurs
    lengths: list[int]  # words per text
    unspaced: bool  # the language is written without spaces
    sides: int  # rows whose texts mention left or right


def count_words(rows: Iterable[Sequence[str]]) -> Words:
    """Counts the words in the texts of a sample of rows."""
    counts, lengths, letters, unspaced, sides = Counter[str](), list[int](), 0, 0, 0
    for texts in rows:
        words = [WORD.findall(text.lower()) for text in texts]
        counts.update({word for each in words for word in each})
        lengths += map(len, words)
        letters += sum(map(len, texts))
        unspaced += sum(len(UNSPACED.findall(text)) for text in texts)
        sides += any(word in ("left", "right") for each in words for word in each)
    return Words(counts, lengths, unspaced * 3 > letters, sides)


def text(words: Words, rows: int) -> tuple[dict[str, Any], int, str]:
    """The options of the tokenizer, the length of texts in tokens, and the reason."""
    lengths = sorted(words.lengths) or [1]
    long = lengths[int(0.95 * (len(lengths) - 1))]
    repeated = sum(count >= 2 for count in words.counts.values())
    about = f"95 % of the texts have at most {counted(long, 'word')}."
    if 100 <= rows <= WORD_ROWS and 3 * repeated > len(words.counts) and not words.unspaced:
        length = _power(long + 1)
        why = "Whole words. Those of a single row are left out, because they say nothing about other rows."
        return {"vocab_size": 8192, "min_df": 2, "positions": length}, length, f"{why} {about}"
    length = _power(2 * long + 1)
    size = next((size for limit, size in ((WORD_ROWS, 2048), (500_000, 8192)) if rows <= limit), 32_768)
    return {"vocab_size": size, "positions": length}, length, f"Subwords, learned from these texts. {about}"


def _power(tokens: int) -> int:
    return next((length for length in (8, 16, 32, 64) if tokens <= length), 128)


def model(rows: int, machine: Machine) -> Choice:
    """Width and depth of the encoder. Heads have 64 features."""
    if not machine.is_gpu:
        width, layers, why = (
            128,
            4,
            "A small model, because at the speed of a CPU many steps help more than many weights.",
        )
    elif rows < 50_000:
        width, layers, why = 256, 6, f"A small model, because {rows:,} rows are few; a larger one would memorize them."
    elif rows < MANY_ROWS or machine.memory < 40e9:
        width, layers, why = 384, 12, "The size of the paper's IMP-S."
    else:
        width, layers, why = 768, 12, "The size of the paper's IMP-B, for millions of rows."
    sizes = {"width": width, "layers": layers, "heads": width // 64, "mlp_dim": 4 * width}
    return Choice({**sizes, "qk_norm": True, "space": "joint", "embed_dim": 256, "init_temperature": 0.1}, why)


def batch_size(kind: str, rows: int, machine: Machine) -> int:
    """Examples per step: a power of two, and at most half of the rows, so that batches differ."""
    largest = {"image": 128, "video": 64, "audio": 64}[kind] * (2 if machine.is_gpu else 1)
    while largest > 2 and 2 * largest > rows:
        largest //= 2
    return largest


def epochs(rows: int) -> float:
    """How often training sees each row of a source: the more rows, the less often."""
    return max(4.0, min(EPOCHS, EPOCHS * (EPOCH_ROWS / rows) ** 0.25))


def rounded(steps: float) -> int:
    """A number of steps, rounded to two significant digits."""
    digits = len(str(int(steps))) - 2
    return max(MIN_STEPS, int(round(steps, -max(0, digits))))
