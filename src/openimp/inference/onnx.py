"""`openimp export`: one ONNX graph per modality, for runtimes without PyTorch.

Shape suffixes: B examples, Z features of the shared embedding space.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openimp.common.errors import UserError
from openimp.common.folders import require_empty
from openimp.common.modality import Modality
from openimp.common.progress import console, no_log_output
from openimp.common.protocols import TensorInput, TensorReader, learned_files
from openimp.common.versions import require_library
from openimp.encoding.find import is_public
from openimp.inference.model import Model, load
from openimp.model.embedder import Embedder

TOLERANCE = 1e-4
"""Largest difference between the unit vectors of a graph and those of the model."""
TRACED_BATCH = 2
"""Batch size with which a graph is traced. The graph takes any batch size."""
TESTED_BATCH = 3
"""Batch size with which a graph is compared with the model."""


def export(run: str | Path, folder: Path) -> None:
    """Writes the graphs NAME.onnx, graphs.json, which describes their inputs and outputs, and the model's tokenizer.

    Each graph is run with onnxruntime and compared with the model.
    """
    for library in ("onnx", "onnxruntime", "onnxscript"):
        require_library(library, "onnx")
    require_empty(folder)
    model = load(run, "cpu", "fp32")
    if model.saved_recipe.text and is_public(model.recipe):
        raise UserError(f"{run}: a public model has no graphs here; export it with its own library")
    outputs_by_modality = {name: _outputs(model, name) for name in model.modalities}
    if not any(outputs_by_modality.values()):
        raise UserError(f"{run}: no task trains two modalities together, so there are no embeddings to export")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        graphs = {
            name: _export_modality(model, name, outputs, folder)
            for name, outputs in outputs_by_modality.items()
            if outputs
        }
    except BaseException:
        for file in folder.glob("*.onnx*"):  # They may be wrong, and the next export needs an empty folder.
            file.unlink()
        raise
    description = {"recipe": model.config.name, "embed_dim": model.imp.config.embed_dim, "graphs": graphs}
    for name, text in learned_files(model.modalities.values()).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "graphs.json").write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, graph in graphs.items():
        size = sum(file.stat().st_size for file in folder.glob(f"{name}.onnx*")) / 1e6
        console.print(
            f"{folder / graph['file']}: {size:.1f} MB, differs from the model by {graph['difference']:.1e}",
            soft_wrap=True,
        )


class Graph(nn.Module):
    """A modality of a model as one function: the tensor of `from_tensor` to unit vectors (B, Z), one per target."""

    def __init__(self, imp: Embedder, name: str, modality: TensorReader, targets: list[str]) -> None:
        super().__init__()
        self.imp = imp
        self.name = name
        self.modality = modality
        self.targets = targets

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        features_BD = self.imp.encode(self.name, self.modality.from_tensor(batch)).features
        return tuple(self.imp.project(features_BD, self.name, target) for target in self.targets)


def _outputs(model: Model, name: str) -> dict[str, list[str]]:
    """The modalities with which the embeddings of each output can be compared, by name of the output.

    In a disjoint space, a modality has an output per projection head. The vectors of the first output are for
    comparison with `Model.partner`.
    """
    shared = [other for other in model.modalities if model.imp.share_a_space(name, other)]
    comparable = [other for other in shared if other != name] or shared
    if not comparable:
        return {}
    partner = model.partner(name)
    comparable_by_head: dict[str, list[str]] = {model.imp.head_name(name, partner): []}
    for other in comparable:
        comparable_by_head.setdefault(model.imp.head_name(name, other), []).append(other)
    outputs: dict[str, list[str]] = {}
    for others in comparable_by_head.values():
        outputs[f"vectors_towards_{others[0]}" if outputs else "vectors"] = others
    return outputs


def _export_modality(model: Model, name: str, outputs: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """Writes the graph of a modality, and returns its entry in graphs.json."""
    modality = model.modalities[name]
    if not isinstance(modality, TensorReader):
        raise UserError(f"{name} cannot be exported: it takes raw values, not a tensor")
    expected = modality.tensor_input(model.checked_view(name))
    graph = Graph(model.imp, name, modality, [others[0] for others in outputs.values()]).eval()
    file = folder / f"{name}.onnx"
    _write(graph, _example(expected, modality, TRACED_BATCH), list(outputs), file)
    return {
        "file": file.name,
        "input": {
            "name": "input",
            "type": str(expected.dtype).removeprefix("torch."),
            "shape": ["batch", *expected.shape],
            "preparation": expected.preparation,
        },
        "outputs": {output: {"comparable_with": others} for output, others in outputs.items()},
        "difference": _difference(graph, file, _example(expected, modality, TESTED_BATCH)),
    }


def _write(graph: Graph, example: Tensor, outputs: list[str], file: Path) -> None:
    """Traces the graph and writes it. Weights above 1.5 GiB are in a file beside it: an ONNX file holds at most 2
    GiB."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # What torch's exporter logs and warns of is for its developers.
    with torch.no_grad(), no_log_output(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.export.export(graph, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        program: Any = torch.onnx.export(
            traced, input_names=["input"], output_names=outputs, dynamic_shapes=({0: "batch"},), verbose=False
        )
    ClearMetadataAndDocStringPass()(program.model)  # The metadata has stack traces with the paths of this machine.
    program.save(file)


def _example(expected: TensorInput, modality: Modality, batch: int) -> Tensor:
    shape = (batch, *expected.shape)
    generator = torch.Generator().manual_seed(0)
    if expected.dtype.is_floating_point:
        return torch.rand(shape, generator=generator) * 2 - 1
    return torch.randint(1, modality.stem_spec().values, shape, generator=generator)


def _difference(graph: Graph, file: Path, batch: Tensor) -> float:
    """The largest difference between the outputs of the file and of the model for a batch."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    file_outputs = session.run(None, {"input": batch.numpy()})
    with torch.no_grad():
        model_outputs = graph(batch)
    difference = max(
        float((torch.from_numpy(file_output) - model_output).abs().max())
        for file_output, model_output in zip(file_outputs, model_outputs)
    )
    if not difference <= TOLERANCE:  # Also if it is not a number.
        raise UserError(f"{file}: differs from the model by {difference:.1e}; try other versions of onnxruntime")
    return difference
