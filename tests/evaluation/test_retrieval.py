"""Retrieval: ranks against a full sort, and which items are the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openimp.evaluation.evaluate import check_sets, evaluate
from openimp.evaluation.retrieval import RetrievalResult, ranks
from openimp.study.variants import peak_bytes
from tests.little import png
from tests.messages import refuses

NAMES = ["red", "green", "blue", "red", "red", "green", "grey", "white"]
PICTURES = [png(i) for i in range(8)]


@pytest.fixture
def named(setup):
    """Retrieves pictures by their names, and names by pictures."""

    def make(pictures=PICTURES, names=NAMES, **options):
        pair = {
            "inputs": {"image": "picture", "text": "name"},
            "view": {"image": {"size": 16}, "text": {"length": 8}},
        }
        return setup({"pictures": {"picture": pictures, "name": names}}, **{"type": "retrieval"} | pair | options)

    return make


def naive_rank(similar: np.ndarray, right: set[int]) -> int:
    """Sorts all candidates, the wrong ones first where they tie, and looks for the first correct one."""
    order = sorted(range(len(similar)), key=lambda i: (-similar[i], i in right))
    return 1 + min(order.index(i) for i in right)


def result_of(queries, candidates, pairs, rank=None) -> RetrievalResult:
    return RetrievalResult(
        "a",
        "b",
        rank=ranks(queries, candidates, pairs) if rank is None else rank,
        correct_pairs=pairs,
        query_row=np.arange(len(queries)),
        candidate_row=np.arange(len(candidates)),
        query_NZ=queries,
        candidate_MZ=candidates,
        rows_of_unknown_texts=[],
    )


def diagonal(n: int) -> np.ndarray:
    return np.stack([np.arange(n)] * 2, axis=1)


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
def test_ranks_and_answers_are_those_of_a_full_sort(problem):
    queries, candidates, right, k = problem
    pairs = np.random.default_rng(0).permutation([(i, j) for i, correct in enumerate(right) for j in correct])
    vectors = torch.from_numpy(queries), torch.from_numpy(candidates)
    similar = queries @ candidates.T
    expected = [naive_rank(row, correct) for row, correct in zip(similar, right)]
    assert ranks(*vectors, pairs, limit=k).tolist() == expected
    result = result_of(*vectors, pairs)
    for query, correct in enumerate(right):
        order = sorted(range(len(candidates)), key=lambda i: (-similar[query, i], i in correct))
        best = next(i for i in order if i in correct)
        shown = order[:k] if correct & set(order[:k]) else [*order[:k], best]
        assert result.answers(query, k) == [(i, similar[query, i], i in correct) for i in shown]


def test_nan_and_one_answer_to_everything_find_nothing():
    z, pairs, same = torch.eye(10), diagonal(10), torch.ones(10, 4)
    assert (ranks(same, same, pairs) == 10).all()
    assert (ranks(z * torch.nan, z, pairs) == 10).all()
    candidates = z.clone()
    candidates[3] = torch.nan
    assert ranks(z, candidates, pairs).tolist() == [2, 2, 2, 10, 2, 2, 2, 2, 2, 2]


def test_memory_does_not_grow_with_queries_times_candidates():
    """All similarities of 20,000 and 20,000 items would be 1.6 GB."""
    z = F.normalize(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = []
    assert peak_bytes(lambda: found.append(ranks(z, z, diagonal(20_000)))) < 64e6
    assert (found[0] == 1).all()


def test_figures_of_ranks_known_by_hand():
    pairs = np.array([(0, 0), (1, 1), (2, 2), (3, 3), (3, 4)])
    metrics = result_of(torch.zeros(4, 2), torch.zeros(20, 2), pairs, np.array([1, 3, 8, 20])).metrics()
    assert (metrics["n"], metrics["candidates"]) == (4, 20)
    assert (metrics["r1"], metrics["r5"], metrics["r10"]) == (0.25, 0.5, 0.75)
    assert metrics["median_rank"] == 5.5
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 8 + 1 / 20) / 4)
    # Three queries with one correct candidate of 20, one with two.
    assert metrics["chance"] == pytest.approx((3 * 1 / 20 + 2 / 20) / 4)


def test_equal_names_and_equal_pictures_are_one_item(named):
    """Against a naive computation with `Model.encode`, one item at a time, and all similarities in one matrix."""
    # The first picture comes three times, twice with the same name, in another case, and once with another.
    pictures = [png(i) for i in (0, 1, 2, 3, 4, 5, 6, 0, 0)]
    made = named(pictures, [*NAMES, "RED "])
    to_text, to_image = results = evaluate(*made)
    assert evaluate(*made) == results
    made.recipe.evaluation.batch_size = 1
    assert evaluate(*made) == results
    model, names = made.inference_model(), ["red", "green", "blue", "grey", "white"]
    images = torch.cat([model.encode_image(picture, normalize=True) for picture in pictures[:7]])
    texts = torch.cat([model.encode_text(name, normalize=True) for name in names])
    similar = (images @ texts.T).numpy()
    right = [{0, 4}, {1}, {2}, {0}, {0}, {1}, {3}]
    back = [{i for i, correct in enumerate(right) if j in correct} for j in range(5)]
    for result, task, matrix, answers in (
        (to_text, "image -> text", similar, right),
        (to_image, "text -> image", similar.T, back),
    ):
        rank = np.array([naive_rank(row, correct) for row, correct in zip(matrix, answers)])
        assert (result["task"], result["n"], result["candidates"]) == (task, *matrix.shape)
        assert result["mrr"] == pytest.approx((1 / rank).mean())
        assert result["chance"] == pytest.approx(8 / 7 / 5)


def test_sources_that_were_checked_before_training_are_not_opened_again(named):
    made = named()
    tables = check_sets(*made, {})
    results = evaluate(*made, tables=tables)
    Path(made.recipe.sources["pictures"].path).unlink()
    assert evaluate(*made, tables=tables) == results


def test_a_column_of_objects_is_no_text_which_is_told_before_training(named):
    with refuses():
        check_sets(*named(names=[{"color": name} for name in NAMES]), {})


def test_unreadable_rows_are_left_out_counted_and_named(named):
    """The figures are those of the readable rows alone."""
    bad = evaluate(*named([*PICTURES[:3], b"not a picture", *PICTURES[4:], png(9)], [*NAMES, None]))
    clean = evaluate(*named([*PICTURES[:3], *PICTURES[4:]], [*NAMES[:3], *NAMES[4:]]))
    for with_bad, without in zip(bad, clean):
        assert with_bad["skipped"] == 2
        first, second = with_bad["skipped_rows"]
        assert first.startswith("pictures.parquet[3]: ")
        assert second.startswith("pictures.parquet[8]: ")
        assert "no text in column name" in second
        for key in ("n", "candidates", "r1", "r5", "median_rank", "chance"):
            assert with_bad[key] == without[key]


def test_texts_without_a_known_word_are_counted_and_named(named):
    audio = {"window": 512, "hop": 256, "bins": 32}
    words = {"modalities": {"vision": {"patch": [2, 8, 8]}, "audio": audio, "text": {"min_df": 1}}}
    names = ["red", "green", "purple", "red", "red", "green", "red", "black"]  # The training texts have red and green.
    result, reverse = evaluate(*named(names=names, keys=words))
    assert result["unknown"] == reverse["unknown"] == 2
    assert result["unknown_rows"] == ["pictures.parquet[2]", "pictures.parquet[7]"]
    assert [result["unknown"] for result in evaluate(*named())] == [0, 0]


@pytest.mark.parametrize(
    ("pictures", "options"),
    [
        ([b"no"], {}),
        (PICTURES[:1], {"inputs": {"image": "picture", "audio": "name"}, "view": {"image": {"size": 16}, "audio": {}}}),
        (PICTURES[:1], {"inputs": {"image": "picture", "text": "nam"}}),
    ],
)
def test_what_cannot_be_measured_is_told_and_the_mode_is_restored(named, pictures, options):
    made = named(pictures, ["red"], **options)
    made.model.train()
    with refuses():
        evaluate(*made)
    assert made.model.training
    with refuses():
        evaluate(*made, sets=["thing"])


def test_equal_files_under_two_names_are_one_item(named, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("copy", 0)):
        (tmp_path / f"{name}.png").write_bytes(png(seed))
    results = evaluate(*named(["a.png", "b.png", "copy.png"], ["red", "green", "red"]))
    assert [result["n"] for result in results] == [2, 2]
