"""Pictures and texts in one space without training (ConSE, arXiv 1312.5650).

A public classifier tells the classes of a picture, and a public encoder of texts embeds their names. The vector of a
picture is the mean of the vectors of its most probable classes' names, weighted by their probabilities.

Shape suffixes: B pictures or texts, K classes, D features.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from openimp.common.errors import UserError, library_errors

MAX_CLASSES = 50
"""Number of a picture's classes whose names count."""
TEMPERATURE = 2.0
"""Divides the classifier's logits. Less probable classes then count for more."""
SIMILARITY_TEMPERATURE = 0.1
"""Divides the cosines of pictures and texts when `classify` makes probabilities of them."""


class NameSpace:
    """The space of the encoder of texts, with the mean of the classes' names as its origin.

    Without that, all texts about photos would have similar directions.
    """

    def __init__(self, name_KD: Tensor) -> None:
        """`name_KD` has the vectors of the classes' names."""
        self.origin_D = F.normalize(name_KD.float(), dim=-1).mean(0)
        self.class_KD = self.texts(name_KD)

    def texts(self, z_BD: Tensor) -> Tensor:
        """The unit vectors (B, D) of texts with the vectors `z_BD`."""
        return F.normalize(F.normalize(z_BD.float(), dim=-1) - self.origin_D, dim=-1)

    def pictures(self, logits_BK: Tensor) -> Tensor:
        """The vectors (B, D) of pictures with these logits."""
        probabilities_BK = (logits_BK.float() / TEMPERATURE).softmax(-1)
        best = probabilities_BK.topk(min(MAX_CLASSES, probabilities_BK.shape[-1]))
        return (best.values[..., None] * self.class_KD[best.indices]).sum(1) / best.values.sum(1, keepdim=True)


def class_names(classifier: Any, name: str) -> list[str]:
    """The names of the classes of timm's model `name`: those in its configuration, or else ImageNet's.

    Of several names of a class, which commas separate, it is the first. UserError if the names are not known.
    """
    import timm

    config = classifier.pretrained_cfg
    make_info: Any
    if config.get("label_names"):
        make_info = partial(timm.data.CustomDatasetInfo, config["label_names"], config.get("label_descriptions"))
    elif subset := timm.data.infer_imagenet_subset(classifier):
        make_info = partial(timm.data.ImageNetInfo, subset)
    else:
        raise UserError(
            f"{name}: the names of its {classifier.num_classes} classes are not known; list them as label_names in the "
            "config.json of a folder with the model"
        )
    with library_errors(f"{name}: label_names in config.json cannot be read"):
        info = make_info()
        if sorted(info.label_indices()) != [*range(classifier.num_classes)]:
            raise UserError(f"{name}: label_names in config.json must name its {classifier.num_classes} classes")
        return [info.index_to_description(number).split(",")[0] for number in range(classifier.num_classes)]
