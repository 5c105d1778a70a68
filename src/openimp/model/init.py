"""Initial weights, as in the authors' release of arXiv 2305.06324."""

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal distribution truncated at -2 and 2."""


def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Fills a weight from a normal distribution with variance 1 / fan_in, truncated at two standard deviations."""
    if has_torch_function_unary(weight):  # `DeferredInit` records the call. torch's `trunc_normal_` cannot be recorded.
        handle_torch_function(lecun_normal_, (weight,), weight, fan_in)
        return
    std = fan_in**-0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear layer with LeCun normal weights and a zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    lecun_normal_(layer.weight, inputs)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
