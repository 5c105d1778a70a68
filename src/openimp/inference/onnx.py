"""`openimp export`: one ONNX graph per modality, for runtimes without PyTorch.

Shape suffixes: B examples, Z features of the shared embedding space.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openimp.common.errors import UserError
from openimp.common.modality import Modality
from openimp.common.progress import console
from openimp.common.protocols import TensorInput, Tensors, learned_files
from openimp.inference.model import Model, load
from openimp.model.embedder import Embedder

TOLERANCE = 1e-4
"""Largest difference between the unit vectors of a graph and those of the model."""
EXAMPLES = 2
"""Batch size of the example with which a graph is traced; the graph takes any."""
TRIED = 3
"""Batch size with which a graph is compared with the model."""
LARGEST_GRAPH = 2**30
"""Bytes of weights above which they are in a file beside the graph. An ONNX file may have 2 GiB."""


def export(run: str | Path, folder: Path) -> None:
    """Writes the graphs NAME.onnx, graphs.json that says what they take and return, and the model's tokenizer.

    Each graph is run with onnxruntime and compared with the model.
    """
    _require_packages()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: expected a new or empty folder")
    model = load(run, "cpu", "fp32")
    graphs = {name: _targets(model, name) for name in model.modalities}
    if not any(graphs.values()):
        raise UserError(f"{run}: no task trains two modalities together, so there are no embeddings to export")
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: _export_one(model, name, targets, folder) for name, targets in graphs.items() if targets}
    about = {"recipe": model.config.name, "embed_dim": model.imp.config.embed_dim, "graphs": described}
    for name, text in learned_files(model.modalities.values()).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "graphs.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in described.items():
        size = sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*")) / 1e6
        console.print(
            f"{folder / found['file']}: {size:.1f} MB, differs from the model by {found['difference']:.1e}",
            soft_wrap=True,
        )


class Graph(nn.Module):
    """A modality of a model as one function: the tensor of `from_tensor` to unit vectors (B, Z), one per target."""

    def __init__(self, imp: Embedder, name: str, modality: Tensors, targets: list[str]) -> None:
        super().__init__()
        self.imp = imp
        self.name = name
        self.modality = modality
        self.targets = targets

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        features_BD = self.imp.encode({self.name: self.modality.from_tensor(batch)}).features
        return tuple(self.imp.project(features_BD, self.name, target) for target in self.targets)


def _targets(model: Model, name: str) -> dict[str, list[str]]:
    """The modalities with which the embeddings of each output can be compared.

    In a disjoint space, a modality has an output per projection head; the first is that of `Model.partner`.
    """
    shared = [other for other in model.modalities if model.imp.share_a_space(name, other)]
    others = [other for other in shared if other != name] or shared
    if not others:
        return {}
    partner = model.partner(name)
    heads: dict[str, list[str]] = {model.imp.head_name(name, partner): []}
    for other in others:
        heads.setdefault(model.imp.head_name(name, other), []).append(other)
    first, *rest = heads.values()
    return {"vectors": first, **{f"vectors_towards_{others[0]}": others for others in rest}}


def _export_one(model: Model, name: str, targets: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """Writes the graph of one modality, and returns what graphs.json says about it."""
    modality = model.modalities[name]
    if not isinstance(modality, Tensors):
        raise UserError(f"{name} cannot be exported: it takes raw values, not a tensor")
    expected = modality.tensor_input(model.views[name])
    graph = Graph(model.imp, name, modality, [others[0] for others in targets.values()]).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    file = folder / f"{name}.onnx"
    _write(graph, _example(expected, modality, EXAMPLES), list(targets), file, weights)
    return {
        "file": file.name,
        "input": {
            "name": "input",
            "type": str(expected.dtype).removeprefix("torch."),
            "shape": ["batch", *expected.shape],
            "preparation": expected.preparation,
        },
        "outputs": {output: {"comparable_with": others} for output, others in targets.items()},
        "difference": _difference(graph, file, _example(expected, modality, TRIED)),
    }


def _write(graph: Graph, example: Tensor, outputs: list[str], file: Path, weights: int) -> None:
    """Traces the graph and writes it. Its weights have `weights` bytes or less."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with torch.no_grad(), _quiet():
        traced = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program: Any = torch.onnx.export(
            traced, input_names=["input"], output_names=outputs, dynamic_shapes=({0: "batch"},), verbose=False
        )
    ClearMetadataAndDocStringPass()(program.model)  # It has stack traces with the paths of this machine.
    program.save(file, external_data=weights > LARGEST_GRAPH)


def _example(expected: TensorInput, modality: Modality, batch: int) -> Tensor:
    shape, generator = (batch, *expected.shape), torch.Generator().manual_seed(0)
    if expected.dtype.is_floating_point:
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randint(1, modality.stem_spec().values, shape, generator=generator)


def _difference(graph: Graph, file: Path, batch: Tensor) -> float:
    """The largest difference between the outputs of the file and of the model for a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": batch.numpy()})
    with torch.no_grad():
        wanted = graph(batch)
    difference = max(float((torch.from_numpy(a) - b).abs().max()) for a, b in zip(found, wanted))
    if not difference <= TOLERANCE:  # Also if it is not a number.
        raise UserError(f"{file}: differs from the model by {difference:.1e}; try other versions of onnxruntime")
    return difference


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'openimp[onnx]'") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress and the warnings of torch's exporter, which concern its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
