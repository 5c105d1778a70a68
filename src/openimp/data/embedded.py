"""The vectors of the texts that towers and teachers embed before the training."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from openimp.common.progress import Progress
from openimp.common.protocols import Towered
from openimp.data.store import Decoded, decoding_key, store_on_disk


class EmbeddedTexts:
    """The vectors of texts: `texts[text]`."""

    def __init__(self, modality: Towered, texts: Iterable[str], progress: Progress | None) -> None:
        distinct = list(dict.fromkeys(texts))

        def embed(numbers: range) -> Iterator[Decoded]:
            return modality.embed_all(partial(str, distinct[number]) for number in numbers)

        self._store = store_on_disk(decoding_key(modality, []), distinct, embed, "embedding texts", progress)
        self._number = {text: number for number, text in enumerate(distinct)}

    def __getitem__(self, text: str) -> np.ndarray:
        """The vectors (crops, features) of a text. BadMedia if it could not be embedded."""
        return self._store[self._number[text]]
