"""What benchmarks/peers.py trains beside openimp: timm's ViT, by itself and by lightly-train, and open_clip's towers on
pictures; a convolutional network on sounds.

    python -m benchmarks.peer_models timm OPTIONS.json OUT.json

It trains one model for a number of steps, tests it, and writes the accuracy. The options are those of `Options`.
"""

import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, create_transform
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from openimp.common.device import autocast, keep_freed_memory
from openimp.data.sources import open_source
from openimp.data.tables import Table
from openimp.modalities.audio import Audio, log_mel
from openimp.modalities.image import Image as ImageModality
from openimp.modalities.vision import Vision
from openimp.recipe.tasks import Source

CLASSES = 10
TEXT = "a photo of a {}"
CPU = torch.device("cpu")


class Options(NamedTuple):
    """The options of a peer's training."""

    train: dict[str, Any]  # the source of the training rows, as in a recipe
    test: dict[str, Any]
    media: str  # the column with pictures or sounds
    label: str
    steps: int
    seed: int
    lr: float
    batch_size: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 2
    patch: int = 4
    strong: bool = True  # RandAugment, mixup, CutMix and random erasing instead of crops and flips alone


class Examples(Dataset[tuple[Any, int]]):
    """Decoded media and their classes. `transform` is applied when an example is read."""

    def __init__(self, media: list[Any], classes: list[int], transform: Callable[[Any], Any]) -> None:
        self.media = media
        self.classes = classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.media[index]), self.classes[index]


