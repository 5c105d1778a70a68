"""Published benchmarks through their own libraries, on small data in exactly their layouts."""

import io
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import webdataset
from datasets import Audio, Dataset, Image
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.get_tasks import TASK_LIST
from sklearn.metrics import average_precision_score

import openimp
from openimp.checkpoint.folder import save_model
from openimp.commands import run_eval
from openimp.common.errors import UserError
from openimp.common.json_lines import append, read_lines
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import read_results, table
from openimp.inference import mteb_tasks
from openimp.inference.benchmarks import find_benchmarks, measure
from openimp.inference.model import Model
from openimp.inference.mteb import MTEBEncoder
from openimp.recipe.schema import Recipe
from openimp.report.page import TEMPLATES
from openimp.report.results import section

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
TEMPLATES_FILE = "zeroshot_classification_templates.txt"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks a hub for something fails."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model_folder(tiny_recipe, tiny_model, tmp_path_factory) -> Path:
    """An untrained model of pictures, sounds and texts, which it reads up to 40 tokens of."""
    views = {"image": {"size": 32}, "audio": {"seconds": 0.512}}
    tasks = {
        name: {
            "source": "all", "inputs": {name: name, "text": "text"}, "objectives": [{"type": "contrastive"}],
            "views": [{name: view, "text": {"length": 40}}],
        }
        for name, view in views.items()
    }  # fmt: skip
    recipe = tiny_recipe(tasks=tasks, train={"precision": "fp32"}, evaluation={"batch_size": 5})
    model, modalities = tiny_model(recipe)
    folder = tmp_path_factory.mktemp("models") / "model"
    folder.mkdir()
    save_model(folder, model, recipe, modalities, {})
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return openimp.load(model_folder, device="cpu", precision="fp32")


def pictures(number: int = 12) -> list[tuple[str, bytes]]:
    """Pictures with their colors, each one different, as PNG."""
    rng, found = np.random.default_rng(0), []
    for i in range(number):
        name = list(COLORS)[i % 3]
        pixels = rng.integers(0, 256, (34 + i, 40, 3)) // 2 + np.array(COLORS[name]) // 2
        file = io.BytesIO()
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        found.append((name, file.getvalue()))
    return found


def write_folder(folder: Path, kind: str, samples: list[dict], shards: int = 2) -> Path:
    """A folder as `clip_benchmark_export_wds` writes it."""
    (folder / "test").mkdir(parents=True)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar")) as tar:
            for i in range(shard, len(samples), shards):
                tar.write({"__key__": f"s{i:07}", **samples[i]})
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    if kind != "classification":
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in COLORS))
        (folder / TEMPLATES_FILE).write_text("a {c} square\n{c}\n")
    return folder


def write_rows(folder: Path, samples: list[dict]) -> Path:
    """The samples as rows, in the order of two tars of `write_folder`."""
    pq.write_table(pa.Table.from_pylist(samples[::2] + samples[1::2]), folder / "rows.parquet")
    return folder / "rows.parquet"


def measured(model, *, tasks=(), folders=()) -> list[dict]:
    found, _ = find_benchmarks(model, tasks, list(map(str, folders)))
    return list(measure(model, None, found))


def own(model, rows: Path, **options) -> list[dict]:
    """openimp's results for the rows in a manifest or a Parquet file."""
    data = model.recipe.to_dict()
    data["sources"]["rows"] = {"path": str(rows)}
    view = {name: model.views[name].model_dump(mode="json") for name in options["inputs"]}
    data["evaluation"] = {"sets": {"rows": {"source": "rows", "view": view, **options}}}
    return evaluate(model.imp, Recipe.build(data), model.modalities)


def test_a_classification_folder_is_measured_as_openimp_does(model, tmp_path):
    samples = [{"png": picture, "cls": i % 3} for i, (_, picture) in enumerate(pictures())]
    folder = write_folder(tmp_path / "wds_colors", "classification", samples)
    (found,) = measured(model, folders=[folder])
    (ours,) = own(
        model, write_rows(tmp_path, samples), type="zero_shot", inputs={"image": "png"}, label="cls",
        classes={str(i): name for i, name in enumerate(COLORS)}, prompts=["a {} square", "{}"],
    )  # fmt: skip
    for key in ("n", "candidates", "top1", "top5", "interval", "per_class", "chance"):
        assert found[key] == pytest.approx(ours[key]), key
    for key in ("type", "checkpoint", "openimp", "precision", "torch", "skipped", "step"):
        assert found[key] == ours[key], key
    assert found["view"]["image"] == ours["view"]["image"]
    assert 0 < found["top1"] < 1
    assert found["task"] == "image -> text"
    assert found["library"].startswith("clip-benchmark 1.")
    (again,) = measured(model, folders=[folder])
    assert again == found


