"""The evaluators of others, as they are, on the bundled data: they must say what openimp's own evaluation says."""

import io
import pickle
from importlib.resources import files

import mteb
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from clip_benchmark.datasets.builder import image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from datasets import Audio, Dataset, DatasetDict, Image, Video
from mteb.abstasks import AbsTaskRetrieval, AbsTaskZeroShotClassification
from mteb.abstasks.task_metadata import TaskMetadata
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.utils.data import DataLoader

import openimp
from openimp.common.errors import UserError
from openimp.evaluation.evaluate import evaluate
from openimp.inference.mteb import MTEBEncoder
from openimp.recipe.schema import Recipe

STILLS = {"split": "test", "vendor": "twemoji"}
NOTES = {"split": "test", "family": ["guitar", "brass"]}
PROMPTS = ["{}", "{} emoji"]
FEATURES = {"image": Image(), "audio": Audio(), "video": Video()}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Whoever asks a hub for something fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


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


class Stills(torch.utils.data.Dataset):
    """Pictures as `model.preprocess` makes them, each with its class or its captions."""

    def __init__(self, rows, targets, transform):
        self.rows, self.targets, self.transform = rows, targets, transform

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.transform(PIL.Image.open(io.BytesIO(self.rows[i]["image"]))), self.targets[i]


def test_clip_benchmark_classifies_as_openimp_does(model):
    """By the two functions that its `evaluate` calls; what follows there stops with NumPy 2.4 (its issue 147)."""
    stills = rows("stills.parquet", STILLS)
    classes = sorted({row["group"] for row in stills})
    # Worker processes get a pickle of it where they are not forked.
    transform = pickle.loads(pickle.dumps(model.preprocess))
    pictures = Stills(stills, [classes.index(row["group"]) for row in stills], transform)
    templates = [prompt.format("{c}") for prompt in PROMPTS]
    classifier = zeroshot_classification.zero_shot_classifier(
        model, model.tokenizer, classes, templates, "cpu", amp=False
    )
    logits, target = zeroshot_classification.run_classification(
        model, classifier, DataLoader(pictures, 50), "cpu", amp=False
    )
    (ours,) = own(
        model, "stills.parquet", STILLS, type="zero_shot", inputs={"image": "image"}, label="group", prompts=PROMPTS
    )
    assert top_k_accuracy_score(target, logits, k=1) == pytest.approx(ours["top1"])
    assert top_k_accuracy_score(target, logits, k=5) == pytest.approx(ours["top5"])
    assert balanced_accuracy_score(target, logits.argmax(1)) == pytest.approx(ours["per_class"])
    assert 0 < ours["top1"] < ours["top5"] < 1


