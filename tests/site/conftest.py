"""The built site, a browser without a network, and a page that remembers what went wrong on it."""

from __future__ import annotations

import functools
import http.server
import os
import pathlib
import shutil
import subprocess
import threading

import pages
import pytest

ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
NOT_PAGES = {"_static", "_sources", "_modules"}


class Site:
    """Where the pages are: a folder and an address."""

    def __init__(self, folder: pathlib.Path, address: str):
        self.folder, self.address = folder, address
        every = (f.relative_to(folder) for f in sorted(folder.rglob("*.html")))
        # index.html is a redirect and has a test of its own
        self.pages = [f.as_posix() for f in every if f.parts[0] not in NOT_PAGES and f.as_posix() != "index.html"]
        self.chapters = [p for p in self.pages if "/" in p]  # those with a source


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("site")
    try:
        folder = pages.build(pages.stage(tmp / "src"), tmp)
    except subprocess.CalledProcessError as e:
        pytest.fail(f"the strict build failed:\n{e.output}", pytrace=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site(folder, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()


@pytest.fixture(scope="session")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium on PATH; install it or set CHROMIUM")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=found, headless=True, args=ARGS)
        yield b
        b.close()


@pytest.fixture
def open_page(browser, site):
    """open_page(size, scheme) -> a page whose `.trouble` lists errors and refused requests."""
    contexts = []

    def make(size: str = "desktop", scheme: str = "light"):
        # reduced motion: nothing is measured in the middle of a transition
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.trouble = []

        def route(r):
            if r.request.url.startswith((site.address, "file:", "data:", "blob:")):
                r.continue_()
            else:
                page.trouble.append(f"outside request {r.request.url}")
                r.abort()

        context.route("**/*", route)
        page.on("pageerror", lambda e: page.trouble.append(f"page error: {e}"))
        page.on("console", lambda m: page.trouble.append(f"console {m.type}: {m.text}") if m.type == "error" else None)
        page.on("response", lambda r: page.trouble.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        return page

    yield make
    for c in contexts:
        c.close()