def test_a_multilabel_folder_gives_the_mean_average_precision(model, tmp_path):
    labels = np.random.default_rng(1).integers(0, 2, (12, 3))
    labels[:, 2] = 0  # a class that no picture has counts as 0
    samples = [{"webp": picture, "npy": row} for row, (_, picture) in zip(labels, pictures())]
    folder = write_folder(tmp_path / "wds_colors", "multilabel", samples, shards=1)
    (found,) = measured(model, folders=[folder])
    names = [model.encode_text([f"a {name} square", name], normalize=True).mean(0) for name in COLORS]
    seen = model.encode_image([picture for _, picture in pictures()], normalize=True)
    scores = (seen @ torch.nn.functional.normalize(torch.stack(names), dim=-1).T).numpy()
    right = [average_precision_score(labels[:, k], scores[:, k]) for k in range(2)]
    assert found["map"] == pytest.approx(sum(right) / 3, abs=1e-4)
    assert found["interval"][0] <= found["map"] <= found["interval"][1]
    assert found["chance"] == pytest.approx(labels[:, :2].mean(0).sum() / 3)
    assert found["n"] == 12


def test_a_retrieval_folder_is_measured_as_openimp_does(model, tmp_path):
    samples = [{"jpg": picture, "txt": f"{name} number {i}\n"} for i, (name, picture) in enumerate(pictures())]
    folder = write_folder(tmp_path / "wds_colors", "retrieval", samples)
    found = measured(model, folders=[folder])
    ours = own(model, write_rows(tmp_path, samples), type="retrieval", inputs={"image": "jpg", "text": "txt"})
    for theirs, result in zip(found, ours):
        for key in ("task", "n", "candidates", "r1", "r5", "r10", "interval", "chance"):
            assert theirs[key] == (result[key] if key == "task" else pytest.approx(result[key])), key
    assert 0 < found[0]["r5"] < 1
    samples[0]["txt"] = "red\nred number 0\nscarlet"
    image, text = measured(model, folders=[write_folder(tmp_path / "several", "retrieval", samples)])
    assert (image["n"], image["candidates"], text["n"], text["candidates"]) == (12, 14, 14, 12)


def test_nothing_in_a_strangers_folder_is_executed(model, tmp_path):
    """Neither pickles that webdataset would decode, nor pictures for which Pillow would start Ghostscript."""
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return Path.touch, (marker,)

    attack = pickle.dumps(Attack())
    keys = ("pyd", "pkl", "pickle", "pth", "cls.pkl", "pkl.gz", "ten", "npz")
    samples = [{"png": picture, "cls": b"0", **dict.fromkeys(keys, attack)} for _, picture in pictures(3)]
    plain = [{"png": picture, "cls": b"0"} for _, picture in pictures(3)]
    with webdataset.TarWriter(str(tmp_path / "hidden.tar"), encoder=False) as tar:
        tar.write({"__key__": "s0", **plain[0]})
        tar.write({"__key__": "folder/", "pkl": attack, "png": plain[0]["png"], "cls": b"0"})
    folder = write_folder(tmp_path / "a", "classification", [])
    for shard, chosen in enumerate((samples[:2], samples[2:])):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar"), encoder=False) as tar:
            for i, sample in enumerate(chosen):
                tar.write({"__key__": f"{i}", **sample})
    assert measured(model, folders=[folder])[0]["n"] == 3
    shutil.copy(tmp_path / "hidden.tar", folder / "test" / "0.tar")
    assert measured(model, folders=[folder])[0]["n"] == 3
    assert not marker.exists()

    array = io.BytesIO()
    np.save(array, np.array([Attack()] * 3, object), allow_pickle=True)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    png = plain[0]["png"]
    cases = [
        ("classification", {"png": postscript, "cls": 0}, "damaged, or of a format that is not read"),
        ("classification", {"png": png, "cls": 3}, r"its \.cls is the number of no line in classnames\.txt"),
        ("classification", {"cls": 1}, r"expected a picture \(\.webp, \.png, \.jpg, \.jpeg\) and a \.cls"),
        ("multilabel", {"png": png, "npy": array.getvalue()}, r"its \.npy has the shape \(3,\) and the type object"),
        ("multilabel", {"png": png, "npy": huge.getvalue()}, r"its \.npy has the shape \(1000000000000,\)"),
        ("retrieval", {"png": png, "txt": ""}, r"its \.txt has no caption"),
        ("retrieval", {"png": png, "txt": "one"}, "R@10 needs 10 pictures, and there are 1"),
    ]
    for i, (kind, sample, message) in enumerate(cases):
        folder = write_folder(tmp_path / f"{i}", kind, [sample], shards=1)
        with pytest.raises(NotMeasured, match=message) as error:
            measured(model, folders=[folder])
        assert str(error.value).startswith(f"{folder}: ")
    assert not marker.exists()


