"""Models of other libraries open from the folders that people have on disk; see tests/layouts.py."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file

from openimp.encoding.frozen import open_encoder, release_encoders
from tests import layouts
from tests.messages import refuses

TEXTS = ["a photo of a red square", "Café für alle!", "a " * 90, ""]
PICTURES = [PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8))
            for h, w in ((64, 64), (90, 70))]  # fmt: skip


@pytest.mark.parametrize("name", layouts.SENTENCE_TRANSFORMERS)
def test_a_layout_of_sentence_transformers_has_the_librarys_vectors(name, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = layouts.write_sentence_transformer(name, tmp_path / "model")
    encoder = open_encoder(f"sentence_transformers:{folder}", "text")
    vectors = encoder.embed(np.concatenate([encoder.read(text) for text in TEXTS]))
    library = SentenceTransformer(str(folder), device="cpu", model_kwargs={"use_safetensors": True})
    expected = library.encode(TEXTS, convert_to_tensor=True)
    assert vectors.shape == (len(TEXTS), encoder.features)
    assert vectors.isfinite().all()
    assert vectors.std(0).max() > 1e-3, "the vectors differ"
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=0)
    release_encoders()


@pytest.mark.parametrize("name", layouts.TIMM)
def test_a_layout_of_timm_has_the_librarys_vectors(name, tmp_path):
    folder = layouts.write_timm(name, tmp_path / "model")
    encoder = open_encoder(f"timm:{folder}", "image")
    vectors = encoder.embed(np.concatenate([encoder.read(picture) for picture in PICTURES]))
    library = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=library))
    with torch.no_grad():
        features = library.forward_features(torch.stack([transform(picture) for picture in PICTURES]))
        expected = library.forward_head(features, pre_logits=True)
    assert vectors.shape == (len(PICTURES), encoder.features)
    assert vectors.std(0).max() > 1e-5, "the vectors differ"
    torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)
    release_encoders()


@pytest.mark.parametrize("name", layouts.OPEN_CLIP)
def test_a_layout_of_open_clip_has_the_librarys_vectors(name, tmp_path):
    folder = layouts.write_open_clip(name, tmp_path / "model")
    library, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = ["a red square", "a white cat, a blue dog"]
    with torch.no_grad():
        pictures = torch.stack([transform(picture) for picture in PICTURES])
        library.eval()
        expected = {
            "image": library.encode_image(pictures, normalize=False),  # CoCa normalizes by default.
            "text": library.encode_text(tokenizer(texts), normalize=False),
        }
    for modality, items in (("image", PICTURES), ("text", texts)):
        encoder = open_encoder(f"open_clip:{folder}", modality)
        vectors = encoder.embed(np.concatenate([encoder.read(item) for item in items]))
        assert vectors.shape == (len(items), encoder.features)
        assert vectors.std(0).max() > 1e-5, "the vectors differ"
        torch.testing.assert_close(vectors, expected[modality], atol=1e-4, rtol=1e-4)
    release_encoders()


def converting_lines() -> list[str]:
    """The lines of docs/fine-tuning.md that convert pickled weights, without the `cd`."""
    page = (Path(__file__).parents[2] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
    return re.findall(r"^python -c .*$", page, re.MULTILINE)


@pytest.mark.slow
def test_pickled_weights_are_refused_and_open_after_the_line_of_the_documentation(tmp_path):
    text = layouts.write_sentence_transformer("LaBSE", tmp_path / "labse")
    pictures = layouts.write_timm("resnet18.a1_in1k", tmp_path / "resnet")
    both = layouts.write_open_clip("imageomics/bioclip", tmp_path / "clip")
    (both / "model.safetensors").unlink()
    expected = open_encoder(f"sentence_transformers:{text}", "text").embed(np.array(TEXTS, object))
    for name, modality, folder, safe, pickled in (
        ("sentence_transformers", "text", text, "model.safetensors", "pytorch_model.bin"),
        ("timm", "image", pictures, "model.safetensors", "pytorch_model.bin"),
        ("open_clip", "text", both, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ):
        for file in folder.rglob(safe):
            torch.save(load_file(file), file.with_name(pickled))
            file.unlink()
        release_encoders()
        with refuses():
            open_encoder(f"{name}:{folder}", modality)
        (line,) = [line for line in converting_lines() if f"'{pickled}'" in line and f"'{safe}'" in line]
        for file in [*folder.rglob(pickled)]:
            subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=file.parent, check=True)
        open_encoder(f"{name}:{folder}", modality)
    vectors = open_encoder(f"sentence_transformers:{text}", "text").embed(np.array(TEXTS, object))
    torch.testing.assert_close(vectors, expected)
    release_encoders()


def test_what_would_need_code_of_a_model_is_refused(tmp_path):
    folder = layouts.write_sentence_transformer("all-MiniLM-L6-v2", tmp_path / "custom-class")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"  # As in jina-embeddings-v3.
    (folder / "modules.json").write_text(json.dumps(modules))
    with refuses():
        open_encoder(f"sentence_transformers:{folder}", "text")
    folder = layouts.write_sentence_transformer("all-MiniLM-L6-v2", tmp_path / "custom-model")
    code = {"model_type": "new", "auto_map": {"AutoModel": "modeling.NewModel"}}  # As in gte-multilingual-base.
    layouts.edit_json(folder / "config.json", code)
    with refuses():
        open_encoder(f"sentence_transformers:{folder}", "text")
    folder = layouts.write_sentence_transformer("all-MiniLM-L6-v2", tmp_path / "known-model")
    layouts.edit_json(folder / "config.json", {"auto_map": {"AutoModel": "modeling.BertModel"}})
    open_encoder(f"sentence_transformers:{folder}", "text")  # transformers has its code.
    folder = layouts.write_open_clip("timm/ViT-B-16-SigLIP", tmp_path / "siglip")
    layouts.edit_json(folder / "config.json", {"auto_map": {"AutoModel": "marqo.Model"}})  # As in marqo-fashionSigLIP.
    with refuses():
        open_encoder(f"open_clip:{folder}", "text")


def test_only_files_of_the_model_are_read(tmp_path):
    folder = layouts.write_sentence_transformer("all-MiniLM-L6-v2", tmp_path / "model")
    (folder / "data_config.json").write_text("damaged")
    open_encoder(f"sentence_transformers:{folder}", "text")
    release_encoders()
    layouts.edit_json(folder / "sentence_bert_config.json", {"model_args": {"attn_implementation": "evil/kernel"}})
    with refuses():
        open_encoder(f"sentence_transformers:{folder}", "text")
