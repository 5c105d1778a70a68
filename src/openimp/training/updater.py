"""One update of the weights: reduced and clipped gradients, the learning rate, the optimizers, the EMA."""

import math
from collections.abc import Mapping

from openimp.model.embedder import Embedder
from openimp.parallel.layout import clip_grad_norm
from openimp.parallel.owners import MatrixOwners
from openimp.planning.ledger import Cost
from openimp.recipe.schema import Recipe
from openimp.training.ema import EMA
from openimp.training.optimizers import fill_missing_grads, make_optimizers, muon_matrices, schedule, set_learning_rate


class Updater:
    """Updates a model from the gradients of its backward passes.

    Attributes:
        optimizers: AdamW, and Muon where the recipe asks for it, over the parameters that this rank updates.
        ema: average of the weights, or None if the recipe keeps none.
        grad_norm: Euclidean norm of the last step's gradient, before clipping.
    """

    def __init__(self, recipe: Recipe, model: Embedder, costs: Mapping[tuple[str, int], Cost]) -> None:
        """Creates the optimizers.

        Args:
            recipe: what is trained.
            model: distributed over the ranks.
            costs: by task and view, with the parameters that a step of it uses.
        """
        options, named = recipe.optimizer, dict(model.named_parameters())
        # With zero gradients every step updates all parameters.
        names = [{*named}] if options.zero_missing_grads else [cost.touched for cost in costs.values()]
        updated_sets = [{named[name] for name in updated} for updated in names]
        self.recipe, self.model = recipe, model
        self.owners = MatrixOwners(muon_matrices(options, model), updated_sets)
        self.optimizers = make_optimizers(options, model, self.owners.updated_by_this_rank(model.parameters()))
        self.ema = EMA(model, options.ema_decay) if options.ema_decay else None
        self.grad_norm = 0.0

    def step(self, step: int) -> bool:
        """Updates every parameter that has a gradient (with `zero_missing_grads`: all), and drops the gradients.

        Returns:
            Whether the gradient was finite. If it was not, nothing is updated.
        """
        options = self.recipe.optimizer
        if options.zero_missing_grads:
            fill_missing_grads(self.model.parameters())
        norm = clip_grad_norm(self.model.parameters(), options.max_grad_norm or math.inf)
        # This waits for a GPU to finish the backward pass. It is the price of never applying a non-finite update.
        self.grad_norm = float(norm)
        if not math.isfinite(self.grad_norm):
            return False
        set_learning_rate(self.optimizers, schedule(self.recipe, step))
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.clamp_logit_scales()
        self.owners.broadcast_updates()
        # None, not zero: a parameter that the next task does not use keeps its value and its optimizer state.
        self.model.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(step)
        return True
