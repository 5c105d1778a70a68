"""Towers: a public encoder, or a model of openimp, as the frozen first part of a modality.

A tower turns an item into a vector, which is the only token of the item. The tower is a part of the modality and not of
the model: it is never trained, saved or distributed. Training embeds its items before the first step
(`TaskData.prepare`), and then reads vectors. Evaluation and inference run the tower.

A *clip* is one input of the encoder: a picture, a text, or a window of a longer item.
Shape suffixes: B items, M clips, D features.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, partial
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError
from openimp.common.modality import BadMedia, Modality, Rng, StemSpec, Tokens
from openimp.common.objective import Teacher
from openimp.common.protocols import Dated, Pictured, Recorded, Segmented, TensorInput
from openimp.common.schema import Count, PartialShare, RecipePath, Strict
from openimp.common.threads import map_ahead
from openimp.encoding.engine import attempt
from openimp.encoding.frozen import CLIPS, FrozenEncoder, open_encoder
from openimp.recipe.registry import modality_class
from openimp.recipe.schema import Recipe

Role = Literal["tower", "teacher"]
"""What a frozen encoder is for."""


class SavedTower(Strict):
    """What a model remembers of its tower."""

    fingerprint: str
    """`FrozenEncoder.fingerprint`."""
    features: Count
    """The size of its vectors."""


class Tower(Modality):
    """A modality that reads items with a frozen encoder, and whose tokens are the encoder's vectors.

    A teacher of `distill` is a `Tower`, too, with another role. `tower_class` makes the subclass for a modality.
    """

    class Config(Strict):
        """A frozen encoder instead of a patch embedding."""

        tower: RecipePath
        """The model that embeds items: a run, `openimp:base`, `hub:OWNER/NAME`, `open_clip:NAME/TAG`, `timm:NAME` for
        pictures, or `sentence_transformers:OWNER/NAME`."""
        crops: Count = 1
        """Vectors that training has of each picture, video or sound. The first is of the whole item: of a long item,
        the mean of its clips' vectors. The others are of random crops. If the tower is a model of openimp, they are
        also augmented as in its training. Each step draws one of them."""

    class View(Strict):
        """How a step reads the vectors of a tower, which itself reads items in its own view."""

        dropout: PartialShare = 0.0
        """Share of the numbers of each vector that a training step sets to 0 (dropout, arXiv 1207.0580), so that a few
        hundred rows are not learned by heart. The others are scaled up."""

    role: ClassVar[Role] = "tower"
    """The vectors of a tower are features before the model's heads. Those of a teacher are the model's embeddings."""

    tower_packages: ClassVar[tuple[str, ...]] = ("openimp.modalities", "openimp.model")
    tower_libraries: ClassVar[tuple[str, ...]] = (
        "torch",
        "transformers",
        "sentence-transformers",
        "open_clip_torch",
        "timm",
    )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._saved: SavedTower | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.name, self.role, self.config, self.state())  # The encoder is not pickled.

    @cached_property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder, on the GPU if there is one. UserError if it has changed since the model was saved."""
        try:
            encoder = open_encoder(self.config.tower, self.name, embeds=self.role == "teacher")
        except UserError as error:
            raise UserError(f"{self.role} of {self.name}: {error}") from None
        if self._saved and self._saved.fingerprint != encoder.fingerprint:
            raise UserError(f"{self.role} {self.config.tower}: has changed since the model was saved")
        return encoder

    def state(self) -> dict[str, str]:
        # A file per modality, because the encoder may read the modalities of a stem in different views.
        saved = self._saved or SavedTower(fingerprint=self.encoder.fingerprint, features=self.encoder.features)
        return {f"tower-{self.name}.json": saved.model_dump_json(indent=1)}

    def load_state(self, state: Mapping[str, str]) -> None:
        """Remembers what the tower was in training. It is opened when it is used."""
        file = f"tower-{self.name}.json"
        try:
            self._saved = SavedTower.model_validate_json(state[file])
        except (KeyError, ValueError):
            raise UserError(f"{file}: missing or damaged") from None

    def fit(self, corpus: Iterable[list[str]]) -> None:
        """Learns nothing."""

    def stem_spec(self) -> StemSpec:
        features = self._saved.features if self._saved else self.encoder.features
        return StemSpec(values=features, axes=(1,), vector=True)

    def check(self, view: Any) -> None:
        """Every view fits."""

    def length(self, view: Any) -> int:
        return 1

    def embed_all(self, reads: Iterable[Callable[[], Any]], seeds: Iterable[int]) -> Iterator[np.ndarray | BadMedia]:
        """The vectors (crops, features) fp16 of each item, or why it cannot be read. `reads` return raw values.

        An item's seed determines its random crops.
        """
        batch: list[list[np.ndarray] | BadMedia] = []
        clips = 0
        items = ((None, partial(self._crops, read, seed)) for read, seed in zip(reads, seeds))
        for _, item in map_ahead(attempt, items):
            batch.append(item)
            clips += 0 if isinstance(item, BadMedia) else sum(map(len, item))
            if clips >= CLIPS:
                yield from self._embedded(batch)
                batch = []
                clips = 0
        yield from self._embedded(batch)

    def _embedded(self, batch: list[list[np.ndarray] | BadMedia]) -> Iterator[np.ndarray | BadMedia]:
        """The vectors of each item of a batch. An item is a list of crops, and a crop an array of clips."""
        crops = [crop for item in batch if not isinstance(item, BadMedia) for crop in item]
        vectors = iter(self._vectors(crops) if crops else ())
        for item in batch:
            yield item if isinstance(item, BadMedia) else np.stack([*islice(vectors, len(item))])

    def _crops(self, read: Callable[[], Any], seed: int) -> list[np.ndarray]:
        """The clips of each crop of an item."""
        value = read()
        crops = [self.encoder.read(value)]
        random_crops = 0 if self.reads_text else self.config.crops - 1
        for crop in range(1, 1 + random_crops):
            crops.append(self.encoder.read(value, np.random.default_rng([seed, crop])))
        return crops

    def _vectors(self, crops: list[np.ndarray]) -> np.ndarray:
        """A vector, (crops, features) fp16, of each array of clips."""
        z_MD = F.normalize(self.encoder.embed(np.concatenate(crops)).float(), dim=-1)
        means = [z.mean(0) for z in z_MD.split([len(clips) for clips in crops])]
        return _scaled(torch.stack(means)).cpu().numpy().astype(np.float16)

    def decode(self, raw: Any, views: list[Any], rng: Rng | None = None) -> np.ndarray:
        """The vectors of one item; see `embed_all`. They do not depend on the other arguments."""
        (vectors,) = self.embed_all([lambda: raw], [0])
        if isinstance(vectors, BadMedia):
            raise vectors
        return vectors

    def transform(self, item: np.ndarray, view: Any, rng: Rng | None) -> np.ndarray:
        """One of the vectors of an item. Evaluation uses `encode_input` instead."""
        assert rng is not None
        return item[int(rng.integers(len(item)))]

    def encode_input(self, value: Any, view: Any) -> np.ndarray:
        """The clips as the tower's modality reads them. `tokens` embeds them."""
        return self.encoder.read(value)

    def tokens(self, items: np.ndarray, view: Any, rngs: list[Rng] | None) -> Tokens:
        """One token per row of `items`: in training, with `rngs`, of vectors (B, features); in evaluation of clips
        (M, ...), which it embeds."""
        if rngs is None:
            return self.from_tensor(self.encoder.embed(items))
        if not (view and view.dropout):
            return self.training_tokens(items, view, None)
        random_bytes = [np.frombuffer(rng.bytes(items.shape[1]), np.uint8) for rng in rngs]
        return self.training_tokens(items, view, np.stack(random_bytes))

    def training_tokens(self, vectors: np.ndarray, view: Any, random_bytes: np.ndarray | None) -> Tokens:
        """One token per vector (B, features) as a step reads it. With dropout, a random byte decides on each number."""
        tokens = self.from_tensor(torch.from_numpy(vectors).float())
        if random_bytes is not None:
            dropped = min(255, round(256 * view.dropout))
            kept_BD = torch.from_numpy(random_bytes >= dropped)
            tokens.values.mul_(kept_BD[:, None] * (256 / (256 - dropped)))
        return tokens

    def from_tensor(self, batch: Tensor) -> Tokens:
        """One token per vector (B, features) of the tower. The vectors may have any length."""
        features = self.stem_spec().values
        if batch.ndim != 2 or batch.shape[1] != features or not batch.is_floating_point():
            raise TypeError(f"expected float vectors (B, {features}), found {batch.dtype} {list(batch.shape)}")
        # Not `len`, which would give an exported graph a fixed batch size.
        coords = torch.zeros(batch.shape[0], 1, 1, dtype=torch.int64, device=batch.device)
        return Tokens(_scaled(batch)[:, None], coords)

    def tensor_input(self, view: Any) -> TensorInput:
        return TensorInput(
            (self.stem_spec().values,),
            torch.float32,
            f"A vector of the model in the recipe's modalities.{self.stem}.tower: its features, before any head. "
            "The length of the vector does not matter.",
        )


