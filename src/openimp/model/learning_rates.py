"""The learning rate of each parameter relative to the recipe's, by part of the model and by depth; frozen parts."""

from collections.abc import Collection

from torch import Tensor

from openimp.common.errors import UserError
from openimp.model.embedder import Embedder
from openimp.recipe.training import Optimizer

MAX_NAMED = 10
"""Maximum number of parts that an error message names."""


def freeze(model: Embedder, options: Optimizer) -> None:
    """Freezes the parameters with a learning rate of 0: they require no gradients.

    Call it before `apply_parallelism`, because FSDP2 reads there which parameters require gradients.
    """
    for parameter, factor in lr_factors(model, options).items():
        parameter.requires_grad_(factor > 0)


def lr_factors(model: Embedder, options: Optimizer) -> dict[Tensor, float]:
    """The factor of each parameter's learning rate; 0 if the parameter is frozen."""
    scales = options.lr_scale
    parameters = dict(model.named_parameters())
    _require_parts(scales, parameters)
    depths = model.depths() if options.layer_decay < 1 else {}
    factors: dict[Tensor, float] = {}
    for name, parameter in parameters.items():
        parts = [part for part in scales if _belongs_to(name, part)]
        scale = scales[max(parts, key=len)] if parts else 1.0
        factors[parameter] = scale * options.layer_decay ** depths.get(parameter, 0)
    return factors


def muon_stacks(model: Embedder, options: Optimizer) -> dict[Tensor, int]:
    """The parameters that Muon updates, with the number of matrices that each stacks; none without a `muon_lr`."""
    hidden = model.hidden_matrices() if options.muon_lr else {}
    return {weight: count for weight, count in hidden.items() if weight.requires_grad}


def _belongs_to(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def _require_parts(parts: Collection[str], names: Collection[str]) -> None:
    """Checks that each part is a parameter or a module of a model, given the names of its parameters.

    The error names the parts that could have been meant: those directly inside the longest beginning that is a module.
    """
    for part in parts:
        if any(_belongs_to(name, part) for name in names):
            continue
        prefix = f"{part}."
        while prefix and not any(name.startswith(prefix) for name in names):
            parent = prefix[:-1].rpartition(".")[0]
            prefix = f"{parent}." if parent else ""
        inside = [name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)]
        known = [f"{prefix}{child}" for child in dict.fromkeys(inside)]
        listed = ", ".join(known[:MAX_NAMED]) + (", ..." if len(known) > MAX_NAMED else "")
        raise UserError(f"optimizer.lr_scale: the model has no part {part!r}; known: {listed}")
