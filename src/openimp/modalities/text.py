"""Sentences: lower-cased subwords, or known words, of a tokenizer that is trained on the recipe's captions or read from
a file."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, StemSpec, Tokens
from openimp.common.safe_files import read_text
from openimp.common.schema import Count, RecipePath, Strict
from openimp.modalities.tokenizer_file import open_tokenizer

PAD, END = 0, 1
UNKNOWN = "[UNK]"
"""What a tokenizer of whole words has in the place of all others; it is left out of texts."""
RESERVED = 2
"""Ids before the tokenizer's own: its id i is our i + 2, so any tokenizer will do, whatever it pads or ends with."""
LONGEST_TOKEN = 64
"""Characters a token at most, when a long text is cut before it is tokenised."""
LEARNT_FROM = 10_000
"""Characters of a text that a tokenizer learns from: its time grows with the square of a word that never ends."""
REMEMBERED = 2**16
"""Words whose ids are kept; before there are more, all are forgotten."""


class Text(Modality):
    """A sentence: its first subwords or known words, an end token, and pads that the mask excludes."""

    name = "text"
    stem = "text"
    masked = True
    reads_text = True
    extensions = (".txt",)
    decoders = ("tokenizers",)

    class Config(Strict):
        """The tokenizer and the position table."""

        renamed = {"vocab": "vocab_size"}

        tokenizer: RecipePath | None = None
        """Path of a tokenizer file of the `tokenizers` library; left out: one is trained on the recipe's captions."""
        vocab_size: Annotated[int, Field(ge=RESERVED + 256)] = 8192
        """Largest number of ids of a tokenizer that is trained: two of ours, 256 bytes, and merges, or words."""
        min_df: Count | None = None
        """Read whole words that the texts of at least so many training examples have, and leave out all others and what
        is between them (scikit-learn's min_df); left out: subwords. For few captions, whose rare words tell nothing of
        anything new; not for languages that put no spaces between words."""
        positions: Count = 256
        """Rows of the position table; no text can be longer."""

        @model_validator(mode="after")
        def _one_tokenizer(self) -> "Text.Config":
            if self.tokenizer is not None and self.min_df is not None:
                raise ValueError("min_df is for a tokenizer that is trained, not for one of a file")
            return self

    class View(Strict):
        """How a sentence is read."""

        length: Count = 16
        """Tokens, the end token included; longer texts keep their beginning. The paper: 16."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._tokenizer: Tokenizer | None = None
        self._word_by_word = False
        self._unknown: int | None = None
        self._known: dict[str, list[int]] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The trained tokenizer."""
        if self._tokenizer is None:
            raise RuntimeError("no tokenizer yet: call fit or load_state first")
        return self._tokenizer

    def stem_spec(self) -> StemSpec:
        # Before it is trained a tokenizer counts as large as it may become; a file's ids may have gaps.
        ids = (
            self.config.vocab_size
            if self._tokenizer is None
            else RESERVED + 1 + max(self._tokenizer.get_vocab().values())
        )
        return StemSpec(values=ids, axes=(self.config.positions,), table=True)

    def check(self, view: Any) -> None:
        if view.length > self.config.positions:
            raise ValueError(f"length {view.length} is more than the {self.config.positions} positions of the table")

    def length(self, view: Any) -> int:
        return view.length

    def fit(self, corpus: Iterable[list[str]]) -> None:
        """Reads the tokenizer file, or learns a lower-cased byte-level BPE, or words, from the texts of each example;
        equal texts, equal tokenizer.

        Raises:
            UserError: the file is no tokenizer, or no word is in as many examples as it has to be.
        """
        if self.config.tokenizer is not None:
            self._use(_load(self.config.tokenizer))
            return
        if self.config.min_df is not None:
            self._use(_words(corpus, self.config.min_df, self.config.vocab_size - RESERVED))
            return
        tokenizer = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size - RESERVED,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        texts = (_valid(text[:LEARNT_FROM]) for text in chain.from_iterable(corpus))
        tokenizer.train_from_iterator(texts, trainer)
        self._use(tokenizer)

    def state(self) -> dict[str, str]:
        return {"tokenizer.json": self.tokenizer.to_str()}

    def load_state(self, state: dict[str, str]) -> None:
        try:
            self._use(open_tokenizer(state["tokenizer.json"]))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"tokenizer.json: not a tokenizer that openimp opens: {error}") from None

    def decode(self, raw: Any, views: list[Any], rng: np.random.Generator | None = None) -> np.ndarray:
        """A string, or the first of a list, to ids (n,) int64 of its subwords, as many as the longest view takes."""
        if isinstance(raw, list | tuple) and raw:
            raw = raw[0]
        if not isinstance(raw, str):
            raise BadMedia(f"expected a text, found {type(raw).__name__}")
        return self._ids(raw, max(view.length for view in views))

    def transform(self, item: np.ndarray, view: Any, rng: np.random.Generator | None) -> np.ndarray:
        """Ids (n,) to (length,), or (1, length) in evaluation: ended and padded. Nothing is random here."""
        out = np.full(view.length, PAD, np.int64)
        beginning = item[: view.length - 1]
        out[: len(beginning)] = beginning
        out[len(beginning)] = END
        return out[None] if rng is None else out

    def knows(self, value: Any, view: Any) -> bool:
        return not isinstance(value, str) or not value.strip() or len(self._ids(value, view.length)) > 0

    def tokens(self, items: np.ndarray, view: Any, rngs: list[np.random.Generator] | None) -> Tokens:
        """Ids (B, length) to tokens whose mask excludes the pads."""
        return self.from_tensor(torch.from_numpy(items))

    def from_tensor(self, batch: torch.Tensor) -> Tokens:
        """Ids (B, L) as `tokenize` gives them to tokens."""
        if batch.ndim != 2 or batch.is_floating_point():
            raise TypeError(f"expected integer ids (B, L), found {batch.dtype} {list(batch.shape)}")
        self.check(self.View(length=batch.shape[1]))
        coords = torch.arange(batch.shape[1], device=batch.device).expand(len(batch), -1)
        return Tokens(batch.long(), coords[..., None].contiguous(), batch != PAD)

    def tokenize(self, texts: str | list[str], length: int | None = None) -> torch.Tensor:
        """Texts to ids (B, length) padded with 0, as open_clip's tokenizers give them; the default is a view's."""
        view = self.View() if length is None else self.View(length=length)
        texts = [texts] if isinstance(texts, str) else texts
        return torch.from_numpy(np.concatenate([self.encode_input(text, view) for text in texts]))

    def _use(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        whole = _reading(tokenizer) == _reading(_of_words({}))
        self._word_by_word = whole or _reading(tokenizer) == _reading(_untrained())
        self._unknown = tokenizer.token_to_id(UNKNOWN) if whole else None
        self._known = {}

    def _ids(self, text: str, count: int) -> np.ndarray:
        # The text is cut first, so that a novel in place of a caption costs no time.
        text = _valid(text[: LONGEST_TOKEN * count])
        words = text.split(" ")
        if not self._word_by_word or words != text.split() or len(max(words, key=len)) > LONGEST_TOKEN:
            return np.array(self._encode(text)[:count], np.int64) + RESERVED
        # Our own tokenizers put the space before a word to the word, or leave it out, and read each by itself, as long
        # as there is nothing but single spaces between them. Looking words up is many times as fast as calling them.
        ids: list[int] = []
        for word in words:
            if len(ids) >= count:
                break
            found = self._known.get(word)
            if found is None:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                found = self._known[word] = self._encode(word)
            ids += found
        return np.array(ids[:count], np.int64) + RESERVED

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if self._unknown is None else [i for i in ids if i != self._unknown]


def _untrained() -> Tokenizer:
    """A lower-cased byte-level BPE that knows no merges yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_words(vocab: dict[str, int]) -> Tokenizer:
    """Lower-cased words of letters and digits, of these the known ones."""
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    return tokenizer


def _words(corpus: Iterable[list[str]], min_df: int, size: int) -> Tokenizer:
    """A tokenizer of the words that the texts of at least `min_df` examples have; if too many, of the most frequent."""
    reader, examples = _of_words({}), Counter[str]()
    for texts in corpus:
        normalized = (reader.normalizer.normalize_str(_valid(text)) for text in texts)
        pieces = chain.from_iterable(map(reader.pre_tokenizer.pre_tokenize_str, normalized))
        examples.update({word for word, _ in pieces})
    known = sorted((word for word, count in examples.items() if count >= min_df), key=lambda w: (-examples[w], w))
    if not known:
        raise UserError(f"modalities.text.min_df: no word is in the texts of {min_df} of the training examples")
    return _of_words({word: i for i, word in enumerate([UNKNOWN, *known][:size])})


def _reading(tokenizer: Tokenizer) -> dict[str, Any]:
    """How a tokenizer reads a text before it looks up what it learned."""
    told = json.loads(tokenizer.to_str())
    return {**told, "model": [told["model"].get(key) for key in ("type", "dropout")]}


def _valid(text: str) -> str:
    """Without lone surrogates, which no UTF-8 can hold."""
    return text.encode("utf-8", "ignore").decode("utf-8")


def _load(path: str) -> Tokenizer:
    try:
        # A view says how long a text is; the file's own pads would be words to us.
        return open_tokenizer(read_text(Path(path)))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"modalities.text.tokenizer: {path} is not a tokenizer that openimp opens: {error}") from None
