"""IMP: one encoder for all modalities, with a stem and projection heads per modality.

Shape suffixes: B examples, L tokens, D width, K classes, Z dimensions of the shared embedding space.
"""

from collections.abc import Iterable, Mapping
from itertools import chain, permutations
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openimp.common.modality import Classes, Modalities, Tokens
from openimp.model.embedder import Embedder, Encoded, EncodedAll
from openimp.model.embedding import Stem, VectorStem
from openimp.model.encoder import Attention, Encoder
from openimp.model.heads import Adapter, Projection, Temperature
from openimp.model.init import linear
from openimp.model.moe import Experts
from openimp.recipe.model_config import ModelConfig
from openimp.recipe.schema import Recipe


class IMP(Embedder):
    """The model of arXiv 2305.06324.

    Each pair of modalities that is trained to agree has a temperature and, in a disjoint space, one head per direction.
    A modality that is trained to match vectors of another model has a head, too. Modalities with the same stem share
    heads and temperatures unless `config.share_heads` is false.
    """

    def __init__(self, config: ModelConfig, modalities: Modalities) -> None:
        """Builds the model with random weights. `modalities` must be fitted."""
        super().__init__()
        self.config = config.model
        self.stem_of = {name: modality.stem for name, modality in modalities.items()}
        self.head_of = self.stem_of if self.config.share_heads else {name: name for name in modalities}
        self.pairs = [(min(pair.modalities), max(pair.modalities)) for pair in config.pairs]
        self.stems = nn.ModuleDict()
        for modality in modalities.values():
            if modality.stem not in self.stems:
                spec = modality.stem_spec()
                kind = VectorStem if spec.vector and not self.config.layers else Stem
                self.stems[modality.stem] = kind(spec, self.config.width)
        self.encoder = Encoder(self.config, self.stems)
        directions = chain(*map(permutations, self.pairs), config.distilled)
        self.projections = nn.ModuleDict()
        for name in sorted({self.head_name(modality, other) for modality, other in directions}):
            self.projections[name] = (
                Projection(self.config.width, self.config.embed_dim)
                if self.config.layers
                else Adapter(self.config.width)
            )
        temperatures = dict.fromkeys(self.temperature_name(*pair) for pair in self.pairs)
        self.temperatures = nn.ModuleDict({name: Temperature(self.config.init_temperature) for name in temperatures})
        self.classifiers = nn.ModuleDict(
            {head: linear(self.config.width, len(classes)) for head, classes in config.classes.items()}
        )

    def encode_all(self, inputs: Mapping[str, Tokens]) -> EncodedAll:
        """Encodes each modality by itself, but all in one pass through the shared blocks."""
        embedded = [self.stem(name)(tokens) for name, tokens in inputs.items()]
        masks = [_attended(tokens.mask) for tokens in inputs.values()]
        outputs, routings = self.encoder(embedded, masks, [self.stem_of[name] for name in inputs])
        encoded = {}
        for i, (name, tokens) in enumerate(inputs.items()):
            encoded[name] = Encoded(self._pool(name, outputs[i], tokens.mask), routings[i])
        return encoded

    def _pool(self, modality: str, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The features (B, D) of the encoder's output; 0 for an example without a valid token."""
        # The last layer is linear, so it may follow the mean instead of transforming every token.
        after = self.stem(modality).after
        if mask_BL is None:
            return after(x_BLD.mean(1))
        count_B1 = mask_BL.sum(1, keepdim=True, dtype=torch.float32)
        # Summed in fp32, because the rounding errors of a long sum in bf16 add up.
        sum_BD = (x_BLD * mask_BL[..., None]).sum(1, dtype=torch.float32)
        features_BD = after((sum_BD / count_B1.clamp(min=1)).type_as(x_BLD))
        return features_BD * (count_B1 > 0).type_as(features_BD)

    def stem(self, modality: str) -> Stem:
        """The stem of a modality; modalities may share one."""
        return cast(Stem, self.stems[self.stem_of[modality]])

    def project(self, features_BD: Tensor, modality: str, other: str, normalize: bool = True) -> Tensor:
        z_BZ = self.projections[self.head_name(modality, other)](features_BD).float()
        # The features of an example without a valid token are 0, but a head's norm has a bias.
        z_BZ = z_BZ * (features_BD != 0).any(-1, keepdim=True)
        return F.normalize(z_BZ, dim=-1) if normalize else z_BZ

    def share_a_space(self, a: str, b: str) -> bool:
        if not {a, b} <= self.head_of.keys():
            return False
        return {self.head_name(a, b), self.head_name(b, a)} <= set(self.projections)

    def hidden_matrices(self) -> dict[Tensor, int]:
        """The matrices of the experts, and of all linear layers except patch embeddings, the stems' convolutions and
        classifiers."""
        stacks: dict[Tensor, int] = {}
        first_layers = [f"stems.{stem}.embed{layer}" for stem in self.stems for layer in ("", ".convolution")]
        for name, module in self.named_modules():
            if isinstance(module, Experts):
                stacks.update((weight, weight.shape[0]) for weight in module.parameters())
            elif isinstance(module, Attention):
                stacks[module.qkv.weight] = 3
            elif isinstance(module, nn.Linear) and not name.startswith("classifiers.") and name not in first_layers:
                stacks.setdefault(module.weight, 1)
        return stacks

    def depths(self) -> dict[Tensor, int]:
        """1 in the last block and the norm after it, and one more in each block below. Stems are below all blocks."""
        layers = self.config.layers
        depths: dict[Tensor, int] = dict.fromkeys(self.encoder.norm.parameters(), 1)
        for stem in self.stems:  # Shared blocks get the same depth from each stem.
            for i, block in enumerate([*self._own_blocks([stem]), *self.encoder.blocks]):
                depths |= dict.fromkeys(block.parameters(), layers - i)
        for name, weight in self.stems.named_parameters():
            if ".after." not in name:
                depths[weight] = layers + 1
        return depths

    def blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *self._own_blocks(self.stems)]

    def blocks_of(self, modalities: Iterable[str]) -> list[nn.Module]:
        return [*self._own_blocks(self.stem_of[name] for name in modalities), *self.encoder.blocks]

    def _own_blocks(self, stems: Iterable[str]) -> list[nn.Module]:
        """The modality-specific blocks that a pass of these stems goes through, in order."""
        if not self.encoder.own:
            return []
        return [block for stem in stems for block in self.encoder.own[stem].children()]

    def experts(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, Experts)]

    def fp32_modules(self) -> list[Temperature]:
        return [cast(Temperature, temperature) for temperature in self.temperatures.values()]

    def temperature(self, a: str, b: str) -> Temperature:
        """The learned temperature of a pair of modalities, in either order."""
        return cast(Temperature, self.temperatures[self.temperature_name(a, b)])

    def temperature_name(self, a: str, b: str) -> str:
        """The name of the temperature of a pair of modalities, in either order."""
        return "-".join(sorted((self.head_of[a], self.head_of[b])))

    def head_name(self, modality: str, other: str) -> str:
        """The name of the projection head that maps `modality` to the space that it shares with `other`."""
        head = self.head_of[modality]
        return head if self.config.space == "joint" else f"{head}-to-{self.head_of[other]}"


def _attended(mask_BL: Tensor | None) -> Tensor | None:
    """The mask for the blocks: all tokens of an example without a valid one, because attention to none may be NaN."""
    return None if mask_BL is None else mask_BL | ~mask_BL.any(1, keepdim=True)


def build_for_training(recipe: Recipe, modalities: Modalities, classes: Classes) -> IMP:
    """The model that a recipe trains, with random weights. `classes` are those of each classification head."""
    model = IMP(recipe.to_config(classes), modalities)
    model.encoder.activation_checkpointing = recipe.memory.activation_checkpointing
    return model