def test_clip_benchmark_and_openimp_measure_the_same_retrieval(model):
    stills = rows("stills.parquet", STILLS)
    # Texts that the little model reads as the same would tie, and openimp alone counts ties against the model.
    stills = list({tuple(model.tokenizer(row["name"])[0].tolist()): row for row in stills}.values())
    names = [row["name"] for row in stills]
    assert len(set(names)) == len(names) > 200
    pictures = Stills(stills, [[name] for name in names], model.preprocess)
    theirs = zeroshot_retrieval.evaluate(
        model,
        DataLoader(pictures, 50, collate_fn=image_captions_collate_fn),
        model.tokenizer,
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    to_text, to_image = own(
        model, "stills.parquet", {**STILLS, "name": names}, type="retrieval", inputs={"image": "image", "text": "name"}
    )
    for k in (1, 5, 10):
        assert theirs[f"text_retrieval_recall@{k}"] == pytest.approx(to_text[f"r{k}"])
        assert theirs[f"image_retrieval_recall@{k}"] == pytest.approx(to_image[f"r{k}"])
    assert 0 < to_text["r10"] < 1
    assert 0 < to_image["r10"] < 1


def test_with_amp_clip_benchmark_runs_too(model):
    stills = rows("stills.parquet", {**STILLS, "group": "activities"})
    pictures = Stills(stills, [[row["name"]] for row in stills], model.preprocess)
    batches = DataLoader(pictures, 5, collate_fn=image_captions_collate_fn)
    theirs = zeroshot_retrieval.evaluate(model, batches, model.tokenizer, "cpu", amp=True, recall_k_list=[len(stills)])
    assert theirs == {f"{side}_retrieval_recall@{len(stills)}": 1.0 for side in ("image", "text")}


def metadata(kind, modalities, category, main_score):
    return TaskMetadata(
        name="Bundled" + kind,
        description="openimp's bundled data",
        dataset={"path": "none", "revision": "none"},
        type=kind,
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def media(modality, found):
    """Rows as a data set of a hub has them."""
    values = [{"bytes": row[modality], "path": None} for row in found]
    return Dataset.from_dict({modality: values}).cast_column(modality, FEATURES[modality])


def scores_of(model, task):
    """What `mteb.evaluate` says of the model."""
    result = mteb.evaluate(MTEBEncoder(model), task, cache=None, show_progress_bar=False)
    (scores,) = result.task_results[0].scores["test"]
    return scores


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")  # a group that is never the answer
def test_mteb_classifies_as_openimp_does(model):
    class Groups(AbsTaskZeroShotClassification):
        metadata = metadata("ZeroShotClassification", ["image", "text"], "i2t", "accuracy")
        input_column_name, label_column_name = "image", "group"

        def load_data(self, **_):
            stills = rows("stills.parquet", STILLS)
            split = media("image", stills).add_column("group", [row["group"] for row in stills])
            self.dataset = DatasetDict({"test": split})
            self.data_loaded = True

        def get_candidate_labels(self):
            return sorted(set(self.dataset["test"]["group"]))

    (ours,) = own(
        model, "stills.parquet", STILLS, type="zero_shot", inputs={"image": "image"}, label="group", prompts=["{}"]
    )
    assert scores_of(model, Groups())["accuracy"] == pytest.approx(ours["top1"], abs=1e-5)
    assert 0 < ours["top1"] < 1


@pytest.mark.parametrize(
    ("modality", "column", "file", "where"),
    [
        ("image", "name", "stills.parquet", {**STILLS, "group": "activities"}),
        ("audio", "instrument", "notes.parquet", NOTES),
        ("video", "name", "clips.parquet", {"split": "test", "group": "animals & nature"}),
    ],
)
def test_mteb_retrieves_as_openimp_does(modality, column, file, where, request, tiny_model_folder):
    """Media by texts, of which several may be right: `hit_rate_at_k` is R@k."""
    if modality == "video":
        model = openimp.load(tiny_model_folder, device="cpu", precision="fp32")
    else:
        model = request.getfixturevalue("model")
    ids = {tuple(model.tokenizer(row[column])[0].tolist()): row[column] for row in rows(file, where)}
    where = {**where, column: list(ids.values())}  # no two that the model reads as the same
    found = rows(file, where)
    texts = sorted({row[column] for row in found})

    class Named(AbsTaskRetrieval):
        metadata = metadata("Any2AnyRetrieval", ["text", modality], f"t2{modality[0]}", "hit_rate_at_1")

        def load_data(self, **_):
            numbers = [str(i) for i in range(len(found))]
            right = {text: {i: 1 for i, row in zip(numbers, found) if row[column] == text} for text in texts}
            split = {
                "queries": Dataset.from_dict({"id": texts, "text": texts}),
                "corpus": media(modality, found).add_column("id", numbers),
                "relevant_docs": right,
                "top_ranked": None,
            }
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    theirs = scores_of(model, Named())
    _, ours = own(model, file, where, type="retrieval", inputs={modality: modality, "text": column})
    assert (ours["n"], ours["candidates"]) == (len(texts), len(found))
    assert theirs["mrr_at_1000"] == pytest.approx(ours["mrr"], abs=1e-5)
    for k in (1, 5, 10):
        assert theirs[f"hit_rate_at_{k}"] == pytest.approx(ours[f"r{k}"], abs=1e-5)
    assert 1 / len(found) < ours["mrr"] < 1


def encode(model, modalities, **columns):
    task = metadata("Any2AnyRetrieval", modalities, None, "hit_rate_at_1")
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
    with pytest.raises(UserError, match="the batch has smell, but the model has image, text, audio"):
        encode(model, ["text"], smell=["rose"])


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
    assert meta.name == "openimp/little"
    assert meta.modalities == ["image", "text", "audio"]
    assert meta.n_parameters == sum(parameter.numel() for parameter in model.imp.parameters())
