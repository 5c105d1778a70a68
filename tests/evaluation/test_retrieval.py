import io
import json

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openimp.common.errors import UserError
from openimp.data.sources import open_source
from openimp.data.tables import item_id
from openimp.evaluation.evaluate import evaluate
from openimp.evaluation.retrieval import RetrievalResult, ranks
from openimp.inference.model import Model
from openimp.recipe.tasks import Source

NAMES = ["red", "green", "blue", "red", "red", "green", "grey", "white"]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder, pictures, names=NAMES):
    """A Parquet file of pictures (bytes) with names, and the keys of a recipe that evaluates it."""
    pq.write_table(pa.table({"picture": pictures, "name": names}), folder / "pictures.parquet")
    options = {
        "type": "retrieval",
        "source": "pictures",
        "inputs": {"image": "picture", "text": "name"},
        "view": {"image": {"size": 16}, "text": {"length": 8}},
    }
    return {
        "sources": {"all": {"path": "unused.parquet"}, "pictures": {"path": str(folder / "pictures.parquet")}},
        "train": {"precision": "fp32"},
        "evaluation": {"sets": {"names": options}, "batch_size": 3},
    }


@pytest.fixture
def measure(tiny_recipe, tiny_model):
    """Evaluates the tiny model on the sets of a recipe with these keys."""

    def run(keys, **options):
        recipe = tiny_recipe(**keys)
        model, modalities = tiny_model(recipe)
        return evaluate(model, recipe, modalities, **options)

    return run


def naive_rank(similar: np.ndarray, right: set[int]) -> int:
    """Sorts all candidates, the wrong ones first where they tie, and looks for the first correct one."""
    order = sorted(range(len(similar)), key=lambda i: (-similar[i], i in right))
    return 1 + min(order.index(i) for i in right)


@st.composite
def problems(draw):
    """Queries and candidates with small whole entries, so that exact ties abound, and correct pairs for each query."""
    n, m, z = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    entries = st.integers(-2, 2).map(float)
    queries, candidates = (draw(hnp.arrays(np.float32, (rows, z), elements=entries)) for rows in (n, m))
    right = draw(st.lists(st.sets(st.integers(0, m - 1), min_size=1), min_size=n, max_size=n))
    return queries, candidates, right, draw(st.integers(1, 20))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_ranks_are_those_of_a_full_sort(problem):
    queries, candidates, right, limit = problem
    pairs = np.array([(i, j) for i, found in enumerate(right) for j in found])
    pairs = np.random.default_rng(0).permutation(pairs)
    got = ranks(torch.from_numpy(queries), torch.from_numpy(candidates), pairs, limit)
    similar = queries @ candidates.T
    assert got.tolist() == [naive_rank(row, found) for row, found in zip(similar, right)]


@given(problems())
@settings(max_examples=200, deadline=None)
def test_answers_are_the_first_of_a_full_sort_and_the_best_correct_one_at_its_rank(problem):
    queries, candidates, right, k = problem
    vectors, pairs = (
        (torch.from_numpy(queries), torch.from_numpy(candidates)),
        np.array([(i, j) for i, found in enumerate(right) for j in found]),
    )
    rows = np.arange(len(queries)), np.arange(len(candidates))
    found = RetrievalResult("a", "b", ranks(*vectors, pairs), pairs, *rows, *vectors)
    similar = queries @ candidates.T
    for query, correct in enumerate(right):
        order = sorted(range(len(candidates)), key=lambda i: (-similar[query, i], i in correct))
        best = next(i for i in order if i in correct)
        first = order[:k] if correct & set(order[:k]) else [*order[:k], best]
        answers = found.answers(query, k)
        assert [answer.candidate for answer in answers] == first
        assert [answer.similarity for answer in answers] == [similar[query, i] for i in first]
        assert [answer.correct for answer in answers] == [i in correct for i in first]
        whole = found.answers(query, len(candidates))
        assert 1 + [answer.correct for answer in whole].index(True) == found.rank[query]


