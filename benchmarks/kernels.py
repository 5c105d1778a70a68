"""What the encoder computes otherwise in bf16 on a CPU, against torch's own kernels, forward and backward.

    python benchmarks/kernels.py

Attention as two matrix products and a softmax, against the fused kernel, backs `UNFUSED_LENGTH` in
openimp/model/kernels.py; GELU's exact form against its approximation by tanh backs `gelu` there. The two take turns in
one process, and the median over all pairs counts. Heads are 64 wide; masked rows have half of each second example's
tokens masked.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.model.kernels import unfused_attention

SHAPES = [(128, 6, 16), (64, 6, 36), (64, 6, 64), (16, 6, 128), (8, 6, 256), (4, 6, 512), (2, 6, 1024)]
"""Examples, heads, tokens."""
HIDDEN = [(1024, 512), (3072, 512), (4096, 1536)]
"""Tokens, hidden features of an MLP."""
HEAD = "| {} | type | {}, ms | {}, ms | second / first |\n|---|---|---|---|---|"


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def qkv_of(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k and v (B, H, L, 64) laid out as the encoder has them: views of one (B, L, 3, H, 64)."""
    batch, heads, length = shape
    qkv = torch.randn(batch, length, 3, heads, 64, dtype=dtype)
    return [part.requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4)]


def half_mask(shape: tuple[int, int, int]) -> Tensor:
    mask = torch.ones(shape[0], 1, 1, shape[2], dtype=torch.bool)
    mask[1::2, ..., shape[2] // 2 :] = False
    return mask


def seconds(function: Callable[..., Tensor], inputs: Sequence[Tensor], rest: Sequence[Any], grad: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(function(*inputs, *rest), inputs, grad)
    return time.perf_counter() - start


def compare(
    what: str, functions: Sequence[Callable[..., Tensor]], inputs: Sequence[Tensor], pairs: int, *rest: Any
) -> None:
    """Prints a row: the medians of two functions of the inputs and the rest, and of their paired ratio."""
    grad = torch.randn_like(functions[0](*inputs, *rest))
    times = [[seconds(function, inputs, rest, grad) for function in functions] for _ in range(pairs + 2)][2:]
    first, second = (statistics.median(column) * 1e3 for column in zip(*times))
    ratio = statistics.median(other / one for one, other in times)
    kind = str(inputs[0].dtype).removeprefix("torch.")
    print(f"| {what} | {kind} | {first:.2f} | {second:.2f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="two pairs of the shortest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs, shapes, hidden = (2, SHAPES[:3], HIDDEN[:1]) if args.smoke else (args.pairs, SHAPES, HIDDEN)
    types = (torch.bfloat16, torch.float32)
    print(HEAD.format("attention: examples, heads, tokens", "spelled out", "fused"))
    for shape in shapes:
        for dtype in types:
            for mask, told in ((None, ""), (half_mask(shape), ", masked")):
                compare(f"{shape}{told}", (unfused_attention, fused), qkv_of(shape, dtype), pairs, mask)
    print("\n" + HEAD.format("GELU: tokens, hidden features", "exact", "by tanh"))
    for size in hidden:
        for dtype in types:
            both = [partial(F.gelu, approximate=how) for how in ("none", "tanh")]
            compare(f"{size}", both, [torch.randn(size, dtype=dtype, requires_grad=True)], pairs)


if __name__ == "__main__":
    main()
