"""mteb must say what openimp's own evaluation says."""

import io
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, DatasetDict, Image
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS, AbsTaskZeroShotClassification
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.get_tasks import TASK_LIST
from torch.utils.data import DataLoader

import openimp
import openimp.inference
from openimp.commands import run_eval
from openimp.common.json_lines import append
from openimp.evaluation.evaluate import NotMeasured, evaluate
from openimp.evaluation.results import read_results, table
from openimp.inference import mteb_tasks
from openimp.inference.mteb import MTEBEncoder
from openimp.recipe.schema import Recipe
from tests.messages import refuses

STILLS = {"split": "test", "vendor": "twemoji"}
NOTES = {"split": "test", "family": ["guitar", "brass"]}
FEATURES = {"image": Image(), "audio": Audio()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks a hub for something fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(little_run):
    model = openimp.load(little_run, device="cpu", precision="fp32")
    # As long as the little model can read, for it splits words into letters.
    model.views["text"] = model.views["text"].model_copy(update={"length": 16})
    return model


def rows(file, where):
    """Rows of a bundled table."""
    filters = [(key, "in", value if isinstance(value, list) else [value]) for key, value in where.items()]
    return pq.read_table(str(files("openimp") / "data" / "demo" / file), filters=filters).to_pylist()


def own(model, file, where, **options):
    """openimp's results for the same rows, in the views of `model`."""
    data = model.recipe.to_dict()
    data["sources"]["rows"] = {"path": f"openimp:{file}", "where": where}
    view = {name: model.views[name].model_dump(mode="json") for name in options["inputs"]}
    data["evaluation"] = {"sets": {"rows": {"source": "rows", "view": view, **options}}}
    data["train"]["precision"] = "fp32"
    for task in data["tasks"].values():  # prompts are read in the first training view
        task["views"][0]["text"]["length"] = model.views["text"].length
    return evaluate(model.imp, Recipe.build(data), model.modalities)


def metadata(name, kind, modalities, category, main_score):
    return TaskMetadata(
        name=name, description="openimp's bundled data", dataset={"path": "none", "revision": "1"}, type=kind,
        category=category, modalities=modalities, eval_splits=["test"], eval_langs=["eng-Latn"], main_score=main_score,
    )  # fmt: skip


def media(modality, found):
    """Rows as a data set of a hub has them."""
    values = [{"bytes": row[modality], "path": None} for row in found]
    return Dataset.from_dict({modality: values}).cast_column(modality, FEATURES[modality])


def measured(model, task):
    """The result of a task, which has no other subsets and splits."""
    (result,) = mteb_tasks.measure(model, 7, [task])
    assert result["step"] == 7
    return result


def test_mteb_classifies_as_openimp_does(model):
    class Groups(AbsTaskZeroShotClassification):
        metadata = metadata("Groups", "ZeroShotClassification", ["image", "text"], "i2t", "accuracy")
        input_column_name, label_column_name = "image", "group"

        def load_data(self, **_):
            stills = rows("stills.parquet", STILLS)
            split = media("image", stills).add_column("group", [row["group"] for row in stills])
            self.dataset, self.data_loaded = DatasetDict({"test": split}), True

        def get_candidate_labels(self):
            return sorted(set(self.dataset["test"]["group"]))

    (ours,) = own(
        model, "stills.parquet", STILLS, type="zero_shot", inputs={"image": "image"}, label="group", prompts=["{}"]
    )
    theirs = measured(model, Groups())
    for key in ("n", "candidates", "top1", "interval", "chance"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
    for key in ("type", "checkpoint", "openimp", "precision", "torch", "skipped"):
        assert theirs[key] == ours[key], key
    assert theirs["view"]["image"] == ours["view"]["image"]
    assert 0 < ours["top1"] < 1


@pytest.mark.parametrize(
    ("modality", "column", "file", "where"),
    [
        ("image", "name", "stills.parquet", {**STILLS, "group": "activities"}),
        ("audio", "instrument", "notes.parquet", NOTES),
    ],
)
def test_mteb_retrieves_as_openimp_does(modality, column, file, where, model):
    """Media by texts, of which several may be right: `hit_rate_at_k` is R@k. A query without an answer does not
    count."""
    ids = {tuple(model.tokenizer(row[column])[0].tolist()): row[column] for row in rows(file, where)}
    where = {**where, column: list(ids.values())}  # no two that the model reads as the same
    found = rows(file, where)
    texts = sorted({row[column] for row in found})

    class Named(AbsTaskRetrieval):
        metadata = metadata("Named", "Any2AnyRetrieval", ["text", modality], f"t2{modality[0]}", "ndcg_at_10")

        def load_data(self, **_):
            numbers = [str(i) for i in range(len(found))]
            right = {text: {i: 1 for i, row in zip(numbers, found) if row[column] == text} for text in texts}
            split = {
                "queries": Dataset.from_dict({"id": [*texts, "none"], "text": [*texts, "no answer"]}),
                "corpus": media(modality, found).add_column("id", numbers),
                "relevant_docs": right,
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    theirs = measured(model, Named())
    _, ours = own(model, file, where, type="retrieval", inputs={modality: modality, "text": column})
    assert (theirs["n"], theirs["candidates"]) == (len(texts), len(found))
    for key in ("n", "candidates", "r1", "r5", "r10", "mrr", "interval", "chance"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
    assert (theirs["type"], theirs["task"], theirs["metric"]) == ("retrieval", f"text -> {modality}", "ndcg_at_10")
    assert 1 / len(found) < ours["mrr"] < 1


def encode(model, modalities, **columns):
    task = metadata("Any", "Any2AnyRetrieval", modalities, None, "hit_rate_at_1")
    batches = DataLoader(Dataset.from_dict(columns), batch_size=2, collate_fn=list_columns)
    return MTEBEncoder(model).encode(batches, task_metadata=task, hf_split="test", hf_subset="default")


def list_columns(batch):
    return {name: [row[name] for row in batch] for name in batch[0]}


def test_mteb_compares_what_the_task_compares(model, media_folder):
    """In a model with a space for each pair a text is encoded towards the modality that it is compared with."""
    texts = ["noise", "a", "a red square"]
    expected = {other: model.encode_text(texts, towards=other, normalize=True) for other in ("image", "audio")}
    assert not torch.allclose(expected["image"], expected["audio"], atol=1e-2)
    for other, compared in (("image", ["text", "image"]), ("audio", ["audio", "text"]), ("image", ["text"])):
        torch.testing.assert_close(encode(model, compared, text=texts), expected[other], rtol=0, atol=1e-5)
    picture = PIL.Image.open(media_folder / "0.png")
    both = encode(model, ["text", "image"], text=texts[:1], image=[picture])
    parts = model.encode_text(texts[0], normalize=True) + model.encode_image(picture, normalize=True)
    torch.testing.assert_close(both, parts, rtol=0, atol=1e-5)


def test_mteb_tells_models_apart_by_their_weights(model, little_run):
    """It would show the cached results of another run under the same name."""
    meta = MTEBEncoder(model).mteb_model_meta
    again = openimp.load(little_run, device="cpu", precision="fp32")
    assert MTEBEncoder(again).mteb_model_meta.revision != meta.revision  # `model` reads longer texts
    again.views["text"] = model.views["text"]
    assert MTEBEncoder(again).mteb_model_meta.revision == meta.revision
    with torch.no_grad():
        again.imp.stems["text"].after.bias[0] += 1e-3
    assert MTEBEncoder(again).mteb_model_meta.revision != meta.revision
    assert meta.modalities == ["image", "text", "audio"]


@pytest.mark.slow
def test_names_of_mteb_are_found_and_what_the_model_cannot_do_is_named():
    (task,), left_out = mteb_tasks.find_tasks(["ESC50_Zeroshot", "ESC50_Zeroshot"], ["audio", "text"])
    assert (task.metadata.name, left_out) == ("ESC50_Zeroshot", [])
    found, (sentence,) = mteb_tasks.find_tasks(["MVEB(v1)"], ["video", "text"])
    assert found
    assert all({*task.metadata.modalities} <= {"video", "text"} for task in found)
    assert sentence.startswith("Left out of MVEB(v1), because the model lacks a modality: ")
    for name, modality in (("ESC50_Zeroshots", "image"), ("HMDB51ZeroShot", "image"), ("MIEB(lite)", "video")):
        with refuses():
            mteb_tasks.find_tasks([name], [modality])
    # A note about a task that mteb has renamed would not be shown.
    assert mteb_tasks.NOTES.keys() <= {task.metadata.name for task in TASK_LIST}


class Pairs(AbsTaskSTS):
    """A task whose answers mteb does not report."""

    metadata = metadata("Pairs", "STS", ["text"], "t2t", "cosine_spearman")
    min_score, max_score = 0, 1
    left, right = ("a red square", "noise", "a", "blue line"), ("a green circle", "a", "b", "other ones")

    def load_data(self, **_):
        pairs = {"sentence1": list(self.left), "sentence2": list(self.right), "score": [0.9, 0.1, 0.3, 0.4]}
        self.dataset, self.data_loaded = {"test": Dataset.from_dict(pairs)}, True


class EqualPairs(Pairs):
    left, right = ("a",) * 4, ("b",) * 4


def test_what_mteb_does_not_tell_is_null(model, tmp_path):
    found = measured(model, Pairs())
    assert (found["n"], found["candidates"], found["interval"], found["chance"]) == (4, None, None, None)
    assert found["task"] == "text (cosine_spearman)"
    found |= {"score": -0.25, "n": None, "note": "not the paper's"}
    file = tmp_path / "results.jsonl"
    append(file, found)
    assert read_results(file) == [found]
    assert "Pairs: not the paper's" in str(table([found]).caption)


def test_a_score_that_is_no_number_is_not_a_result(model):
    """But the results of the other tasks are."""
    results = mteb_tasks.measure(model, None, [EqualPairs(), Pairs()])
    assert next(results)["set"] == "Pairs"
    with pytest.raises(NotMeasured, match="Pairs: mteb cannot measure it: cosine_spearman is not between -1 and 1"):
        next(results)


def write_esc50(folder: Path) -> list[bytes]:
    """Six sounds as mteb/esc50 has them."""
    folder.mkdir(parents=True)
    rng, sounds = np.random.default_rng(0), []
    for i in range(6):
        file = io.BytesIO()
        soundfile.write(
            file, 0.3 * np.sin(np.arange(9000) * (i + 1) / 9) + rng.normal(0, 0.1, 9000), 16_000, format="wav"
        )
        sounds.append(file.getvalue())
    media = [{"bytes": sound, "path": None} for sound in sounds]
    data = Dataset.from_dict({"audio": media, "target": list(range(6))}).cast_column("audio", Audio())
    data.to_parquet(folder / "train-00000-of-00001.parquet")
    return sounds


def test_the_command_measures_what_it_can_and_names_the_rest(little_run, tmp_path, monkeypatch, capsys):
    """A published task of mteb, whose data set is found as a local folder."""
    monkeypatch.chdir(tmp_path)
    sounds = write_esc50(Path("mteb/esc50"))
    # Loading scripts of data sets are no longer executed, whatever a task asks for.
    Path("mteb/cifar10").mkdir()
    Path("mteb/cifar10/cifar10.py").write_text("open('marker', 'w').close()")
    out = Path("results.jsonl")
    with pytest.raises(NotMeasured) as error:
        run_eval(little_run, None, None, out, mteb=["CIFAR10ZeroShot", "CIFAR100ZeroShot", "ESC50_Zeroshot"])
    first, second = str(error.value).splitlines()
    assert first.startswith("CIFAR10ZeroShot: mteb/cifar10 cannot be loaded: ")
    assert second.startswith("CIFAR100ZeroShot: mteb/cifar100 cannot be loaded: ")
    assert not Path("marker").exists()
    (found,) = read_results(out)
    (task,), _ = mteb_tasks.find_tasks(["ESC50_Zeroshot"], ["audio", "text"])
    model = openimp.load(little_run)
    texts = model.encode_text(task.get_candidate_labels(), normalize=True, towards="audio")
    right = (model.encode_audio(sounds, normalize=True) @ texts.T).argmax(1).cpu() == torch.arange(6)
    assert found["top1"] == pytest.approx(float(right.float().mean()))
    assert (found["n"], found["candidates"], found["chance"], found["task"]) == (6, 50, 1 / 50, "audio -> text")
    assert found["interval"][0] <= found["top1"] <= found["interval"][1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "ESC50_Zeroshot: not comparable to the paper: one prompt per class, and underscores" in shown
    assert f"{100 * found['top1']:.1f} [" in shown


def test_mixed_options_and_a_missing_library_are_refused_in_one_sentence(little_run, monkeypatch):
    with refuses():
        run_eval(little_run, ["a"], None, out=None, mteb=["a"])
    monkeypatch.delitem(sys.modules, "openimp.inference.mteb_tasks")
    monkeypatch.delattr(openimp.inference, "mteb_tasks")
    monkeypatch.setitem(sys.modules, "mteb", None)  # as if it were not installed
    with refuses():
        run_eval(little_run, None, None, None, mteb=["a"])
