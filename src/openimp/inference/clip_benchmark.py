"""Retrieval and zero-shot classification of pictures, measured by CLIP_benchmark's own code.

It needs `pip install openimp[eval]`. Shape suffixes: N pictures, K classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

from openimp.common.errors import UserError
from openimp.data.hub import first_line
from openimp.evaluation.metrics import accuracy, average_precision, share_interval
from openimp.inference.clip_folder import SPLIT, ClipFolder, Reader, batches
from openimp.inference.model import Model

KS = (1, 5, 10)


def measure(model: Model, folder: ClipFolder, seen: str, read: str) -> list[dict[str, Any]]:
    """Measures the model on the test split of a folder: a result per direction of retrieval, else one.

    `seen` and `read` are the names of the modalities of pictures and of texts.
    """
    pictures: Any = model.modalities[seen]
    preprocess: Any = model.preprocess
    loader, reader = batches(folder, preprocess, pictures.check_file, model.recipe.evaluation.batch_size)
    try:
        if folder.kind == "retrieval":
            found = _retrieval(model, folder, loader, reader)
            found = {f"{seen} -> {read}": found["text"], f"{read} -> {seen}": found["image"]}
        else:
            found = {f"{seen} -> {read}": _classification(model, folder, loader)}
    except UserError:
        raise
    except Exception as error:  # A damaged tar or picture is any of a dozen types.
        raise UserError(f"{folder.path}: CLIP_benchmark cannot measure it: {first_line(error)}") from error
    about = {
        "set": folder.name,
        "type": "retrieval" if folder.kind == "retrieval" else "zero_shot",
        "skipped": 0,
        "library": f"clip-benchmark {version('clip-benchmark')}",
        "dataset": folder.name,
        "split": SPLIT,
        "data_hash": reader.data_hash,
    }
    return [{**about, "task": task, **figures} for task, figures in found.items()]


def pictures_and_texts(model: Model) -> tuple[str, str]:
    """The names of the model's modalities of pictures and of texts, which it must compare with each other."""
    seen = next((name for name, modality in model.modalities.items() if hasattr(modality, "preprocess")), "")
    read = next((name for name, modality in model.modalities.items() if hasattr(modality, "tokenize")), "")
    if not (seen and read and model.partner(seen) == read and model.partner(read) == seen):
        raise UserError(
            "CLIP_benchmark needs a model that compares pictures with texts, but this one is trained with "
            f"{', '.join(' and '.join(pair) for pair in sorted(model.imp.pairs)) or 'no pairs'}"
        )
    return seen, read


def retrieval_recalls(model: Any, batches: Iterable[Any], ks: Sequence[int]) -> dict[str, float]:
    """Recalls from CLIP_benchmark's `zeroshot_retrieval.evaluate`, without AMP.

    `batches` has pairs of pictures (B, 3, H, W) and a list of captions for each of them. Each K must be at most the
    number of pictures and the number of captions. Returns `image_retrieval_recall@K`, whose queries are captions, and
    `text_retrieval_recall@K`, whose queries are pictures.
    """
    device = next(model.parameters()).device.type
    found = zeroshot_retrieval.evaluate(model, batches, model.tokenizer, device, amp=False, recall_k_list=list(ks))
    return {key: float(value) for key, value in found.items()}


def _retrieval(model: Model, folder: ClipFolder, loader: Iterable[Any], reader: Reader) -> dict[str, dict[str, Any]]:
    """Figures by what is retrieved: "text" or "image"."""

    def enough() -> Iterator[Any]:
        yield from loader
        if reader.pictures < max(KS):
            raise UserError(f"{folder.path}: R@{max(KS)} needs {max(KS)} pictures, and there are {reader.pictures}")

    recalls = retrieval_recalls(model, enough(), KS)
    found = {}
    for target, n, candidates in (
        ("text", reader.pictures, reader.captions),
        ("image", reader.captions, reader.pictures),
    ):
        shares = {f"r{k}": recalls[f"{target}_retrieval_recall@{k}"] for k in KS}
        found[target] = {
            "n": n,
            "candidates": candidates,
            **shares,
            "interval": share_interval(shares["r1"], n),
            # In both directions, because each caption belongs to one picture.
            "chance": 1 / reader.pictures,
        }
    return found


def _classification(model: Model, folder: ClipFolder, loader: Any) -> dict[str, Any]:
    """Accuracy or mAP from CLIP_benchmark's logits.

    Its `zeroshot_classification.evaluate` fails in its last lines with NumPy 2.4 (its issue 147), so the functions that
    it calls are called here.
    """
    device = model.device.type
    classifier = zeroshot_classification.zero_shot_classifier(
        model, model.tokenizer, folder.classes, folder.templates, device, amp=False
    )
    logits_NK, target = zeroshot_classification.run_classification(model, classifier, loader, device, amp=False)
    classes = len(folder.classes)
    if folder.kind == "classification":
        hit_N = (logits_NK.argmax(1) == target).numpy()
        top5 = (logits_NK.topk(min(5, classes)).indices == target[:, None]).any(1).float().mean()
        return {**accuracy(hit_N, target.numpy(), classes), "top5": float(top5)}
    hot_NK = target.numpy() > 0
    if not hot_NK.any():
        raise UserError(f"{folder.path}: no picture has a class")
    ours = average_precision(logits_NK.numpy(), hot_NK)
    # CLIP_benchmark counts the average precision of a class without pictures as 0. Ours leaves such a class out.
    share = float(hot_NK.any(0).mean())
    return ours | {
        "map": float(zeroshot_classification.average_precision_per_class(logits_NK, target).mean()),
        "interval": [share * bound for bound in ours["interval"]],
        "chance": share * ours["chance"],
    }
