"""Decides, by its name and a sample, whether a recipe can use a column as text, as classes or as a split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from openimp.common.errors import counted
from openimp.common.texts import text_key
from openimp.data.tables import Unreadable
from openimp.drafting.finding import ROLES

TEXT_NAMES = re.compile(
    r"captions?|texts?|txt|descriptions?|title|name|sentences?|alt|prompt|transcript|transcription|utterance|lyrics|"
    r"keywords|tags|comment|summary"
)
LABEL_NAMES = re.compile(r"labels?|class|classes|classname|cls2?|category|categories|target|species|genre")
NEITHER_NAMES = re.compile(
    r"split|set|fold|subset|ids?|uuid|key|hash|md5|sha|sha256|url|link|source|licen[sc]e|lang|language|date|time|"
    r"timestamp|author|format|mode|version"
)
"""Words in the names of columns. They decide where a sample alone is ambiguous."""
MAX_TEXT = 1000
"""Characters of a text that are inspected."""
LABEL_WORDS = 5
"""Most words, on average, of the names of classes. Longer values are texts."""


@dataclass(frozen=True)
class Column:
    """A column that holds no media."""

    name: str
    use: Literal["text", "label", "split", "none"]
    why: str = ""  # if `use` is "none": the reason
    hinted: bool = False  # its name says that it is a text or a label
    lists: bool = False  # each row has several texts
    short: bool = False  # these texts have one or two words, like keywords
    numeric: bool = False  # the classes are numbers, so no text can be made of them
    distinct: int = 0  # different values in the sample
    missing: float = 0.0  # share of the rows without a value
    texts: tuple[tuple[str, ...], ...] = ()  # those of each sampled row


def describe(name: str, values: Sequence[Any], file_names: bool = False) -> Column:
    """Judges a column by the values of a sample. With `file_names`, its values are the names of files."""
    if re.search(r"[{}*]", name) or name != name.strip():
        return Column(name, "none", "a template cannot name this column; rename it without braces, * and outer spaces")
    values = [None if isinstance(value, Unreadable) else value for value in values]
    present = [value for value in values if value not in (None, "", []) and value == value]
    if not present:
        return Column(name, "none", "it is empty")
    missing = 1 - len(present) / len(values)
    words = re.split(r"[^a-z0-9]+", name.lower())
    if all(isinstance(value, list) for value in present):
        return _lists(name, present, missing, _any(TEXT_NAMES, words))
    if not all(isinstance(value, str | int | float) for value in present):
        return Column(name, "none", f"it holds {type(present[0]).__name__} values, neither texts nor classes")
    texts = [" ".join(str(value)[:MAX_TEXT].split()) for value in present]
    distinct = len({text_key(text) for text in texts})
    if _is_split(name, texts):
        return Column(name, "split", missing=missing)
    if len(values) > 1 and distinct == 1:
        return Column(name, "none", f"it has the same value in every row ({texts[0][:40]!r})")
    named = _any(LABEL_NAMES, words)
    is_label = distinct * (2 if named else 4) <= len(texts)
    if all(re.fullmatch(r"[-+]?\d*\.?\d+([eE][-+]?\d+)?|true|false", text.lower()) for text in texts):
        return _numbers(name, texts, distinct, missing, named, is_label)
    if sum("://" in text for text in texts) * 2 > len(texts):
        return Column(name, "none", "it holds addresses; openimp does not download them")
    about: dict[str, Any] = {"distinct": distinct, "missing": missing, "texts": tuple((text,) for text in texts)}
    lengths = [len(text.split()) for text in texts]
    brief = sum(lengths) / len(lengths) <= LABEL_WORDS
    if named and is_label:
        return Column(name, "label", hinted=True, **about)
    spaced = sum(length > 1 for length in lengths) >= 0.3 * len(lengths)
    coded = sum(any(c.isdigit() for c in text) and " " not in text for text in texts) * 2 > len(texts)
    hinted = (named or _any(TEXT_NAMES, words)) and not file_names and not coded
    if hinted:
        return Column(name, "text", hinted=True, **about)
    if _any(NEITHER_NAMES, words):
        return Column(name, "none", "its name says that it is neither a text nor a class")
    if is_label and brief and not coded:
        return Column(name, "label", **about)
    if spaced:
        return Column(name, "text", **about)
    return Column(name, "none", f"{distinct:,} different single words in {counted(len(texts), 'row')} look like names "
                                "of the rows; if they are texts, call the column text")  # fmt: skip


def _any(names: re.Pattern[str], words: list[str]) -> bool:
    return any(names.fullmatch(word) for word in words)


def _is_split(name: str, texts: list[str]) -> bool:
    """Whether a column says which rows are for training and which for a test."""
    roles = {ROLES.get(text.lower()) for text in texts}
    return None not in roles and "train" in roles and len(roles) > 1


def _numbers(name: str, texts: list[str], distinct: int, missing: float, hinted: bool, is_label: bool) -> Column:
    if not hinted:
        return Column(name, "none", "it holds numbers; if they are classes, call the column label")
    if not is_label:
        return Column(name, "none", f"{distinct:,} different numbers in {counted(len(texts), 'row')} are no classes")
    if any("." in text or "e" in text.lower().removesuffix("true").removesuffix("false") for text in texts):
        return Column(name, "none", "it holds fractions, which are no classes")
    return Column(name, "label", hinted=True, numeric=True, distinct=distinct, missing=missing)


def _lists(name: str, present: list[Any], missing: float, hinted: bool) -> Column:
    if not all(isinstance(item, str) for value in present for item in value):
        return Column(name, "none", "it holds lists of other things than texts")
    rows = tuple(tuple(" ".join(item[:MAX_TEXT].split()) for item in value) for value in present)
    texts = [text for row in rows for text in row]
    distinct = len({tuple(map(text_key, row)) for row in rows})
    if len(rows) > 1 and distinct == 1:
        return Column(name, "none", "it has the same value in every row")
    short = len(texts) >= 2 * len(rows) and sum(len(text.split()) for text in texts) <= 2 * len(texts)
    return Column(name, "text", hinted=hinted, lists=True, short=short, distinct=distinct, missing=missing, texts=rows)


def split_values(values: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
    """The values of a split column for training, for evaluation (validation, otherwise test), and all others."""
    found = sorted({str(value) for value in values if value is not None})
    by_role = {
        role: [value for value in found if ROLES.get(value.lower()) == role] for role in ("train", "val", "test")
    }
    training, testing = by_role["train"], by_role["val"] or by_role["test"]
    return training, testing, [value for value in found if value not in training and value not in testing]
