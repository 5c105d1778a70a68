"""The learning rate of each parameter relative to the recipe's, by part of the model and by depth; frozen parts."""

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
    depths = model.depths() if options.layer_decay < 1 else {}
    factors: dict[Tensor, float] = {}
    known_parts = set()
    for name, parameter in model.named_parameters():
        scale = 1.0
        for part in accumulate(name.split("."), "{}.{}".format):  # The longest part of `lr_scale` counts.
            known_parts.add(part)
            scale = options.lr_scale.get(part, scale)
        factors[parameter] = scale * options.layer_decay ** depths.get(parameter, 0)
    for part in options.lr_scale:
        if part not in known_parts:
            stem = getattr(model, "stem_of", {}).get(part.removeprefix("stems."))  # `part` may name a modality.
            hint = nearest(f"stems.{stem}" if stem else part, known_parts)
            raise UserError(f"optimizer.lr_scale: the model has no part {part!r}{hint}")
    return factors


def muon_stacks(model: Embedder, options: Optimizer) -> dict[Tensor, int]:
    """The parameters that Muon updates, with the number of matrices that each stacks; none without a `muon_lr`."""
    hidden = model.hidden_matrices() if options.muon_lr else {}
    return {weight: count for weight, count in hidden.items() if weight.requires_grad}
