"""Names of models and data, which mean the same in every command and recipe key; docs/names.md lists them.

A name is a path, a URL, or one of `SCHEMES`, a colon and what the scheme calls it, such as `open_clip:NAME/TAG`.
After the name of a library, a path means a model in a folder.
"""

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

BUNDLED = "openimp"
HUB = "hub"
OPEN_CLIP = "open_clip"
TIMM = "timm"
SENTENCE_TRANSFORMERS = "sentence_transformers"
CONSE = "conse"
SCHEMES = (BUNDLED, HUB, OPEN_CLIP, TIMM, SENTENCE_TRANSFORMERS, CONSE)
PUBLIC = (OPEN_CLIP, CONSE)
"""Schemes of public models that embed pictures and texts in one space, so that commands use them like openimp's."""
LOCAL = "local-dir:"
"""What may follow the name of a library if the model is in a folder, as in open_clip and timm."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""open_clip's configuration of a model in a folder or on the Hub."""
CONFIGS = {
    OPEN_CLIP: (OPEN_CLIP_CONFIG,),
    TIMM: ("config.json",),
    SENTENCE_TRANSFORMERS: ("modules.json", "config.json"),
}
"""By library, the files of which a model in a folder has at least one."""


class Name(NamedTuple):
    """A name in two parts."""

    scheme: str | None  # one of `SCHEMES`, or "url"; None for a path
    rest: str  # what follows the scheme; the whole of a path or a URL

    @classmethod
    def parse(cls, name: str | Path) -> "Name":
        """Parses a name. What begins with no scheme is a path."""
        text = name.as_posix() if isinstance(name, Path) else name  # On Windows, `str` would write hub:OWNER\NAME.
        scheme, colon, rest = text.partition(":")
        if colon and scheme in SCHEMES:
            return cls(scheme, rest)
        return cls("url" if "://" in text else None, text)

    @property
    def folder(self) -> str | None:
        """The folder of a library's model: what follows `local-dir:`, or a path that begins with /, ./, ../ or ~.

        None for any other name. `absolute_name` also finds the folders that a name such as `timm:models/vit` means.
        """
        if self.scheme not in CONFIGS:
            return None
        if self.rest.startswith(LOCAL):
            return self.rest.removeprefix(LOCAL)
        first_part = re.split(r"[/\\]", self.rest, maxsplit=1)[0]
        is_path = os.path.isabs(self.rest) or first_part in (".", "..") or first_part.startswith("~")
        return self.rest if is_path else None


class ConseName(NamedTuple):
    """What follows `conse:`: two names, with a + between them."""

    classifier: str  # of pictures: timm:NAME
    texts: str  # the encoder of texts: sentence_transformers:NAME

    @classmethod
    def parse(cls, name: str | Path) -> "ConseName | None":
        """The two names in `conse:CLASSIFIER+TEXTS`. None if `name` does not have this form."""
        match = re.fullmatch(rf"{CONSE}:({TIMM}:.+?)\+({SENTENCE_TRANSFORMERS}:.+)", str(name))
        return cls(*match.groups()) if match else None

    def map(self, change: Callable[[str], str]) -> str:
        """The name `conse:CLASSIFIER+TEXTS` after a change of its two names."""
        return f"{CONSE}:{change(self.classifier)}+{change(self.texts)}"


class HubName(NamedTuple):
    """What follows `hub:`, which is OWNER/NAME or OWNER/NAME@REVISION."""

    repository: str
    revision: str | None

    @classmethod
    def parse(cls, rest: str) -> "HubName | None":
        """None if `rest` does not have this form."""
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", rest)
        return cls(match[1], match[2]) if match else None


def single_names(name: str) -> tuple[str, ...]:
    """The two names in `conse:CLASSIFIER+TEXTS`. Any other name is one."""
    return ConseName.parse(name) or (name,)


def has_scheme(name: str | Path) -> bool:
    """Whether a name begins with one of `SCHEMES`, so that it means no file or folder of the user."""
    return Name.parse(name).scheme in SCHEMES


def is_bundled(name: str | Path) -> bool:
    """Whether a name is that of a model or of data that comes with openimp."""
    return Name.parse(name).scheme == BUNDLED


def is_url(name: str) -> bool:
    """Whether a name is a URL that fsspec opens, such as `s3://bucket/*.parquet`."""
    return Name.parse(name).scheme == "url"


def map_path(name: str, change: Callable[[str], str]) -> str:
    """The name in which a path, also one behind the name of a library, is changed. Other names stay as they are."""
    if both := ConseName.parse(name):
        return both.map(lambda part: map_path(part, change))
    parsed = Name.parse(name)
    if parsed.folder is not None:
        local = LOCAL if parsed.rest.startswith(LOCAL) else ""
        return f"{parsed.scheme}:{local}{change(parsed.folder)}"
    return change(name) if parsed.scheme is None else name


def absolute_name(name: str, folder: str | Path) -> str:
    """The name in which a relative path starts at `folder` instead. `~` is the home directory."""
    if both := ConseName.parse(name):
        return both.map(lambda part: absolute_name(part, folder))
    parsed = Name.parse(name)
    if parsed.folder is None and _means_folder(parsed, Path(folder)):
        name = f"{parsed.scheme}:./{parsed.rest}"
    return map_path(name, lambda path: str(Path(folder).resolve() / os.path.expanduser(path)))


def _means_folder(name: Name, base: Path) -> bool:
    """Whether a name is that of a folder in `base` with a library's model, and of no model that the library knows."""
    library, rest = name
    if library not in CONFIGS or not any((base / rest / file).is_file() for file in CONFIGS[library]):
        return False
    if library == OPEN_CLIP and find_spec("open_clip"):
        import open_clip

        model, _, tag = rest.partition("/")
        return not open_clip.get_pretrained_cfg(model, tag)
    if library == TIMM and find_spec("timm"):
        import timm

        return not timm.is_model(rest)
    return True
