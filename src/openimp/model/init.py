"""Initial weights: as in the authors' release of arXiv 2305.06324, or mimetic ones for attention."""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

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
    if has_torch_function_unary(weight):  # `DeferredInit` records the call. torch's `trunc_normal_` cannot be recorded.
        handle_torch_function(lecun_normal_, (weight,), weight, fan_in)
        return
    std = fan_in**-0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def mimetic_keys_(qkv_weight: Tensor) -> None:
    """Copies the queries' weights of an attention layer (3 D, D) to the keys (arXiv 2305.09828).

    So each token first attends to tokens that are similar to it, as in trained vision Transformers.
    """
    if has_torch_function_unary(qkv_weight):
        handle_torch_function(mimetic_keys_, (qkv_weight,), qkv_weight)
        return
    queries, keys, _ = qkv_weight.detach().chunk(3)
    keys.copy_(queries)


def mimetic_output_(out_weight: Tensor, qkv_weight: Tensor) -> None:
    """Makes the output layer of an attention layer minus the transpose of its values' weights.

    Their product is then about minus the identity, divided by the number of heads. In trained vision Transformers, it
    is also a negative multiple of the identity (arXiv 2305.09828).
    """
    if has_torch_function_unary(out_weight):
        handle_torch_function(mimetic_output_, (out_weight, qkv_weight), out_weight, qkv_weight)
        return
    _, _, values = qkv_weight.detach().chunk(3)
    out_weight.detach().copy_(-values.T)


def identity_(weight: Tensor) -> None:
    """Makes a linear layer with at least as many outputs as inputs keep its inputs, and append zeros."""
    if has_torch_function_unary(weight):
        handle_torch_function(identity_, (weight,), weight)
        return
    weight.detach().zero_().fill_diagonal_(1)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with LeCun normal weights and a zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    lecun_normal_(layer.weight, inputs)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
