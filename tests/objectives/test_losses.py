"""The losses against loops over single pairs."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.common.modality import StemSpec, Tokens
from openimp.common.objective import Objective, TargetSizes, head_key
from openimp.data.batch import Batch
from openimp.model.imp import IMP, Encoded
from openimp.objectives.classification import Classification, sigmoid_classification
from openimp.objectives.contrastive import Contrastive
from openimp.objectives.distill import Distill
from openimp.objectives.losses import task_losses
from openimp.objectives.nce import sigmoid_nce, softmax_nce
from openimp.recipe.model import Model
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Task
from tests.made_models import FixedStem, model_config


def small(moe: dict | None = None) -> IMP:
    torch.manual_seed(0)
    model = Model(width=16, layers=2, heads=2, mlp_dim=32, embed_dim=8, moe=moe)
    pairs = [("image", "text"), ("audio", "text"), ("audio", "image")]
    config = model_config(model, pairs, {"all:label": range(5), "all:tags": range(5)})
    return IMP(config, {name: FixedStem(name, StemSpec(6, (4,))) for name in ("image", "audio", "text")})


def task_of(*objectives: Objective, inputs: tuple[str, ...] = ("image", "text")) -> Task:
    return Task(source="all", inputs={name: name for name in inputs}, objectives=list(objectives))


def losses_of(
    model: IMP, objective: Objective, encoded: dict[str, Encoded], **targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    return objective.losses(model, task_of(objective, inputs=tuple(encoded)), encoded, targets)


def encoded_of(items: int, draw: int = 1) -> dict[str, Encoded]:
    """Random features: `draw` texts an item."""
    torch.manual_seed(items)
    rows = {"image": items, "text": items * draw}
    return {name: Encoded(torch.randn(n, 16), []) for name, n in rows.items()}


def task_in_recipe(inputs: tuple[str, ...], *objectives: dict[str, Any]) -> Task:
    """The only task of a recipe, which is checked as a whole."""
    task = {"source": "all", "inputs": {name: name for name in inputs}, "objectives": list(objectives)}
    sources = {"all": {"path": "x.parquet"}}
    return Recipe.build({"name": "x", "sources": sources, "tasks": {"all": task}}).tasks["all"]


def similarities(model: IMP, encoded: dict[str, Encoded]) -> torch.Tensor:
    image, text = (model.project(encoded[a].features, a, b) for a, b in (("image", "text"), ("text", "image")))
    return (image @ text.T) / model.config.init_temperature


def loss_by_marks(model: IMP, logits: torch.Tensor, positive: torch.Tensor, kind: str) -> torch.Tensor:
    """The contrastive loss of similarities, given which of them are of positives."""
    if kind == "softmax":
        return (softmax_nce(logits, positive).mean() + softmax_nce(logits.T, positive.T).mean()) / 2
    _, bias = model.temperature("image", "text")()
    return sigmoid_nce(logits, positive, bias).mean()


def test_duplicate_texts_are_counted_unless_the_recipe_says_which_rows_are_one_item():
    ids = torch.tensor([[5, 1], [5, 1], [6, 1], [7, 1], [6, 1], [8, 1]])
    text = Tokens(ids, torch.zeros(6, 2, 1, dtype=torch.int64), torch.ones(6, 2, dtype=torch.bool))
    image = Tokens(torch.zeros(3, 4, 2), torch.zeros(3, 4, 1, dtype=torch.int64), None)
    tokens = {"image": image, "text": text}
    targets = {"item": torch.tensor([0, 1, 2])}
    rows = Contrastive(type="contrastive")
    items = Contrastive(type="contrastive", positives_by="name")
    # Two texts per row: rows 0, 1 and 2 have [5, 5], [6, 7] and [6, 8].
    assert "33% of a batch's texts" in rows.warning(task_of(rows), tokens, targets)
    values = Contrastive(type="contrastive", positives_in="keywords")
    assert values.warning(task_of(values), tokens, targets) is None
    assert items.warning(task_of(items), tokens, targets) is None


@pytest.mark.parametrize("draw", [1, 2])
def test_distillation_compares_each_embedding_with_its_vector(draw):
    """Two of the three rows have the same vector, so in the contrastive loss either is correct for both."""
    model = small()
    encoded = encoded_of(3, draw)
    vector = F.normalize(torch.randn(3, 8), dim=1)[[0, 1, 0]]
    item = torch.tensor([7, 8, 7])
    embedding = model.project(encoded["text"].features, "text", "image")
    expected = {"cosine": 0.0, "contrastive": 0.0}
    for i, z in enumerate(embedding.detach()):
        row = i // draw
        expected["cosine"] += 1 - float(z @ vector[row])
        log_shares = (vector @ z / 0.1).log_softmax(0)
        same = [0, 2] if row in (0, 2) else [1]
        expected["contrastive"] -= float(log_shares[same].mean()) + math.log(len(same))
    for loss, total in expected.items():
        objective = Distill(type="distill", of="text", to="teacher", loss=loss, temperature=0.1)
        ((name, found),) = losses_of(model, objective, encoded, vector=vector, item=item).items()
        assert (name, float(found.detach())) == ("text:teacher", pytest.approx(total / len(embedding), rel=1e-4))


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    draw=st.integers(1, 3),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_items_with_several_positives(items, draw, kind):
    """Several texts an item, and rows that are the same item: all of them are positives."""
    model = small()
    encoded = encoded_of(len(items), draw)
    logits = similarities(model, encoded)
    positive = [[one == other for other in items for _ in range(draw)] for one in items]

    def nce(rows: torch.Tensor, wanted: list[list[bool]]) -> float:
        total = 0.0
        for row, marks in zip(rows.tolist(), wanted):
            positives = [x for x, yes in zip(row, marks) if yes]
            total += math.log(sum(map(math.exp, row))) - sum(positives) / len(positives) - math.log(len(positives))
        return total / len(rows)

    if kind == "softmax":
        expected = (nce(logits, positive) + nce(logits.T, [list(column) for column in zip(*positive)])) / 2
    else:
        bias = -10  # where SigLIP's starts
        signs = [[1 if yes else -1 for yes in row] for row in positive]
        expected = sum(
            math.log1p(math.exp(-sign * (x + bias)))
            for row, marks in zip(logits.tolist(), signs)
            for x, sign in zip(row, marks)
        ) / len(items)
    objective = Contrastive(type="contrastive", loss=kind)
    found = losses_of(model, objective, encoded, item=torch.tensor(items))["image-text"].item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def targets_of(objective, task, rows, texts):
    """The targets of rows for each of which a text was drawn. `zeros` has the same names and shapes."""
    examples = [
        objective.read(task, row, i, TargetSizes(8, {})) | objective.read_texts({"text": [text]})
        for i, (row, text) in enumerate(zip(rows, texts))
    ]
    targets = {key: torch.stack([example[key] for example in examples]) for key in examples[0]}
    zeros = objective.zeros(task, len(rows), TargetSizes(8, {}))
    assert {key: value.shape for key, value in zeros.items()} == {key: value.shape for key, value in targets.items()}
    return targets


def test_media_are_no_positives_of_each_other_because_of_a_value():
    rows = [{"keywords": ["dog", "animal"]}, {"keywords": [f"{i}" for i in range(40)] + ["animal"]}]
    model = small()
    encoded = {name: Encoded(torch.randn(2, 16), []) for name in ("image", "audio", "text")}
    objective = Contrastive(type="contrastive", positives_in="keywords")
    found = losses_of(model, objective, encoded, **targets_of(objective, task_of(objective), rows, ["dog", "animal"]))
    plain = losses_of(model, Contrastive(type="contrastive"), encoded, item=torch.arange(2))
    torch.testing.assert_close(found["image-audio"], plain["image-audio"])
    # The second text is a value of the first row only, because the list of the second one is cut before it.
    for name in ("image", "audio"):
        assert not torch.allclose(found[f"{name}-text"], plain[f"{name}-text"])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_text_without_a_known_word_says_nothing_about_its_picture(kind):
    """Its embedding is 0. As a positive, it would only push its picture away from all other texts."""
    model = small()
    encoded = encoded_of(4)
    with torch.no_grad():
        encoded["text"].features[1] = 0
    positive = torch.eye(4, dtype=torch.bool)
    positive[1, 1] = False
    objective = Contrastive(type="contrastive", loss=kind, pairs=[["image", "text"]])
    found = losses_of(model, objective, encoded, item=torch.arange(4))["image-text"]
    logits = similarities(model, encoded)
    assert not logits[:, 1].any()
    assert softmax_nce(logits, positive)[1] == 0
    torch.testing.assert_close(found, loss_by_marks(model, logits, positive, kind))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("items", [None, "name"])
def test_a_text_is_a_positive_of_each_example_that_has_it_as_a_value(items, kind):
    """The third text is a whole caption, which is in no list of keywords."""
    rows = [
        {"name": "dog face", "keywords": ["Dog", "pet"]},
        {"name": "guide dog", "keywords": ["dog", "blind"]},
        {"name": "cat", "keywords": ["pet"]},
        {"name": "star", "keywords": None},
    ]
    texts = ["dog", "blind ", "cat, pet", "Pet"]
    objective = Contrastive(type="contrastive", loss=kind, positives_by=items, positives_in="keywords")
    targets = targets_of(objective, task_of(objective), rows, texts)
    positive = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)  # image, text
    model = small()
    encoded = encoded_of(4)
    expected = loss_by_marks(model, similarities(model, encoded), positive, kind)
    torch.testing.assert_close(losses_of(model, objective, encoded, **targets)["image-text"], expected)


def test_only_named_pairs_are_compared():
    model = small()
    names = ("image", "audio", "text")
    encoded = {name: Encoded(torch.randn(4, 16), []) for name in names}

    def pairs(**options):
        return list(losses_of(model, Contrastive(type="contrastive", **options), encoded, item=torch.arange(4)))

    assert pairs() == ["image-audio", "image-text", "audio-text"]
    assert pairs(pairs=[["text", "audio"]]) == ["text-audio"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sigmoid_classification_loss_by_hand(smoothing):
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    marks = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    soft = marks * (1 - smoothing) + smoothing / 2
    yes, no = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
    expected = -(soft * yes + (1 - soft) * no).mean()
    torch.testing.assert_close(sigmoid_classification(logits, marks, smoothing), expected)


def test_classification_is_of_the_modalities_without_a_mask_unless_one_is_named():
    model = small()
    torch.nn.init.normal_(model.classifiers["all:label"].weight)
    encoded = {name: Encoded(torch.randn(3, 16), []) for name in ("image", "audio", "text")}
    label = torch.tensor([0, 4, 2])

    def losses(**options):
        objective = Classification(type="classification", label="label", label_smoothing=0.1, **options)
        return losses_of(model, objective, encoded, label=label)

    assert list(losses()) == ["image:label", "audio:label"]
    assert list(losses(of="text")) == ["text:label"]
    logits = model.classifiers["all:label"](encoded["audio"].features)
    torch.testing.assert_close(losses(of="audio")["audio:label"], F.cross_entropy(logits, label, label_smoothing=0.1))


@pytest.mark.parametrize(("label", "loss"), [("label", "softmax"), ("tags", "sigmoid")])
def test_every_drawn_row_is_classified_by_its_examples_label(label, loss):
    model = small()
    torch.nn.init.normal_(model.classifiers[f"all:{label}"].weight)
    features = torch.randn(6, 16)
    labels = torch.tensor([4, 0, 2]) if loss == "softmax" else torch.tensor([[1.0, 0, 0, 1, 0]] * 2 + [[0.0] * 5])
    objective = Classification(type="classification", label=label, loss=loss, of="image")

    def found(rows, target):
        (value,) = losses_of(model, objective, {"image": Encoded(rows, [])}, label=target).values()
        return value

    # Two rows an example, one after the other.
    expected = (found(features[::2], labels) + found(features[1::2], labels)) / 2
    torch.testing.assert_close(found(features, labels), expected)


@pytest.mark.parametrize("moe", [None, {"experts": 2, "layers": 2}])
def test_a_tasks_objectives_are_summed_with_their_weights(moe):
    """And the routers' own losses, summed over sparse layers and averaged over modalities, are added as they are."""
    model = small(moe)
    task = task_in_recipe(
        ("image", "text"),
        {"type": "contrastive", "weight": 0.25},
        {"type": "classification", "label": "label", "of": "image", "weight": 3.0},
        {"type": "classification", "label": "tags", "of": "image", "loss": "sigmoid"},
    )
    tokens = Tokens(torch.randn(4, 3, 6), torch.arange(3).expand(4, -1)[..., None])
    targets = [{"item": torch.arange(4)}, {"label": torch.tensor([0, 1, 2, 3])}, {"label": torch.eye(5)[:4]}]
    batch = Batch({"image": tokens, "text": tokens}, targets)
    found = task_losses(model, task, batch)
    parts = found.parts
    assert list(parts) == ["image-text", "image:label", "image:tags", *(["router"] if moe else [])]
    expected = 0.25 * parts["image-text"] + 3 * parts["image:label"] + parts["image:tags"] + parts.get("router", 0)
    torch.testing.assert_close(found.total.detach(), expected)
    if moe:
        aux = [stats.z_loss for encoded in model.encode_all(batch.tokens).values() for stats in encoded.routing]
        assert len(aux) == 4
        torch.testing.assert_close(parts["router"], torch.stack(aux).sum().detach() / 2)
    assert found.total.requires_grad
    assert not any(part.requires_grad for part in parts.values())
    usages = [stats for layers in found.usage.values() for stats in layers]
    assert len(usages) == (4 if moe else 0)
    assert not any(number.requires_grad for stats in usages for number in stats)


