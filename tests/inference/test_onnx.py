"""onnxruntime computes the vectors of the model from the exported graphs."""

import json
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import openimp
from openimp.common.errors import UserError
from openimp.inference import onnx
from openimp.inference.onnx import export
from tests.messages import refuses

pytestmark = pytest.mark.slow

EXPERT_CHOICE = {"moe": {"experts": 4, "layers": 1}}
BY_STEM = {"moe": {"experts": {"vision": 4, "audio": 2, "text": 2}, "layers": 1}}
BIASED = {"moe": {"experts": 4, "layers": 1}, "bias": True, "gelu": "erf"}
GRID = {"positions": "grid", "tables": [2, 4, 4]}
CONVOLVED = {"conv_channels": 8}


@pytest.fixture
def exported(tiny_recipe, write_tiny, tmp_path):
    """Exports the untrained model of some tasks of the tiny recipe; returns the model and the folder."""

    def make(changes, tasks, vision=None):
        recipe = tiny_recipe(changes)
        kept = {name: task for name, task in recipe.to_dict()["tasks"].items() if name in tasks}
        stems = {"image": "vision", "video": "vision", "audio": "audio"}
        modalities = {stem: recipe.to_dict()["modalities"][stem] for stem in {stems[name] for name in tasks}}
        modalities.get("vision", {}).update(vision or {})
        write_tiny(tiny_recipe(changes, tasks=kept, modalities=modalities), tmp_path)
        export(tmp_path, tmp_path / "onnx")
        return openimp.load(tmp_path, "cpu", "fp32"), tmp_path / "onnx"

    return make


def run(folder, name, batch):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    assert {each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())} == {"batch"}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": batch.numpy()})))


def inputs(model, name, batch):
    shape, rng = model.modalities[name].tensor_input(model.views[name]).shape, torch.Generator().manual_seed(batch)
    if name != "text":
        return torch.rand(batch, *shape, generator=rng) * 2 - 1
    texts = ["a", "a red square", "a blue line that is rather longer than the other ones", "noise", "circle and a"]
    return model.tokenizer(texts[:batch])


@pytest.mark.parametrize(
    ("changes", "tasks", "vision"),
    [
        (EXPERT_CHOICE, ["image", "video", "audio"], CONVOLVED),
        (BY_STEM, ["image", "video", "audio"], {}),
        (BIASED, ["image", "video"], GRID),
    ],
    ids=["expert_choice", "experts by stem", "as in public ViTs"],
)
def test_onnxruntime_computes_the_vectors_of_the_model(changes, tasks, vision, exported):
    """At batch sizes other than that of the export, for each modality that an output is compared with."""
    model, folder = exported(changes, tasks, vision)
    graphs = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))["graphs"]
    assert graphs.keys() == {*tasks, "text"}
    for name, about in graphs.items():
        assert b".py" not in (folder / about["file"]).read_bytes(), "stack traces tell paths of this machine"
        compared = [other for output in about["outputs"].values() for other in output["comparable_with"]]
        assert sorted(compared) == sorted(other for other in graphs if model.imp.share_a_space(name, other))
        for size in (1, 5):
            batch = inputs(model, name, size)
            assert about["input"]["shape"] == ["batch", *batch.shape[1:]]
            found = run(folder, name, batch)
            assert found.keys() == about["outputs"].keys()
            for output, vectors in found.items():
                for other in about["outputs"][output]["comparable_with"]:
                    expected = model.encode(name, batch, normalize=True, towards=other).detach().numpy()
                    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-4)
            np.testing.assert_allclose(
                found["vectors"], model.encode(name, batch, normalize=True).detach().numpy(), rtol=0, atol=1e-4
            )


def test_the_preparations_lead_to_the_vectors_of_the_model(exported):
    """A text and a sound are prepared as graphs.json says, without openimp."""
    model, folder = exported(EXPERT_CHOICE, ["audio"])
    about = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))["graphs"]
    text, audio = about["text"]["input"], about["audio"]["input"]
    length, samples = text["shape"][1], audio["shape"][1]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    steps = f"Add 2 to each id, keep the first {length - 1}, append 1, and fill up with 0."
    assert text["preparation"].endswith(steps)
    ids = [i + 2 for i in tokenizer.encode("a red square", add_special_tokens=False).ids][: length - 1]
    batch = torch.tensor([[*ids, 1, *[0] * (length - 1 - len(ids))]])
    expected = model.encode_text("a red square", normalize=True)
    np.testing.assert_allclose(run(folder, "text", batch)["vectors"], expected, rtol=0, atol=1e-4)

    assert audio["preparation"].startswith(f"{samples} mono samples in -1..1 at 16000 Hz.")
    sound = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)
    parts = torch.from_numpy(np.stack([sound[:samples], sound[-samples:]]))
    mean = torch.from_numpy(run(folder, "audio", parts)["vectors"]).mean(0, keepdim=True)
    expected = model.encode_audio(sound, normalize=True)
    torch.testing.assert_close(F.normalize(mean, dim=-1), expected, rtol=0, atol=1e-3)  # openimp rounds to 16 bits.


def test_what_cannot_be_exported_is_said_in_one_sentence(tiny_model_folder, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").touch()
    with refuses():
        export(tiny_model_folder, tmp_path)
    with refuses():
        export(tmp_path, tmp_path / "onnx")
    monkeypatch.setattr(onnx, "TOLERANCE", -1)
    with pytest.raises(UserError, match="differs"):
        export(tiny_model_folder, tmp_path / "graphs")
    assert not [*(tmp_path / "graphs").iterdir()]
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with refuses():
        export(tiny_model_folder, tmp_path / "onnx")
