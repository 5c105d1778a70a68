"""AdamW and Muon, and the learning rate schedule that they share."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from openimp.model.embedder import Embedder
from openimp.model.learning_rates import lr_factors, muon_stacks
from openimp.parallel.layout import group_by_mesh
from openimp.parallel.muon import Muon
from openimp.recipe.schema import Recipe
from openimp.recipe.training import Optimizer


def make_optimizers(options: Optimizer, model: Embedder) -> list[torch.optim.Optimizer]:
    """Fused AdamW, and Muon for the hidden matrices if the recipe has a `muon_lr`. Every rank must call this.

    Weight decay applies to kernels only, not to embedding and position tables, norms, biases and temperatures. Each
    parameter group keeps its peak learning rate as `peak`. Frozen parameters are in none.
    """
    hidden, factors = muon_stacks(model, options), lr_factors(model, options)
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in hidden]
    # Tables, and the biases of experts, have two dimensions like kernels.
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    tables |= {weight for module in model.experts() for weight in module.parameters() if weight.ndim == 2}
    kernels = [parameter for parameter in rest if parameter.ndim >= 2 and parameter not in tables]
    others = [parameter for parameter in rest if parameter.ndim < 2 or parameter in tables]
    groups = [
        {"params": group, "weight_decay": decay, "lr": options.lr * factor}
        for some, decay in ((kernels, options.weight_decay), (others, 0.0))
        for factor in dict.fromkeys(factors[parameter] for parameter in some)
        for group in group_by_mesh(parameter for parameter in some if factors[parameter] == factor)
    ]
    betas = (options.betas[0], options.betas[1])
    made: list[torch.optim.Optimizer] = []
    if groups:  # Else all that AdamW would update is frozen.
        made.append(torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True))
    if options.muon_lr:
        rates = {weight: factors[weight] for weight in hidden}
        made.append(Muon(hidden, options.muon_lr, options.weight_decay, lr_factors=rates))
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return made


def schedule(recipe: Recipe, step: int) -> float:
    """Factor of the peak learning rate at a step: linear warm-up, then a cosine until the last step."""
    options, steps = recipe.optimizer, recipe.train.steps
    warmup = steps // 20 if options.warmup_steps is None else options.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Sets the learning rate of every parameter group to `share` times its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * share
