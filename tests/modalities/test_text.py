import base64
import json
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia
from openimp.modalities.text import END, PAD, Text
from tests.messages import refuses

CORPUS = ["A red bicycle leans on a wall", "a red car", "Two dogs play with a red ball", "dogs and cats"] * 5


@pytest.fixture(scope="module")
def text():
    out = Text(Text.Config(vocab_size=400))
    out.fit([text] for text in CORPUS)
    return out


def test_training_is_deterministic_and_learns_words(text):
    other = Text(Text.Config(vocab_size=400))
    other.fit(iter([CORPUS]))
    assert other.state() == text.state()
    assert text.stem_spec().values <= 400
    ids = text.tokenize("red dogs")[0]
    assert (ids != PAD).sum() == 3  # two words and the end


@given(st.text(st.characters(exclude_categories=[]), max_size=60), st.integers(2, 20))
@example("half of a pair \ud83d", 8)
@settings(max_examples=100, deadline=None)
def test_any_string_is_valid_ids_with_an_end(string, length):
    text = Text(Text.Config(vocab_size=300))
    text.load_state(STATE)
    view = Text.View(length=length)
    items = text.encode_input(string, view)
    tokens = text.tokens(items, view, None)
    assert tokens.values.shape == tokens.mask.shape == (1, length)
    words, end = tokens.values[0].tolist(), tokens.values[0].tolist().index(END)
    assert all(END < token < text.stem_spec().values for token in words[:end])
    assert words[end + 1 :] == [PAD] * (length - end - 1)
    valid = end + 1 if end else 0  # Without a word, not even the end is valid.
    assert tokens.mask[0].tolist() == [True] * valid + [False] * (length - valid)


SOME = ["a", "red", "Dogs,", "ΑΣ", "don't", "x" * 70, "", "\u0301", "\t", "\u2003"]


