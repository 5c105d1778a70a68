"""Where tensors live, and in what precision the model computes; the same in training, evaluation and use."""

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
Precision = Literal["auto", "bf16", "fp32"]


def pick_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass.

    Args:
        device: where it runs.
        precision: "bf16" or "fp32" as it says; "auto" is bf16 where the processor computes with it.
    """
    enabled = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, where the allocator is glibc's.

    Otherwise large tensors go back to the system after each step and are zeroed page by page in the next: about a tenth
    of a sparse model's step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """The context of what must not be rounded inside a forward pass: routers and the softmax of a loss."""
    # The meta device, on which costs are counted, knows no autocast.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed by the processor itself: emulated, it is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch.ops.mkldnn._is_mkldnn_bf16_supported says yes for any AVX-512, which emulates.
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
