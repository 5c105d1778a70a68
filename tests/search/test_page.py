"""The search page in a browser: with the keyboard only, with files, on a narrow screen, and when the server is gone."""

import re
import shutil
from pathlib import Path

import playwright.sync_api as api
import pytest

from tests.served import serving

pytestmark = pytest.mark.slow
SECONDS = 120_000
"""Limit on a wait in the browser, in milliseconds. The machine may be busy."""


@pytest.fixture(scope="module")
def server(little_run: Path, tmp_path_factory: pytest.TempPathFactory):
    """`openimp serve RUN`, which indexes the pictures and sounds of the run's recipe first."""
    run = Path(shutil.copytree(little_run, tmp_path_factory.mktemp("served") / "run"))
    with serving(run) as server:
        yield server


@pytest.fixture
def page(browser):
    """A page whose console must stay free of errors, such as violations of the content security policy."""
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    errors = []
    page.on("filechooser", lambda chooser: None)  # Otherwise the browser learns too late that a test chooses the files.
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not [error for error in errors if "Failed to load resource" not in error]


def results(page) -> list[str]:
    return page.locator("#results .card h3").all_inner_texts()


def kinds(page) -> list[str]:
    return [text.partition(",")[0] for text in page.locator("#results .card .facts span:first-child").all_inner_texts()]


def has_status(page, pattern: str) -> None:
    """Waits until the status above the results matches."""
    api.expect(page.locator("#status")).to_have_text(re.compile(pattern), timeout=SECONDS)


def press_until(page, key: str, selector: str, times: int = 60) -> None:
    """Presses a key until an element has the focus."""
    for _ in range(times):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector} is not reached with {key}")


