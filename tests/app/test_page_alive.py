"""The page when something is amiss: a queue that is full, names that look like markup, files that are too large. In a real browser."""
import json
import re
import shutil

import pytest
from madeup import make_curves, make_study
from test_app import FLAGS, NO_BROWSER, PATIENCE, chromium
from test_access import start

from essl_nb.mixers.base import list_mixers

MARKUP = "<img src=x onerror=alert(1)><b>bold</b><a href='http://evil.example'>here</a>"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "An explorer of a study whose names are markup."
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    folder = tmp_path_factory.mktemp("study")
    study = make_study(folder / "opened", seeds=1, names=list_mixers()[:3])
    make_curves(folder / "curves", list_mixers()[:3])
    rows = [json.loads(x) for x in (study / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        if row["what"]["encoder"] in (list_mixers()[0], "some features"):
            row["what"]["encoder"] = MARKUP if row["what"]["encoder"] == list_mixers()[0] else MARKUP + " features"
    (study / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    beside = folder / "<img src=y>"
    shutil.copytree(study, beside, ignore=shutil.ignore_patterns("encoders"))
    (folder / "<b>noise<b>").mkdir()
    (folder / "<b>noise<b>" / "grid.json").write_text("{}")
    (folder / "<b>noise<b>" / "rows.jsonl").write_bytes(bytes(range(128, 256)))
    process, found = start(tmp_path_factory.mktemp("uploads"), study, "bundled")
    yield found
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(executable_path=chromium(), args=FLAGS)


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport=dict(width=1440, height=900))
    page.set_default_timeout(PATIENCE)
    page.asked = []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("dialog", lambda d: page.asked.append("dialog") or d.dismiss())
    yield page
    page.close()


def painted(page):
    page.wait_for_function("() => window.essl && essl.views.listen && essl.views.listen.root.dataset.shown")


def test_a_full_queue_leaves_a_painted_page_and_a_way_on(page, address):
    page.goto(address)  # until the first views stand in the page itself
    painted(page)
    for _ in range(60):
        if '\\"panels\\":[{' in page.request.get(address).text():
            break
        page.wait_for_timeout(2000)
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, body='{"detail": "queue full"}', content_type="application/json"))
    page.reload()
    painted(page)
    assert page.locator("#listen-view canvas.essl-highlight").is_visible() and page.locator("#clip input").input_value()
    page.evaluate("() => { essl.patience = 500; }")
    before = page.evaluate("() => essl.views.listen.payload.stamp")
    page.click("#layer label:has-text('2')")
    page.wait_for_selector("#listen-view .essl-busy:has-text('No answer for') button:has-text('Try again')")
    assert not page.evaluate("() => essl.views.listen.root.classList.contains('waiting')")
    page.unroute("**/queue/join*")
    page.click("#listen-view .essl-busy button")
    page.wait_for_function(f"() => essl.views.listen.payload.stamp !== {before} && essl.views.listen.payload.panels[0].title.includes('layer 2') && !essl.views.listen.busy.textContent")


def test_names_are_shown_as_they_are(page, address):
    page.goto(address)
    painted(page)
    page.click("button[role=tab]:has-text('Compare')")
    page.wait_for_selector("#compare-view .essl-view[data-shown]")
    page.click("#pick-study input")
    page.wait_for_selector("text=unreadable")
    page.keyboard.press("Escape")
    page.click("#chosen input")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card h3")
    page.wait_for_timeout(1000)
    shown = page.inner_text("#compare-view") + page.inner_text("#card")
    point = page.evaluate("""() => { const d = essl.views.compare.div, t = d.data.find(t => t.name.startsWith('<img')), l = d._fullLayout, b = d.getBoundingClientRect();
        return [b.x + l.xaxis._offset + l.xaxis.d2p(t.x[0]), b.y + l.yaxis._offset + l.yaxis.d2p(t.y[0])]; }""")
    page.mouse.move(point[0], point[1] + 12)
    page.wait_for_selector("#compare-view .hoverlayer text")
    assert "onerror" in page.evaluate("() => document.querySelector('#compare-view .hoverlayer').textContent")
    page.click("#chosen input")
    page.keyboard.type("<img")
    page.keyboard.press("Enter")
    page.wait_for_selector("#card h3:has-text('onerror')")
    page.click("#listen-to-it")
    page.wait_for_selector("#no-listen .essl-error:has-text('ships no weights')")
    foreign = page.evaluate("() => [document.querySelectorAll('main img[src=x], main img[src=y]').length, document.querySelectorAll('main a[href*=evil]').length, [...document.querySelectorAll('svg a')].length]")
    assert foreign == [0, 0, 0] and "<img src=x" in shown
    assert not [u for u in page.asked if not u.startswith((address, address.replace("http:", "ws:"), "data:", "blob:")) or re.search("/[xy]$", u)]
    page.click("#chosen input")
    page.keyboard.type(list_mixers()[1])
    page.keyboard.press("Enter")
    page.wait_for_selector("#no-listen .essl-error", state="detached")  # what was said of another encoder


def test_a_file_that_is_too_large_is_answered_where_it_was_chosen(page, address, tmp_path):
    page.goto(address)
    painted(page)
    page.click("label:has-text('your own')")
    page.wait_for_selector("#own input[type=file]", state="attached")
    large = tmp_path / "large.wav"
    large.write_bytes(b"RIFF" + bytes(26 * 10**6))
    page.set_input_files("#own input[type=file]", large)
    page.wait_for_selector(".essl-large:has-text('large.wav has 26 MB')")
    assert not [u for u in page.asked if "/upload" in u]
