"""Optimisers and their one schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openimp.model.embedder import Embedder
from openimp.parallel.layout import on_one_mesh
from openimp.recipe.schema import Recipe
from openimp.recipe.training import Optimizer


def muon_matrices(options: Optimizer, model: Embedder) -> dict[Tensor, None]:
    """What Muon updates, in order: the hidden matrices, where the recipe asks for it."""
    return model.hidden_matrices() if options.muon_lr else {}


def make_optimizers(options: Optimizer, model: Embedder, own: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    """Fused AdamW, with Muon beside it for the hidden matrices where the recipe asks for it.

    Weight decay is for kernels: not for embedding and position tables, norms, biases and temperatures. Each group
    keeps its peak learning rate as `peak`.

    Args:
        own: the parameters that this process updates.
    """
    hidden = muon_matrices(options, model)
    rest = [parameter for parameter in own if parameter not in hidden]
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    kernels = [parameter for parameter in rest if parameter.ndim >= 2 and parameter not in tables]
    others = [parameter for parameter in rest if parameter.ndim < 2 or parameter in tables]
    groups = [
        {"params": group, "weight_decay": decay}
        for parameters, decay in ((kernels, options.weight_decay), (others, 0.0))
        for group in on_one_mesh(parameters)
    ]
    # Of many processes some may have nothing to update; a group may be empty, but not the list of groups.
    betas = (options.betas[0], options.betas[1])
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups or [{"params": []}], lr=options.lr, betas=betas, eps=options.eps, fused=True)
    ]
    if options.muon_lr:
        # Updates as large as AdamW's (arXiv 2502.16982, section 2.2), so that both share the scale of learning rates.
        muon = torch.optim.Muon(
            [{"params": [parameter for parameter in own if parameter in hidden]}],
            lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        made.append(muon)
    for group in (group for optimizer in made for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return made


def schedule(recipe: Recipe, step: int) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine to the last step."""
    options, steps = recipe.optimizer, recipe.train.steps
    warmup = steps // 20 if options.warmup_steps is None else options.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.min_lr_ratio + (1 - options.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Sets every group to a share of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * share
