"""The losses against loops over single pairs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from openimp.common.modality import StemSpec, Tokens
from openimp.data.batch import Batch, head_key
from openimp.model.imp import IMP, Encoded
from openimp.objectives import (
    classification_losses,
    contrastive_losses,
    distillation_losses,
    equal_texts,
    sigmoid_classification,
    sigmoid_nce,
    softmax_classification,
    task_losses,
)
from openimp.recipe.model import Model
from openimp.recipe.schema import Recipe
from openimp.recipe.tasks import Classification, Contrastive, Distill, Task


def small(moe: dict | None = None) -> IMP:
    torch.manual_seed(0)
    config = Model(width=16, layers=2, heads=2, mlp_dim=32, embed_dim=8, moe=moe)
    names = ("image", "audio", "text")
    stems = {name: StemSpec(6, (4,)) for name in names}
    pairs = [("image", "text"), ("audio", "text"), ("audio", "image")]
    return IMP(config, stems, {name: name for name in names}, pairs, {"all:label": 5, "all:tags": 5})


def batch_of(items: list[int], draw: int = 1, same: list[int] | None = None) -> tuple[Batch, dict[str, Encoded]]:
    """A batch of random features: `draw` texts an item."""
    torch.manual_seed(len(items))
    rows = {"image": len(items), "text": len(items) * draw}
    encoded = {name: Encoded(torch.randn(n, 16), []) for name, n in rows.items()}
    batch = Batch({}, {"": torch.tensor(items)}, rows=items)
    if same:
        batch.item_ids["name"] = torch.tensor(same)
    return batch, encoded


def similarities(model: IMP, encoded: dict[str, Encoded]) -> torch.Tensor:
    image, text = (model.project(encoded[a].features, a, b) for a, b in (("image", "text"), ("text", "image")))
    return (image @ text.T) / model.config.init_temperature


def test_equal_texts_are_counted_unless_the_recipe_says_which_rows_are_one_item():
    ids = torch.tensor([[5, 1], [5, 1], [6, 1], [7, 1], [6, 1], [8, 1]])
    text = Tokens(ids, torch.zeros(6, 2, 1, dtype=torch.int64), torch.ones(6, 2, dtype=torch.bool))
    image = Tokens(torch.zeros(3, 4, 2), torch.zeros(3, 4, 1, dtype=torch.int64), None)
    batch = Batch({"image": image, "text": text}, {"": torch.tensor([0, 1, 2])})
    told = {}
    for same in ("", "name"):
        objective = {"type": "contrastive", "same": same or None}
        told[same] = equal_texts(Task(source="s", inputs={"image": "i", "text": "t"}, objectives=[objective]), batch)
    # Two texts per row: rows 0, 1 and 2 have [5, 5], [6, 7] and [6, 8].
    assert told == {"": pytest.approx(2 / 6), "name": 0}
    classify = Task(source="s", inputs={"image": "i"}, objectives=[{"type": "classification", "label": "l"}])
    assert equal_texts(classify, batch) == 0


def test_softmax_nce_of_distinct_items_is_cross_entropy_both_ways():
    model = small()
    batch, encoded = batch_of([3, 1, 4, 15, 9])
    logits, diagonal = similarities(model, encoded), torch.arange(5)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    found = contrastive_losses(model, Contrastive(type="contrastive"), encoded, batch)
    assert list(found) == ["image-text"]
    torch.testing.assert_close(found["image-text"], expected)


@pytest.mark.parametrize("draw", [1, 2])
def test_distillation_compares_each_embedding_with_its_vector(draw):
    """Two of the three rows have the same vector, so in the contrastive loss either is correct for both."""
    model = small()
    batch, encoded = batch_of([0, 1, 2], draw)
    vector = F.normalize(torch.randn(3, 8), dim=1)[[0, 1, 0]]
    batch.labels["teacher"], batch.item_ids["teacher"] = vector, torch.tensor([7, 8, 7])
    embedding = model.project(encoded["text"].features, "text", "image")
    expected = {"cosine": 0.0, "contrastive": 0.0}
    for i, z in enumerate(embedding.detach()):
        row = i // draw
        expected["cosine"] += 1 - float(z @ vector[row])
        shares = (vector @ z / 0.1).exp()
        same = [0, 2] if row in (0, 2) else [1]
        expected["contrastive"] -= math.log(float(shares[same].sum() / shares.sum()))
    for loss, total in expected.items():
        objective = Distill(type="distill", of="text", to="teacher", loss=loss, temperature=0.1)
        ((name, found),) = distillation_losses(model, objective, "image", encoded, batch).items()
        assert (name, float(found.detach())) == ("text:teacher", pytest.approx(total / len(embedding), rel=1e-4))


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    draw=st.integers(1, 3),
    by_column=st.booleans(),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_items_with_several_positives(items, draw, by_column, kind):
    """Several texts an item, and rows that are the same item by row or by column: all of them are positives."""
    model = small()
    rows = list(range(len(items))) if by_column else items
    batch, encoded = batch_of(rows, draw, same=items if by_column else None)
    logits = similarities(model, encoded)
    positive = [[one == other for other in items for _ in range(draw)] for one in items]

    def nce(rows: torch.Tensor, wanted: list[list[bool]]) -> float:
        total = 0.0
        for row, marks in zip(rows.tolist(), wanted):
            share = sum(math.exp(x) for x, yes in zip(row, marks) if yes) / sum(math.exp(x) for x in row)
            total -= math.log(share)
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
    objective = Contrastive(type="contrastive", loss=kind, same="name" if by_column else None)
    found = contrastive_losses(model, objective, encoded, batch)["image-text"].item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_sigmoid_loss_is_siglips():
    """Algorithm 1 of arXiv 2303.15343, written down again."""
    torch.manual_seed(0)
    n, t_prime, b = 7, torch.tensor(math.log(10.0)), torch.tensor(-10.0)
    image, text = F.normalize(torch.randn(n, 8)), F.normalize(torch.randn(n, 8))
    logits = image @ text.T * t_prime.exp() + b
    labels = 2 * torch.eye(n) - torch.ones(n, n)
    expected = -torch.log(torch.sigmoid(labels * logits)).sum() / n
    torch.testing.assert_close(sigmoid_nce(logits, torch.eye(n, dtype=torch.bool)).mean(), expected)


def test_only_named_pairs_are_compared():
    model = small()
    names = ("image", "audio", "text")
    encoded = {name: Encoded(torch.randn(4, 16), []) for name in names}
    batch = Batch({}, {"": torch.arange(4)}, rows=list(range(4)))

    def pairs(**options):
        return list(contrastive_losses(model, Contrastive(type="contrastive", **options), encoded, batch))

    assert pairs() == ["image-audio", "image-text", "audio-text"]
    assert pairs(pairs=[["text", "audio"]]) == ["text-audio"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_losses_by_hand(smoothing):
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    logs = logits.log_softmax(-1)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]) * (1 - smoothing) + smoothing / 3
    found = softmax_classification(logits, torch.tensor([0, 2]), smoothing)
    torch.testing.assert_close(found, -(target * logs).sum(1).mean())

    marks = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    soft = marks * (1 - smoothing) + (1 - marks) * 0 + smoothing / 2
    yes, no = torch.sigmoid(logits).log(), torch.sigmoid(-logits).log()
    expected = -(soft * yes + (1 - soft) * no).sum(1).mean()
    torch.testing.assert_close(sigmoid_classification(logits, marks, smoothing), expected)


def test_classification_is_of_the_modalities_without_a_mask_unless_one_is_named():
    model = small()
    torch.nn.init.normal_(model.classifiers["all:label"].weight)
    tokens = Tokens(torch.zeros(3, 1, 6), torch.zeros(3, 1, 1, dtype=int))
    mask = torch.ones(3, 1, dtype=torch.bool)
    given_ = {"image": tokens, "audio": tokens, "text": tokens._replace(mask=mask)}
    encoded = {name: Encoded(torch.randn(3, 16), []) for name in given_}
    batch = Batch(given_, {}, {"label": torch.tensor([0, 4, 2])}, rows=[0, 1, 2])

    def losses(**options):
        objective = Classification(type="classification", label="label", **options)
        return classification_losses(model, objective, "all", encoded, batch)

    assert list(losses()) == ["image:label", "audio:label"]
    assert list(losses(of="text")) == ["text:label"]
    logits = model.classifiers["all:label"](encoded["audio"].features)
    torch.testing.assert_close(losses(of="audio")["audio:label"], F.cross_entropy(logits, torch.tensor([0, 4, 2])))


@pytest.mark.parametrize(("label", "loss"), [("label", "softmax"), ("tags", "sigmoid")])
def test_every_drawn_row_is_classified_by_its_examples_label(label, loss):
    model = small()
    torch.nn.init.normal_(model.classifiers[f"all:{label}"].weight)
    features = torch.randn(6, 16)
    labels = torch.tensor([4, 0, 2]) if loss == "softmax" else torch.tensor([[1.0, 0, 0, 1, 0]] * 2 + [[0.0] * 5])
    objective = Classification(type="classification", label=label, loss=loss, of="image")

    def found(rows, target):
        encoded = {"image": Encoded(rows, [])}
        (value,) = classification_losses(model, objective, "all", encoded, Batch({}, {}, {label: target})).values()
        return value

    # Two rows an example, one after the other.
    expected = (found(features[::2], labels) + found(features[1::2], labels)) / 2
    torch.testing.assert_close(found(features, labels), expected)


@pytest.mark.parametrize("moe", [None, {"experts": 2, "layers": 2}])
def test_a_tasks_objectives_are_summed_with_their_weights(moe):
    """And the routers' own losses, summed over sparse layers and averaged over modalities, are added as they are."""
    model = small(moe)
    recipe = Recipe.build(
        {
            "name": "x",
            "sources": {"all": {"path": "x.parquet"}},
            "tasks": {
                "one": {
                    "source": "all",
                    "inputs": {"image": "i", "text": "t"},
                    "objectives": [
                        {"type": "contrastive", "weight": 0.25},
                        {"type": "classification", "label": "label", "of": "image", "weight": 3.0},
                        {"type": "classification", "label": "tags", "of": "image", "loss": "sigmoid"},
                    ],
                }
            },
        }
    )
    tokens = Tokens(torch.randn(4, 3, 6), torch.arange(3).expand(4, -1)[..., None])
    labels = {"label": torch.tensor([0, 1, 2, 3]), "tags": torch.eye(5)[:4]}
    batch = Batch({"image": tokens, "text": tokens}, {"": torch.arange(4)}, labels, rows=[0, 1, 2, 3])
    found = task_losses(model, recipe.tasks["one"], batch)
    parts = found.parts
    assert list(parts) == ["image-text", "image:label", "image:tags", *(["router"] if moe else [])]
    expected = 0.25 * parts["image-text"] + 3 * parts["image:label"] + parts["image:tags"] + parts.get("router", 0)
    torch.testing.assert_close(found.total.detach(), expected)
    if moe:
        aux = [stats.aux for encoded in model.encode_all(batch.tokens).values() for stats in encoded.routing]
        assert len(aux) == 4
        torch.testing.assert_close(parts["router"], torch.stack(aux).sum().detach() / 2)
    assert found.total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_the_losses_of_an_objectives_pairs_are_averaged():
    """As in the release, so that a task of three modalities weighs as much as one of two."""
    model = small()
    names = ("image", "audio", "text")
    recipe = Recipe.build(
        {
            "name": "x",
            "sources": {"all": {"path": "x.parquet"}},
            "tasks": {
                "one": {"source": "all", "inputs": {n: n for n in names}, "objectives": [{"type": "contrastive"}]}
            },
        }
    )
    tokens = Tokens(torch.randn(4, 3, 6), torch.arange(3).expand(4, -1)[..., None])
    batch = Batch(dict.fromkeys(names, tokens), {"": torch.arange(4)}, rows=[0, 1, 2, 3])
    found = task_losses(model, recipe.tasks["one"], batch)
    assert len(found.parts) == 3
    torch.testing.assert_close(found.total.detach(), torch.stack([*found.parts.values()]).mean())


