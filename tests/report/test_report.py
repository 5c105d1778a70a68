"""The page, looked at as a browser sees it."""

import base64
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import PIL.Image
import pytest

from openimp.checkpoint.folder import checkpoints, load_model, verify
from openimp.commands import run_info
from openimp.common.json_lines import append, read_lines
from openimp.data.sources import open_source
from openimp.encoding.find import find_model
from openimp.evaluation.classification import classify
from openimp.evaluation.evaluator import Evaluator
from openimp.evaluation.results import read_results
from openimp.recipe.schema import Recipe
from openimp.report.training import experts
from openimp.report.write import write_report
from openimp.training.metrics_file import read_metrics
from openimp.training.trainer import train
from tests.messages import refuses

VOID = {"img", "link", "meta", "wbr"}
"""Elements without an end tag."""
HOSTILE = """<script>document.title="owned"</script><img src="http://127.0.0.1:9/x.png" onerror="alert('1')">"""


class Parser(HTMLParser):
    """HTML to a tree of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.builder = ElementTree.TreeBuilder()
        self.feed(text)
        self.root = self.builder.close()

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, {key: value or "" for key, value in attributes})
        if tag in VOID:
            self.builder.end(tag)

    def handle_endtag(self, tag):
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


@dataclass
class Seen:
    """A page as a browser sees it: its elements, the lines of its console, and the addresses that it requested."""

    root: Element
    console: list[str]
    requests: list[str]


@pytest.fixture
def browse(browser, tmp_path):
    def run(text: str) -> Seen:
        file = tmp_path / "page.html"
        file.write_text(text)
        page = browser.new_page()
        console = []
        requests = []
        page.on("console", lambda message: console.append(message.text))
        page.on("request", lambda request: requests.append(request))
        page.goto(file.as_uri())
        root = Parser(page.content()).root
        page.close()
        sent = [request.url for request in requests if request.failure != "csp"]  # not stopped by the page's policy
        return Seen(root, console, [url for url in sent if url != file.as_uri()])

    return run


@pytest.fixture(scope="module")
def page(little_run, tmp_path_factory) -> str:
    """The page about `little_run`."""
    return write_report(little_run, tmp_path_factory.mktemp("report") / "page.html").read_text()


@pytest.fixture(scope="module")
def parsed(page) -> Element:
    return Parser(page).root


def section(root: Element, title: str) -> Element:
    return root.find(f".//section[@id='{title}']")


def titles(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(\w+)", page)


def text(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def cells(table: Element) -> list[list[str]]:
    return [[text(cell) for cell in row if cell.tag in ("th", "td")] for row in table.iter("tr")]


@pytest.mark.slow
def test_the_page_forbids_scripts_and_requests(browse, page):
    hostile = HOSTILE + '<link rel="stylesheet" href="http://127.0.0.1:9/x.css">'
    seen = browse(hostile)
    assert set(seen.requests) == {"http://127.0.0.1:9/x.png", "http://127.0.0.1:9/x.css"}, "without the policy"
    assert text(seen.root.find(".//title")) == "owned"
    seen = browse(page.replace("<main>", f"<main>{hostile}"))
    assert "owned" not in text(seen.root.find(".//title"))
    assert seen.requests == []
    assert sum("Content Security Policy" in line for line in seen.console) >= 3


def test_the_page_has_all_sections(page, parsed, little_run):
    assert len(page) < 3e6
    expected = ["Results", "Losses", "Training", "Mixture", "Experts", "Confusions", "Retrieval"]
    assert titles(page) == expected
    assert [link.get("href") for link in parsed.find(".//nav")] == [f"#{title.lower()}" for title in expected]

    # One chart per task and one of the routers, with curves of the loss and its two parts.
    lines = read_lines(little_run / "metrics.jsonl")
    charts = {text(chart.find(".//span[@class='title']")): chart for chart in section(parsed, "losses").iter("figure")}
    assert set(charts) == {"named", "heard", "router losses"}
    assert len(list(charts["heard"].iter("path"))) == 1
    assert len(list(charts["heard"].iter("circle"))) == len([line for line in lines if "heard" in line["tasks"]])
    assert len(list(charts["named"].iter("path"))) == 3
    assert len(list(section(parsed, "training").iter("figure"))) == 5
    mixture = {row[0]: int(row[1].split()[0]) for row in cells(section(parsed, "mixture").find(".//table"))[1:]}
    assert mixture == {**{task: units["steps"] for task, units in lines[-1]["totals"].items()}, "total": 12}


def test_its_numbers_are_those_of_the_evaluation(parsed, little_run):
    model, saved = load_model(find_model(little_run))
    recipe = saved.recipe.validated()
    modalities = saved.modalities
    source = open_source("pictures", recipe.sources["pictures"])
    evaluator = Evaluator(model, recipe, modalities)
    found, _ = classify(evaluator, recipe.evaluation.sets["colours"], "evaluation.sets.colours", source)
    matrix, *_ = section(parsed, "confusions").iter("table")
    header, *rows = cells(matrix)
    assert header[1:] == found.classes == [row[0] for row in rows]
    assert [[int(count) for count in row[1:]] for row in rows] == found.confusion().tolist()
    recorded = read_lines(little_run / "results.jsonl")
    _, *shown = cells(section(parsed, "results").find(".//table"))
    assert len(shown) == len(recorded) == 3
    for row, result in zip(shown, recorded):
        assert row[0] == result["set"] + result["task"].replace(" -> ", " → ")
        first = 100 * result.get("r1", result.get("top1"))
        assert float(row[1].split("%")[0]) == pytest.approx(first, abs=0.051)
        assert float(row[3].rstrip("%")) == pytest.approx(100 * result["chance"], abs=0.051)


def test_queries_are_shown_with_their_answers_and_correct_ones_are_marked(parsed):
    """Three captions and fifteen sounds: a sound's answers are all three captions."""
    heard, _ = section(parsed, "retrieval").findall(".//div[@class='cases']")
    captions = ["a low tone", "a middle tone", "a high tone"]
    kinds = [case.get("aria-label").split(",")[0] for case in heard]
    assert kinds == ["best", "best", "median", "median", "worst", "worst"]
    for case in heard:
        (picture,) = case.iter("img")
        with PIL.Image.open(BytesIO(base64.b64decode(picture.get("src").partition("base64,")[2]))) as shown:
            assert shown.format == "WEBP"
            assert [str(side) for side in shown.size] == [picture.get("width"), picture.get("height")]
        answers = list(case.iter("li"))
        assert {text(answer.find("p")) for answer in answers} == set(captions)
        rank = case.get("aria-label").split()[-1]
        (correct,) = [answer for answer in answers if answer.get("class") == "correct"]
        assert (text(correct).split()[0], correct.get("value")) == (rank, rank)
        # The sounds are numbered, and their captions alternate.
        row = int(re.search(r"\[(\d+)\]", picture.get("alt"))[1])
        assert text(correct.find("p")) == captions[row % 3]


