"""Which texts are equal."""

from unicodedata import normalize

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openimp.common.texts import text_key
from openimp.modalities.text import Text


@pytest.fixture(scope="module")
def text():
    modality = Text(Text.Config(vocab_size=300))
    modality.fit([["a dog"]])
    return modality


@pytest.mark.parametrize(
    "equal",
    [
        ["A dog", "a dog", "  A\tDOG\n", "a\u00a0dog", "a \ud800dog"],
        ["Straße", "STRASSE", "strasse", "STRAẞE"],
        ["Café", "cafe\u0301", "CAFE\u0301"],
        ["ὈΔΥΣΣΕΎΣ", "ὀδυσσεύς", "ὀδυσσεύσ"],
        ["a dog.", "A dog."],
        ["cafe"],
    ],
)
def test_equal_texts_have_one_key_which_is_its_own_key(equal):
    (key,) = {text_key(text) for text in equal}
    assert text_key(key) == key


def test_texts_that_differ_have_different_keys():
    assert len({text_key(text) for text in ("a dog", "adog", "a dog.", "café", "cafe", "Straße", "Strase", "")}) == 8


CHANGES = [str.lower, str.upper, str.swapcase, str.title, *(lambda text, form=form: normalize(form, text)
                                                             for form in ("NFC", "NFD", "NFKC"))]  # fmt: skip
ASSIGNED = st.characters(exclude_categories=["Cn", "Co"])
"""The characters that this Python knows. The tokenizers' library may know more."""


@given(st.text(ASSIGNED, min_size=1, max_size=8), st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3))
def test_texts_of_equal_tokens_are_equal(text, before, changes):
    after = before
    for change in changes:
        after = change(after)
    assume(after != before)
    ids, others = text.tokenize([before, after], length=256)
    assert (ids != others).any() or text_key(before) == text_key(after)
