"""Small models of open_clip with random weights, as the library itself builds and saves them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "red", "green", "blue", "white", "square", "dog", "s"]
TOWER = {"width": 32, "layers": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8, "head_width": 16}
TEXT = {**TOWER, "heads": 2, "context_length": 16}
WORD_TEXT = {**TEXT, "vocab_size": len(WORDS), "hf_tokenizer_name": "local"}
MODELS: dict[str, dict[str, Any]] = {
    "clip": {"quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "oblong": {"vision_cfg": {**VISION, "image_size": [24, 40], "patch_size": 4}, "text_cfg": TEXT},
    "squashed": {"vision_cfg": {**VISION, "image_size": [40, 30], "patch_size": 10, "pool_type": "avg"},
                 "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True}, "custom_text": True},
    "siglip": {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"},
               "text_cfg": {**WORD_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True,
                            "tokenizer_kwargs": {"clean": "canonicalize"}},
               "custom_text": True, "init_logit_bias": -10},
    "convnext": {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 64}, "text_cfg": TEXT},
    "resnet": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64},
               "text_cfg": TEXT},
    "bert": {"vision_cfg": VISION, "text_cfg": {"hf_model_name": "bert", "hf_tokenizer_name": "local",
                                                "context_length": 12, "tokenizer_kwargs": {"strip_sep_token": True}}},
    "coca": {"vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
             "text_cfg": {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True},
             "multimodal_cfg": {**TOWER, "heads": 2, "context_length": 15}, "custom_text": True},
}  # fmt: skip
"""The architectures, as the library's `model_cfg` without `embed_dim`."""
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "m2m_100": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
                "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "pad_token_id": 0},
}  # fmt: skip
"""Sizes of text towers of transformers. Other kinds have those of bert."""
PREPROCESSING: dict[str, dict[str, Any]] = {
    "siglip": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"},
    "squashed": {"resize_mode": "longest", "interpolation": "bilinear"},
}
"""Options of preprocessing that differ from the library's defaults."""


def write(name: str, folder: Path) -> str:
    """Writes one of `MODELS` to a new folder, and returns openimp's name of it."""
    write_model(folder, MODELS[name], PREPROCESSING.get(name, {}))
    return f"open_clip:local-dir:{folder}"


def write_model(folder: Path, model_config: dict[str, Any], preprocessing: dict[str, Any]) -> None:
    """Writes a model to a new folder, as `open_clip.push_to_hf_hub` does."""
    folder.mkdir()
    config = {"embed_dim": 24, **json.loads(json.dumps(model_config))}
    if kind := config["text_cfg"].get("hf_model_name"):
        tower = folder / "tower"
        sizes = TEXT_TOWERS.get(kind, TEXT_TOWERS["bert"])
        AutoConfig.for_model(kind, vocab_size=len(WORDS), **sizes).save_pretrained(tower)
        config["text_cfg"]["hf_model_name"] = str(tower)
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
    randomize(model, model.visual, model.visual.image_size)
    save_config_for_hf(model, file, config)
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    if "hf_tokenizer_name" in config["text_cfg"]:
        word_tokenizer().save_pretrained(folder)


def randomize(model: torch.nn.Module, visual: torch.nn.Module, size: int | Iterable[int]) -> None:
    """Changes new weights so that no scale is 0, and batch norms so that they fit pictures of a size."""
    norms = [module for module in visual.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
        if norms:
            for norm in norms:
                norm.momentum = None  # Its mean and variance become those of one batch.
            height, width = (size, size) if isinstance(size, int) else size
            visual.train()(torch.randn(4, 3, height, width))
            visual.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