@pytest.mark.slow
def test_names_from_data_and_recipe_are_text(browse, own_data, tmp_path):
    sounds = own_data / "sounds.jsonl"
    sounds.write_text(sounds.read_text().replace("low", json.dumps(HOSTILE)[1:-1]))
    data = Recipe.load(own_data / "recipe.yaml", ["train.steps=4", "train.log_every=2"]).to_dict()
    data["name"] = "<i>name&lt;"
    data["tasks"] = {HOSTILE: data["tasks"]["heard"]}
    data["modalities"].pop("vision")
    tones = data["evaluation"]["sets"]["tones"]
    classes = {**tones, "type": "zero_shot", "label": "caption", "inputs": {"audio": tones["inputs"]["audio"]}}
    classes["view"] = {"audio": tones["view"]["audio"]}
    data["evaluation"]["sets"] = {HOSTILE: tones, "classes": classes}
    train(Recipe.build(data, own_data), tmp_path / "run")
    seen = browse(write_report(tmp_path / "run").read_text())
    assert (seen.console, seen.requests) == ([], [])
    assert text(seen.root.find(".//title")) == "<i>name&lt; · openimp report"
    assert list(seen.root.iter("script")) == []
    assert all(picture.get("src").startswith("data:image/webp;base64,") for picture in seen.root.iter("img"))
    for title in ("results", "losses", "mixture", "retrieval", "confusions"):
        assert HOSTILE in text(section(seen.root, title)), title


