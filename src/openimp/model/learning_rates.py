"""The learning rate of each parameter relative to the recipe's, by part of the model and by depth; frozen parts."""

from collections.abc import Collection
from itertools import accumulate

from torch import Tensor

from openimp.common.errors import UserError, nearest
from openimp.model.embedder import Embedder
from openimp.recipe.training import Optimizer


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
    """Checks that each part is a parameter or a module of a model, given the names of its parameters."""
    known = {prefix for name in names for prefix in accumulate(name.split("."), "{}.{}".format)}
    for part in parts:
        if part not in known:
            raise UserError(f"optimizer.lr_scale: the model has no part {part!r}{nearest(part, known)}")
