"""Which vectors can be compared: in a joint space all, in disjoint spaces only those of one pair of heads."""

from openimp.common.cache import stable_hash
from openimp.evaluation.provenance import checkpoint_fields
from openimp.inference.model import Model
from openimp.model.embedder import Embedder

Space = frozenset[str]
"""A space, identified by the names of its two heads; empty for the joint space."""


def shared_space(model: Embedder, a: str, b: str) -> Space:
    """The space of the vectors of modality `a` towards modality `b`."""
    joint = model.config.space == "joint"
    return frozenset() if joint else frozenset([model.head_name(a, b), model.head_name(b, a)])


def fingerprint(model: Model) -> str:
    """Hash of a model's weights and views. Vectors with different fingerprints must not be compared."""
    views = [(name, view.model_dump_json()) for name, view in model.views.items()]
    return stable_hash([checkpoint_fields(model.imp, model.modalities)["checkpoint"], views])


def has_partner(model: Model, name: str) -> bool:
    """Whether the modality shares a space with another one, or has the head of a joint space, and so an embedding."""
    return any(model.imp.share_a_space(name, other) for other in model.modalities)
