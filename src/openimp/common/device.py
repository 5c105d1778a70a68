"""Where tensors live, and in what precision the model computes; the same in training, evaluation and use."""

import ctypes
import platform
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
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
        precision: "bf16" or "fp32" as it says; "auto" is bf16 where that is faster.
    """
    enabled = precision_of(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def precision_of(device: torch.device, precision: Precision) -> Literal["bf16", "fp32"]:
    """What `precision` comes to on a device."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


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
    """Whether bf16 is computed by the processor itself, and faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # AVX-512's bf16 product is twice as fast as fp32 on AMD's cores, and half as fast on Intel's, which have AMX for
    # it unless a virtual machine hides that. torch.ops.mkldnn._is_mkldnn_bf16_supported even says yes where it is
    # emulated.
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _vendor() == "AuthenticAMD")


@cache
def _vendor() -> str:
    """Who made the CPU: "AuthenticAMD", "GenuineIntel", or something else."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # Not Linux; Windows tells it at the end of "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD".
        return platform.processor().rpartition(" ")[2]
    return next((line.rpartition(" ")[2] for line in lines if line.startswith("vendor_id")), "")
