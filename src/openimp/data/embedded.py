"""The vectors of the texts that towers embed before the training."""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from openimp.common.modality import BadMedia
from openimp.common.progress import Progress
from openimp.common.protocols import Towered
from openimp.data.store import Decoded, decoding_of, store_on_disk
from openimp.data.tables import Table
from openimp.data.templates import columns_of, fill


class EmbeddedTexts:
    """The vectors of texts: `texts[text]`."""

    def __init__(self, modality: Towered, texts: Iterable[str], progress: Progress | None) -> None:
        distinct = list(dict.fromkeys(texts))

        def embed(numbers: range) -> Iterator[Decoded]:
            return modality.embed_all(partial(str, distinct[number]) for number in numbers)

        self._store = store_on_disk(decoding_of(modality), distinct, embed, "embedding texts", progress)
        self._number = {text: number for number, text in enumerate(distinct)}

    def __getitem__(self, text: str) -> np.ndarray:
        """The vectors (crops, features) of a text. BadMedia if it could not be embedded."""
        return self._store[self._number[text]]


class EmbeddedRows:
    """The vectors of the texts that evaluation makes of a table's rows: `texts[row]`."""

    def __init__(self, table: Table, modality: Towered, templates: list[str], progress: Progress | None) -> None:
        self._texts = [*_evaluation_texts(table, templates)]
        readable = (text for text in self._texts if isinstance(text, str))
        self._vectors = EmbeddedTexts(modality, readable, progress)

    def __getitem__(self, row: int) -> np.ndarray:
        """The vectors of a row's text; BadMedia if it has none."""
        text = self._texts[row]
        if isinstance(text, BadMedia):
            raise text
        return self._vectors[text]


def _evaluation_texts(table: Table, templates: list[str]) -> Iterator[str | BadMedia]:
    for row in table.iterate(columns_of(templates)):
        try:
            yield fill(templates, row)
        except BadMedia as error:
            yield error