def test_an_answer_that_is_nan_stands_where_its_rank_says():
    candidates, pairs = torch.eye(4), np.stack([np.arange(4)] * 2, axis=1)
    candidates[2] = torch.nan
    found = RetrievalResult(
        "a", "b", ranks(torch.eye(4), candidates, pairs), pairs, *[np.arange(4)] * 2, torch.eye(4), candidates
    )
    for query, rank in enumerate(found.rank):
        assert [answer.correct for answer in found.answers(query, 4)].index(True) == rank - 1


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = torch.ones(10, 4)
    assert (ranks(same, same, np.stack([np.arange(10)] * 2, axis=1)) == 10).all()


def test_nan_finds_nothing():
    """Neither where all is NaN, nor where a wrong or the right candidate is."""
    z, pairs = torch.eye(10), np.stack([np.arange(10)] * 2, axis=1)
    assert (ranks(z * torch.nan, z, pairs) == 10).all()
    candidates = z.clone()
    candidates[3] = torch.nan
    assert ranks(z, candidates, pairs).tolist() == [2, 2, 2, 10, 2, 2, 2, 2, 2, 2]


def test_memory_does_not_grow_with_queries_times_candidates(peak_bytes):
    """All similarities of 20,000 and 20,000 items would be 1.6 GB."""
    z = torch.nn.functional.normalize(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    pairs = np.stack([np.arange(20_000)] * 2, axis=1)
    found = []
    assert peak_bytes(lambda: found.append(ranks(z, z, pairs))) < 64e6
    assert (found[0] == 1).all()


def test_figures_of_ranks_known_by_hand():
    pairs = np.array([(0, 0), (1, 1), (2, 2), (3, 3), (3, 4)])
    vectors = torch.zeros(4, 2), torch.zeros(20, 2)
    found = RetrievalResult("a", "b", np.array([1, 3, 8, 20]), pairs, np.arange(4), np.arange(20), *vectors)
    figures = found.metrics()
    assert (figures["n"], figures["candidates"]) == (4, 20)
    assert (figures["r1"], figures["r5"], figures["r10"]) == (0.25, 0.5, 0.75)
    assert figures["median_rank"] == 5.5
    assert figures["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 8 + 1 / 20) / 4)
    # Three queries with one correct candidate of 20, one with two.
    assert figures["chance"] == pytest.approx((3 * 1 / 20 + 2 / 20) / 4)


def test_equal_names_and_equal_pictures_are_one_item(measure, tmp_path, tiny_recipe, tiny_model):
    """Against a naive computation with `Model.encode`, one item at a time, and all similarities in one matrix."""
    # The first picture comes three times, twice with the same name and once with another.
    pictures = [png(i) for i in (0, 1, 2, 3, 4, 5, 6, 0, 0)]
    keys = write_pictures(tmp_path, pictures, [*NAMES, "red"])
    to_text, to_image = measure(keys)
    recipe = tiny_recipe(**keys)
    imp, modalities = tiny_model(recipe)
    model = Model(imp, recipe.to_config({}), modalities, "fp32")
    model.views["image"] = recipe.evaluation.sets["names"].view["image"]
    names = ["red", "green", "blue", "grey", "white"]
    images = torch.cat([model.encode_image(picture, normalize=True) for picture in pictures[:7]])
    texts = torch.cat([model.encode_text(name, normalize=True) for name in names])
    similar = (images @ texts.T).numpy()
    right = [{0, 4}, {1}, {2}, {0}, {0}, {1}, {3}]
    wanted = np.array([naive_rank(row, found) for row, found in zip(similar, right)])
    back = [{i for i, found in enumerate(right) if j in found} for j in range(5)]
    wanted_back = np.array([naive_rank(row, found) for row, found in zip(similar.T, back)])
    for result, rank, candidates in ((to_text, wanted, 5), (to_image, wanted_back, 7)):
        assert (result["n"], result["candidates"]) == (len(rank), candidates)
        assert result["r1"] == pytest.approx((rank == 1).mean())
        assert result["median_rank"] == np.median(rank)
        assert result["mrr"] == pytest.approx((1 / rank).mean())
    assert (to_text["task"], to_image["task"]) == ("image -> text", "text -> image")
    assert to_text["chance"] == pytest.approx(8 / 7 / 5)
    assert to_image["chance"] == pytest.approx(8 / 5 / 7)


def test_equal_files_under_two_names_are_one_item(measure, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        (tmp_path / f"{name}.png").write_bytes(png(seed))
    keys = write_pictures(tmp_path, ["a.png", "b.png", "copy.png"], ["red", "green", "red"])
    to_text, to_image = measure(keys)
    assert (to_text["n"], to_image["n"]) == (2, 2)


def test_texts_that_differ_only_in_case_and_spaces_are_one_item(measure, tmp_path):
    """But not texts of which the model reads the same because it reads too little."""
    alike = [("a red square", "A Red  square"), ("noise", " NOISE ")]
    pictures = [png(i) for i in range(4)]
    to_text, to_image = measure(write_pictures(tmp_path, pictures, [text for pair in alike for text in pair]))
    assert (to_text["n"], to_text["candidates"], to_image["n"]) == (4, 2, 2)
    assert to_text["chance"] == to_image["chance"] == 1 / 2
    long = "a red square and nothing but a red square, "
    keys = write_pictures(tmp_path, pictures, [long + "once", long + "twice", "a", "b"])
    assert [result["candidates"] for result in measure(keys)] == [4, 4]


def test_parts_positives_and_evaluation_agree_which_texts_are_equal(measure, tmp_path):
    equal = [["Straße", "STRASSE"], ["A dog", "a  dog"], ["Café", "cafe\u0301"], ["cafe"]]
    names = [text for texts in equal for text in texts]
    keys = write_pictures(tmp_path, [png(i) for i in range(len(names))], names)
    table = open_source("pictures", Source(path=str(tmp_path / "pictures.parquet")))
    to_text, _ = measure(keys)
    counts = {
        "part": len(set(table.parts(10**9, "name"))),
        "positives_by": len({item_id(name, row) for row, name in enumerate(names)}),
        "evaluation": to_text["candidates"],
    }
    assert counts == dict.fromkeys(counts, len(equal))


def test_a_trained_pair_is_found_and_the_figures_are_reproducible(measure, tmp_path, tiny_recipe, tiny_model):
    """Fits the tiny model to eight pictures with the real loss; R@1 then is 1, both ways, twice, in any batch size."""
    keys = write_pictures(tmp_path, [png(i) for i in range(8)], [f"{i} number" for i in range(8)])
    recipe = tiny_recipe(**keys)
    model, modalities = tiny_model(recipe)
    view = recipe.evaluation.sets["names"].view
    tokens = {
        "image": modalities["image"].tokens(
            np.concatenate([modalities["image"].encode_input(png(i), view["image"]) for i in range(8)]),
            view["image"],
            None,
        ),
        "text": modalities["text"].from_tensor(modalities["text"].tokenize([f"{i} number" for i in range(8)], 8)),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        a = model.project(model.encode({"image": tokens["image"]}).features, "image", "text")
        b = model.project(model.encode({"text": tokens["text"]}).features, "text", "image")
        logits = model.temperature("image", "text").scale * a @ b.T
        target = torch.arange(8)
        loss = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.train()
    first = evaluate(model, recipe, modalities, step=150)
    assert model.training
    assert [(result["r1"], result["mrr"], result["step"]) for result in first] == [(1, 1, 150)] * 2
    assert evaluate(model, recipe, modalities, step=150) == first
    recipe.evaluation.batch_size = 1
    assert evaluate(model, recipe, modalities, step=150) == first


def test_results_are_json_and_say_what_was_measured(measure, tmp_path):
    keys = write_pictures(tmp_path, [png(i) for i in range(8)])
    results = measure(keys, step=7)
    assert json.loads(json.dumps(results)) == results
    result = results[0]
    assert (result["set"], result["type"], result["step"], result["source"]) == ("names", "retrieval", 7, "pictures")
    assert result["view"]["image"]["size"] == 16
    assert (result["skipped"], result["skipped_rows"], result["prompts"]) == (0, [], None)
    changed = measure(write_pictures(tmp_path, [png(i) for i in range(1, 9)]))[0]
    assert result["fingerprint"] != changed["fingerprint"]


def test_unreadable_rows_are_left_out_counted_and_named(measure, tmp_path):
    """The figures are those of the readable rows alone."""
    good = [png(i) for i in range(8)]
    bad = measure(write_pictures(tmp_path, [*good[:3], b"not a picture", *good[4:], png(9)], [*NAMES, None]))
    (tmp_path / "clean").mkdir()
    clean = measure(write_pictures(tmp_path / "clean", [*good[:3], *good[4:]], [*NAMES[:3], *NAMES[4:]]))
    for with_bad, without in zip(bad, clean):
        assert with_bad["skipped"] == 2
        assert [row.split(": ")[0] for row in with_bad["skipped_rows"]] == [
            "pictures.parquet[3]",
            "pictures.parquet[8]",
        ]
        assert "no text in column name" in with_bad["skipped_rows"][1]
        same = ("n", "candidates", "r1", "r5", "median_rank", "chance")
        assert {key: with_bad[key] for key in same} == {key: without[key] for key in same}


def test_a_set_without_readable_rows_is_an_error(measure, tmp_path):
    keys = write_pictures(tmp_path, [b"no", b"picture"], ["red", "green"])
    with pytest.raises(
        UserError, match=r"evaluation\.sets\.names: no row of source pictures can be read; the first: pictures"
    ):
        measure(keys)


def test_modalities_that_were_never_trained_together_are_refused(measure, tmp_path):
    keys = write_pictures(tmp_path, [png(0)], ["red"])
    keys["evaluation"]["sets"]["names"]["inputs"] = {"image": "picture", "audio": "name"}
    keys["evaluation"]["sets"]["names"]["view"] = {"audio": {"seconds": 0.512}, "image": {"size": 16}}
    with pytest.raises(
        UserError, match=r"sets\.names: no task trains image and audio together.*audio-text, image-text"
    ):
        measure(keys)


def test_bad_names_get_one_clear_line(measure, tmp_path):
    keys = write_pictures(tmp_path, [png(0)], ["red"])
    with pytest.raises(UserError, match="no evaluation set is called 'name'; did you mean 'names'"):
        measure(keys, sets=["name"])
    keys["evaluation"]["sets"]["names"]["inputs"]["text"] = "nam"
    with pytest.raises(UserError, match=r"sets\.names: .*no column 'nam'; did you mean 'name'"):
        measure(keys)


def test_a_training_model_is_measured_in_evaluation_mode(tmp_path, tiny_recipe, tiny_model):
    """With experts that choose across the batch, training mode would make the figures those of the batches."""
    keys = write_pictures(tmp_path, [png(i) for i in range(30)], [f"{i} number" for i in range(30)])
    recipe = tiny_recipe({"moe": {"experts": 4, "layers": 2, "routing": "expert_choice_batch"}}, **keys)
    model, modalities = tiny_model(recipe)
    assert evaluate(model.train(), recipe, modalities) == evaluate(model.eval(), recipe, modalities)


def test_the_mode_is_restored_after_an_error(tmp_path, tiny_recipe, tiny_model):
    recipe = tiny_recipe(**write_pictures(tmp_path, [b"bad"], ["red"]))
    model, modalities = tiny_model(recipe)
    model.train()
    with pytest.raises(UserError):
        evaluate(model, recipe, modalities)
    assert model.training


def test_progress_counts_rows(measure, tmp_path):
    shown = []

    def progress(items, description):
        for item in items:
            shown.append((description, item))
            yield item

    measure(write_pictures(tmp_path, [png(i) for i in range(8)]), progress=progress)
    assert shown == [(f"names: {side}", row) for side in ("image", "text") for row in range(8)]