def test_the_keyboard_alone_searches_for_texts_and_files(server, page, little_data: Path):
    page.goto(server.url)
    press_until(page, "Tab", "#q", 5)
    page.keyboard.type("a red square")
    page.keyboard.press("Enter")
    api.expect(page).to_have_title(re.compile("^a red square"), timeout=SECONDS)
    assert results(page)[0] == "a red square"
    assert page.locator("#status").inner_text().startswith("39 results")
    entries = page.evaluate("history.length")
    page.evaluate("go(address())")
    assert page.evaluate("history.length") == entries, "the same query is no step"
    press_until(page, "Tab", "#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(little_data / "4.wav")
    page.wait_for_url("**q=a+red+square&file=*")
    assert page.locator("#q").input_value() == "a red square", "the file is added to the text"
    assert page.locator("#parts").inner_text().split() == ["like", "4.wav", "✕"]
    press_until(page, "Tab", "#results a[data-go]")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"
    page.keyboard.press("Enter")
    page.wait_for_url("**more=*")
    press_until(page, "Tab", "#results .card a[data-go]")


def test_a_file_is_uploaded_filtered_and_followed_to_more_like_it(server, page, little_data: Path):
    page.goto(server.url)
    page.set_input_files("#file", little_data / "4.wav")
    page.wait_for_url("**file=*")
    assert results(page)[0] == "a middle tone"
    page.get_by_role("checkbox", name="image").check()
    has_status(page, r"audio and the items \(image\) share no space")
    page.get_by_role("checkbox", name="image").uncheck()
    page.get_by_role("checkbox", name="audio").check()
    page.wait_for_url("**modality=audio*")
    has_status(page, "^15 results")
    assert set(kinds(page)) == {"audio"}
    first = page.locator("#results .card").first
    name = first.locator("h3").inner_text()
    id = re.search(r"more=(\w+)", first.locator("a", has_text="More").get_attribute("href"))[1]
    first.locator("a", has_text="More like this").click()
    page.wait_for_url(f"**more={id}*")
    has_status(page, "^14 results")
    assert page.locator("#parts li.more").inner_text().replace("\n", " ").startswith(f"more like {name}")
    page.locator("#results .card").last.locator("a", has_text="Less like this").click()
    page.wait_for_url("**less=*")
    before = (results(page), page.url)
    page.reload()
    assert (results(page), page.url) == before, "the URL is the whole state"
    page.go_back()
    page.wait_for_selector("#parts li.less", state="detached")
    page.locator("#parts li.more a").click()
    page.wait_for_selector("#parts li.more", state="detached")
    assert page.get_by_role("checkbox", name="audio").is_checked()
    entries = page.evaluate("history.length")
    for score in ("0.98", "0.99"):
        page.locator("[name=min]").fill(score)
        page.wait_for_url(f"**min={score}*")
    has_status(page, "at least 0.99")
    assert page.evaluate("history.length") == entries, "the slider's positions are not steps back"


def test_dropped_and_pasted_files_are_searched_for(server, page, little_data: Path):
    content = list((little_data / "pictures" / "blue" / "2.png").read_bytes())
    script = """([type, content]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(content)], "mine.png"));
        const given = { dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true };
        document.body.dispatchEvent(type === "drop" ? new DragEvent(type, given) : new ClipboardEvent(type, given));
    }"""
    for kind in ("drop", "paste"):
        page.goto(server.url)
        page.evaluate(script, [kind, content])
        page.wait_for_url("**file=*")
        assert results(page)[0] == "a blue square"
        assert "mine.png" in page.locator("#parts").inner_text()
    # A spreadsheet puts a picture of the copied cells beside their text.
    page.goto(server.url)
    is_left_to_the_browser = page.evaluate(
        """(content) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], "cells.png"));
            data.setData("text/plain", "a red square");
            data.setData("text/html", "<td>a red square</td>");
            const given = { clipboardData: data, bubbles: true, cancelable: true };
            return document.body.dispatchEvent(new ClipboardEvent("paste", given));
        }""",
        content,
    )
    assert is_left_to_the_browser


def test_more_results_follow_where_the_reader_is_and_the_skip_link_keeps_what_was_typed(server, page):
    page.goto(f"{server.url}/?q=a+red+square&k=12")
    more = page.get_by_role("link", name="Show more results")
    more.scroll_into_view_if_needed()
    place = page.evaluate("scrollY")
    assert place > 0
    more.click()
    has_status(page, "^The first 24|^39 results|results")
    api.expect(page.locator("#results .card").nth(12)).to_be_visible(timeout=SECONDS)
    assert page.evaluate("scrollY") == place
    focused = "[...document.querySelectorAll('.card')].indexOf(document.activeElement.closest('.card'))"
    assert page.evaluate(focused) == 12, "the keyboard continues at the first new result"
    page.locator("#q").fill("typed, not sent")
    page.evaluate("document.querySelector('.skip').click()")
    page.wait_for_url("**#results")
    assert page.locator("#q").input_value() == "typed, not sent"


def test_a_browser_without_the_size_of_a_query_searches(server, browser):
    """As Safari before version 17."""
    page = browser.new_page()
    page.add_init_script("delete URLSearchParams.prototype.size")
    page.goto(server.url)
    page.locator("#q").fill("a red square")
    page.keyboard.press("Enter")
    page.wait_for_url("**q=a+red+square")
    assert results(page)[0] == "a red square"
    page.close()


def test_the_microphone_is_searched_with(server, page):
    page.goto(server.url)
    page.evaluate("go('/?q=noise')")
    page.locator("#record").click()
    page.locator("#record.recording").wait_for()
    page.go_back()
    page.locator("#record:not(.recording)").wait_for()
    assert page.evaluate("recorder === null"), "a recording is dropped with the form"
    page.locator("#record").click()
    page.locator("#record.recording").wait_for()
    page.evaluate("""async () => {
        for (let bytes = 0; bytes < 3000; ) {
            recorder.requestData();
            bytes += await new Promise((done) =>
                recorder.addEventListener("dataavailable", (event) => done(event.data.size), { once: true }));
        }
    }""")
    page.locator("#record").click()
    page.wait_for_url("**file=*")
    assert "like recording" in page.locator("#parts").inner_text().replace("\n", " ")
    assert len(results(page)) == 15, "the model does not compare sounds with pictures"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_on_a_phone_in_light_and_dark(server, browser, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    context.set_default_timeout(SECONDS)
    page = context.new_page()
    backgrounds = set()
    for path in ("/", "/?q=red", "/?q=red&min=1", "/nothing", "/?k=x"):
        page.goto(server.url + path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if path == "/?q=red":
            assert page.locator("#results").bounding_box()["y"] < 740 / 2
    assert backgrounds == {"rgb(247, 246, 243)" if scheme == "light" else "rgb(19, 20, 22)"}
    context.close()


def test_errors_are_explained(server, page, tmp_path: Path):
    page.goto(server.url)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "bad.png")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.locator("#problem").inner_text().startswith("Cannot search with bad.png: cannot be read as image: ")
    top = page.locator("#problem").bounding_box()
    assert top["y"] + top["height"] <= page.locator("#query").bounding_box()["y"], "it covers nothing"
    page.get_by_role("button", name="Close").click()
    page.wait_for_selector("#problem", state="hidden")
    page.context.set_offline(True)
    page.locator("#q").fill("red")
    page.keyboard.press("Enter")
    api.expect(page.locator("#problem")).to_contain_text("The server does not answer", timeout=SECONDS)
    page.context.set_offline(False)
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem", state="hidden")
    page.goto(f"{server.url}/?file=gone")
    assert "A file of this query is no longer kept. Choose it again." in page.locator("#results").inner_text()
