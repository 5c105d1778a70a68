"""docs/recipe.md says what the schema says, and every key of a recipe has a meaning."""

from pydantic import BaseModel

from openimp.common.objective import Objective
from openimp.common.schema import Strict
from openimp.encoding.tower import Tower
from openimp.recipe import evaluation, inputs, model, schema, tasks, training
from openimp.recipe.model_config import ComparedPair, ModelConfig
from tools import write_recipe_reference as tool


def test_the_reference_is_current():
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.current(page), "docs/recipe.md is older than the schema; run `make docs`"


def test_every_key_has_a_meaning():
    silent = [
        f"{part.__qualname__}.{name}"
        for part in tool.sections()
        for name, field in part.model_fields.items()
        if not field.description
    ]
    assert not silent, "write a docstring below each of these"


def test_every_part_of_the_schema_has_a_section():
    modules = (schema, evaluation, inputs, model, tasks, training)
    values = [value for module in modules for value in vars(module).values()]
    parts = {value for value in values if isinstance(value, type) and issubclass(value, BaseModel)}
    modalities = [*tool.builtin_modalities().values(), Tower]
    parts |= {part for modality in modalities for part in (modality.Config, modality.View)}
    parts |= {*tool.builtin_objectives().values()}
    assert parts - {BaseModel, Objective, Strict, ModelConfig, ComparedPair} == set(tool.sections())
