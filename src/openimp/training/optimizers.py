"""AdamW and Muon, and the learning rate schedule that they share."""

import math
from collections.abc import Callable

import torch
from torch import nn

from openimp.model.embedder import Embedder
from openimp.model.learning_rates import lr_factors, muon_stacks
from openimp.parallel.layout import group_by_mesh
from openimp.parallel.muon import Muon
from openimp.recipe.schema import Recipe
from openimp.recipe.training import Optimizer

OPEN_CLIP_TABLE = "positional_embedding"
"""End of the names of the position tables in open_clip's towers, which studies train."""


def make_optimizers(options: Optimizer, model: Embedder) -> list[torch.optim.Optimizer]:
    """Fused AdamW, and Muon for the hidden matrices if the recipe has a `muon_lr`. Every rank must call this.

    Weight decay applies to kernels only, not to embedding and position tables, norms, biases and temperatures. Each
    parameter group keeps its peak learning rate as `peak`. Frozen parameters are in no group.
    """
    muon_matrices = muon_stacks(model, options)
    lr_factor_of = lr_factors(model, options)
    # Tables have two dimensions like kernels.
    undecayed = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    undecayed |= {weight for name, weight in model.named_parameters() if name.endswith(OPEN_CLIP_TABLE)}
    by_options: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and lr factor
    for parameter in model.parameters():
        if parameter.requires_grad and parameter not in muon_matrices:
            is_decayed = parameter.ndim >= 2 and parameter not in undecayed
            decay = options.weight_decay if is_decayed else 0.0
            by_options.setdefault((decay, lr_factor_of[parameter]), []).append(parameter)
    groups = []
    for (decay, lr_factor), parameters in by_options.items():
        for group_parameters in group_by_mesh(parameters):
            groups.append({"params": group_parameters, "weight_decay": decay, "lr": options.lr * lr_factor})
    betas = (options.betas[0], options.betas[1])
    optimizers: list[torch.optim.Optimizer] = []
    if groups:  # Otherwise all parameters of AdamW are frozen.
        optimizers.append(torch.optim.AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, fused=True))
    if options.muon_lr:
        muon_lr_factors = {weight: lr_factor_of[weight] for weight in muon_matrices}
        optimizers.append(
            Muon(muon_matrices, options.muon_lr, options.muon_momentum, options.weight_decay, muon_lr_factors)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


class LRSchedule:
    """The factor of the peak learning rate at each step: linear warm-up, then a cosine until the last step.

    The cosine follows the share of the work that is done. `work_before(step)` is the number of steps before a step, or
    the sum of their FLOPs: an int of Python, because a day on one GPU has more FLOPs than fit into 64 bits.
    """

    def __init__(self, recipe: Recipe, work_before: Callable[[int], int]) -> None:
        steps = recipe.train.steps
        options = recipe.optimizer
        self.min_ratio = options.min_lr_ratio
        self.work_before = work_before
        self.warmup = steps // 20 if options.warmup_steps is None else options.warmup_steps
        self.warmup_work = work_before(min(self.warmup, steps))
        self.cosine_work = work_before(steps) - self.warmup_work  # that follows the warm-up

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (self.work_before(step) - self.warmup_work) / self.cosine_work
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