def endless(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch after the other."""
    while True:
        yield from loader


def rows(source: dict[str, Any], media: str, label: str) -> tuple[list[Any], list[str]]:
    """The media and the classes of a source."""
    table = open_source("peers", Source(**source))
    assert isinstance(table, Table)
    return [table.media(value) for value in table.column(media)], [str(value) for value in table.column(label)]


def train(
    model: nn.Module, options: Options, examples: Examples, weight_decay: float, mixup: Mixup | None = None
) -> None:
    """AdamW with timm's parameter groups and a cosine schedule, in bf16."""
    batch_size = min(options.batch_size, len(examples))  # Otherwise the loader would have no batch at all.
    loader = DataLoader(examples, batch_size, shuffle=True, drop_last=True, num_workers=1, persistent_workers=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=options.lr, weight_decay=weight_decay)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=options.steps, warmup_t=options.steps // 20, warmup_prefix=True, t_in_epochs=False
    )
    model.train()
    for step, (inputs, target) in zip(range(options.steps), endless(loader)):
        if mixup is not None:
            inputs, target = mixup(inputs, target)
        with autocast(CPU, "bf16"):
            logits = model(inputs)
        if mixup is not None:
            loss = (-target * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()
        else:
            loss = F.cross_entropy(logits.float(), target, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(step + 1)


@torch.no_grad()
def accuracy(model: nn.Module, examples: Examples) -> float:
    model.eval()
    hits = 0
    for inputs, target in DataLoader(examples, 500):
        with autocast(CPU, "bf16"):
            hits += int((model(inputs).argmax(1) == target).sum())
    return hits / len(examples)


def timm_vit(options: Options) -> float:
    """A ViT of timm without a class token, which is slightly better here, with the augmentation of timm's recipes."""
    decoder = ImageModality(Vision.Config(patch=(1, options.patch, options.patch)))
    view = ImageModality.View(size=32, crop_pct=1)

    def decoded(source: dict[str, Any], transform: Callable[[Any], Any]) -> Examples:
        media, labels = rows(source, options.media, options.label)
        pictures = [Image.fromarray(decoder.decode(value, [view])) for value in media]
        return Examples(pictures, [names.index(label) for label in labels], transform)

    names = sorted({*rows(options.train, options.media, options.label)[1]})
    common: dict[str, Any] = {"input_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    if options.strong:
        # Without mstd0.5, with which timm 1.0 asks Pillow for pictures of 0 bits.
        augment = create_transform(**common, is_training=True, auto_augment="rand-m9-inc1", re_prob=0.25)
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    else:
        augment = create_transform(**common, is_training=True, scale=(0.5, 1.0), color_jitter=0.2)
        mixup = None
    model = VisionTransformer(
        img_size=32,
        patch_size=options.patch,
        embed_dim=options.width,
        depth=options.layers,
        num_heads=options.heads,
        num_classes=CLASSES,
        class_token=False,
        global_pool="avg",
        weight_init="jax",
    )
    train(model, options, decoded(options.train, augment), 0.05, mixup)
    return accuracy(model, decoded(options.test, create_transform(**common, is_training=False, crop_pct=1)))


def open_clip_towers(options: Options) -> float:
    """open_clip's own training program on pictures with the texts "a photo of a ...", tested zero-shot."""
    import open_clip
    from open_clip_train.main import main

    with TemporaryDirectory() as name:
        folder = Path(name)
        media, labels = rows(options.train, options.media, options.label)
        for number, picture in enumerate(media):
            (folder / f"{number}.jpg").write_bytes(picture)
        # One epoch over a table that repeats the rows, each time in another order.
        rng = np.random.default_rng(options.seed)
        examples = options.steps * options.batch_size
        epochs = -(-examples // len(media))
        order = np.concatenate([rng.permutation(len(media)) for _ in range(epochs)])[:examples]
        lines = [f"{folder}/{number}.jpg\t{TEXT.format(labels[number])}" for number in order]
        (folder / "train.csv").write_text("\n".join(["filepath\ttitle", *lines]), encoding="utf-8")
        vision = {"image_size": 32, "patch_size": options.patch, "head_width": options.width // options.heads}
        sizes = {"width": options.width, "layers": options.layers}
        text = {"context_length": 8, "vocab_size": 49408, "heads": options.heads}
        config = {"embed_dim": 256, "vision_cfg": vision | sizes, "text_cfg": text | sizes}
        (folder / "small.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(folder / "small.json")
        arguments = {
            "--train-data": folder / "train.csv",
            "--dataset-type": "csv",
            "--model": "small",
            "--batch-size": options.batch_size,
            "--epochs": 1,
            "--lr": options.lr,
            "--wd": 0.1,
            "--warmup": options.steps // 20,
            "--workers": 1,
            "--precision": "amp_bf16",
            "--device": "cpu",
            "--seed": options.seed,
            "--logs": folder / "logs",
            "--name": "run",
        }
        main([str(part) for pair in arguments.items() for part in pair])
        weights = folder / "logs" / "run" / "checkpoints" / "epoch_1.pt"
        model, _, preprocess = open_clip.create_model_and_transforms("small", pretrained=str(weights))
        names = sorted({*labels})
        media, labels = rows(options.test, options.media, options.label)
        with torch.no_grad():
            texts = model.eval().encode_text(open_clip.get_tokenizer("small")([TEXT.format(name) for name in names]))
            pictures = [preprocess(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in media]
            vectors = torch.cat([model.encode_image(block) for block in torch.stack(pictures).split(500)])
        # A text's length counts in the product, so it is normalized. A picture's is the same for all texts.
        predicted = (vectors @ F.normalize(texts, dim=-1).T).argmax(1)
        return float(np.mean([names[index] == label for index, label in zip(predicted.tolist(), labels)]))


def lightly_vit(options: Options) -> float:
    """lightly-train's program for classification, with its own augmentation, on a ViT of the same size.

    It holds two percent of the rows out, because it insists on measuring some at its last step.
    """
    import lightly_train

    with TemporaryDirectory() as name:
        folder = Path(name)
        media, labels = rows(options.train, options.media, options.label)
        names = sorted({*labels})
        for number, (picture, label) in enumerate(zip(media, labels)):
            part = folder / ("val" if number % 50 == 0 else "train") / label
            part.mkdir(parents=True, exist_ok=True)
            (part / f"{number}.jpg").write_bytes(picture)
        lightly_train.train_image_classification(
            out=folder / "out",
            data={"train": folder / "train", "val": folder / "val", "classes": dict(enumerate(names))},
            model="timm/vit_tiny_patch16_224",
            model_args={
                "lr": options.lr,
                "backbone_args": {
                    "pretrained": False,
                    "img_size": 32,
                    "patch_size": options.patch,
                    "embed_dim": options.width,
                    "depth": options.layers,
                    "num_heads": options.heads,
                },
            },
            transform_args={"image_size": (32, 32)},
            logger_args={"val_every_num_steps": options.steps},
            steps=options.steps,
            batch_size=options.batch_size,
            num_workers=1,
            seed=options.seed,
            accelerator="cpu",
        )
        model = lightly_train.load_model(folder / "out" / "exported_models" / "exported_last.pt")
        media, labels = rows(options.test, options.media, options.label)
        pictures = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in media]
        predicted = [
            answer["labels"][0]
            for start in range(0, len(media), 500)
            for answer in model.predict_batch(pictures[start : start + 500])
        ]
        return float(np.mean([names[int(index)] == label for index, label in zip(predicted, labels)]))


class ConvNet(nn.Module):
    """Four stages of two 3 x 3 convolutions over a log-mel spectrogram (B, frames, bins), and their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stage in range(4):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width << stage, 3, padding=1, bias=False)]
                channels = width << stage
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x[:, None]).mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def sound_cnn(options: Options) -> float:
    """A network on the spectrograms of openimp, with its changes of speed if `strong`."""
    modality = Audio(Audio.Config(window=512, hop=128, bins=64, patch=(4, 64)))
    view = Audio.View(seconds=0.768, clips=1, speed=0.15 if options.strong else 0.0)
    rng = np.random.default_rng(options.seed)

    def spectrum(sound: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        wave = modality.transform(sound, view, rng)
        values = log_mel(torch.from_numpy(wave.reshape(1, -1)), modality.config)[0]
        return (values - modality.config.mean) / modality.config.std

    def decoded(source: dict[str, Any], training: bool) -> Examples:
        media, labels = rows(source, options.media, options.label)
        sounds = [modality.decode(value, [view]) for value in media]
        return Examples(
            sounds, [names.index(label) for label in labels], partial(spectrum, rng=rng if training else None)
        )

    names = sorted({*rows(options.train, options.media, options.label)[1]})
    model = ConvNet(options.width)
    train(model, options, decoded(options.train, True), 0.05)
    return accuracy(model, decoded(options.test, False))


MODELS = {"timm": timm_vit, "lightly": lightly_vit, "open_clip": open_clip_towers, "cnn": sound_cnn}

if __name__ == "__main__":
    kind, options_file, out = sys.argv[1:]
    options = Options(**json.loads(Path(options_file).read_text(encoding="utf-8")))
    torch.manual_seed(options.seed)
    keep_freed_memory()
    found = MODELS[kind](options)
    assert math.isfinite(found)
    Path(out).write_text(json.dumps({"top1": found}), encoding="utf-8")
