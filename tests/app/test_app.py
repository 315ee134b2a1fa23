"""The explorer in a real browser: pick, upload, switch, click, and the keyboard's way; nothing leaves loopback, nothing is said on the console."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from madeup import make_curves, make_study

from essl_nb.app.clips import UNKNOWN, LRUCache, Sessions, clip_choices, uploaded_sound
from essl_nb.app.curves import CurvesFile, curves_message, curves_table
from essl_nb.app.explorer import create_app
from essl_nb.app.library import Studies
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers

NO_BROWSER = "no Chromium: apt-get install chromium, or set ESSL_CHROMIUM"
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync "
         "--use-fake-ui-for-media-stream --use-fake-device-for-media-stream").split()
PATIENCE = 120_000  # ms; a loaded machine is slow


def test_create_app_starts_nothing_and_keeps_to_itself():
    app = create_app()
    assert not app.is_running
    settings = app.launch.keywords
    assert settings["server_name"] == "127.0.0.1" and settings["share"] is False and settings["max_file_size"] == "25mb"
    assert app.analytics_enabled is False and app.delete_cache


def test_a_study_that_is_not_there_is_named(tmp_path):
    with pytest.raises(EsslError, match="nowhere"):
        create_app(results=tmp_path / "nowhere")


@pytest.mark.parametrize("name, write, words", [
    ("empty.wav", lambda p: p.write_bytes(b""), "empty"),
    ("letter.wav", lambda p: p.write_text("Dear Sir or Madam"), "not audio"),
    ("silent.wav", lambda p: soundfile.write(p, np.zeros(16000), 16000), "silent"),
    ("short.wav", lambda p: soundfile.write(p, np.ones(800) / 2, 16000), "0.05 s"),
    ("hour.wav", lambda p: soundfile.write(p, np.zeros(8000 * 3600, dtype="int16"), 8000, subtype="PCM_U8"), "60 minutes"),
], ids=lambda v: v if isinstance(v, str) and "." in v else "")
def test_bad_uploads_get_one_sentence(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(EsslError) as e:
        uploaded_sound(tmp_path / name)
    text = str(e.value)
    assert words in text and str(tmp_path) not in text and text.count(". ") <= 1, text


def test_other_rates_and_channels_are_taken(tmp_path):
    t = np.arange(96000) / 96000
    soundfile.write(tmp_path / "wide.wav", np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 220 * t)], 1) / 2, 96000)
    soundfile.write(tmp_path / "narrow.wav", np.sin(2 * np.pi * 440 * t[:8000]) / 2, 8000)
    assert abs(uploaded_sound(tmp_path / "wide.wav").seconds - 1) < 0.01 and abs(uploaded_sound(tmp_path / "narrow.wav").seconds - 1) < 0.01


def test_visits_are_apart_and_bounded_in_bytes(tmp_path):
    soundfile.write(tmp_path / "mine.wav", np.sin(np.arange(16000) / 9) / 2, 16000)
    sound, removed = uploaded_sound(tmp_path / "mine.wav"), []
    sessions = Sessions(max_bytes=2.5 * sound.wav.nbytes, remove_file=removed.append)
    for name in "ab":
        sessions.start(name, sound, name + ".wav")
    for i in range(200):
        sessions.get(f"somebody who reads {i}")
    assert sessions.get("a").sound is sound and sessions.get("b").sound is sound, "who brings nothing takes nobody's place"
    sessions.get("a")
    sessions.start("c", sound)
    assert sessions.get("b").sound is None and removed == ["b.wav"] and "no room" in sessions.eviction_message("b") and sessions.get("a").sound is sound, "the one that was idle longest makes room, and is told"
    sessions.start("b", sound)
    assert not sessions.eviction_message("b") and sessions.get("c").sound is None and sessions.get("a").sound is sound
    sessions.end("b")
    assert sessions.get("b").sound is None and not sessions.eviction_message("b")


def test_what_two_ask_for_at_once_is_made_once():
    from threading import Barrier, Thread

    store, made, together, got = LRUCache(), [], Barrier(4), []

    def ask():
        together.wait()
        got.append(store.get("map", lambda: (time.sleep(0.2), made.append(1), "answer")[2]))

    threads = [Thread(target=ask) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert got == ["answer"] * 4 and made == [1]
    with pytest.raises(ZeroDivisionError):
        store.get("fails", lambda: 1 / 0)
    assert store.get("fails", lambda: "now it works") == "now it works"


def test_a_corpus_that_says_nothing_can_be_chosen_from(tmp_path):
    from essl_nb.data.corpus import load_corpus

    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(16000 + i) / 9) / 2, 16000)
    assert len(clip_choices(load_corpus(tmp_path), UNKNOWN, UNKNOWN, "all")) == 3


def test_studies_beside_the_opened_one_are_told_apart(study):
    assert [label for label, _ in Studies(study).choices()] == ["opened · block transformer · equal width", "beside it · block transformer · widths 32 to 40"]
    assert Studies(None).choices() == [] and Studies(study).get("nowhere").folder == study


def test_intervals_are_drawn_for_what_is_asked(study):
    opened = Studies(study).opened
    whole = opened.scores()
    for only in (dict(probe="first question"), dict(encoder=list_mixers()[0], state="pretrained")):
        part = opened.scores(**only)
        assert opened.scores(**only) is part and 0 < len(part) < len(whole)
        same = whole[np.logical_and.reduce([whole[c] == v for c, v in only.items()])]
        assert part.value.tolist() == same.value.tolist() and part.low.tolist() == same.low.tolist()


def test_curves_that_are_not_there_are_asked_for(tmp_path):
    with pytest.raises(EsslError, match="essl_curves"):
        CurvesFile(tmp_path / "curves").read()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(EsslError, match="no measured point"):
        CurvesFile(tmp_path).read()
    assert curves_table(CurvesFile(None), list_mixers()[0]) == ""


def test_curves_of_an_unfinished_measurement_can_be_read(tmp_path):
    file = CurvesFile(make_curves(tmp_path, list_mixers()[:2]))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()[:1]  # one point, no exponent
    (tmp_path / "rows.jsonl").write_text(lines[0] + "\n")
    value, choices, values = curves_message(file, dict(quantity="nothing"), "no such mixer")
    assert values["width"] == 64 and len(choices["pass"]) == 1 and "<td>–</td>" in curves_table(file, list_mixers()[0])


def chromium() -> str | None:
    "Where a Chromium is."
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("ESSL_CHROMIUM") or next((found for n in names if (found := shutil.which(n))), None)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    "An opened study with every mixer in it, and a smaller one of other widths beside it."
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder / "beside_it", seeds=1, names=list_mixers()[:3], dims=(32, 40), ship=False)
    make_curves(folder / "curves", list_mixers())
    return make_study(folder / "opened")


@pytest.fixture(scope="module")
def address(study):
    "A running explorer, started by its command."
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    start = f"from essl_nb.app.explorer import essl_explore; essl_explore(port=7900, results={str(study)!r}, no_browser=True)"
    server = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.findall(r"http://\S+", line):
                assert found == [f for f in found if f.startswith("http://127.0.0.1:")] and len(found) == 1, line
                yield found[0]
                break
        else:
            pytest.fail("the explorer did not start:\n" + "".join(lines))
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    if chromium() is None:
        pytest.skip(NO_BROWSER)
    sync = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(executable_path=chromium(), args=FLAGS)


@pytest.fixture(scope="module")
def wide(browser, address):
    yield from opened(browser, address, 1440)


def opened(browser, address, width, **more):
    "A page with a map on it; at the end it must have been silent and have asked nobody else."
    said, asked = [], []
    page = browser.new_page(viewport=dict(width=width, height=900), **more)
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(address)
    settled(page)
    yield page
    page.close()
    outside = [u for u in asked if not u.startswith((address, address.replace("http:", "ws:"), "data:", "blob:"))]
    assert not outside, outside
    assert not said, said


def settled(page, condition="true"):
    "Wait until the Listen tab shows what was asked and no work is going on."
    page.wait_for_function(f"() => {{ const v = window.essl && essl.views.listen; return v && v.payload && !v.root.classList.contains('waiting') && !v.busy.textContent && ({condition}); }}")


def choose(page, name: str, text: str):
    "Pick from a dropdown as the keyboard does."
    page.click(f"#{name} input")
    page.fill(f"#{name} input", text)
    page.keyboard.press("Enter")


def listen(page):
    page.click("button[role=tab]:has-text('Listen')")


def view(page, expression: str):
    return page.evaluate(f"() => {{ const v = essl.views.listen, d = v.payload; return {expression}; }}")


def test_first_paint_is_real(wide):
    listen(wide)
    assert view(wide, "d.panels.length") == 1 and wide.locator("#listen-view canvas.essl-highlight").is_visible()
    assert view(wide, "d.panels[0].step") == 1 and view(wide, "d.seconds") > 1
    assert wide.locator(".essl-transcript").inner_text().startswith("“") and "vowel" in wide.inner_text("#listen-view .essl-key")
    assert re.search(r"phone [AEIOU]", wide.locator(".essl-readout").first.inner_text()), "a vowel is chosen"
    before = view(wide, "v.t")
    wide.click(".essl-play")
    wide.wait_for_selector(".essl-play:has-text('Pause')")
    wide.wait_for_function(f"() => essl.views.listen.t > {before} + 0.3")
    wide.click(".essl-play")
    wide.wait_for_selector(".essl-play:has-text('Play')")


def test_pick_a_clip_by_language_and_voice(wide):
    listen(wide)
    before = view(wide, "d.sound")
    choose(wide, "language", "French")
    settled(wide, f"v.payload.sound !== '{before}'")
    assert "language fr" in wide.locator(".essl-about").inner_text()
    now = view(wide, "d.sound")
    wide.click("#clip input")
    wide.keyboard.press("ArrowDown")
    wide.keyboard.press("Enter")
    settled(wide, f"v.payload.sound !== '{now}'")


def test_switch_encoder_and_layer_and_see_two(wide):
    listen(wide)
    names = list_mixers()
    choose(wide, "encoder", f"{names[1]}, pre-trained")
    settled(wide, f"v.payload.panels[0].title.startsWith('{names[1]}, pre-trained · layer 1 of 2')")
    start = time.monotonic()
    wide.click("#layer label:has-text('2')")
    settled(wide, "v.payload.panels[0].title.includes('layer 2')")
    print(f"layer to full map: {time.monotonic() - start:.2f} s")
    choose(wide, "second", f"{names[0]}, untrained")
    settled(wide, "v.payload.panels.length === 2")
    first, second = (wide.locator(".essl-panel").nth(i).bounding_box() for i in (0, 1))
    assert abs(first["y"] - second["y"]) < 2 and second["x"] > first["x"], "two encoders stand side by side"
    wide.click("#contrast-0")
    settled(wide, "v.payload.panels.length === 2 && v.payload.panels[1].title.startsWith('none, pre-trained')")
    assert wide.input_value("#second input").startswith("none, pre-trained") and wide.locator(".essl-panel:visible").count() == 2
    choose(wide, "second", "no second encoder")
    settled(wide, "v.payload.panels.length === 1")


def test_own_maps_of_a_mixer_can_be_chosen(wide):
    listen(wide)
    name = next(n for n in list_mixers() if mixers.get(n).meta["family"] == "attention")
    choose(wide, "encoder", f"{name}, pre-trained")
    settled(wide, f"v.payload.panels[0].title.startsWith('{name}, pre-trained')")
    wide.click("#listen-more > .label-wrap")
    wide.click("#kind input")
    wide.keyboard.press("ArrowDown")
    wide.keyboard.press("Enter")
    settled(wide, "v.payload.panels[0].kind !== 'influence'")
    choose(wide, "kind", "influence")
    settled(wide, "v.payload.panels[0].kind === 'influence'")
    wide.click("#listen-more > .label-wrap")


def test_a_frame_is_chosen_by_pointer_and_by_keyboard(wide):
    listen(wide)
    wide.locator("#essl-frame").focus()
    before = view(wide, "v.t")
    wide.keyboard.press("ArrowRight")
    assert abs(view(wide, "v.t") - before - view(wide, "d.panels[0].dt")) < 1e-3
    box = wide.locator(".essl-panel .essl-plot").first.bounding_box()
    wide.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    middle = view(wide, "v.t")
    wide.mouse.move(box["x"] + box["width"] / 4, box["y"] + 80)
    assert view(wide, "v.t") < middle
    assert f"Frame at {view(wide, 'v.t'):.2f} s" in wide.locator(".essl-readout").first.inner_text()
    lit = wide.evaluate("() => { const c = document.querySelector('canvas.essl-highlight'); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v > 0); }")
    assert lit, "the highlight is drawn over the spectrogram"
    wide.mouse.down()
    wide.mouse.up()
    wide.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    wide.mouse.move(box["x"] - 200, box["y"] - 20)
    assert view(wide, "v.t") < middle and "press again to let it go" in wide.locator(".essl-readout").first.inner_text(), "a press keeps the frame"
    wide.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    wide.mouse.down()
    wide.mouse.up()
    assert abs(view(wide, "v.t") - middle) < 0.1 and not view(wide, "v.pinned"), "a second press lets it go"


def test_numbers_and_code(wide):
    listen(wide)
    with wide.expect_download() as download:
        wide.click("#listen-view .essl-panel:visible button:has-text('the numbers')")
    lines = Path(download.value.path()).read_text().splitlines()
    T = view(wide, "d.panels[0].T")
    assert lines[0].startswith("output_s,input_s,") and len(lines) == T * T + 1
    wide.click("#listen-view .essl-panel:visible summary")
    code = wide.locator("#listen-view pre:visible").inner_text().splitlines()
    assert code[0].startswith("from essl_nb") and "influence_map(" in code[-1]
    wide.click("#listen-view .essl-panel:visible summary")


def test_upload_good_and_bad(wide, tmp_path):
    listen(wide)
    (tmp_path / "letter.wav").write_text("Dear Sir or Madam, this is no sound at all.")
    t = np.arange(3 * 44100) / 44100
    soundfile.write(tmp_path / "chirp.wav", np.sin(2 * np.pi * (200 + 300 * t) * t) / 2, 44100)
    soundfile.write(tmp_path / "long.flac", np.sin(2 * np.pi * 300 * np.arange(25 * 16000) / 16000) / 2, 16000)
    wide.click("label:has-text('your own')")
    wide.wait_for_selector("#own input[type=file]", state="attached")
    wide.set_input_files("#own input[type=file]", tmp_path / "letter.wav")
    wide.wait_for_selector("#listen-error .essl-error")
    assert "letter.wav" in wide.locator("#listen-error").inner_text() and wide.locator("#listen-view canvas").first.is_visible()
    for name, seconds in (("chirp.wav", 3), ("long.flac", 10)):
        wide.click("#own button[aria-label='Clear']")
        wide.wait_for_selector("#own input[type=file]", state="attached")
        wide.set_input_files("#own input[type=file]", tmp_path / name)
        settled(wide, f"v.payload.transcript && v.payload.transcript.startsWith('{name}')")
        assert abs(view(wide, "d.seconds") - seconds) < 0.05 and not wide.locator("#listen-error .essl-error").count()
    wide.wait_for_selector("#start", state="visible")
    assert "is given only these" in wide.locator(".essl-caption").first.inner_text()
    wide.click("label:has-text('a clip of the corpus')")
    settled(wide, "!v.payload.transcript.startsWith('long.flac')")


def test_compare_click_card_budget_and_listen(wide, study):
    wide.click("button[role=tab]:has-text('Compare')")
    wide.wait_for_selector("#compare-view .essl-view[data-shown]")
    names = list_mixers()
    point = wide.evaluate("""name => { const d = essl.views.compare.div, t = d.data.find(t => t.name === name), l = d._fullLayout, b = d.getBoundingClientRect();
        return [b.x + l.xaxis._offset + l.xaxis.d2p(t.x[0]), b.y + l.yaxis._offset + l.yaxis.d2p(t.y[0])]; }""", names[1])
    wide.mouse.move(*point)
    wide.mouse.click(*point)
    wide.wait_for_selector(f"#card h3:has-text('{names[1]}')")
    assert "[" in wide.locator("#card").inner_text()
    wide.click("#card summary")
    assert "[" in wide.locator("#card table").last.inner_text()
    wide.fill("#budget-disk_bytes input, #budget-disk_bytes textarea", "9")
    wide.keyboard.press("Enter")
    wide.wait_for_selector(".essl-finding:has-text('inside this budget')")
    faded = wide.evaluate("() => essl.views.compare.div.data.filter(t => t.meta && t.meta.role === 'point' && t.opacity < 1).length")
    assert faded == len(names) - 2
    wide.fill("#budget-disk_bytes input, #budget-disk_bytes textarea", "nine")
    wide.wait_for_selector("#error-disk_bytes .essl-error:has-text('no number')")
    wide.fill("#budget-disk_bytes input, #budget-disk_bytes textarea", "")
    wide.wait_for_selector(f".essl-finding:has-text('of {len(names)} is'):not(:has-text('inside this budget'))")
    choose(wide, "chosen", names[2])
    wide.wait_for_selector(f"#card h3:has-text('{names[2]}')")
    wide.click("#listen-to-it")
    settled(wide, f"v.payload.panels[0].title.startsWith('{names[2]}, pre-trained')")
    assert wide.locator("#listen-view").is_visible()


LABELS = """() => { const d = essl.views.compare.div, boxes = [...d.querySelectorAll('.annotation')].map(e => [e.textContent, e.querySelector('.annotation-text-g rect').getBoundingClientRect()]);
    const points = d.data.filter(t => t.meta && t.meta.role === 'point'), edge = d.getBoundingClientRect(), meet = [];
    const outside = boxes.filter(([, b]) => b.left < edge.left - 1 || b.right > edge.right + 1).map(([t]) => t);
    boxes.forEach(([t, a], i) => boxes.slice(i + 1).forEach(([u, b]) => { if (a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 2 && b.top < a.bottom - 2) meet.push([t, u]); }));
    return {named: boxes.map(b => b[0]), must: points.filter(t => t.meta.must).map(t => t.name), all: points.map(t => t.name), meet, outside}; }"""


def settled_labels(page) -> dict:
    "What the labels of the first figure are, once it stands."
    page.wait_for_function("() => { const v = essl.views.compare; return v.payload && v.root.dataset.shown === String(v.payload.stamp) && !v.root.classList.contains('waiting') && v.div.querySelector('.annotation'); }")
    return page.evaluate(LABELS)


def test_labels_do_not_meet_and_the_important_are_there(wide):
    wide.click("button[role=tab]:has-text('Compare')")
    found = settled_labels(wide)
    roles = [n for n in list_mixers() if mixers.get(n).meta["family"] == "none" or mixers.get(n).meta.get("baseline")]
    assert {*roles, *found["must"]} <= set(found["named"]) and not found["meet"] and not found["outside"], found
    before = view_of(wide, "d.stamp")
    choose(wide, "pick-cost", "parameters")  # here the better is the dearer: all of them are the front
    wide.wait_for_function(f"() => essl.views.compare.root.dataset.shown > {before}")
    found = settled_labels(wide)
    assert set(found["must"]) == set(found["all"]) <= set(found["named"]) and not found["meet"], found
    families = {mixers.get(n).meta["family"] for n in list_mixers()}
    assert wide.locator("#compare-view .essl-key li").count() == len(families) == wide.locator("#compare-view .essl-key path").count()
    choose(wide, "pick-cost", "arithmetic in use")
    wide.wait_for_selector("#compare-view .essl-caption:has-text('Cost: arithmetic in use')")


def view_of(page, expression: str, name="compare"):
    return page.evaluate(f"() => {{ const v = essl.views.{name}, d = v.payload; return {expression}; }}")


def test_untrained_encoders_are_asked_for_where_there_are_many(wide):
    wide.click("button[role=tab]:has-text('Compare')")
    drawn = "d.figure.data.filter(t => t.meta && t.meta.role === 'untrained').length"
    settled_labels(wide)
    assert view_of(wide, drawn) == 0 and not wide.locator("#pick-untrained input").is_checked()
    wide.focus("#pick-untrained input")
    wide.keyboard.press("Space")
    wide.wait_for_selector("#compare-view .essl-caption:has-text('open points')")
    assert view_of(wide, drawn) > 0
    wide.keyboard.press("Space")
    wide.wait_for_selector("#compare-view .essl-caption:not(:has-text('open points'))")


def test_another_setting_redraws_everything(wide, study):
    wide.click("button[role=tab]:has-text('Compare')")
    choose(wide, "chosen", list_mixers()[1])
    wide.wait_for_selector(f"#card h3:has-text('{list_mixers()[1]}')")
    choose(wide, "pick-study", "beside it")
    wide.wait_for_selector("#compare-view .essl-caption:has-text('32 to 40 wide')")
    assert len(settled_labels(wide)["all"]) == 3 and wide.locator("#pick-untrained input").is_checked() and "beside_it" in view_of(wide, "d.code")
    assert wide.locator("#card h3").inner_text() == list_mixers()[1], "the chosen encoder stays"
    wide.click("#listen-to-it")
    wide.wait_for_selector("text=start the explorer with --results")
    choose(wide, "pick-study", "opened")
    wide.wait_for_selector("#compare-view .essl-caption:has-text('equal width')")


def test_curves_by_keyboard_and_of_the_chosen_encoder(wide):
    wide.click("button[role=tab]:has-text('Compare')")
    shown = "() => { const v = essl.views.curves; return v.payload && v.payload.figure && v.root.dataset.shown === String(v.payload.stamp); }"
    wide.wait_for_function(shown)
    name = next(n for n in list_mixers() if not mixers.get(n).meta.get("baseline"))
    choose(wide, "chosen", name)
    wide.wait_for_selector(f"#curves-view .essl-finding:has-text('{name.replace('_', ' ')} takes less time')")
    thick = view_of(wide, "d.figure.data.filter(t => t.meta.role === 'curve' && t.line.width > 2).map(t => t.name)", "curves")
    assert name in thick and "always" in wide.locator("#card .essl-grows").inner_text()
    drawn = "() => essl.views.curves.div.data.filter(t => t.meta.role === 'curve' && t.visible !== false).length"
    before = wide.evaluate(drawn)
    button = wide.locator("#curves-view .essl-key button").first
    button.focus()
    wide.keyboard.press("Enter")
    wide.wait_for_selector("#curves-view .essl-key button[aria-pressed=false]")
    assert 0 < wide.evaluate(drawn) < before
    assert wide.evaluate("() => document.activeElement.closest('#curves-view .essl-key') !== null"), "the focus stays on the key"
    wide.keyboard.press("Enter")
    wide.wait_for_function(f"() => ({drawn})() === {before}")
    choose(wide, "curve-width", "128")
    wide.wait_for_selector("#curves-view .essl-caption:has-text('width 128')")
    choose(wide, "curve-quantity", "memory, attention = 1")
    wide.wait_for_selector("#curves-view .essl-finding:has-text('less memory')")
    with wide.expect_download() as download:
        wide.click("#curves-view button:has-text('the numbers')")
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0].startswith("mixer,family,width") and len(lines) == 1 + 3 * before
    assert "curves = load_curves(" in view_of(wide, "d.code", "curves")


def test_narrow_dark_and_by_keyboard(browser, address):
    for page in opened(browser, address, 390, color_scheme="dark"):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.wait_for_selector("#listen-sidebar > .label-wrap[data-folded]")
        page.wait_for_selector("#language", state="hidden")  # the sidebar is folded
        page.focus("button[role=tab]:has-text('Listen')")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#compare-view .essl-view[data-shown]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        found = settled_labels(page)
        assert set(found["must"]) <= set(found["named"]) and not found["meet"] and not found["outside"], found
        page.focus("#chosen input")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.wait_for_selector("#card table")


def test_every_control_has_a_name(wide):
    for tab in ("Listen", "Compare"):
        wide.click(f"button[role=tab]:has-text('{tab}')")
        nameless = wide.evaluate("""() => [...document.querySelectorAll('main input, main button, main select, main textarea')].filter(e => e.offsetParent && !(e.getAttribute('aria-label')
            || e.labels && e.labels.length || e.textContent.trim() || e.title || e.getAttribute('aria-labelledby') || e.type === 'file')).map(e => e.outerHTML.slice(0, 120))""")
        assert not nameless, nameless
