"""The host does not wait for the device, except on the steps that are logged."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from openimp.common.json_lines import read_lines
from openimp.data.loader import load_batches
from tests.trained import trainer_of

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}
"""Operators that give a number to the host, as `item` and `float` do, or whose result has a size that they compute."""
CHANGES = ["optimizer={lr: 3e-3, muon_lr: 0.01, ema_decay: 0.9}", "evaluation={}", "train.num_workers=1",
           "alternation.kind=intervals"]  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts, by step, where the host reads numbers that were computed in the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.waits = Counter[int]()
        self.fresh: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._opname
        if name in WAITS and args[0].untyped_storage()._cdata in self.fresh:
            self.waits[self.step] += 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):  # Kept, so that no other storage has its address.
                self.fresh[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return out


def test_numbers_are_read_on_logged_steps_only(little_data, tmp_path):
    """Every fourth and every fifth step (with a checkpoint), and the last."""
    training = trainer_of(little_data, tmp_path / "run", *CHANGES, "train.steps=11", "train.log_every=4")
    waits = Waits()
    make_step = training.make_step

    def counted_step(loaded: Any) -> Any:
        waits.step = loaded.visit.step
        waits.fresh.clear()
        return make_step(loaded)

    training.make_step = counted_step  # type: ignore[method-assign]
    with waits:
        training.train()
    waits.waits.pop(-1)  # Before the first step, torch's loader draws its seed.
    assert {step + 1 for step in waits.waits} == {4, 5, 8, 10, 11}
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 11]
    inputs = {"named": {"image", "text"}, "heard": {"audio", "text"}}
    assert [{*line["experts"]} for line in lines] == [
        set().union(*(inputs[task] for task in line["tasks"])) for line in lines
    ]
    assert len(lines[0]["tasks"]) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("more", [[], ["model.moe.experts={vision: 2, text: 2, audio: 2}"], ["model.moe=null"]])
def test_the_host_never_waits_for_a_gpu_between_two_logged_steps(little_data, tmp_path, more):
    training = trainer_of(little_data, tmp_path / "run", *CHANGES, "train.log_every=100", "train.save_every=100", *more)
    batches = [*load_batches(training.batches, 0, 8)]
    for loaded in batches[:4]:  # Libraries and optimizer state are initialized in the first steps.
        training.make_step(loaded)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loaded in batches[4:]:
            training.make_step(loaded)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.confirm()
    assert training.step == 8