def test_a_dense_run_whose_data_is_gone_keeps_its_recorded_figures(own_data, tmp_path, capsys):
    """One of its sets is a probe, which has a row for each of its classifiers."""
    probed = "type: probe, train: seen, source: unseen, inputs: {image: file}, label: label, view: {image: {size: 16}}"
    changes = [f"evaluation.sets.probed={{{probed}, k: 3}}", "train.steps=2", "model.moe=null"]
    for name, files in (("seen", "['0', '1', '2', '3']"), ("unseen", "['4', '5']")):
        changes.append(f"sources.{name}={{path: pictures, where: {{name: {files}}}}}")
    run = tmp_path / "run"
    train(Recipe.load(own_data / "recipe.yaml", changes), run)
    recorded = {line["set"] + line["task"].replace("->", "→"): line for line in read_lines(run / "results.jsonl")}
    probes = ["probedimage → label (linear)", "probedimage → label (kNN)"]
    assert [name for name in recorded if name.startswith("probed")] == probes
    pages = [write_report(run).read_text()]
    shutil.rmtree(own_data / "pictures")
    pages.append(write_report(run).read_text())
    for page in pages:
        shown = {row[0]: row[1:] for row in cells(section(Parser(page).root, "results").find(".//table"))}
        for name in ("coloursimage → label", *probes):
            assert shown[name][0].startswith(f"{100 * recorded[name]['top1']:.1f}%")
        for name in probes:
            assert shown[name][4:8] == ["", "", "", ""]  # of retrieval and zero-shot only
        assert shown["coloursimage → label"][4]
    not_measured = "colours is not measured again. Its recorded results, if any, are shown. source pictures: "
    assert not_measured in page
    assert not_measured in capsys.readouterr().err
    assert titles(page) == ["Results", "Losses", "Training", "Mixture", "Retrieval"]


