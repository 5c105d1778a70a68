"""The hardware that a recipe is drafted for."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from openimp.common.device import pick_device
from openimp.common.errors import counted
from openimp.common.threads import core_count
from openimp.planning.gpus import USABLE, peak_flops

MFU = 0.2
"""The assumed model FLOPs utilization, which is what small models reach: on two cores, `mixture` reaches 0.23."""
HOST_SHARE = 0.5
"""Share of a computer's memory that training on its CPU may take."""
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the bytes that a container may use, of Linux' control groups in versions 2 and 1."""


@dataclass(frozen=True)
class Machine:
    """The resources of a computer that training can use."""

    name: str
    is_gpu: bool
    memory: float  # bytes for the tensors of a step
    host_memory: float  # bytes of the computer's memory that this process may use
    speed: float  # FLOP/s of training, roughly
    workers: int  # processes that can read data

    @property
    def hours(self) -> float:
        """The longest training that a draft asks for."""
        return 24 if self.is_gpu else 1


def this_machine() -> Machine:
    """Measures this machine, in a fraction of a second."""
    device = pick_device()
    cores = core_count()
    host_memory = _host_memory()
    is_gpu = device.type == "cuda"
    if is_gpu:
        name = torch.cuda.get_device_name(device)
        memory = USABLE * torch.cuda.get_device_properties(device).total_memory
        workers = min(8, cores - 1)
    else:
        name = f"a CPU with {counted(torch.get_num_threads(), 'thread')}"
        memory = HOST_SHARE * host_memory
        workers = min(4, cores // 4)
    return Machine(name, is_gpu, memory, host_memory, speed=MFU * peak_flops(device, "auto"), workers=max(1, workers))


def _host_memory() -> float:
    """Bytes of the computer's memory, or of the part that its container may use."""
    if not hasattr(os, "sysconf"):
        return 8 * 2.0**30  # Windows: a small computer is assumed.
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # "max" means no limit.
            limits.append(int(Path(file).read_text(encoding="utf-8")))
    return float(min(limits))
