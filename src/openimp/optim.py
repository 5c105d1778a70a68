"""Optimisers and their one schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from openimp.model.embedder import Embedder
from openimp.parallel import on_one_mesh
from openimp.recipe import Optimizer, Recipe


def muon_matrices(options: Optimizer, model: Embedder) -> dict[Tensor, None]:
    """What Muon updates, in order: the hidden matrices, where the recipe asks for it."""
    return model.hidden_matrices() if options.muon_lr else {}


def make_optimizers(options: Optimizer, model: Embedder, own: Iterable[Tensor]) -> list[torch.optim.Optimizer]:
    """Fused AdamW, with Muon beside it for the hidden matrices where the recipe asks for it.

    Weight decay is for matrices, not for norms, biases and temperatures. Each group keeps its peak learning rate as
    `peak`.

    Args:
        own: the parameters that this process updates.
    """
    hidden = muon_matrices(options, model)
    rest = [parameter for parameter in own if parameter not in hidden]
    decay = {True: options.weight_decay, False: 0.0}
    groups = [
        {"params": group, "weight_decay": decay[is_matrix]}
        for is_matrix in decay
        for group in on_one_mesh(p for p in rest if (p.ndim >= 2) == is_matrix)
    ]
    # Of many processes some may have nothing to update; a group may be empty, but not the list of groups.
    betas = (options.betas[0], options.betas[1])
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups or [{"params": []}], lr=options.lr, betas=betas, fused=True)
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
    warmup = steps // 20 if options.warmup is None else options.warmup
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Sets every group to a share of its peak."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak"] * share