def test_a_run_without_a_checkpoint_or_step_times_and_a_model_have_pages(little_run, tmp_path):
    run = Path(shutil.copytree(little_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    page = write_report(run).read_text()
    assert titles(page) == ["Results", "Losses", "Training", "Mixture", "Experts"]
    for text_of_page in ("There is no checkpoint to measure.", "tones", "seconds per step: median"):
        assert text_of_page in page
    lines = read_lines(run / "metrics.jsonl")
    for line in lines:
        assert 0 < line.pop("step_p50") <= line.pop("step_p95")
    write_lines(run / "metrics.jsonl", lines)  # As an older version wrote them.
    (run / "results.jsonl").unlink()
    page = write_report(run).read_text()
    assert titles(page) == ["Losses", "Training", "Mixture", "Experts"]
    assert "seconds per step: median" not in page
    assert "examples per second: " in page
    page = write_report(find_model(little_run), tmp_path / "page.html").read_text()
    assert titles(page) == ["Results", "Confusions", "Retrieval"]


def test_the_page_of_a_checkpoint_is_beside_it_and_replaces_no_other_page(little_run, tmp_path, monkeypatch):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    of_run = write_report(run).read_text()
    folder = checkpoints(run)[0]
    assert write_report(folder) == folder.with_name(f"{folder.name}.html")
    monkeypatch.chdir(folder)
    assert write_report(Path()) == folder.with_name(f"{folder.name}.html")
    assert (run / "report.html").read_text() == of_run
    verify(folder)
    assert checkpoints(run)[0] == folder


def test_results_of_published_benchmarks_are_shown_as_recorded(little_run, tmp_path, capsys):
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    about = {"step": 12, "skipped": 0, "library": "mteb 2.26", "note": "one prompt"}
    known = {"task": "audio -> text", "n": 2000, "candidates": 50, "interval": [0.11, 0.14], "chance": 0.02}
    unknown = {"task": "audio (v_measure)", "n": None, "candidates": None, "interval": None, "chance": None}
    append(run / "results.jsonl", {"set": "ESC50_Zeroshot", "type": "zero_shot", **known, "top1": 0.123, **about})
    append(run / "results.jsonl", {"set": "Sounds", "type": "AudioClustering", **unknown, "score": -0.0321, **about})
    page = write_report(run).read_text()
    for shown in ("12.3%", "ESC50_Zeroshot: one prompt", "-3.2%", "Sounds: one prompt"):
        assert shown in page
    assert "None" not in page
    run_info(str(run), [])
    assert "-3.2" in capsys.readouterr().out


def write_lines(file: Path, lines: list) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_experts_of_a_stem_are_compared_with_each_other(little_run, tmp_path):
    lines = read_lines(little_run / "metrics.jsonl")
    used = {"image": [0.5, 0.5, 0, 0, 0], "text": [0, 0, 0.2, 0.4, 0.4], "audio": [0, 0, 0.2, 0.4, 0.4]}
    for line in lines:
        for name, layers in line["experts"].items():
            for layer in layers:
                layer["load"] = layer["gate"] = used[name]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (found,) = experts(read_metrics(tmp_path / "metrics.jsonl"))["maps"]
    assert {name: count for name, _, count, _ in found["rows"]} == {"image": 2, "text": 3, "audio": 3}


def test_a_diverged_run_has_a_report(little_run, tmp_path):
    lines = read_lines(little_run / "metrics.jsonl")
    for line in lines[6:]:
        line["grad_norm"] = float("nan")
        line["tasks"] = {task: {name: float("inf") for name in losses} for task, losses in line["tasks"].items()}
        for layer in (layer for layers in line["experts"].values() for layer in layers):
            layer["gate"] = [float("nan")] * len(layer["gate"])
    write_lines(tmp_path / "metrics.jsonl", lines)
    shutil.copy(little_run / "recipe.yaml", tmp_path)
    assert "no expert" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("metrics.jsonl", [
            {"grad_norm": ...}, {"tasks": ["named"]}, {"seconds": "1"}, {"seconds": float("nan")}, {"step": 10**400},
            {"totals": {"named": {"steps": 1}}}, {"tasks": {"named": {"loss": 10**400}}}, {"experts": {"text": []}},
            {"experts": {"text": [{"load": [1.0], "gate": [1.0], "dropped": 0}]}},
        ]),
        ("results.jsonl", [
            {"set": None}, {"interval": [0.5]}, {"interval": [0, "x"]}, {"chance": float("inf")}, {"n": "9"},
            {"mrr": None}, {"type": "retrieval", "r10": ...}, {"top1": ..., "r1": ...}, {"splits": [1]},
            {"step": "last"}, {"step": ...},
        ]),
    ],
    ids=["metrics", "results"],
)  # fmt: skip
def test_a_line_that_is_no_metrics_or_result_is_refused_in_one_sentence(little_run, tmp_path, file, changes):
    lines = read_lines(little_run / file)
    for change in changes:
        wrong = {key: value for key, value in (lines[-1] | change).items() if value is not ...}
        write_lines(tmp_path / file, [*lines, wrong])
        with refuses():
            {"metrics.jsonl": read_metrics, "results.jsonl": read_results}[file](tmp_path / file)


def test_a_page_is_written_whole_or_not_at_all(little_run, tmp_path):
    (tmp_path / "empty").mkdir()
    with refuses():
        write_report(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    for out in (tmp_path, tmp_path / "missing" / "page.html"):
        with refuses():
            write_report(little_run, out)
    run = Path(shutil.copytree(little_run, tmp_path / "run"))
    before = sorted(run.iterdir())
    weights = find_model(run) / "ema" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with refuses():
        write_report(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{no json\n")
    with refuses():
        write_report(run)
    assert sorted(run.iterdir()) == before
