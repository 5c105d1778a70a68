"""One update of the weights: reduced and clipped gradients, the learning rate, the optimizers, the EMA."""

import math

import torch

from openimp.model.embedder import Embedder
from openimp.parallel.layout import clip_grad_norm
from openimp.planning.ledger import Costs
from openimp.recipe.schema import Recipe
from openimp.training.ema import EMA
from openimp.training.optimizers import make_optimizers, schedule, set_learning_rate


class Updater:
    """Updates a model, which is distributed over the ranks, from the gradients of its backward passes.

    `grad_norm` is the Euclidean norm of the last step's gradient, before clipping.
    """

    def __init__(self, recipe: Recipe, model: Embedder, costs: Costs) -> None:
        options, named = recipe.optimizer, dict(model.named_parameters())
        # With zero gradients every step updates all parameters.
        names = [{*named}] if options.zero_missing_grads else [cost.touched for cost in costs.values()]
        updated_sets = [{named[name] for name in updated} for updated in names]
        self.recipe, self.model = recipe, model
        self.optimizers = make_optimizers(options, model, updated_sets)
        self.ema = EMA(model, options.ema_decay) if options.ema_decay else None
        self.grad_norm = 0.0

    def step(self, step: int) -> bool:
        """Updates every parameter that has a gradient (with `zero_missing_grads`: all), and drops the gradients.

        Returns whether the gradient was finite. If it was not, nothing is updated.
        """
        options = self.recipe.optimizer
        for parameter in self.model.parameters() if options.zero_missing_grads else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # `float` waits for a GPU to finish the backward pass. It is the price of never applying a non-finite update.
        self.grad_norm = float(clip_grad_norm(self.model.parameters(), options.max_grad_norm or math.inf))
        if not math.isfinite(self.grad_norm):
            return False
        set_learning_rate(self.optimizers, schedule(self.recipe, step))
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.clamp_logit_scales()
        # None, not zero: a parameter that the next task does not use keeps its value and its optimizer state.
        self.model.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(step)
        return True
