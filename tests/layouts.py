"""Folders as people have them after a download: the files of popular repositories, with tiny random weights.

Each entry is named after a repository, and has its files, the keys of its configurations, its tokenizer's kind and the
layers behind its encoder, written down from memory of the repositories. Sizes are shrunk. In models of open_clip, a
timm tower is one of timm's test architectures (so EVA and MobileCLIP have other towers here), and a tokenizer of
transformers has a few words. What the libraries do not read is there too, such as ONNX files.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast, T5EncoderModel

from tests import public

CORPUS = ["a photo of a red square", "the cat and the dog", "query: what is this? passage: a text", "café für alle"] * 9
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "gemma3_text": {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16},
}
"""Of the models of transformers that do not take `SMALL`."""
OTHER_FILES = (".gitattributes", "README.md", "onnx/model.onnx", "openvino/openvino_model.xml", "rust_model.ot",
               "tf_model.h5", "train_script.py", "pytorch_model.bin")  # fmt: skip
"""Files beside the model that no library needs. Here they are damaged, so that nobody can read them."""
PROMPTS = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None, "similarity_fn_name": "cosine"}


TANH = "torch.nn.modules.activation.Tanh"
IDENTITY = "torch.nn.modules.linear.Identity"


def text_model(kind: str, tokenizer: str, pooling: str = "mean", **options: Any) -> dict[str, Any]:
    return {"kind": kind, "tokenizer": tokenizer, "pooling": pooling, **options}


SENTENCE_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "all-MiniLM-L6-v2": text_model("bert", "wordpiece", normalize=True, files={"data_config.json": [{"lines": 1}]}),
    "all-mpnet-base-v2": text_model("mpnet", "wordpiece", normalize=True, files={"data_config.json": [{"lines": 1}]}),
    "paraphrase-multilingual-MiniLM-L12-v2": text_model("bert", "unigram", files={"unigram.json": {"vocab": []}}),
    "all-distilroberta-v1": text_model("roberta", "bpe", normalize=True, files={"data_config.json": []}),
    "multi-qa-mpnet-base-dot-v1": text_model("mpnet", "wordpiece", "cls"),
    "distiluse-base-multilingual-cased-v2": text_model("distilbert", "wordpiece", dense=TANH),
    "LaBSE": text_model("bert", "wordpiece", "cls", dense=TANH, normalize=True),
    "sentence-t5-base": text_model("t5", "unigram", dense=IDENTITY, normalize=True),
    "distilbert-base-nli-stsb-mean-tokens": text_model("distilbert", "wordpiece", root="0_Transformer"),
    "BAAI/bge-small-en-v1.5": text_model("bert", "wordpiece", "cls", normalize=True, prompts=PROMPTS),
    "intfloat/multilingual-e5-large": text_model("xlm-roberta", "unigram", normalize=True),
    "intfloat/multilingual-e5-large-instruct": text_model("xlm-roberta", "unigram", normalize=True, prompts=PROMPTS),
    "mixedbread-ai/mxbai-embed-large-v1": text_model("bert", "wordpiece", "cls", prompts=PROMPTS),
    "thenlper/gte-base": text_model("bert", "vocab.txt", normalize=True),
    "Alibaba-NLP/gte-modernbert-base": text_model("modernbert", "tokenizer.json", "cls", prompts=PROMPTS),
    "nomic-ai/modernbert-embed-base": text_model("modernbert", "tokenizer.json", normalize=True),
    "Qwen/Qwen3-Embedding-0.6B": text_model("qwen3", "bpe", "lasttoken", normalize=True, prompts=PROMPTS),
    "Qwen/Qwen3-Embedding-8B": text_model("qwen3", "bpe", "lasttoken", normalize=True, prompts=PROMPTS, shards=True),
    "google/embeddinggemma-300m": text_model("gemma3_text", "unigram", dense=IDENTITY,
                                             normalize=True, prompts=PROMPTS),
    "Muennighoff/SGPT-125M-weightedmean": text_model("gpt_neo", "bpe", "weightedmean"),
    "google-bert/bert-base-uncased": text_model("bert", "wordpiece", modules=False, head=True),
    "default-prompt": text_model("bert", "wordpiece", prompts={**PROMPTS, "default_prompt_name": "query"}),
}  # fmt: skip
"""The last one is a layout that every repository may have."""


def write_tokenizer(kind: str, folder: Path) -> int:
    """Writes a tokenizer of a kind, with the files of that kind, and returns the size of its vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind in ("bpe", "tokenizer.json"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=350, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="[UNK]")
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=64, **names)
    fast.save_pretrained(folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    if kind in ("wordpiece", "vocab.txt"):
        (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        edit_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    if kind == "bpe":
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    if kind == "unigram":
        (folder / "sentencepiece.bpe.model").write_bytes(b"read only without tokenizer.json")
    if kind == "vocab.txt":
        (folder / "tokenizer.json").unlink()
    return len(words)


def edit_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_sentence_transformer(name: str, folder: Path) -> Path:
    """Writes one of `SENTENCE_TRANSFORMERS` to a new folder, and returns the folder."""
    options = SENTENCE_TRANSFORMERS[name]
    root = folder / options.get("root", "")
    root.mkdir(parents=True)
    kind = options["kind"]
    torch.manual_seed(0)
    size = write_tokenizer(options["tokenizer"], root)
    config = AutoConfig.for_model(kind, vocab_size=size, pad_token_id=0, bos_token_id=2, eos_token_id=3,
                                  **SIZES.get(kind, SMALL))  # fmt: skip
    if kind == "t5":
        model = T5EncoderModel(config)
    else:
        model = (AutoModelForMaskedLM if options.get("head") else AutoModel).from_config(config)
    model.save_pretrained(root, max_shard_size="20KB" if options.get("shards") else "1GB")
    assert (root / "model.safetensors.index.json").exists() == options.get("shards", False)
    for file in OTHER_FILES:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"\x80 not read")
    for file, content in options.get("files", {}).items():
        (folder / file).write_text(json.dumps(content))
    if not options.get("modules", True):
        return folder
    (root / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 32, "do_lower_case": False}))
    versions = {"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(versions | options.get("prompts", {})))
    modules = [(options.get("root", ""), "Transformer"), ("1_Pooling", "Pooling")]
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": mode.partition("_")[0] == options["pooling"] for mode in modes}
    pooling["pooling_mode_mean_sqrt_len_tokens"] = False
    write_module(folder / "1_Pooling", {"word_embedding_dimension": 32, **pooling})
    if activation := options.get("dense"):
        modules.append(("2_Dense", "Dense"))
        shape = {"in_features": 32, "out_features": 24, "bias": True, "activation_function": activation}
        write_module(folder / "2_Dense", shape)
        linear = torch.nn.Linear(32, 24)
        save_file({f"linear.{key}": value for key, value in linear.state_dict().items()},
                  folder / "2_Dense" / "model.safetensors")  # fmt: skip
        (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"not read")
    if options.get("normalize"):
        modules.append((f"{len(modules)}_Normalize", "Normalize"))  # Git stores no empty folder for it.
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
        for i, (path, module) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def write_module(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 32), "stem_width": 8}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18.a1_in1k": (64, RESNET),
    "resnet50.a1_in1k": (64, RESNET),
    "wide_resnet50_2.racm_in1k": (64, RESNET),
    "resnetv2_50.a1h_in1k": (64, {"layers": (1, 1, 1, 1), "channels": (32, 32, 64, 64), "stem_chs": 32}),
    "convnext_tiny.in12k": (64, CONVNEXT),
    "convnextv2_atto.fcmae_ft_in1k": (64, CONVNEXT),
    "efficientnet_b0.ra_in1k": (64, {}),
    "tf_efficientnet_lite0.in1k": (64, {}),
    "mobilenetv3_small_100.lamb_in1k": (64, {}),
    "mobilenetv4_conv_small.e2400_r224_in1k": (64, {}),
    "swin_tiny_patch4_window7_224.ms_in1k": (56, {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": (64, VIT),
    "vit_base_patch16_clip_224.openai": (64, VIT),
    "vit_small_patch14_dinov2.lvd142m": (56, VIT),
    "vit_small_patch16_dinov3.lvd1689m": (64, VIT),
    "vit_base_patch16_siglip_224.v2_webli": (64, VIT),
    "eva02_tiny_patch14_224.mim_in22k": (56, {**VIT, "img_size": 56}),
    "beit_base_patch16_224.in22k_ft_in22k_in1k": (64, VIT),
    "deit_tiny_distilled_patch16_224.fb_in1k": (64, VIT),
    "regnety_002.pycls_in1k": (64, {}),
    "densenet121.ra_in1k": (64, {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
}
"""The side of the pictures and the arguments that shrink the architecture."""


def write_timm(name: str, folder: Path) -> Path:
    """Writes one of `TIMM` to a new folder, and returns the folder."""
    side, arguments = TIMM[name]
    architecture, _, tag = name.partition(".")
    torch.manual_seed(0)
    published = timm.get_pretrained_cfg(name)
    sizes = {"img_size": side} if published.fixed_input_size else {}
    model = timm.create_model(architecture, **{**sizes, **arguments})
    public.randomize(model, model, side)
    folder.mkdir()
    keys = ("custom_load", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes",
            "first_conv", "classifier", "license")  # fmt: skip
    pretrained = {"tag": tag, "input_size": [3, side, side], **{key: getattr(published, key) for key in keys}}
    config = {"architecture": architecture, "num_classes": model.num_classes, "num_features": model.num_features}
    if arguments:
        config["model_args"] = arguments
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    for file in (".gitattributes", "README.md", "pytorch_model.bin"):
        (folder / file).write_bytes(b"\x80 not read")
    return folder


TEXT = public.TEXT
WORD_TEXT = {**public.WORD_TEXT, "no_causal_mask": True, "pool_type": "last"}
HF_TEXT = {"hf_tokenizer_name": "local", "context_length": 12}
SQUASHED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "squash"}
LAION_FILES = ("model.safetensors", "pytorch_model.bin", "config.json", "preprocessor_config.json", "README.md",
               "open_clip_pytorch_model.bin", ".gitattributes")  # fmt: skip
"""Beside open_clip's files, these repositories have the same model for transformers."""
OPEN_CLIP: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ({"vision_cfg": public.VISION, "text_cfg": TEXT}, {}),
    "timm/vit_base_patch32_clip_224.openai": ({"vision_cfg": public.VISION, "text_cfg": TEXT, "quick_gelu": True}, {}),
    "timm/resnet50_clip.openai": (public.MODELS["resnet"], {}),
    "laion/CLIP-convnext_base_w-laion2B-s13B-b82K": (public.MODELS["convnext"], {}),
    "laion/CLIP-ViT-B-32-roberta-base-laion2B-s12B-b32k": (
        {"vision_cfg": public.VISION,
         "text_cfg": {**HF_TEXT, "hf_model_name": "roberta", "hf_pooler_type": "mean_pooler"}}, {}),
    "laion/CLIP-ViT-B-32-xlm-roberta-base-laion5B-s13B-b90k": (
        {"vision_cfg": public.VISION,
         "text_cfg": {**HF_TEXT, "hf_model_name": "xlm-roberta", "hf_pooler_type": "mean_pooler"}}, {}),
    "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": (
        {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "", "timm_proj": "linear"},
         "text_cfg": {**HF_TEXT, "hf_model_name": "bert", "hf_proj_type": "mlp",
                      "hf_pooler_type": "cls_last_hidden_state_pooler"}}, {}),
    "visheratin/nllb-clip-base-siglip": (
        {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "map", "timm_proj": "none"},
         "text_cfg": {**HF_TEXT, "hf_model_name": "m2m_100", "hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"},
         "embed_dim": 64, "custom_text": True, "init_logit_bias": -10}, SQUASHED),
    "timm/ViT-B-16-SigLIP": (public.MODELS["siglip"], SQUASHED),
    "timm/ViT-B-16-SigLIP2": (
        {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "avg", "timm_proj": "none"},
         "text_cfg": {**WORD_TEXT, "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 64},
         "embed_dim": 64, "custom_text": True, "init_logit_bias": -10}, SQUASHED),
    "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k": (
        {"vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token", "timm_proj": None},
         "text_cfg": TEXT, "custom_text": True, "embed_dim": 64}, {}),
    "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k": (public.MODELS["coca"], {}),
    "UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B": (
        {"vision_cfg": {**public.VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
         "text_cfg": {**WORD_TEXT, "tokenizer_kwargs": {"strip_sep_token": True}}},
        {"interpolation": "bilinear", "resize_mode": "squash"}),
    "apple/MobileCLIP-S1-OpenCLIP": (
        {"vision_cfg": {"timm_model_name": "test_efficientnet", "image_size": 64, "timm_pool": "avg"},
         "text_cfg": {**TEXT, "no_causal_mask": False}, "custom_text": True, "embed_dim": 256},
        {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}),
    "apple/DFN5B-CLIP-ViT-H-14-378": (
        {"vision_cfg": {**public.VISION, "image_size": 40}, "text_cfg": TEXT, "quick_gelu": True},
        {"resize_mode": "squash"}),
    "facebook/metaclip-b32-400m": ({"vision_cfg": public.VISION, "text_cfg": TEXT, "quick_gelu": True}, {}),
    "imageomics/bioclip": ({"vision_cfg": public.VISION, "text_cfg": TEXT}, {"resize_mode": "shortest"}),
    "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M": ({"vision_cfg": public.VISION, "text_cfg": TEXT}, {}),
    "oblong pictures": (public.MODELS["oblong"], {}),
    "pictures in a frame": (public.MODELS["squashed"], public.PREPROCESSING["squashed"]),
}  # fmt: skip
"""The configuration of the model, and that of its preprocessing. The last two are layouts that the library knows."""


def write_open_clip(name: str, folder: Path) -> Path:
    """Writes one of `OPEN_CLIP` to a new folder, and returns the folder."""
    model, preprocessing = OPEN_CLIP[name]
    public.write_model(folder, model, preprocessing)
    for file in LAION_FILES:
        (folder / file).write_bytes(b"{}" if file == "config.json" else b"\x80 not read")
    return folder
