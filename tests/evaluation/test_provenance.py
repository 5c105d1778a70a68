"""A result names all that it depends on: the same thing has the same names, another thing has others."""

import json
import subprocess
from importlib.metadata import version

import pytest
import torch

from openimp.common.versions import openimp_version
from openimp.evaluation.evaluate import evaluate
from openimp.evaluation.provenance import checkpoint_fields
from tests.little import png

WORDS = ["red", "green", "blue", "white"]
ZERO_SHOT = {"type": "zero_shot", "inputs": {"image": "picture"}, "label": "word", "view": {"image": {"size": 16}}}


@pytest.fixture
def manifest(tmp_path):
    """Names four pictures, two of them of split test."""
    lines = []
    for i, word in enumerate(WORDS):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        row = {"picture": f"{i}.png", "word": word, "part": "test" if i < 2 else "train"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "things.jsonl").write_text("".join(lines))
    return tmp_path / "things.jsonl"


@pytest.fixture
def measure(manifest, tiny_recipe, tiny_model):
    """The first result of an evaluation set of the manifest."""

    def run(model=None, where=None, precision="fp32", **options):
        recipe = tiny_recipe(
            model,
            sources={"all": {"path": "unused"}, "things": {"path": str(manifest), "where": where or {}}},
            train={"precision": precision},
            evaluation={"sets": {"names": {"source": "things"} | (options or ZERO_SHOT)}},
        )
        network, modalities = tiny_model(recipe)
        return evaluate(network, recipe, modalities)[0]

    return run


def test_the_measured_values_have_a_name(measure, manifest):
    """Which a change inside a file of a manifest changes, unlike the fingerprint, and the choice of rows too."""
    picture = manifest.parent / "1.png"
    before, chosen = measure(), measure(where={"part": "test"})
    assert (before["split"], before["where"], chosen["where"]) == (None, {}, {"part": "test"})
    picture.write_bytes(png(9))
    after, chosen_after = measure(), measure(where={"part": "test"})
    assert len({result["data_hash"] for result in (before, chosen, after, chosen_after)}) == 4
    assert before["fingerprint"] == after["fingerprint"] != chosen["fingerprint"] == chosen_after["fingerprint"]
    picture.write_bytes(png(1))
    picture.rename(manifest.parent / "moved.png")
    manifest.write_text(manifest.read_text().replace("1.png", "moved.png"))
    assert measure()["data_hash"] == before["data_hash"]
    manifest.write_text(manifest.read_text().replace('"blue"', '"grey"'))
    assert measure()["data_hash"] != before["data_hash"]


def test_prompts_have_a_version(measure):
    def prompts_version(**options):
        return measure(**ZERO_SHOT | options)["prompts_version"]

    names = {word: word for word in WORDS}
    options = ({}, {"prompts": ["a {}"]}, {"prompts": ["a {}", "{}"]}, {"words": True}, {"classes": names},
               {"classes": names | {"red": "scarlet"}})  # fmt: skip
    versions = [prompts_version(**changes) for changes in options]
    assert len(set(versions)) == 6
    assert prompts_version(prompts=["a {}"]) == versions[1]


def test_decoders_are_those_of_the_set_and_the_precision_is_that_of_training(measure):
    for precision in ("bf16", "fp32"):
        result = measure(precision=precision)
        assert (result["precision"], result["torch"]) == (precision, torch.__version__)
        assert result["decoders"] == {name: version(name) for name in ("pillow", "tokenizers")}


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
    assert checkpoint_fields(model, modalities) == {"checkpoint": name, "openimp": openimp_version()}
    modalities["text"].fit([["other words, other words"]])
    fitted = checkpoint_fields(model, modalities)["checkpoint"]
    assert len({name, fitted, checkpoint_fields(model.bfloat16(), modalities)["checkpoint"]}) == 3


def test_the_version_names_the_commit_of_a_checkout_and_of_no_other_project(tmp_path, monkeypatch):
    """The package is in src/openimp of the checkout."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "first")
    head = git("rev-parse", "--short", "HEAD").strip()
    for folder, name in (("src", f"{version('openimp')} ({head})"), (".venv/lib", version("openimp"))):
        (tmp_path / folder / "openimp").mkdir(parents=True)
        monkeypatch.setattr("openimp.common.versions.PACKAGE", tmp_path / folder / "openimp")
        assert openimp_version.__wrapped__() == name