def test_tars_that_unpack_to_more_than_their_size_are_refused(model, tmp_path):
    folder = write_folder(tmp_path / "folder", "classification", [], shards=1)
    file = folder / "test" / "0.tar"
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UserError, match=r"0\.tar: not a tar that is read: it is compressed"):
        find_benchmarks(model, [], [str(folder)])
    sparse = tarfile.TarInfo("folder/.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = tarfile.itn(2**40, 12, tarfile.GNU_FORMAT)  # the size with its holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file.write_bytes(bytes(header) + bytes(2 * tarfile.BLOCKSIZE))
    with pytest.raises(UserError, match=r"0\.tar: not a tar that is read: folder/\.png is not a regular file"):
        find_benchmarks(model, [], [str(folder)])
    file.write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"0\.tar: not a tar that is read: "):
        find_benchmarks(model, [], [str(folder)])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classnames.txt", None, "classnames.txt is missing"),
        ("classnames.txt", "", "classnames.txt is empty"),
        (TEMPLATES_FILE, None, f"{TEMPLATES_FILE} is missing"),
        (TEMPLATES_FILE, "a {c:>2000000000}", r"needs \{c\} where the class goes, and no other braces"),
        (TEMPLATES_FILE, "a photo", r"'a photo' needs \{c\} where the class goes"),
        ("dataset_type.txt", "captioning", "expected classification, multilabel, retrieval, found 'captioning'"),
        ("test/nshards.txt", None, "test/nshards.txt is missing"),
        ("test/nshards.txt", "999999999", "nshards.txt says '999999999', but test has 2 tars"),
        ("test/nshards.txt", "-1", "nshards.txt says '-1', but test has 2 tars"),
        ("test/1.tar", None, "nshards.txt says '2', but test has 1 tar$"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(model, tmp_path, file, content, message):
    folder = write_folder(tmp_path / "folder", "classification", [])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        find_benchmarks(model, [], [str(folder)])


def test_links_and_paths_that_lead_elsewhere_are_refused(model, tmp_path):
    (tmp_path / "private.txt").write_text("red\ngreen\nblue\n")
    for file in ("classnames.txt", "test/0.tar"):
        folder = write_folder(tmp_path / file.replace("/", "-"), "classification", [])
        (folder / file).unlink()
        (folder / file).symlink_to(tmp_path / "private.txt")
        with pytest.raises(UserError, match=f"{file}: is a link out of"):
            find_benchmarks(model, [], [str(folder)])
    folder = write_folder(tmp_path / "{0..9}", "classification", [])
    with pytest.raises(UserError, match=r"cannot read a path with '\{'; rename the folder"):
        find_benchmarks(model, [], [str(folder)])


def test_a_folder_of_the_hub_is_measured_from_its_cache(model, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    message = "^clip-benchmark/wds_colors: there is no local folder of this name, and the Hugging Face Hub did not"
    with pytest.raises(UserError, match=message) as error:
        find_benchmarks(model, [], ["clip-benchmark/wds_colors"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such folder; a data set on the Hugging Face Hub is named OWNER/NAME"):
        find_benchmarks(model, [], ["'; touch x; '"])
    samples = [{"png": picture, "cls": i % 3} for i, (_, picture) in enumerate(pictures(3))]
    folder = write_folder(tmp_path / "local", "classification", samples)
    repository, commit = tmp_path / "hub" / "datasets--clip-benchmark--wds_colors", "0" * 40
    snapshot = repository / "snapshots" / commit
    for part in ("blobs", "refs"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for i, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        shutil.copy(file, repository / "blobs" / f"{i}")
        (snapshot / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file.relative_to(folder)).symlink_to(repository / "blobs" / f"{i}")
    (found,) = measured(model, folders=["clip-benchmark/wds_colors"])
    assert (found["set"], found["n"]) == ("clip-benchmark/wds_colors", 3)


def test_names_of_mteb_are_found_and_what_the_model_cannot_do_is_named(model):
    (task,), left_out = mteb_tasks.find_tasks(["ESC50_Zeroshot", "ESC50_Zeroshot"], ["audio", "text"])
    assert (task.metadata.name, left_out) == ("ESC50_Zeroshot", [])
    found, (sentence,) = mteb_tasks.find_tasks(["MVEB(v1)"], ["video", "text"])
    assert found
    assert all({*task.metadata.modalities} <= {"video", "text"} for task in found)
    assert sentence.startswith("Left out of MVEB(v1), because the model lacks a modality: ")
    for name, message in (
        ("ESC50_Zeroshots", "mteb has no task or benchmark called 'ESC50_Zeroshots'; did you mean 'ESC50_Zeroshot'?"),
        ("HMDB51ZeroShot", "HMDB51ZeroShot needs video, but the model has image, text, audio"),
    ):
        with pytest.raises(UserError) as error:
            find_benchmarks(model, [name], [])
        assert str(error.value) == message
    with pytest.raises(UserError, match="each of its tasks needs a modality that the model lacks"):
        mteb_tasks.find_tasks(["MIEB(lite)"], ["video"])
    # A note about a task that mteb has renamed would not be shown.
    assert mteb_tasks.NOTES.keys() <= {task.metadata.name for task in TASK_LIST}


def metadata(name, kind, modalities, category, main_score):
    return TaskMetadata(
        name=name, description="Colors", dataset={"path": "none", "revision": "1"}, type=kind, category=category,
        modalities=modalities, eval_splits=["test"], eval_langs=["eng-Latn"], main_score=main_score,
    )  # fmt: skip


def test_retrieval_by_mteb_has_interval_and_chance(model, tmp_path):
    class Colors(AbsTaskRetrieval):
        metadata = metadata("Colors", "Any2AnyRetrieval", ["text", "image"], "t2i", "ndcg_at_10")

        def load_data(self, **_):
            ids = [str(i) for i in range(12)]
            media = [{"bytes": picture, "path": None} for _, picture in pictures()]
            corpus = Dataset.from_dict({"id": ids, "image": media}).cast_column("image", Image())
            right = {name: {i: 1 for i, (color, _) in zip(ids, pictures()) if color == name} for name in COLORS}
            queries = Dataset.from_dict({"id": [*COLORS, "none"], "text": [*COLORS, "no answer"]})
            split = {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    (found,) = mteb_tasks.measure(MTEBEncoder(model), Colors())
    for i, (_, picture) in enumerate(pictures()):
        (tmp_path / f"{i}.png").write_bytes(picture)
    lines = "".join(f"{i}.png,{name}\n" for i, (name, _) in enumerate(pictures()))
    (tmp_path / "rows.csv").write_text(f"file,name\n{lines}")
    _, ours = own(model, tmp_path / "rows.csv", type="retrieval", inputs={"image": "file", "text": "name"})
    for key in ("n", "candidates", "r1", "r5", "r10", "mrr", "interval", "chance"):
        assert found[key] == pytest.approx(ours[key], abs=1e-5), key
    assert (found["type"], found["task"], found["metric"]) == ("retrieval", "text -> image", "ndcg_at_10")


class Pairs(AbsTaskSTS):
    metadata = metadata("Pairs", "STS", ["text"], "t2t", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, **_):
        left, right = ["a red square", "noise", "a", "blue line"], ["a green circle", "a", "b", "other ones"]
        split = Dataset.from_dict({"sentence1": left, "sentence2": right, "score": [0.9, 0.1, 0.3, 0.4]})
        self.dataset, self.data_loaded = {"test": split}, True


def test_a_score_that_is_no_number_is_not_written(model):
    class Equal(Pairs):
        def load_data(self, **_):
            split = Dataset.from_dict({"sentence1": ["a"] * 3, "sentence2": ["b"] * 3, "score": [0.1, 0.2, 0.3]})
            self.dataset, self.data_loaded = {"test": split}, True

    with pytest.raises(UserError, match="Pairs: mteb cannot measure it: cosine_spearman is not between -1 and 1"):
        mteb_tasks.measure(MTEBEncoder(model), Equal())


def test_what_mteb_does_not_tell_is_null_and_shown_as_nothing(model, tmp_path):
    encoder = MTEBEncoder(model)
    (found,) = measure(model, 7, [lambda: mteb_tasks.measure(encoder, Pairs())])
    assert (found["n"], found["candidates"], found["interval"], found["chance"]) == (4, None, None, None)
    assert found["task"] == "text (cosine_spearman)"
    found |= {"score": -0.25, "n": None, "note": "not the paper's"}
    file = tmp_path / "results.jsonl"
    append(file, found)
    assert read_results(file) == [found]
    assert "Pairs: not the paper's" in str(table([found]).caption)
    html = TEMPLATES.get_template("results.html").render(data=section([found], [found], []))
    assert "-25.0%" in html
    assert "Pairs: not the paper&#39;s" in html
    assert "None" not in html


def write_esc50(folder: Path) -> list[np.ndarray]:
    """Six sounds as mteb/esc50 has them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    waves, media = [0.3 * np.sin(np.arange(9000) * (i + 1) / 9) + rng.normal(0, 0.1, 9000) for i in range(6)], []
    for wave in waves:
        file = io.BytesIO()
        soundfile.write(file, wave, 16_000, format="wav")
        media.append({"bytes": file.getvalue(), "path": None})
    data = Dataset.from_dict({"audio": media, "target": list(range(6))}).cast_column("audio", Audio())
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return [item["bytes"] for item in media]


def test_the_command_measures_what_it_can_and_names_the_rest(model_folder, model, tmp_path, monkeypatch, capsys):
    """A published task of mteb, whose data set is found as a local folder; and a folder of CLIP_benchmark."""
    monkeypatch.chdir(tmp_path)
    sounds = write_esc50(Path("mteb/esc50"))
    # Loading scripts of data sets are no longer executed, whatever a task asks for.
    Path("mteb/cifar10").mkdir()
    Path("mteb/cifar10/cifar10.py").write_text("open('marker', 'w').close()")
    samples = [{"png": picture, "cls": i % 3} for i, (_, picture) in enumerate(pictures())]
    write_folder(Path("colors"), "classification", samples)
    out = Path("results.jsonl")
    with pytest.raises(NotMeasured) as error:
        run_eval(
            model_folder, None, None, out, mteb=["CIFAR10ZeroShot", "CIFAR100ZeroShot", "ESC50_Zeroshot"],
            clip_benchmark=["colors"],
        )  # fmt: skip
    first, second = str(error.value).splitlines()
    assert first.startswith("CIFAR10ZeroShot: mteb/cifar10 cannot be loaded: ")
    assert second.startswith("CIFAR100ZeroShot: mteb/cifar100 cannot be loaded: ")
    assert not Path("marker").exists()
    esc, colors = read_lines(out)
    assert read_results(out) == [esc, colors]
    (task,), _ = mteb_tasks.find_tasks(["ESC50_Zeroshot"], ["audio", "text"])
    texts = model.encode_text(task.get_candidate_labels(), normalize=True, towards="audio")
    right = (model.encode_audio(sounds, normalize=True) @ texts.T).argmax(1) == torch.arange(6)
    assert esc["top1"] == pytest.approx(float(right.float().mean()))
    assert (esc["n"], esc["candidates"], esc["chance"], esc["task"]) == (6, 50, 1 / 50, "audio -> text")
    assert esc["interval"][0] <= esc["top1"] <= esc["interval"][1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "ESC50_Zeroshot: not comparable to the paper: one prompt per class, and underscores" in shown
    assert f"{100 * colors['top1']:.1f} [" in shown


def test_mixed_options_and_missing_libraries_are_refused_in_one_sentence(model_folder, model, monkeypatch):
    for options in ({"sets": ["a"]}, {"other": "a.yaml"}, {"overrides": ["a=1"]}, {"allow_sources": True}):
        arguments = {"sets": None, "other": None, **options}
        with pytest.raises(UserError, match="take no evaluation sets, --recipe, --set or --allow-sources"):
            run_eval(model_folder, out=None, mteb=["a"], **arguments)
    for package, names in (("mteb", (["a"], [])), ("clip_benchmark", ([], ["a"]))):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(UserError, match=r"cannot be imported .*: pip install 'openimp\[eval\]'"):
            find_benchmarks(model, *names)


def test_a_model_without_pictures_is_refused(tiny_recipe, tiny_model, tmp_path):
    task = {"source": "all", "inputs": {"audio": "audio", "text": "text"}, "objectives": [{"type": "contrastive"}],
            "views": [{"audio": {"seconds": 0.512}, "text": {"length": 8}}]}  # fmt: skip
    recipe = tiny_recipe(tasks={"sounds": task}, modalities={"audio": {"window": 512, "hop": 256, "bins": 32}})
    model, modalities = tiny_model(recipe)
    with pytest.raises(UserError, match="needs a model that compares pictures with texts, but this one is trained"):
        find_benchmarks(Model(model, recipe, modalities, {}), [], [str(tmp_path)])
