"""Texts: subwords or known words, from a tokenizer that is trained on the recipe's captions or read from a file."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, Rng, StemSpec, Tokens
from openimp.common.protocols import TensorInput
from openimp.common.safe_files import read_text
from openimp.common.schema import Count, RecipePath, Strict
from openimp.common.texts import valid_text
from openimp.modalities.tokenizer_file import open_tokenizer

PAD = 0
END = 1
TOKENIZER_FILE = "tokenizer.json"
"""The tokenizer in the folder of a model."""
UNKNOWN = "[UNK]"
"""The token of all words that a word tokenizer does not know. It is removed from texts."""
RESERVED = 2
"""Ids that openimp reserves. Id i of the tokenizer becomes i + 2, so its own pads and end tokens do not matter."""
NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
"""Of the tokenizers that are trained."""
CHARACTERS_PER_TOKEN = 64
"""Before a text is tokenized, it is cut to this many characters per token of the view."""
MAX_TRAINING_LENGTH = 10_000
"""Most characters of a text to train subwords on. The time of training grows with the square of the longest word."""


class Text(Modality):
    """A text: its first subwords or known words, an end token, and pads, which the mask excludes.

    A text without a known word, such as an empty one, has no valid token. So its features and embeddings are 0, and it
    is similar to nothing. Otherwise all such texts would share one embedding, which is near many pictures.
    """

    name = "text"
    stem = "text"
    masked = True
    reads_text = True
    extensions = (".txt",)
    decoders: ClassVar[tuple[str, ...]] = ("tokenizers",)
    file_copies: ClassVar[dict[str, str]] = {"tokenizer": TOKENIZER_FILE}
    _tokenizer: Tokenizer | None = None

    class Config(Strict):
        """The tokenizer and the position table."""

        tokenizer: RecipePath | None = None
        """Path of a tokenizer file of the `tokenizers` library. By default a tokenizer is trained on the recipe's
        captions."""
        vocab_size: Annotated[int, Field(ge=RESERVED + 256)] = 8192
        """Most ids of a trained tokenizer: two reserved ones, and 256 bytes with their merges, or words. Before
        training, `openimp info` and `openimp plan` count this many."""
        min_df: Count | None = None
        """Train a word tokenizer: keep the words that occur in the texts of at least this many training examples
        (scikit-learn's min_df), and remove other words, underscores and punctuation. By default subwords are used.
        Words suit small data sets, in which rare words do not generalize. Subwords suit languages without spaces
        between words."""
        positions: Count = 256
        """Rows of the position table, which limits the length of texts."""

        @model_validator(mode="after")
        def _one_tokenizer(self) -> "Text.Config":
            if self.tokenizer is not None and self.min_df is not None:
                raise ValueError("min_df is for a tokenizer that is trained, not for one from a file")
            return self

    class View(Strict):
        """Length of a text."""

        length: Annotated[int, Field(ge=2)] = 16
        """Tokens, including the end token; longer texts are cut at the end. The paper: 16."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained or read from a file."""
        if self._tokenizer is None:
            raise RuntimeError("no tokenizer yet: call fit or load_state first")
        return self._tokenizer

    def stem_spec(self) -> StemSpec:
        # The size of the stem follows from the tokenizer. One from a file needs no texts.
        if self._tokenizer is None and self.config.tokenizer is not None:
            self.fit(())
        axes = (self.config.positions,)
        if self._tokenizer is None:
            return StemSpec(values=self.config.vocab_size, axes=axes, table=True)
        ids = RESERVED + 1 + max(self._tokenizer.get_vocab().values())  # The ids in a file may have gaps.
        return StemSpec(values=ids, axes=axes, table=True)

    def check(self, view: Any) -> None:
        self._check_length(view.length)

    def length(self, view: Any) -> int:
        return view.length

    def fit(self, corpus: Iterable[list[str]]) -> None:
        """Reads the tokenizer file, or trains a byte-level BPE or a word tokenizer on the texts of each example.

        Equal texts give equal tokenizers.
        """
        if path := self.config.tokenizer:
            if not Path(path).is_file():
                raise UserError(f"modalities.text.tokenizer: {path}: no such file")
            self._tokenizer = open_tokenizer(f"modalities.text.tokenizer: {path}", lambda: read_text(Path(path)))
        elif self.config.min_df is not None:
            self._tokenizer = _train_words(corpus, self.config.min_df, self.config.vocab_size - RESERVED)
        else:
            self._tokenizer = _train_subwords(corpus, self.config.vocab_size - RESERVED)

    def state(self) -> dict[str, str]:
        return {TOKENIZER_FILE: self.tokenizer.to_str()}

    def load_state(self, state: Mapping[str, str]) -> None:
        self._tokenizer = open_tokenizer(TOKENIZER_FILE, lambda: state[TOKENIZER_FILE])

    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """Tokenizes a string, or the first of a list, to ids (n,) int64, as many as the longest view takes."""
        if isinstance(raw, list | tuple) and raw:
            raw = raw[0]
        if not isinstance(raw, str):
            raise BadMedia(f"expected a text, found {type(raw).__name__}")
        return self._ids(raw, views)

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """Ends and pads ids (n,) to (length,), or to (1, length) in evaluation. Nothing is random here."""
        out = np.full(view.length, PAD, np.int64)
        beginning = item[: view.length - 1]
        out[: len(beginning)] = beginning
        out[len(beginning)] = END
        return out[None] if rng is None else out

    def knows(self, value: Any, view: Any) -> bool:
        return not isinstance(value, str) or len(self._ids(value, [view])) > 0

    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """Converts ids (B, length) to tokens, as `from_tensor` does."""
        return self.from_tensor(torch.from_numpy(items))

    def from_tensor(self, batch: Tensor) -> Tokens:
        """Converts ids (B, L), as `tokenize` returns them, to tokens.

        The mask excludes pads, and all of a text without a known word.
        """
        if batch.ndim != 2 or batch.is_floating_point():
            raise TypeError(f"expected integer ids (B, L), found {batch.dtype} {list(batch.shape)}")
        self._check_length(batch.shape[1])
        coords = torch.arange(batch.shape[1], device=batch.device).expand(batch.shape[0], -1)
        has_words_B1 = (batch >= RESERVED).any(1, keepdim=True)
        return Tokens(batch.long(), coords[..., None].contiguous(), (batch != PAD) & has_words_B1)

    def tensor_input(self, view: Any) -> TensorInput:
        unknown = "" if self.config.min_df is None else f"Remove the ids of {UNKNOWN}. "
        return TensorInput(
            (view.length,),
            torch.int64,
            "Token ids. Encode the text with tokenizer.json and the library tokenizers, without special tokens. "
            f"{unknown}Add {RESERVED} to each id, keep the first {view.length - 1}, append {END}, and fill up with "
            f"{PAD}.",
        )

    def tokenize(self, texts: str | list[str], length: int | None = None) -> Tensor:
        """Tokenizes texts to ids (B, length) padded with 0, like open_clip's tokenizers. Default length: `View`'s."""
        view = self.View() if length is None else self.View(length=length)
        texts = [texts] if isinstance(texts, str) else texts
        no_texts = np.empty((0, view.length), np.int64)
        return torch.from_numpy(np.concatenate([no_texts, *(self.encode_input(text, view) for text in texts)]))

    def _check_length(self, length: int) -> None:
        if length > self.config.positions:
            raise ValueError(f"length {length} is more than the {self.config.positions} positions of the table")

    def _ids(self, text: str, views: list[Any]) -> np.ndarray:
        count = max(view.length for view in views)
        # The text is cut first, so that a very long one takes little time.
        ids = self.tokenizer.encode(valid_text(text[: CHARACTERS_PER_TOKEN * count]), add_special_tokens=False).ids
        if self.config.min_df is not None:
            unknown = self.tokenizer.token_to_id(UNKNOWN)
            ids = [i for i in ids if i != unknown]
        return np.array(ids[:count], np.int64) + RESERVED


def _train_subwords(corpus: Iterable[list[str]], size: int) -> Tokenizer:
    """Trains a lower-cased byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    texts = (valid_text(text[:MAX_TRAINING_LENGTH]) for text in chain.from_iterable(corpus))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_words(corpus: Iterable[list[str]], min_df: int, size: int) -> Tokenizer:
    """Makes a tokenizer of [UNK] and the `size` - 1 most frequent lower-cased words of at least `min_df` examples."""
    # An underscore separates words, as in golden_retriever, the name of a folder.
    splitter = pre_tokenizers.Split(Regex(r"[^\W_]+"), "removed", invert=True)
    examples_with = Counter[str]()
    for texts in corpus:
        normalized = (NORMALIZER.normalize_str(valid_text(text)) for text in texts)
        words = chain.from_iterable(map(splitter.pre_tokenize_str, normalized))
        examples_with.update({word for word, _ in words})
    frequent = [word for word, count in examples_with.items() if count >= min_df]
    if not frequent:
        raise UserError(f"modalities.text.min_df: no word is in the texts of {min_df} of the training examples")
    frequent.sort(key=lambda word: (-examples_with[word], word))
    vocabulary = {word: i for i, word in enumerate([UNKNOWN, *frequent][:size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = NORMALIZER
    tokenizer.pre_tokenizer = splitter
    return tokenizer
