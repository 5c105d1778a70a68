"""A result names all that it depends on: the same thing has the same names, another thing has others."""

import io
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch

from openimp.common.versions import openimp_version
from openimp.evaluation.evaluate import evaluate
from openimp.evaluation.provenance import checkpoint_fields

WORDS = ["red", "green", "blue", "white"]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four pictures and sounds, named by a manifest, two of them of split test."""
    lines = []
    for i, word in enumerate(WORDS):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 9000), 16_000)
        row = {"picture": f"{i}.png", "sound": f"{i}.wav", "word": word, "part": "test" if i < 2 else "train"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "things.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def measure(folder, tiny_recipe, tiny_model):
    """The results of one evaluation set of the manifest."""

    def run(model=None, where=None, train=None, **options):
        names = {"type": "zero_shot", "inputs": {"image": "picture"}, "label": "word", "view": {"image": {"size": 16}}}
        recipe = tiny_recipe(
            model,
            sources={"all": {"path": "unused"}, "things": {"path": f"{folder}/things.jsonl", "where": where or {}}},
            train=train or {},
            evaluation={"sets": {"names": {"source": "things"} | (options or names)}},
        )
        return evaluate(*_model(tiny_model, recipe))

    return run


def _model(tiny_model, recipe):
    model, modalities = tiny_model(recipe)
    return model, recipe, modalities


PAIR = {"type": "retrieval", "view": {"image": {"size": 16}, "text": {"length": 8}}}


def test_the_measured_values_have_a_name(measure, folder):
    """Which a change inside a file of a manifest changes, unlike the fingerprint, and the choice of rows too."""
    (before,) = measure()
    (chosen,) = measure(where={"part": "test"})
    assert (before["split"], before["where"], chosen["where"]) == (None, {}, {"part": "test"})
    (folder / "1.png").write_bytes(png(9))
    (after,) = measure()
    (chosen_after,) = measure(where={"part": "test"})
    assert len({result["data_hash"] for result in (before, chosen, after, chosen_after)}) == 4
    assert before["fingerprint"] == after["fingerprint"] != chosen["fingerprint"] == chosen_after["fingerprint"]
    (folder / "1.png").write_bytes(png(1))
    (folder / "1.png").rename(folder / "moved.png")
    manifest = folder / "things.jsonl"
    manifest.write_text(manifest.read_text().replace("1.png", "moved.png"))
    assert measure()[0]["data_hash"] == before["data_hash"]
    manifest.write_text(manifest.read_text().replace('"blue"', '"grey"'))
    assert measure()[0]["data_hash"] != before["data_hash"]


def test_prompts_have_a_version(measure):
    def of(**options):
        options = {"inputs": {"image": "picture"}, "view": {"image": {"size": 16}}} | options
        return measure(**({"type": "zero_shot", "label": "word"} | options))[0]["prompts_version"]

    names = {word: word for word in WORDS}
    versions = [of(), of(prompts=["a {}"]), of(prompts=["a {}", "{}"]), of(words=True), of(classes=names)]
    versions.append(of(classes=names | {"red": "scarlet"}))
    assert len(set(versions)) == 6
    assert of(prompts=["a {}"]) == versions[1]
    assert all(len(name) == 8 for name in versions)
    pairs = [measure(**PAIR, inputs={"image": "picture", "text": text})[0] for text in ("word", "a {word}")]
    assert len({pair["prompts_version"] for pair in pairs}) == 2
    sounds = {"type": "retrieval", "inputs": {"image": "picture", "audio": "sound"}}
    views = {"image": {"size": 16}, "audio": {"seconds": 0.512}}
    (result, _) = measure({"space": "joint"}, **sounds, view=views)
    assert result["prompts_version"] is None
    assert result["decoders"] == {name: version(name) for name in ("pillow", "soundfile", "av")}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_that_was_computed_in_is_told(measure, precision):
    (result,) = measure(train={"precision": precision})
    assert (result["precision"], result["torch"]) == (precision, torch.__version__)


def test_decoders_are_those_of_the_set(measure):
    assert measure()[0]["decoders"] == {name: version(name) for name in ("pillow", "tokenizers")}


def test_a_checkpoint_is_named_by_all_of_its_tensors_and_by_what_was_learned(tiny_recipe, tiny_model):
    recipe = tiny_recipe()
    model, modalities = tiny_model(recipe)
    name = checkpoint_fields(model, modalities)["checkpoint"]
    assert name == checkpoint_fields(tiny_model(recipe)[0].train(), modalities)["checkpoint"]
    for tensor in model.state_dict().values():
        value = tensor.clone()
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(torch.inf))
        assert checkpoint_fields(model, modalities)["checkpoint"] != name
        tensor.copy_(value)
    assert checkpoint_fields(model, modalities)["checkpoint"] == name
    modalities["text"].fit([["other words, other words"]])
    assert checkpoint_fields(model, modalities)["checkpoint"] != name
    assert checkpoint_fields(model.bfloat16(), modalities)["checkpoint"] != name
    assert checkpoint_fields(model, modalities)["openimp"] == openimp_version()


def test_the_version_names_the_commit_of_a_checkout_and_of_no_other_project(tmp_path):
    """A copy of the package reports the commit of the checkout it lies in as src/openimp, and only then."""
    package = Path(sys.modules["openimp"].__file__).parent

    def told(folder: Path) -> str:
        shutil.copytree(package, folder / "openimp", ignore=shutil.ignore_patterns("data", "__pycache__"))
        code = "from openimp.common.versions import openimp_version as v, PACKAGE; print(PACKAGE.parent, v())"
        env = {**os.environ, "PYTHONPATH": str(folder)}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        path, _, found = out.stdout.strip().partition(" ")
        assert path == str(folder)
        return found

    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*who, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert told(tmp_path / "src") == f"{version('openimp')} ({head.strip()})"
    assert told(tmp_path / ".venv" / "lib" / "site-packages") == version("openimp")
