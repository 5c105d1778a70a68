"""Queries: the results are those of comparing all vectors, and whatever cannot be compared is refused."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile

from openimp.search import Hit, Index, Like, Query, build_index, open_index
from openimp.search.query import Words
from openimp.search.table import Items
from tests.messages import refuses

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def media(media_folder: Path, tmp_path_factory) -> Path:
    """The media in two folders: texts and sounds, and pictures and clips, one of which has a difficult name."""
    top = tmp_path_factory.mktemp("top")
    for file in media_folder.iterdir():
        folder = top / ("seen" if file.suffix in (".png", ".mp4") else "heard_100%")
        folder.mkdir(exist_ok=True)
        # A text beside a sound of the same name would be its caption.
        name = {"0.png": "it's 0.png"}.get(file.name, f"of {file.name}" if file.suffix == ".txt" else file.name)
        shutil.copy(file, folder / name)
    return top


@pytest.fixture(scope="module")
def joint_model(tiny_recipe, write_tiny, tmp_path_factory) -> Path:
    """A model in which everything can be compared."""
    return write_tiny(tiny_recipe(model={"space": "joint"}), tmp_path_factory.mktemp("joint"))


@pytest.fixture(scope="module")
def index(joint_model: Path, media: Path) -> Index:
    return open_index(build_index(joint_model, [media], media.parent / "joint.index").folder)


@pytest.fixture(scope="module")
def disjoint_index(tiny_model_folder: Path, media: Path) -> Index:
    return open_index(build_index(tiny_model_folder, [media], media.parent / "disjoint.index").folder)


def scores(index: Index, vector: np.ndarray) -> dict[str, float]:
    """The cosines of a vector with all items, by id."""
    table = index.vectors()
    stored = np.array(table["vector"].to_pylist(), np.float32)
    cosines = stored @ (vector / np.linalg.norm(vector)) / np.linalg.norm(stored, axis=1)
    return dict(zip(table["id"].to_pylist(), cosines.tolist()))


def encoded(index: Index, modality: str, value: object) -> np.ndarray:
    return index.model.encode(modality, value, normalize=True)[0].cpu().numpy()


def assert_best(index: Index, hits: list[Hit], expected: dict[str, float], candidates: Iterable[str]) -> None:
    """The hits are the best of the candidates, by how far they are above the other items of their stem."""
    stem_of = {row["id"]: index.model.modalities[row["modality"]].stem for row in index.vectors().to_pylist()}
    stems = {stem_of[id] for id in candidates}
    usual = np.mean([np.var([expected[id] for id in expected if stem_of[id] == stem]) for stem in stems])

    def excess(id: str) -> float:
        others = [score for other, score in expected.items() if stem_of[other] == stem_of[id] and other != id]
        variance = (len(others) * np.var(others) + 5 * usual) / (len(others) + 5)
        return (expected[id] - np.mean(others)) / np.sqrt(variance)

    best = sorted(candidates, key=lambda id: -excess(id))
    assert [hit.id for hit in hits] == best[: len(hits)]
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.id], abs=1e-3)


def test_results_are_those_of_comparing_all_items(index, media):
    assert index.counts == {"image": 3, "video": 3, "audio": 3, "text": 3}
    for k in (1, 5, 100):
        hits = index.search("a red square", k, by="meaning")
        assert len(hits) == min(k, 12)
        expected = scores(index, encoded(index, "text", "a red square"))
        assert_best(index, hits, expected, expected)
    file = media / "seen" / "1.png"
    for value in (file, str(file), file.read_bytes()):
        hits = index.search(Query("image", value), k=1)
        assert (hits[0].path, hits[0].modality) == (str(file), "image")
        assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_queries_and_stored_vectors_of_items_add_up_and_can_be_subtracted(index, media):
    table = index.vectors()
    ids = table["id"].to_pylist()
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    sound = media / "heard_100%" / "1.wav"
    parts = ["a red square", Query("audio", sound, 2.0), Query("text", "noise", -0.5), Like(ids[3]), Like(ids[7], -0.5)]
    text, noise = (encoded(index, "text", text) for text in ("a red square", "noise"))
    total = text + 2 * encoded(index, "audio", sound) - 0.5 * noise + vectors[3] - 0.5 * vectors[7]
    hits = index.search(parts, by="meaning")
    results = {*ids} - {ids[3], ids[7]}
    assert {hit.id for hit in hits} == results, "items of the query are no results"
    assert_best(index, hits, scores(index, total), results)


def test_filters_leave_the_best_of_what_they_keep(index, media, monkeypatch):
    search = partial(index.search, by="meaning")
    everything = scores(index, encoded(index, "text", "noise"))
    hits = search("noise", modalities=["image", "audio"])
    assert [hit.modality for hit in hits].count("image") == 3
    of_both = {hit.id: everything[hit.id] for hit in hits}
    assert_best(index, hits, of_both, of_both)
    assert index.folders == [str(media / "heard_100%"), str(media / "seen")]
    monkeypatch.chdir(media)
    monkeypatch.setenv("HOME", str(media))
    for folder in ("seen", media / "seen", f"{media}/seen/", "~/seen"):
        hits = search("noise", under=folder)
        assert {Path(hit.path).parent.name for hit in hits} == {"seen"}
        assert len(hits) == 6
    (hit,) = search("noise", under=media / "seen" / "it's 0.png")
    assert hit.path.endswith("it's 0.png")
    assert search("noise", under="heard_") == [], "a folder is no prefix of names"
    hits = search("noise", k=100)
    least = sorted(hit.score for hit in hits)[-7]
    good = search("noise", k=100, min_score=least)
    assert {hit.id for hit in good} == {hit.id for hit in hits if hit.score >= least}
    assert search("noise", k=5, min_score=least) == good[:5], "what is not good enough takes nobody's turn"
    with refuses():
        search("noise", modalities=["vdieo"])


def test_a_recording_in_segments_is_one_result(joint_model, media, tmp_path, monkeypatch):
    (tmp_path / "long").mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).normal(0, 0.1, 60 * 8000) * np.linspace(0, 1, 60 * 8000)
        soundfile.write(tmp_path / "long" / f"{i}.wav", noise, 8000)
    index = open_index(build_index(joint_model, [media, tmp_path / "long"], tmp_path / "long.index").folder)
    assert index.counts["audio"] == 3 + 2 * 12
    query = Query("audio", tmp_path / "long" / "1.wav")
    everything = scores(index, encoded(index, "audio", query.value))
    best_last = sorted(index.hits(everything).values(), key=lambda hit: everything[hit.id])
    best_of_each = {hit.id if hit.start is None else hit.path: hit.id for hit in best_last}
    for k in (1, 5, 100):
        hits = index.search(query, k)
        assert len(hits) == min(k, 12 + 2)
        assert_best(index, hits, everything, best_of_each.values())
        assert all(hit.parts == (1 if hit.start is None else 12) for hit in hits)
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "long" / "0.wav", "long/0.wav"):
        segments = index.search(query, 100, under=file)
        assert [hit.path for hit in segments] == [str(tmp_path / "long" / "0.wav")] * 12
        assert_best(index, segments, everything, [hit.id for hit in segments])
    assert len(index.search(query, 100, under="long")) == 2, "a folder's files are one result each"


def test_only_indexed_media_that_are_unchanged_are_read(tiny_model_folder, media_folder, tmp_path):
    file = Path(shutil.copy(media_folder / "1.png", tmp_path))
    index = open_index(build_index(tiny_model_folder, [file], tmp_path / "x.index").folder)
    (hit,) = index.search("noise")
    assert index.read(hit.id) == file
    assert index.hit(hit.id).path == str(file)
    os.utime(file)
    with refuses():
        index.read(hit.id)
    for wrong in ("0", "' OR 1=1 --", "../" + hit.id):
        with refuses():
            index.read(wrong)


def test_disjoint_spaces_are_searched_one_by_one(disjoint_index, media):
    index = disjoint_index
    assert index.model.recipe.model.space == "disjoint"
    picture = Query("image", media / "seen" / "1.png")
    hits = index.search("noise", k=100, by="meaning")
    assert {hit.modality for hit in hits} == {"image", "video", "audio", "text"}
    vectors = {row["id"]: np.array(row["vector"]) for row in index.vectors().to_pylist()}
    for hit in hits:
        if hit.modality != "text":
            query = index.model.encode_text("noise", normalize=True, towards=hit.modality)[0].numpy()
            assert hit.score == pytest.approx(float(query @ vectors[hit.id]), abs=2e-3)
    assert {hit.modality for hit in index.search(picture, k=100)} == {"image", "video", "text"}, "these share a stem"
    with refuses():
        index.search(picture, modalities=["audio"])


@pytest.fixture(scope="module")
def word_model(tiny_recipe, write_tiny, tmp_path_factory) -> Path:
    """A model that knows whole words: those of `TEXTS`."""
    modalities = {
        "vision": {"patch": [2, 8, 8]},
        "audio": {"window": 512, "hop": 256, "bins": 32},
        "text": {"min_df": 1},
    }
    return write_tiny(tiny_recipe(modalities=modalities), tmp_path_factory.mktemp("words"))


def test_texts_without_a_known_word_are_found_by_words_only(word_model, tmp_path):
    (tmp_path / "lines.txt").write_text("green noise\nxyzzy\nxyzzy plugh", encoding="utf-8")
    done = build_index(word_model, [tmp_path / "lines.txt"], tmp_path / "x.index")
    (problem,) = done.skipped.values()
    assert problem == "line 2: has no word that the model knows, and 1 other part of the file"
    (tmp_path / "lines.txt").rename(tmp_path / "renamed.txt")
    shutil.copy(tmp_path / "renamed.txt", tmp_path / "copied.txt")
    done = build_index(word_model, [tmp_path], done.folder)
    assert {Path(path).name for path in done.skipped} == {"renamed.txt", "copied.txt"}, "under each of its names"
    (tmp_path / "copied.txt").unlink()
    done = build_index(word_model, [tmp_path], done.folder)
    index = open_index(done.folder)
    assert [hit.text for hit in index.search("noise")] == ["green noise"]
    line, longer = index.search("Xyzzy")
    assert [line.text, longer.text] == ["xyzzy", "xyzzy plugh"]
    assert (line.score, line.found_by) == (None, "words")
    assert [hit.score is None for hit in index.search("xyzzy noise", by="words")] == [False, True, True]
    assert index.search(Like(line.id)) == [longer], "which has a word of it"
    for text in ("xyzzy", " "):
        with refuses():
            index.search(text, by="meaning")


@pytest.fixture
def index_of(word_model, tmp_path) -> Callable[..., Index]:
    """Indexes files and folders with `word_model`."""
    return lambda *paths: open_index(build_index(word_model, paths, tmp_path / "x.index").folder)


@pytest.fixture
def captioned(index_of, media_folder, tmp_path) -> Index:
    """Three pictures and three sounds. Two pictures and a sound have a caption."""
    captions = {"0.png": "A red guitar.", "1.png": "Two green Guitars and a drum", "2.wav": "the noise of a guitar"}
    for name in (f"{i}{suffix}" for suffix in (".png", ".wav") for i in range(3)):
        folder = tmp_path / "captioned" / name[2:]
        folder.mkdir(parents=True, exist_ok=True)
        file = Path(shutil.copy(media_folder / name, folder))
        if name in captions:
            file.with_suffix(".txt").write_text(captions[name], encoding="utf-8")
    return index_of(tmp_path / "captioned" / "png", tmp_path / "captioned" / "wav")


def test_words_are_found_in_languages_without_spaces(index_of, media_folder, tmp_path):
    texts = ["一只小狗在草地上", "東京タワーの写真", "แมวสีดำ", "two dogs and a cat"]
    for text in texts:
        shutil.copy(media_folder / "0.png", tmp_path / f"{text}.png")
    index = index_of(tmp_path)
    for word, text in zip(["小狗", "タワー", "แมว", "dog"], texts):
        assert [hit.text for hit in index.search(word, by="words")] == [text]


def test_the_text_of_media_is_their_path_in_the_outermost_given_folder(index_of, media_folder, tmp_path):
    dogs = tmp_path / "photos" / "dog"
    dogs.mkdir(parents=True)
    shutil.copy(media_folder / "0.png", dogs / "red_drum.png")
    shutil.copy(media_folder / "1.png", tmp_path / "b.png")
    index = index_of(dogs, dogs.parent, tmp_path / "b.png")
    assert {hit.text for hit in index.sample(2)} == {"dog/red_drum", "b"}
    for words in ("dogs", "drum"):
        assert [hit.text for hit in index.search(words, by="words")] == ["dog/red_drum"]
    assert index.search("photos", by="words") == [], "all items would have the words of the given folder"


def test_items_are_found_by_the_words_of_their_texts(captioned):
    guitars = {"A red guitar.", "Two green Guitars and a drum", "the noise of a guitar"}
    hits = captioned.search("a guitar", by="words")
    assert {hit.text for hit in hits} == guitars, "whatever the case, the plural and words such as `a`"
    assert {hit.found_by for hit in hits} == {"words"}
    hits = captioned.search("guitar")
    assert {hit.text for hit in hits} == guitars
    assert [hit.score for hit in hits] == [None] * 3, "the model does not know the word"
    assert captioned.search("guitar", min_score=-1) == [], "and without a score no item is close enough"
    with refuses():
        captioned.search("piano")
    assert [hit.text for hit in captioned.search("drums", by="words")] == ["Two green Guitars and a drum"]
    assert captioned.search("piano", by="words") == []
    assert {hit.modality for hit in captioned.search("guitar", modalities="audio", by="words")} == {"audio"}
    with refuses():
        captioned.search("guitar", by="meaning")


def test_meaning_and_words_are_merged(captioned):
    """The model knows `red` and not `guitar`."""
    by_meaning = {hit.id: hit.score for hit in captioned.search("a red guitar", k=100, by="meaning")}
    assert len(by_meaning) == 6
    hits = captioned.search("a red guitar", k=100)
    assert {hit.id for hit in hits} == by_meaning.keys()
    for hit in hits:
        assert hit.score == pytest.approx(by_meaning[hit.id], abs=1e-3)
        assert hit.found_by == ("both" if "guitar" in hit.text.lower() else "meaning")
    assert [hit.found_by for hit in hits] == ["both"] * 3 + ["meaning"] * 3, "with words first, of all modalities"
    pictures = [hit.text for hit in hits if hit.modality == "image"]
    assert pictures == ["A red guitar.", "Two green Guitars and a drum", "2"], "items with more of the words come first"
    sounds = [hit.text for hit in hits if hit.modality == "audio"]
    assert sounds[0] == "the noise of a guitar"


def test_texts_that_are_equally_relevant_are_ordered_by_meaning_however_few_are_wanted(index_of, tmp_path):
    """As the pictures of a class."""
    lines = [f"red {'circle ' * (i % 5)}{'square ' * (4 - i % 5)}" for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    index = index_of(tmp_path / "lines.txt")
    items = Items(index.folder)
    vector = index.vectors()["vector"][7].as_py()
    wanted = {"words": Words("red", ""), "all_words": False, "vectors": {"text": np.float32(vector)}, "where": "true"}
    best, *_ = everything = items.with_words(k=40, **wanted)
    assert best["score"] > everything[-1]["score"]
    for k in (1, 3, 10):
        assert [row["score"] for row in items.with_words(k=k, **wanted)] == [row["score"] for row in everything[:k]]


def test_items_with_all_words_come_first(index_of, tmp_path):
    """By BM25, a short text with the rarer word alone is better."""
    both = "red " + "paper " * 40 + "noise"
    (tmp_path / "lines.txt").write_text("\n".join(["noise noise", both, *["red"] * 20]), encoding="utf-8")
    index = index_of(tmp_path / "lines.txt")
    assert [hit.text for hit in index.search("red noise", k=2, by="words")] == [both, "noise noise"]


def test_items_with_words_that_are_subtracted_are_left_out_of_those_with_words(captioned):
    minus = Query("text", "drums", -1.0)
    assert [hit.text for hit in captioned.search(["guitar", minus], by="words", modalities=["image"])] == [
        "A red guitar."
    ]
    with refuses():
        captioned.search([minus], by="words")


def test_a_query_with_more_than_texts_is_ranked_by_meaning(captioned):
    (red, *_) = captioned.search("red", by="meaning")
    for query in (["red", Like(red.id)], [Like(red.id)]):
        for by in ("both", "words"):
            hits = captioned.search(query, k=100, by=by)
            assert hits == captioned.search(query, k=100, by="meaning")
    with refuses():
        captioned.search(["guitar", Like(red.id)])


def test_segments_of_a_file_with_a_caption_leave_room_for_other_files(index_of, tmp_path, monkeypatch):
    monkeypatch.setattr("openimp.search.index.RANKED", 8)
    for name, seconds in (("0", 60), *((str(i), 1) for i in range(1, 5))):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16_000 * seconds), 16_000)
        (tmp_path / f"{name}.txt").write_text("a noise", encoding="utf-8")
    index = index_of(tmp_path)
    assert index.counts["audio"] > 12, "the sound of a minute has more segments than a ranking has rows at first"
    for by in ("words", "both"):
        assert len({hit.path for hit in index.search("noise", k=5, by=by)}) == 5


def test_more_results_begin_with_those_that_are_shown_already(index, captioned):
    for searched in (index, captioned):
        for text in ("red noise", "a red guitar", "green guitar", "a blue line", "noise"):
            hits = searched.search(text, k=100)
            for k in (1, 2, 5, 9):
                assert searched.search(text, k=k) == hits[:k], (text, k)


def test_a_query_that_cannot_be_encoded_is_refused(index, media):
    cancelled = ["noise", Query("text", "noise", -1.0)]
    queries = ([], cancelled, Query("image", media / "heard_100%" / "1.wav"), Query("smell", "x"), Path("cat.png"))
    for query in queries:
        with refuses():
            index.search(query)


def test_a_folder_that_is_no_index_is_refused(joint_model, media, tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path)  # Of the user's, and no reason to ask for its removal.
    for folder in (tmp_path, tmp_path / "missing"):
        with refuses():
            open_index(folder)
    run = tmp_path / "run"
    run.mkdir()
    for name in (".lock", "recipe.yaml"):
        (run / name).write_text("")
    with refuses():
        build_index(joint_model, media, run)
    with refuses():
        build_index(tmp_path / "misspelled", media)


def test_the_command_line_indexes_and_searches(openimp, joint_model, media, tmp_path):
    index = tmp_path / "x.index"
    picture = media / "seen" / "1.png"
    code, out, _ = openimp("index", joint_model, media, "--out", index)
    assert (code, "12 items, exact search" in out) == (0, True)
    first, _ = openimp("search", index, "--image", picture, "-k", 2)[1].splitlines()
    assert first.split() == ["1.000", "image", str(picture)]
    folder = media / "heard_100%"
    query = ("a red square", "--minus", "noise", "--audio", folder / "0.wav")
    code, out, _ = openimp("search", index, *query, "--modality", "text", "--under", folder, "--json")
    assert code == 0
    hits = [json.loads(line) for line in out.splitlines()]
    assert {hit["text"][:12] for hit in hits} == {"a red square", "a green circ", "a blue line "}
    assert hits[0].keys() == {field.name for field in fields(Hit)}
    for words in ("noise", "--min-score", 0.9999), ("noise", "--since", "2099-01-01"), ("piano", "--by", "words"):
        printed = openimp("search", index, *words)[1]
        assert printed == "nothing is indexed that matches the query and its filters\n"


def test_the_command_line_refuses_in_one_sentence(openimp, index, joint_model, media, monkeypatch):
    nowhere, picture = media / "nowhere", media / "seen" / "1.png"
    search, first = ("search", index.folder), f"first: openimp index {joint_model} FOLDER --out my.index"
    for arguments, told in (
        ((*search, "noise " * 1000, "--since", "2026-02-01", "--until", "2026-01-31"),
         "since 2026-02-01 is after until 2026-01-31"),
        ((*search, "unheard-of", "--under", nowhere), f"--under {nowhere}: nothing is indexed there"),
        ((*search, "--video", media), f"{media}: cannot be read as video: not a file"),
        (search, "the query is empty: give a text or a file"),
        ((*search, picture), f"{picture}: is a file; --image, --video or --audio searches with it"),
        (("serve", nowhere), f"{nowhere}: no such index or run; openimp index makes an index"),
        (("serve", media), f"{media}: is neither an index nor a run with a checkpoint; "
                           f"make an index first: openimp index MODEL {media} --out {media}.index"),
        (("serve", joint_model), f"{joint_model}: comes without media; index some {first}"),
        (("index", joint_model, "s3://bucket/photos", "--out", nowhere),
         "s3://bucket/photos: only files on disk are indexed; copy or mount them"),
        (("index", media, "openimp:base"),
         "openimp:base: is no file or folder; name the model first, then files and folders"),
        (("index", media, joint_model),
         f"{media}: no model here; expected a run with a checkpoint, or a folder with config.json"),
        (("search", "noise", index.folder), f"{index.folder}: is an index; name it before the query"),
    ):  # fmt: skip
        assert openimp(*arguments)[::2] == (2, f"openimp: {told}\n")
    monkeypatch.setitem(sys.modules, "lancedb", None)
    for command in ((*search, "noise"), ("index", joint_model, media)):
        assert openimp(*command)[::2] == (2, "openimp: search needs LanceDB: pip install 'openimp[search]'\n")


def test_names_with_control_characters_are_printed_in_one_line(openimp, joint_model, media, tmp_path):
    names = ("a\nb \x1b[31m:cat:\t.png", "bad\n.png")
    (tmp_path / "media").mkdir()
    shutil.copy(media / "seen" / "1.png", tmp_path / "media" / names[0])
    (tmp_path / "media" / names[1]).write_bytes(b"no picture")
    index = tmp_path / "x.index"
    _, out, _ = openimp("index", joint_model, tmp_path / "media", "--out", index)
    assert any(line.startswith(f"  {tmp_path}/media/bad\\n.png: ") for line in out.splitlines())
    _, out, _ = openimp("search", index, "noise")
    assert out.endswith(f"  image  {tmp_path}/media/a\\nb \\x1b[31m:cat:\\t.png\n")
    assert out.count("\n") == 1
