"""One sparse Transformer encoder for image, video, audio and text, trained by alternating gradient descent."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openimp.inference.model import load
    from openimp.inference.sentence_transformers import sentence_transformer
    from openimp.model.imp import IMP
    from openimp.recipe.schema import Recipe

__all__ = ["IMP", "Recipe", "__version__", "load", "sentence_transformer"]
_HOME = {
    "IMP": "openimp.model.imp",
    "Recipe": "openimp.recipe.schema",
    "load": "openimp.inference.model",
    "sentence_transformer": "openimp.inference.sentence_transformers",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for (PEP 562), so that `import openimp` takes no time."""
    if name == "__version__":
        return import_module("importlib.metadata").version("openimp")
    if name not in _HOME:
        raise AttributeError(f"module 'openimp' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