class MediaTower(Tower):
    """A tower for media. It shows and cuts them with the encoder's `reader`."""

    def thumbnail(self, value: Any, view: Any, side: int, segment: tuple[float, float] | None = None) -> bytes:
        reader = self.encoder.reader
        if not isinstance(reader, Pictured):
            raise BadMedia(f"{self.name} of {self.role} {self.config.tower} cannot show its items")
        return reader.thumbnail(value, self.encoder.view, side, segment)

    def recorded(self, value: Any) -> Recorded:
        reader = self.encoder.reader
        return reader.recorded(value) if isinstance(reader, Dated) else Recorded()

    def segments(self, value: Any, view: Any) -> list[tuple[float, float]]:
        reader = self.encoder.reader
        return reader.segments(value, self.encoder.view) if isinstance(reader, Segmented) else []

    def encode_segment(self, value: Any, view: Any, start: float, end: float) -> np.ndarray:
        return self.encoder.read_segment(value, start, end)


@cache
def tower_class(name: str, role: Role = "tower") -> type[Tower]:
    """The class that reads a modality with a frozen encoder. It has the modality's name, stem and types of files."""
    plain = modality_class(name)
    base = Tower if plain.reads_text else MediaTower
    shared = ("name", "stem", "reads_text", "extensions", "other_extensions", "decoders")
    values = {key: getattr(plain, key) for key in shared}
    return type(f"{plain.__name__}{role.capitalize()}", (base,), {"role": role, **values})


def make_teachers(recipe: Recipe) -> dict[Teacher, Tower]:
    """The frozen models that the trained tasks of a recipe learn from. They are opened when they are used."""
    teachers = {}
    for task in recipe.tasks.values():
        if not task.weight:
            continue
        for teacher in task.teachers:
            tower = tower_class(teacher.modality, "teacher")
            teachers[teacher] = tower(tower.Config(tower=teacher.model))
    return teachers


def _restored(name: str, role: Role, config: Any, state: dict[str, str]) -> Tower:
    tower = tower_class(name, role)(config)
    tower.load_state(state)
    return tower


def _scaled(vectors_BD: Tensor) -> Tensor:
    """Vectors of length sqrt(D), so that their values have about variance 1, which a stem expects."""
    return F.normalize(vectors_BD.float(), dim=-1) * vectors_BD.shape[-1] ** 0.5