def test_all_modalities_are_encoded_in_one_pass():
    """However many pairs a modality is in: the encoder is nearly all of the work."""
    model = small()
    task = {
        "source": "all",
        "inputs": {n: n for n in ("image", "audio", "text")},
        "objectives": [{"type": "contrastive"}],
    }
    recipe = Recipe.build({"name": "x", "sources": {"all": {"path": "x.parquet"}}, "tasks": {"one": task}})
    tokens = Tokens(torch.randn(2, 3, 6), torch.arange(3).expand(2, -1)[..., None])
    batch = Batch({n: tokens for n in ("image", "audio", "text")}, {"": torch.arange(2)}, rows=[0, 1])
    passes = []

    def counted(inputs):
        passes.append(list(inputs))
        return model.encode_all(inputs)

    losses = task_losses(model, recipe.tasks["one"], batch, counted)
    assert passes == [["image", "audio", "text"]]
    assert len(losses.parts) == 3


def test_heads_are_named_by_source_and_column():
    assert head_key("notes", "family.name") == "notes:family/name" != head_key("notes-family", "name")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_blocks_of_similarities_change_nothing_but_what_is_held(kind, monkeypatch):
    """However small the blocks, the same loss and gradients; and no tensor of all similarities waits."""
    batch, _ = batch_of([3, 1, 4, 1, 5], draw=3)
    model = small()
    found = []
    for block in (2**24, 40, 1):
        monkeypatch.setattr("openimp.objectives.BLOCK", block)
        torch.manual_seed(0)
        features = {name: torch.randn(rows, 16, requires_grad=True) for name, rows in (("image", 5), ("text", 15))}
        encoded = {name: Encoded(x, []) for name, x in features.items()}
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: (held.append(x.numel()), x)[1], lambda x: x):
            loss = contrastive_losses(model, Contrastive(type="contrastive", loss=kind), encoded, batch)["image-text"]
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in features.values())])
        assert (5 * 15 in held) == (block == 2**24)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)
