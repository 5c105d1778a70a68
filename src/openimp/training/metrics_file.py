"""Reads metrics.jsonl, which `Log` writes."""

from math import nan
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from openimp.common.errors import UserError
from openimp.common.json_lines import read_lines
from openimp.common.schema import checked

Amount = Annotated[int, Field(ge=0, lt=2**100)]
"""Larger integers do not fit into a float, in which charts and shares are computed."""


class _Part(BaseModel):
    """Types must match exactly. Other keys are ignored."""

    model_config = ConfigDict(strict=True)


class LayerUsage(_Part):
    """Use of the experts of one sparse layer by one modality."""

    load: Annotated[list[float], Field(min_length=1)]
    gate: Annotated[list[float], Field(min_length=1)]
    dropped: float


class Totals(_Part):
    """What one task has used since step 0."""

    steps: Amount
    examples: Amount
    tokens: Amount
    flops: Amount


class MetricsLine(_Part):
    """The part of a line that `openimp report` and `openimp info` show; docs/metrics.md explains the keys."""

    step: Amount
    lr: float
    grad_norm: float
    examples_per_s: float
    seconds: FiniteFloat
    step_p50: float = nan  # Older versions did not write the step times.
    step_p95: float = nan
    data_wait: float
    tasks: dict[str, dict[str, float]]
    experts: dict[str, Annotated[list[LayerUsage], Field(min_length=1)]]
    totals: dict[str, Totals]


def read_metrics(file: Path) -> list[MetricsLine]:
    """Reads metrics.jsonl; an empty list if there is no such file. A line that lacks a key is a UserError."""
    lines = []
    sizes = set()
    for number, values in enumerate(read_lines(file), 1):
        error_prefix = f"{file}: line {number} is not a line of training metrics"
        line = checked(MetricsLine, values, error_prefix)
        lines.append(line)
        for layers in line.experts.values():
            sizes |= {(len(layers), len(layer.load), len(layer.gate)) for layer in layers}
        if len(sizes) > 1:
            raise UserError(f"{error_prefix}: experts: the number of layers or of experts differs from that before")
    return lines
