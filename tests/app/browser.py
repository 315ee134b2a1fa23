"""A page of the explorer in a browser, for tests of single tabs."""
import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from test_access import start
from test_app import FLAGS, NO_BROWSER, PATIENCE, chromium

from essl_nb.core.places import study_dir


@contextmanager
def quiet_page(uploads, width: int = 390, study=None, corpus="bundled", flags=FLAGS, **more): # more: of the page
    "A study, the shipped one if none is given, on a page that must stay on this machine and leave the console silent; skips where there is no browser."
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    process, address = start(uploads, study or study_dir("small"), corpus)
    try:
        with sync.sync_playwright() as p:
            page = p.chromium.launch(executable_path=chromium(), args=flags).new_context(viewport=dict(width=width, height=800), **more).new_page()
            page.set_default_timeout(PATIENCE)
            asked, told = [], []
            page.told = told
            page.on("request", lambda r: asked.append(r.url))
            page.on("console", lambda m: told.append(m.text))
            page.on("pageerror", lambda e: told.append(str(e)))
            page.goto(address)
            yield page
            assert not told, told
            assert not [u for u in asked if not u.startswith((address, address.replace("http:", "ws:"), "data:", "blob:"))]
    finally:
        process.terminate()
        process.wait(60)


def awaited(coroutine): # what it returns
    "Run a coroutine in a thread of its own: a page that is open in this one keeps an event loop running here."
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
