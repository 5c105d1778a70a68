"""The optimizers, and one update of the weights with clipped gradients and the scheduled learning rate."""

import math
from collections.abc import Callable

import torch

from openimp.common.device import HostCopy
from openimp.model.embedder import Embedder
from openimp.parallel.layout import clip_grad_norm, reshard
from openimp.recipe.schema import Recipe
from openimp.training.ema import EMA
from openimp.training.optimizers import LRSchedule, make_optimizers


class Updater:
    """Updates a model, which is distributed over the ranks, from the gradients of its backward passes.

    It also makes the EMA. Only `Trainer.confirm` updates the EMA, once the gradients are known to be finite.

    The host queues an update before the device has computed the gradients. If they turn out not to be finite, the
    device leaves weights and optimizer state as they are.
    """

    def __init__(self, recipe: Recipe, model: Embedder, work_before_step: Callable[[int], int]) -> None:
        """Makes the optimizers and the EMA.

        `work_before_step(step)`: the number of steps before a step, or their FLOPs. The learning rate follows this
        number (see `LRSchedule`).
        """
        options = recipe.optimizer
        self.recipe = recipe
        self.model = model
        self.lr_factor = LRSchedule(recipe, work_before_step)  # of a step
        self.optimizers = make_optimizers(options, model)
        self.ema = EMA(model, options.ema_decay) if options.ema_decay else None

    def queue_update(self, step: int) -> HostCopy:
        """Queues the update of step `step`, which counts from 0, and drops the gradients.

        It updates every parameter that has a gradient; with `zero_missing_grads`, every trainable one. Returns the
        Euclidean norm of the gradient before clipping. If it is not finite, nothing is updated. The caller must have
        read the norm of the previous update, and must not update again if it was not finite.
        """
        # With `parallel.reshard_after_forward: false`, ranks still hold the gathered weights of blocks. They are freed,
        # because the update changes only the shards.
        reshard(self.model)
        options = self.recipe.optimizer
        if options.zero_missing_grads:
            for parameter in self.model.parameters():
                if parameter.grad is None and parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        grad_norm = clip_grad_norm(self.model.parameters(), options.max_grad_norm or math.inf)
        grad_norm_copy = HostCopy(grad_norm)
        lr_factor = self.lr_factor(step)
        found_inf = 1 - grad_norm.isfinite().float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * lr_factor
            # torch's GradScaler sets the same attribute. If it is 1, AdamW (which is fused) and Muon change
            # nothing, not even their step counts.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.step()
        self.model.clamp_logit_scales()
        # None, not zero: a parameter that the next task does not use keeps its value and its optimizer state.
        self.model.zero_grad(set_to_none=True)
        return grad_norm_copy
