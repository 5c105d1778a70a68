"""Optimisers and their one schedule."""

import math
from collections.abc import Iterable

import torch

from openimp.model.embedder import Embedder
from openimp.parallel import Dealt, on_one_mesh
from openimp.recipe import Optimizer, Recipe


def make_optimizers(options: Optimizer, model: Embedder, steps: Iterable[Iterable[str]]) -> list[torch.optim.Optimizer]:
    """Fused AdamW, with Muon beside it for the hidden matrices where the recipe asks for it.

    Weight decay is for matrices, not for norms, biases and temperatures. Each group keeps its peak learning rate as
    `peak`.

    Args:
        steps: the names of the parameters that each kind of step updates, by which processes with copies of the model
            share Muon's work.
    """
    hidden = model.hidden_matrices() if options.muon_lr else {}
    rest = [parameter for parameter in model.parameters() if parameter not in hidden]
    decay = {True: options.weight_decay, False: 0.0}
    groups = [
        {"params": group, "weight_decay": decay[is_matrix]}
        for is_matrix in decay
        for group in on_one_mesh(p for p in rest if (p.ndim >= 2) == is_matrix)
    ]
    betas = (options.betas[0], options.betas[1])
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)]
    if options.muon_lr:
        named = dict(model.named_parameters())
        dealt = Dealt(hidden, [{named[name] for name in step} for step in steps])
        # Updates as large as AdamW's (arXiv 2502.16982, section 2.2), so that both share the scale of learning rates.
        muon = torch.optim.Muon(
            [{"params": dealt.own}],  # With many processes it may be empty, and then is no list of parameters to torch.
            lr=options.muon_lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        muon.register_step_post_hook(lambda *_: dealt.exchange())
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
