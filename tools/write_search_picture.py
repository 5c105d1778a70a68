"""Writes docs/images/search.png: the search page with the media of a run's recipe, for the README.

    python -m tools.write_search_picture runs/demo

Needs the extras `dev` and a Chromium on the PATH.
"""

import shutil
import sys
import threading
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

from openimp.search import build_index, open_index
from openimp.search.server import create_app

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "search.png"
SIZE = {"width": 1120, "height": 700}
QUERY = "q=dog"


def main(run: str) -> None:
    folder = build_index(run).folder
    server = uvicorn.Server(uvicorn.Config(create_app(open_index(folder)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            thread.join(0.1)
        port = server.servers[0].sockets[0].getsockname()[1]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.goto(f"http://127.0.0.1:{port}/?{QUERY}", wait_until="networkidle")
            page.screenshot(path=PICTURE)
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1])
