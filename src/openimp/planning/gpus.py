"""Published figures of GPUs, to plan with."""

from dataclasses import dataclass

NODE = 8
"""GPUs of a node, which are connected by `GPU.link`; more of them meet on the network."""
USABLE = 0.9
"""Share of a GPU's memory for tensors; its context, NCCL's buffers and gaps between tensors have the rest."""


@dataclass(frozen=True)
class GPU:
    """A GPU in the kind of machine that it is mostly sold in."""

    memory: float  # GiB that programs see
    tflops: float  # dense bf16 products, TFLOP/s, as its maker publishes
    bandwidth: float  # TB/s of its memory
    link: float  # GB/s to the other GPUs of its node, each way
    network: float  # GB/s to other nodes, each way


GPUS = {
    "a100-40": GPU(39, 312, 1.56, 300, 25),
    "a100": GPU(79, 312, 2.04, 300, 25),
    "h100": GPU(79, 989, 3.35, 450, 50),
    "h200": GPU(140, 989, 4.8, 450, 50),
    "b200": GPU(178, 2250, 8, 900, 50),
    "l40s": GPU(44, 362, 0.864, 32, 12.5),
    "rtx4090": GPU(23.5, 165, 1.01, 32, 1.25),
}
