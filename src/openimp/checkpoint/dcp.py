"""What torch.distributed.checkpoint (DCP) needs to write and read `shards`: each process its own parts, of any mesh.

torch's own pairs will not do. The default one pickles its metadata. HuggingFaceStorageReader reads all files of a
folder as one, so averaged weights would take the place of the weights of the same names, and where a file of parts is
lost, it leaves what was in memory and says nothing. DCP's plans are pickled too, but go from process to process only.

It is slow to import, and only saving and going on need it.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from openimp.checkpoint.shards import Part, file_name, parts, readable, shape, write
from openimp.common.errors import UserError
from openimp.parallel.distributed import Group

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # In one process that is what is meant.


class Snapshot(torch_dcp.DefaultSavePlanner):
    """This process' parts of some tensors, copied to the CPU's memory: what becomes of the tensors is of no matter."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        super().set_up_planner(dict(tensors))
        self.plan = super().create_local_plan()
        self.copies = {
            item.index: self.lookup_object(item.index).detach().to("cpu", copy=True).contiguous()
            for item in self.plan.items
        }
        self.state_dict = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Has been done, while the tensors were what they were."""

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index]

    def save(self, folder: Path, name: str, group: Group | None) -> Path:
        """Writes one file in each process, of what no other process writes too, and gives this one's.

        Raises:
            OSError: in all processes, if one of them cannot write.
        """
        writer = _Writer(folder, name)
        try:
            torch_dcp.save({}, storage_writer=writer, planner=self, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise _cause(error) from None
        return writer.file


def load(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place, whole ones and DTensors, each process reading what it holds of them.

    Raises:
        UserError: a file is missing or damaged, or holds other tensors than these.
    """
    boxes = parts(folder, name)
    for key in sorted(boxes.keys() | tensors.keys()):
        found = list(shape(boxes[key])) if key in boxes else "missing"
        wanted = list(tensors[key].shape) if key in tensors else "none of its tensors"
        if found != wanted:
            where = boxes[key][0].file if key in boxes else folder / file_name(name)
            raise UserError(f"{where}: does not fit the model: {key} is {found} there, {wanted} here")
    try:
        planner = torch_dcp.DefaultLoadPlanner(flatten_state_dict=False)
        torch_dcp.load(dict(tensors), storage_reader=_Reader(boxes), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from None


def _cause(error: CheckpointException) -> BaseException:
    """What the first process that failed has raised."""
    return error.failures[min(error.failures)][0]


class _Writer(StorageWriter):
    """A file a process, even if it holds nothing, so that a lost one is missed."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=file_name(self.name, i, len(plans))) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.file = self.folder / plan.storage_data
        tensors: dict[str, Any] = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        try:
            write(self.file, tensors, {item.index.fqn: item.index.offset or () for item in plan.items})
        except SafetensorError as error:
            raise OSError(str(error)) from None  # The other is no exception that can be sent to other processes.
        return _done([])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """There is nothing to add, for each file tells what it holds."""

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(StorageReader):
    """Reads of each file what a process holds of its tensors."""

    def __init__(self, boxes: Mapping[str, list[Part]]) -> None:
        # Where there are more processes than rows, some have written parts of nothing.
        self.boxes = {key: [part for part in some if math.prod(part.sizes)] for key, some in boxes.items()}
        self.files = {(key, part.offsets): part.file for key, some in self.boxes.items() for part in some}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(),
                torch.Size(shape(self.boxes[key])),
                [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in some],
            )
            for key, some in self.boxes.items()
        }
        return Metadata(tensors)

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[Path, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self.files[item.storage_index.fqn, tuple(item.storage_index.offset or ())]].append(item)
        for file, items in wanted.items():
            with readable(file), safe_open(file, "pt") as opened:
                for item in items:
                    box = Part(file, tuple(item.storage_offsets), tuple(item.lengths))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(opened.get_slice(item.storage_index.fqn)[box.slices])
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
