"""Names of icons: from "battery-charging-outline-24" to "battery charging"."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tools.icon_sets import UNWANTED

ALWAYS_STYLE = {"duotone", "filled", "outline", "outlined", "twotone"}

STYLE = {
    "active", "alt", "compact", "expressive", "f", "fill", "light", "line", "ltr", "negative", "o", "r", "regular",
    "rtl", "sharp", "small", "solid", "stroke", "thin", "variant",
}  # fmt: skip
"""Words that are style in the sets in which they end at least 3 % of the names. "Light" is content elsewhere."""

STYLE_SHARE = 0.03

PREFIXES = {
    "medical-icon": ["i"],
    "oui": ["app", "editor", "nav", "vis"],
    "streamline-block": ["basic ui", "control buttons", "content", "other ui"],
    "streamline-pixel": ["interface essential", "business products", "content files", "computers devices electronics"],
}
"""Sections of a set with which its names start."""

MORE_STYLE = {
    "ci": {"lg", "md", "sm"},
    "icon-park": {"one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"},
}
"""Sizes and counts that are style in one set."""

NUMBERED = {
    "battery", "counter", "dice", "filter", "forward", "letter", "level", "looks", "number", "numeric", "replay",
    "rewind", "signal", "step", "timer",
}  # fmt: skip
"""Words after which a number is content. It counts variants elsewhere."""

MAX_VARIANT = 48
"""Larger numbers are content: "rotate 90". Not if they start with 0."""

MAX_WORDS, MAX_NAMES = 6, 3500
"""Longer names are lists of keywords. Some sets have ten thousand names."""

BRANDED = re.compile(r"brand|logo|social (media|network)", re.IGNORECASE)
"""Titles of a set's categories that are left out."""


def affixes(data: dict[str, Any], kind: str) -> list[str]:
    """Returns what the set itself lists as prefixes or suffixes of its styles, the longest first."""
    return sorted((a.replace("-", " ") for a in data.get(kind) or {} if a), key=lambda a: (-len(a), a))


def digest(*parts: str) -> bytes:
    """Returns a hash of the texts, to choose and to order without a preference."""
    return hashlib.sha256("\0".join(parts).encode()).digest()


def content_words(icon: str, data: dict[str, Any]) -> list[str]:
    """Returns the words of an icon's name without the affixes that the set lists, and without sizes and counts."""
    text = icon.lower().replace("-", " ").replace("_", " ")
    for affix in affixes(data, "suffixes"):
        if text.endswith(f" {affix}"):
            text = text.removesuffix(f" {affix}")
            break
    prefixes = affixes(data, "prefixes") + PREFIXES.get(data["prefix"], [])
    text = next((text.removeprefix(f"{affix} ") for affix in prefixes if text.startswith(f"{affix} ")), text)
    return without_count(text.split())


def without_count(words: list[str]) -> list[str]:
    """Removes a size or a count from the end."""
    while len(words) > 1 and (last := re.fullmatch(r"(\d+)(px|x)?", words[-1])):
        if (int(last[1]) > MAX_VARIANT and last[1][0] != "0") or words[-2] in NUMBERED:
            break
        words = words[:-1]
    return [*words[:-1], re.sub(r"(?<=[a-z]{3})\d{1,2}x?$", "", words[-1])]


def style_words(names: list[list[str]]) -> set[str]:
    """Returns the words of STYLE that end at least three, and STYLE_SHARE, of the names."""
    ends = Counter(words[-1] for words in names)
    return ALWAYS_STYLE | {word for word in STYLE if ends[word] >= max(3, STYLE_SHARE * len(names))}


def clean(words: list[str], style: set[str]) -> str | None:
    """Returns the name without words of style at its end, or None if it is a brand, a skin tone or no words."""
    if UNWANTED.intersection(words) or re.search(r"\bskin( tone| ?\d)|\bu1f", " ".join(words)):
        return None
    while len(words) > 1 and words[-1] in style:
        words = without_count(words[:-1])
    words = list(dict.fromkeys(words))
    return " ".join(words) if len(words) <= MAX_WORDS and any(re.search("[a-z]{2}", word) for word in words) else None


def named_icons(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, icon) of at most MAX_NAMES names of a set, each with one of its variants, chosen by a hash.

    An alias yields its own name with its icon if neither is there already.
    """
    icons, categories = data["icons"], data.get("categories") or {}
    brands = {icon for title in categories if BRANDED.search(title) for icon in categories[title]}
    shown = {name for name, icon in icons.items() if not (icon.get("hidden") or "<animate" in icon["body"])} - brands
    words = {icon: content_words(icon, data) for icon in shown}
    style = style_words(list(words.values())) | MORE_STYLE.get(data["prefix"], set())
    found: dict[str, str] = {}
    for icon in sorted(shown, key=lambda icon: digest(data["prefix"], icon)):
        if name := clean(words[icon], style):
            found.setdefault(name, icon)
    unused = shown - set(found.values())
    for alias, about in sorted(data.get("aliases", {}).items()):
        if about["parent"] in unused and not about.get("hidden"):
            name = clean(content_words(alias, data), style)
            if name and name not in found:
                found[name] = about["parent"]
                unused.remove(about["parent"])
    size = {side: data.get(side, 16) for side in ("width", "height")}
    for name in sorted(found, key=digest)[:MAX_NAMES]:
        yield name, size | icons[found[name]]
