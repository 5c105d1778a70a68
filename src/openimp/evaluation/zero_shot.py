"""Class embeddings for zero-shot classification: classes are known only by name (CLIP, arXiv 2103.00020, section 3.1).

Shape suffixes: K classes, P prompts, Z features of the shared embedding space.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError, counted
from openimp.common.modality import Modality
from openimp.common.progress import notice
from openimp.common.protocols import TextReader, is_known
from openimp.common.schema import as_text
from openimp.common.texts import equal_pair, text_key
from openimp.encoding.engine import ItemEncoder
from openimp.evaluation.evaluator import Evaluator
from openimp.parallel.distributed import all_gather_uneven, own_part, rank
from openimp.recipe.evaluation import ZeroShot


def class_names(labels: list[Any], options: ZeroShot, error_prefix: str) -> list[str]:
    """The names of classes, which fill the prompts.

    A class without a name, two classes with equal names (`text_key`), or a prompt without a place for the name is a
    UserError, which begins with `error_prefix`.
    """
    names: list[str] = []
    label_of: dict[str, Any] = {}  # by the `text_key` of the name
    for label in labels:
        name = (options.classes or {}).get(as_text(label), label)
        if options.words and name == label and isinstance(name, str):
            name = words(name)
        if not isinstance(name, str) or not name.strip():
            raise UserError(
                f"{error_prefix}: class {label!r} of column {options.label!r} has no text; name it in classes as "
                f"{as_text(label)!r}"
            )
        key = text_key(name)
        if key in label_of:
            both = f"classes {label_of[key]!r} and {label!r}"
            raise UserError(f"{error_prefix}: {both} have the same text, {name!r}; rename one")
        label_of[key] = label
        names.append(name)
    for prompt in options.prompts:
        check_prompt(prompt, error_prefix)
    return names


def check_prompt(prompt: str, error_prefix: str) -> None:
    """Raises UserError if a prompt has no place for the name of a class."""
    # No format: a width, as in {:>2000000000}, would fill the memory. {{ and }} are braces, as in templates.
    other_text = r"(?:[^{}]|\{\{|\}\})*"
    if not re.fullmatch(rf"{other_text}\{{\}}{other_text}", prompt):
        raise UserError(f"{error_prefix}: prompt {prompt!r} needs one plain {{}} where the class' text goes")


def names_with_equal_tokens(names: Iterable[str], reader: Modality, view: Any) -> tuple[str, str] | None:
    """Two names that the model cannot tell apart. A tokenizer of words, for example, removes the + of "C++"."""
    if not isinstance(reader, TextReader):  # A tower would embed each name.
        return None
    return equal_pair(names, lambda name: reader.encode_input(name, view).tobytes())


@cache
def _notice_once(message: str) -> None:
    notice(message)


def class_embeddings(evaluator: Evaluator, options: ZeroShot, error_prefix: str, names: list[str]) -> Tensor:
    """(K, Z) unit vectors of classes; see `class_vectors`."""
    (seen,) = options.inputs
    encoder = evaluator.item_encoder(options.reader, evaluator.recipe.inference_view(options.reader), seen)
    if rank() == 0 and (equal_names := names_with_equal_tokens(names, encoder.modality, encoder.view)):
        both = "{!r} and {!r}".format(*equal_names)
        _notice_once(f"{error_prefix}: the model reads the classes {both} as the same text, so it confuses them")
    if rank() == 0 and (unknown := [name for name in names if not is_known(encoder.modality, name, encoder.view)]):
        listed = ", ".join(map(repr, unknown[:3]))
        message = f"{error_prefix}: the model knows no word of {counted(len(unknown), 'class')}: {listed}"
        splitting = "" if options.words else ", or split names such as BrushHair by words: true"
        _notice_once(f"{message}; give other names in classes{splitting}")
    return class_vectors(encoder, names, options.prompts)


def class_vectors(encoder: ItemEncoder, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """(K, Z) unit vectors: for each class, the mean of the unit vectors of its name in each prompt.

    Each rank encodes a part of the classes. All ranks get all vectors.
    """
    rank_names = [names[i] for i in own_part(len(names))]
    texts = (prompt.format(name) for name in rank_names for prompt in prompts)
    vectors = [vector for _, vector in encoder.encode((text, partial(encoder.read, text)) for text in texts)]
    z_NZ = encoder.stack([vector for vector in vectors if isinstance(vector, Tensor)])  # Every text can be read.
    z_KPZ = z_NZ.unflatten(0, (len(rank_names), len(prompts)))
    return all_gather_uneven(F.normalize(z_KPZ.mean(1), dim=-1))


def words(label: str) -> str:
    """Splits a label into words: `brush_hair` and `BrushHair` become "brush hair". A label with spaces keeps its
    capitals."""
    spaced = " ".join(label.replace("_", " ").split())
    if " " in spaced:
        return spaced
    # Several capitals in a row, as in TVShow, are one word.
    parts = re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W_])(?=[A-Z][a-z])", spaced)
    return " ".join(part if len(part) > 1 and part.isupper() else part.lower() for part in parts)
