"""One Transformer encoder for image, video, audio and text, trained by alternating gradient descent."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openimp.common.errors import UserError
    from openimp.encoding.find import list_models
    from openimp.inference.embed import embed
    from openimp.inference.evaluate import evaluate
    from openimp.inference.model import Model, load
    from openimp.inference.sentence_transformers import sentence_transformer
    from openimp.model.imp import IMP
    from openimp.recipe.schema import Recipe
    from openimp.search import open_index
    from openimp.search.build import build_index as index
    from openimp.training.callbacks import Callback, EarlyStopping, StopTraining
    from openimp.training.trainer import train

_HOME = {
    "Callback": "openimp.training.callbacks",
    "EarlyStopping": "openimp.training.callbacks",
    "IMP": "openimp.model.imp",
    "Model": "openimp.inference.model",
    "Recipe": "openimp.recipe.schema",
    "StopTraining": "openimp.training.callbacks",
    "UserError": "openimp.common.errors",
    "embed": "openimp.inference.embed",
    "evaluate": "openimp.inference.evaluate",
    "index": "openimp.search.build:build_index",
    "list_models": "openimp.encoding.find",
    "load": "openimp.inference.model",
    "open_index": "openimp.search",
    "sentence_transformer": "openimp.inference.sentence_transformers",
    "train": "openimp.training.trainer",
}
__all__ = [
    "IMP",
    "Callback",
    "EarlyStopping",
    "Model",
    "Recipe",
    "StopTraining",
    "UserError",
    "__version__",
    "embed",
    "evaluate",
    "index",
    "list_models",
    "load",
    "open_index",
    "sentence_transformer",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for (PEP 562), so that `import openimp` takes no time."""
    if name == "__version__":
        return import_module("importlib.metadata").version("openimp")
    if name not in _HOME:
        raise AttributeError(f"module 'openimp' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
