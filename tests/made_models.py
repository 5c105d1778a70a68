"""Models of made-up modalities, of which a model uses only the stems."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from openimp.common.modality import StemSpec
from openimp.recipe.model import Model
from openimp.recipe.model_config import ComparedPair, ModelConfig


class FixedStem(NamedTuple):
    stem: str
    spec: StemSpec

    def stem_spec(self) -> StemSpec:
        return self.spec


def model_config(model: Model, pairs: Iterable[tuple[str, str]], classes: dict[str, Any]) -> ModelConfig:
    """Without the validation, which knows only registered modalities."""
    compared = [ComparedPair(modalities=pair) for pair in pairs]
    return ModelConfig.model_construct(model=model, pairs=compared, distilled=[], classes=classes)
