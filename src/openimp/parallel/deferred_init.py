"""Initialization of a model that no rank holds in full."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from openimp.parallel.distributed import world_size
from openimp.parallel.layout import fill_shard

M = TypeVar("M", bound=nn.Module)


class DeferredInit(TorchFunctionMode):
    """Builds a model without memory for its weights, and initializes them once it is distributed over the ranks.

    A weight gets the value that it has on one rank. Random numbers come in one sequence, so each rank draws the numbers
    of all weights, one weight after the other, and keeps its shards. It needs memory for the weights of one layer
    besides its shards, and communicates nothing.

    While the model is built on the meta device, this records the calls of in-place functions, whose names end with "_".
    Weights that are initialized in another way are an error. On a single rank, the model is built as usual.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self._calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._names: dict[Tensor, str] = {}

    def build(self, build: Callable[[], M], at_once: bool = False) -> M:
        """Calls `build`. On several ranks the model is on the meta device, until `initialize` follows.

        With `at_once`, `initialize` has nothing left to do: `build` makes a model whose weights are loaded.
        """
        torch.manual_seed(self.seed)
        if at_once or world_size() == 1:
            return build()
        with torch.device("meta"), self:
            model = build()
        self._names = {weight: name for name, weight in model.named_parameters()}
        return model

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):
            self._calls.append((func, args, kwargs))
        return func(*args, **kwargs)

    @torch.no_grad()
    def initialize(self, model: nn.Module) -> None:
        """Fills this rank's shards of the model that `build` returned."""
        torch.manual_seed(self.seed)
        shards = dict(model.named_parameters())
        targets = {_target(args, kwargs) for _, args, kwargs in self._calls}
        # A call may read other weights than the one that it changes.
        last_use = {weight: i for i, (_, args, kwargs) in enumerate(self._calls) for weight in _tensors((args, kwargs))}
        if missing := [name for weight, name in self._names.items() if weight not in targets]:
            raise TypeError(f"these weights are not initialized by in-place functions: {', '.join(missing)}")
        full_weights = {}
        for i, (func, args, kwargs) in enumerate(self._calls):
            target = _target(args, kwargs)
            if target not in full_weights:
                full_weights[target] = torch.empty_like(target, device="cpu")
            args, kwargs = tree_map_only(Tensor, full_weights.__getitem__, (args, kwargs))
            func(*args, **kwargs)
            for weight in [weight for weight in full_weights if last_use[weight] == i]:
                fill_shard(shards[self._names[weight]], full_weights.pop(weight))


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that an in-place function changes. `torch.nn.init` passes it by name."""
    return args[0] if args else kwargs["tensor"]