@given(st.lists(st.sampled_from(SOME) | st.text(), max_size=12).map(" ".join), st.integers(2, 40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_text_has_the_first_known_ids_of_its_tokenizer(string, count, words):
    state = WORDS if words else STATE
    whole = Tokenizer.from_str(state["tokenizer.json"]).encode(string[: 64 * count], add_special_tokens=False).ids
    if words:
        whole = [i for i in whole if i]  # 0 is what is not known.
    text = Text(Text.Config(vocab_size=300, min_df=2 if words else None))
    text.load_state(state)
    assert (text.decode(string, [Text.View(length=count)]) - 2).tolist() == whole[:count]


def test_words_of_few_examples_are_left_out():
    """Examples count, not texts or words; of those that are as frequent the alphabet says which are kept."""
    corpus = [["A red car, red", "red: (rare)"], ["the CAR"], ["a red bus"], ["bus"], ["don't, don't", "t"]]
    text = Text(Text.Config(min_df=2))
    text.fit(corpus)
    vocabulary = {"[UNK]": 0, "a": 1, "bus": 2, "car": 3, "red": 4}
    assert text.tokenizer.get_vocab() == vocabulary
    assert text.tokenize(["Rare: a RED_red (car)!", "rare"], length=6).tolist() == [
        [3, 6, 6, 5, END, PAD], [END, PAD, PAD, PAD, PAD, PAD],
    ]  # fmt: skip
    small = Text(Text.Config(min_df=1, vocab_size=2 + 256))
    small.fit([[f"w{i} w{i + 1}"] for i in range(1000)])
    assert small.stem_spec().values == 2 + 256
    with refuses():
        Text(Text.Config(min_df=6)).fit(corpus)
    with pytest.raises(ValueError, match="min_df"):
        Text.Config(min_df=2, tokenizer="words.json")


def _state(**config):
    text = Text(Text.Config(vocab_size=300, **config))
    text.fit([CORPUS] * 2)
    return text.state()


STATE, WORDS = _state(), _state(min_df=2)


def test_ids_come_back_as_text(text):
    ids = text.decode("two dogs, ünï 犬", [Text.View(length=64)])
    assert text.tokenizer.decode((ids - 2).tolist()).strip() == "two dogs, ünï 犬"


def test_tokens_carry_positions_and_a_mask(text):
    items = text.tokenize(["a red", ""], length=6)
    tokens = text.from_tensor(items.int())
    assert torch.equal(tokens.values, items)
    assert tokens.mask.tolist() == [[True] * 3 + [False] * 3, [False] * 6]  # The second text has no word.
    assert tokens.coords[..., 0].tolist() == [[*range(6)]] * 2
    with refuses(TypeError):
        text.from_tensor(torch.zeros(1, 6))


def test_training_and_evaluation_read_alike(text):
    view = Text.View()
    item = text.decode(["a red car", "another caption"], [view])
    training = text.transform(item, view, np.random.default_rng(1))
    np.testing.assert_array_equal(text.transform(item, view, None), training[None])
    np.testing.assert_array_equal(text.tokenize("a red car").numpy(), training[None])


@pytest.mark.parametrize("raw", [None, 3, b"bytes", [], [3], {"text": "x"}])
def test_what_is_no_text_is_bad_media(text, raw):
    with refuses(BadMedia):
        text.decode(raw, [Text.View()])


def test_state_and_pickle_carry_the_tokenizer(text):
    other = Text(Text.Config(vocab_size=400))
    assert other.stem_spec().values == 400  # as large as it may become
    with pytest.raises(RuntimeError, match="fit"):
        other.tokenize("red dogs")
    other.load_state(text.state())
    for copy in (other, pickle.loads(pickle.dumps(text))):
        assert torch.equal(copy.tokenize("red dogs"), text.tokenize("red dogs"))
        assert copy.stem_spec() == text.stem_spec()


WORD_IDS = {"red": 0, "car": 1, "[UNK]": 2}


@pytest.mark.parametrize(
    ("vocabulary", "splitter", "texts", "ids"),
    [
        (WORD_IDS, pre_tokenizers.Whitespace(), ["car red bus"], [[3, 2, 4, END, PAD]]),
        # Which joins words, so it must see whole texts.
        ({"red car": 5, **WORD_IDS}, pre_tokenizers.Split(",", "removed"), ["red car,red", "car"],
         [[7, 2, END, PAD, PAD], [3, END, PAD, PAD, PAD]]),
        # Whose ids have gaps.
        ({"red": 0, "car": 7, "[UNK]": 1}, pre_tokenizers.Whitespace(), ["car red car"], [[9, 2, 9, END, PAD]]),
    ],
)  # fmt: skip
def test_a_tokenizer_from_a_file(tmp_path, vocabulary, splitter, texts, ids):
    """Which pads and cuts texts, but not here."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.enable_padding(pad_id=0, length=6)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(tmp_path / "words.json"))
    text = Text(Text.Config(tokenizer=str(tmp_path / "words.json")))
    text.fit([["this is not looked at"]])
    assert text.stem_spec().values == 2 + 1 + max(vocabulary.values())
    assert text.tokenize(texts, length=5).tolist() == ids


def opened(file: str, **options: Any) -> Text:
    """The modality with what is in a tokenizer file."""
    text = Text(Text.Config(**options))
    text.load_state({"tokenizer.json": file})
    return text


def test_a_bad_tokenizer_file_is_named(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{}")
    for name in (str(path), str(tmp_path / "none.json")):
        with pytest.raises(UserError, match=re.escape(name)):
            Text(Text.Config(tokenizer=name)).fit([])
    with refuses():
        opened("{}")


def _file(normalizer: Any = None, pre_tokenizer: Any = None, model: Any = None, **rest: Any) -> str:
    """A tokenizer file; a list of parts is a sequence of them."""
    both = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        if isinstance(both[key], list):
            both[key] = {"type": "Sequence", inner: both[key]}
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"} | (model or {})
    return json.dumps({"version": "1.0", "added_tokens": [], **both, "model": model, **rest})


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _precompiled(replacement: bytes, size: int = 256, **changes: int) -> dict[str, str]:
    """A map of "A" to a text, in an index of so many units, some of which are changed."""
    units = {"u0": 1 << 10, "u64": ord("A") | 1 << 8 | 1 << 10, "u65": 2**31} | changes
    index = b"".join(units.get(f"u{i}", 0).to_bytes(4, "little") for i in range(size))
    charsmap = len(index).to_bytes(4, "little") + index + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}


@pytest.mark.parametrize(
    "file",
    [
        _file([_replace({"String": "a"}, "aaaaaaaa")] * 8),
        _file([_replace({"Regex": r"\s+"}, "  ")] * 30),
        _file([BYTES] * 30),
        _file([{"type": "Sequence", "normalizers": [BYTES]}, BYTES]),
        _file(None, [BYTES] * 30),
        # Whichever key the library reads, a sequence's parts are those that are checked.
        _file(None, {"type": "Sequence", "normalizers": [], "pretokenizers": [BYTES] * 30}),
        _file([_replace({"String": ""}, "")]),
        _file([_replace({"Regex": "(a+)+$"}, "b")]),
        _file(None, [_split("(a+)+$")]),
        _file(None, [_split("((a{1000}){1000}){1000}")]),
        _file({"type": "Prepend", "prepend": "a" * 10**6}),
        _file([{"type": "Lowercase"}, *[_replace({"String": "a"}, "b")] * 64]),
        _file(_precompiled(b"a" * 10**6)),
        _file({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        _file(_precompiled(b"\xff")),
        _file(_precompiled(b"a", size=0)),
        _file(_precompiled(b"a", size=66)),
        _file(_precompiled(b"a", u0=2**31 + (256 << 10))),
        _file(_precompiled(b"a", u64=ord("A") | 1 << 9 | 1 << 10)),
        _file(_precompiled(b"a", u65=2**31 + 2)),
        _file(_precompiled("ä".encode(), u65=2**31 + 1)),
        _file(model={"type": "Unigram", "vocab": [["a" * 1000, 0.0]]}),
        json.dumps({"model": {"vocab": [["a" * 1000, 0.0]], "unk_id": 0}}),
        _file({"type": "Unheard"}),
        _file(model={"type": "BPE", "merges": [], "end_of_word_suffix": "a" * 10**6}),
        _file(model={"type": "WordPiece", "max_input_chars_per_word": 10**9}),
        _file(added_tokens=[{"id": 2, "content": "a" * 10**6}]),
        _file(added_tokens=[{"id": i, "content": f"a{i}"} for i in range(2**14 + 1)]),
        _file(model={"vocab": {"a": 2**31}, "unk_token": "a"}),
        _file(model={"type": "BPE", "vocab": {}, "merges": []}),
        "[" * 200_000,
        "[]",
        _file(model={"type": "Pickle"}),
        _file([3]),
    ],
)
def test_a_tokenizer_that_could_fill_the_memory_or_never_end_is_refused(file):
    with refuses():
        opened(file)


def test_padding_and_decoders_of_a_model_are_left_out():
    pads = {"strategy": {"Fixed": 2 * 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    decoder = {"type": "Replace", "pattern": {"Regex": "((a{1000}){1000}){1000}"}, "content": "b"}
    file = _file(
        padding={**pads, "pad_type_id": 0, "pad_token": "a"}, decoder=decoder, pre_tokenizer={"type": "Whitespace"}
    )
    assert opened(file).tokenize("a a", length=4).tolist() == [[2, 2, END, PAD]]


@pytest.mark.parametrize(
    "file",
    [
        _file([{"type": "NFC"}, _replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}], [_split(CLIP), BYTES]),
        _file(None, [_split(LLAMA), BYTES]),
        _file([{"type": "Prepend", "prepend": "▁"}, _replace({"String": " "}, "▁")]),
        _file({"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
               "lowercase": True}, {"type": "BertPreTokenizer"}),
        _file([_precompiled(b"a"), _replace({"Regex": " {2,}"}, " ")],
              [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}]),
    ],
    ids=["CLIP", "Llama 3", "Llama 2", "BERT", "T5"],
)  # fmt: skip
def test_tokenizers_of_well_known_models_are_opened(file):
    assert opened(file).tokenize("a b", length=4).shape == (1, 4)


def test_a_sentencepiece_map_is_applied():
    text = opened(_file(_precompiled(b"a")))
    assert text.tokenize(["A", "B"], length=3).tolist() == [[2, END, PAD], [3, END, PAD]]