def test_all_modalities_are_encoded_in_one_pass_and_the_losses_of_pairs_are_averaged():
    """However many pairs a modality is in: the encoder is nearly all of the work, and a task of three modalities weighs
    as much as one of two, as in the release."""
    model = small()
    names = ("image", "audio", "text")
    tokens = Tokens(torch.randn(4, 3, 6), torch.arange(3).expand(4, -1)[..., None])
    batch = Batch(dict.fromkeys(names, tokens), [{"item": torch.arange(4)}])
    passes = []

    def counted(inputs):
        passes.append(tuple(inputs))
        return model.encode_all(inputs)

    found = task_losses(model, task_in_recipe(names, {"type": "contrastive"}), batch, counted)
    assert passes == [names]
    assert len(found.parts) == 3
    torch.testing.assert_close(found.total.detach(), torch.stack([*found.parts.values()]).mean())


def test_heads_are_named_by_source_and_column():
    assert head_key("notes", "family.name") == "notes:family/name" != head_key("notes-family", "name")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_blocks_of_similarities_change_nothing_but_what_is_held(kind, monkeypatch):
    """However small the blocks, the same loss and gradients; and no tensor of all similarities waits."""
    item = torch.tensor([3, 1, 4, 1, 5])
    objective = Contrastive(type="contrastive", loss=kind)
    model = small()
    found = []
    for block in (2**24, 40, 1):
        monkeypatch.setattr("openimp.objectives.nce.MAX_SIMILARITIES", block)
        torch.manual_seed(0)
        features = {name: torch.randn(rows, 16, requires_grad=True) for name, rows in (("image", 5), ("text", 15))}
        encoded = {name: Encoded(x, []) for name, x in features.items()}
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: (held.append(x.numel()), x)[1], lambda x: x):
            loss = losses_of(model, objective, encoded, item=item)["image-text"]
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in features.values())])
        assert (5 * 15 in held) == (block == 2**24)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)
