"""Measures how often the items that an everyday word finds have this word in their texts.

    openimp index runs/demo
    python -m benchmarks.everyday_words runs/demo/search.index

Each query is one word. A result is right if the item's text (of the demo: its name and keywords) has the word, in the
singular or plural. Only words that the texts of at least five items have are searched. A word that the model does not
know finds nothing by meaning. Searched are pictures and clips alone, and then all kinds of items together.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import NamedTuple, get_args

from openimp.common.errors import UserError
from openimp.search import open_index
from openimp.search.index import Index
from openimp.search.query import By
from openimp.search.table import Items

WORDS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split()
PICTURES = ("image", "video")


class Precision(NamedTuple):
    """Shares of the results that are right, as means over the words."""

    first: float
    first_five: float


def says(text: str | None, word: str) -> bool:
    """Whether a text has a word, in the singular or plural."""
    return re.search(rf"\b{word}(s|es)?\b", text or "", re.IGNORECASE) is not None


def frequent_words(index: Index) -> list[str]:
    """The words that the texts of at least five items have."""
    texts = [text for text, name in Items(index.folder).columns("text", "modality") if name in PICTURES]
    return [word for word in WORDS if sum(says(text, word) for text in texts) >= 5]


def precision(index: Index, words: Iterable[str], by: By, modalities: list[str]) -> Precision:
    """The precision of searches for items of some modalities, each by one word."""
    first = []
    first_five = []
    for word in words:
        try:
            hits = index.search(word, k=5, modalities=modalities, by=by)
        except UserError:  # No word that the model knows.
            hits = []
        right = [says(hit.text, word) for hit in hits]
        first.append(sum(right[:1]))
        first_five.append(sum(right) / 5)
    return Precision(mean(first), mean(first_five))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    index = open_index(parser.parse_args().index)
    words = frequent_words(index)
    pictures = [name for name in PICTURES if name in index.counts]
    print("| search for | by | words | first result right | first five right |\n|---|---|---|---|---|")
    for kinds, modalities in (("pictures, clips", pictures), ("everything", list(index.counts))):
        for by in get_args(By):
            first, first_five = precision(index, words, by, modalities)
            print(f"| {kinds} | {by} | {len(words)} | {first:.1%} | {first_five:.1%} |")


if __name__ == "__main__":
    main()
