"""openimp:base, the model that comes with openimp."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import openimp
from openimp.checkpoint.find import BUNDLED_MODELS
from openimp.checkpoint.warm_start import open_warm_start
from openimp.common.cache import cache_folder
from openimp.data.sources import open_source
from openimp.model.imp import IMP
from openimp.recipe.tasks import Source
from openimp.search import build_index, open_index
from tests.messages import refuses

WORDS = ["dog", "cat", "guitar", "moon", "pencil", "house", "car", "apple", "fish", "umbrella", "clock", "key"]
"""Everyday words that are names of pictures."""


@pytest.fixture(scope="module")
def base() -> openimp.Model:
    return openimp.load("openimp:base", "cpu")


def test_everyday_words_find_their_pictures(base):
    """The candidates are training pictures of one vendor that have a word in their name or keywords."""
    source = open_source("stills", Source(path="openimp:stills.parquet", where={"split": "train", "vendor": "noto"}))
    rows = source.rows(range(len(source)))
    texts = [f"{row['name']} {' '.join(row['keywords'])}".lower().split() for row in rows]
    named = [i for i, text in enumerate(texts) if any(word in text for word in WORDS)]
    image = base.encode_image([rows[i]["image"] for i in named], normalize=True)
    found = (base.encode_text(WORDS, normalize=True) @ image.T).argmax(1)
    right = [word in texts[named[i]] for word, i in zip(WORDS, found.tolist())]
    assert sum(right) >= 0.8 * len(WORDS), dict(zip(WORDS, right))


def test_the_weights_are_small_in_the_package_and_exact_in_memory(base):
    (file,) = BUNDLED_MODELS.glob("base/model/*.safetensors")
    assert file.stat().st_size <= 10e6
    with safe_open(file, "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}


def test_training_starts_from_it(base):
    recipe = base.recipe.model_copy(deep=True)
    recipe.train.init = "openimp:base"
    modalities = recipe.make_modalities()
    start = open_warm_start(recipe, modalities)
    model = IMP(recipe.to_config({}), modalities)
    assert "; new: nothing; " in start.load(model, {})
    theirs = base.imp.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())


def test_the_index_of_its_own_media_is_in_the_cache(media_folder, tmp_path, monkeypatch):
    """A bundled model is no run, in which an index could be. An index of the user's files is not in the cache."""
    pytest.importorskip("lancedb")
    shutil.copytree(Path(__file__).parents[1] / "fixtures/pushed", tmp_path / "small")
    monkeypatch.setattr("openimp.checkpoint.find.BUNDLED_MODELS", tmp_path)
    build_index("openimp:small")
    for name in (cache_folder("search") / "small", "openimp:small"):
        assert sum(open_index(name).counts.values()) > 0
    with refuses():
        open_index("openimp:smal")
    with refuses():
        build_index("openimp:small", [media_folder])


def test_it_is_among_the_models():
    assert openimp.list_models("openimp:*") == ["openimp:base"]
    if find_spec("open_clip"):
        assert "open_clip:ViT-B-16-SigLIP2/webli" in openimp.list_models("*SigLIP2*")
