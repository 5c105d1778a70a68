"""Published figures of GPUs, to plan with, and the peak to which the utilization of a device refers."""

from dataclasses import dataclass

import torch

from openimp.common.device import Precision, precision_of, product_speed

NODE = 8
"""GPUs of a node. Its links connect them, and the network connects nodes."""
USABLE = 0.9
"""Share of a GPU's memory for tensors; its context, NCCL's buffers and gaps between tensors have the rest."""
GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU in the kind of machine that it is mostly sold in."""

    memory_gib: float  # that programs see
    bf16_tflops: float  # dense products, as its maker publishes
    memory_tb_per_s: float
    link_gb_per_s: float  # from the other GPUs of its node
    network_gb_per_s: float  # from other nodes, over a network card of its own
    names: tuple[str, ...]  # as CUDA calls it; variants with other figures are left out

    @property
    def flops_per_s(self) -> float:
        return self.bf16_tflops * 1e12

    @property
    def bytes_per_s(self) -> float:
        """Of its memory."""
        return self.memory_tb_per_s * 1e12

    @property
    def usable_bytes(self) -> float:
        return USABLE * self.memory_gib * GIB


GPUS = {
    "a100-40": GPU(39, 312, 1.56, 300, 25, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "a100": GPU(79, 312, 2.04, 300, 25, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "h100": GPU(79, 989, 3.35, 450, 50, ("NVIDIA H100 80GB HBM3",)),
    "h200": GPU(140, 989, 4.8, 450, 50, ("NVIDIA H200",)),
    "b200": GPU(178, 2250, 8, 900, 50, ("NVIDIA B200",)),
    "l40s": GPU(44, 362, 0.864, 32, 12.5, ("NVIDIA L40S",)),
    "rtx4090": GPU(23.5, 165, 1.01, 32, 1.25, ("NVIDIA GeForce RTX 4090",)),
}


def peak_flops(device: torch.device, precision: Precision) -> float:
    """The FLOP/s of which MFU and HFU are shares: the published bf16 peak of a GPU in `GPUS`, as in `openimp plan`; of
    another device, which has no such figure here, the fastest of some large matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for gpu in GPUS.values():
            if name in gpu.names:
                return gpu.flops_per_s
    return product_speed(device, precision_of(device, precision))
