"""Initial weights: as in the authors' release of arXiv 2305.06324, or mimetic ones for attention."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal distribution truncated at -2 and 2."""


class SkipInit(TorchFunctionMode):
    """Leaves weights uninitialized, because they are loaded. The system commits no memory until it is written to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        target = args[0] if args else kwargs.get("tensor")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return target if in_place and isinstance(target, nn.Parameter) else func(*args, **kwargs)


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Fills a weight from a normal distribution with variance 1 / fan_in, truncated at two standard deviations."""
    std = fan_in**-0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def mimetic_(qkv_weight: Tensor, out_weight: Tensor) -> None:
    """Changes random weights of an attention layer, (3 D, D) and (D, D), as arXiv 2305.09828 proposes.

    The keys' weights become the queries', so each token first attends to tokens that are similar to it. The output
    layer becomes minus the transpose of the values' weights: their product is then about minus the identity, divided by
    the number of heads. Both are so in trained vision Transformers.
    """
    queries, keys, values = qkv_weight.chunk(3)
    keys.copy_(queries)
    out_weight.copy_(values.T).neg_()  # Not `-values.T`, which imports torch's compiler on the meta device.


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with LeCun normal weights and a zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    lecun_normal_(layer.weight, inputs)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
