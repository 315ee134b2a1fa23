"""Three readers of the explorer with a stopwatch: what each wants, pressed in a real browser, and the seconds until the page shows it.

    python tools/walks.py                       # wide and light, narrow and dark; rows are appended to results/visitors/walks.jsonl
    python tools/walks.py --screenshots /tmp    # and pictures of where each of them ended

A student wants to see what mixing is, an engineer an encoder for his limits, a researcher her own sound and her own study; the fourth
walk opens each tab for the first time and again. Needs playwright and a Chromium (`sh tools/env.sh browser`).
"""
import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from playwright.sync_api import sync_playwright
from visitors import started

from essl_nb.core.files import append_line
from essl_nb.core.machine import machine_record
from essl_nb.core.places import study_dir
from essl_nb.study.study import revision

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "visitors" / "walks.jsonl"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
SHAPES = ((1440, "light"), (390, "dark"))  # width in px, colours
DRAWN = "v && v.payload && !v.root.classList.contains('waiting') && !v.busy.textContent && v.root.dataset.shown === String(v.payload.stamp)"
TABS = {"Compare": "compare-view", "Cost": "cost-view", "Stream": "live-view", "LiGRU": "gru-view", "Study": "health-view"}  # name → its first view


class Walk:
    "One reader on a page of his own."

    def __init__(self, browser, address: str, width: int, theme: str):
        self.page = browser.new_context(viewport=dict(width=width, height=900), color_scheme=theme).new_page()
        self.page.set_default_timeout(60_000)
        self.narrow, self.steps, self.said = width < 800, [], []
        self.page.on("console", lambda m: self.said.append(m.text))
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.step("the page and its first map", lambda: self.page.goto(address), self.drawn("listen"), presses=0)

    def drawn(self, view: str, more: str = "true"): # a wait
        "Until a view shows its newest answer, and what else is asked of it as `v`."
        return lambda: self.page.wait_for_function(f"() => {{ const v = window.essl && essl.views.{view}; return {DRAWN} && ({more}); }}")

    def seen(self, selector: str): # a wait
        "Until something is there."
        return lambda: self.page.wait_for_selector(selector)

    def step(self, what: str, act, wait, presses: int = 1):
        "Do something, and wait for what it gives."
        begin = time.perf_counter()
        act()
        wait()
        self.steps.append(dict(what=what, seconds=round(time.perf_counter() - begin, 2), presses=presses))

    def press(self, selector: str): # an act
        "A press."
        return lambda: self.page.click(selector)

    def open_tab(self, name: str):
        "A tab's first view."
        view = TABS[name]
        self.step(f"{name}, opened first", self.press(f"button[role=tab]:has-text('{name}')"), self.seen(f"#{view} .essl-view[data-shown]"))

    def unfold(self, tab: str):
        "On a narrow page the choices are folded."
        if self.narrow:
            bar = f"#{tab}-sidebar > .label-wrap"
            self.page.wait_for_selector(f"{bar}[data-folded]")
            self.step("the choices, unfolded", self.press(bar), self.seen(f"{bar}.open"))


def student(w: Walk):
    "What is mixing? Plays the sentence, then compares three other ways."
    w.step("the sentence, played", w.press(".essl-play"), w.seen("button:has-text('Pause')"))
    w.unfold("listen")
    for i, words in enumerate(("no mixing", "neighbours", "a summary of all")):
        before = w.page.evaluate("() => (essl.views.listen.payload.panels[1] || {}).title || ''")
        w.step(f"compared with {words}", w.press(f"#contrast-{i}"), w.drawn("listen", f"v.payload.panels.length === 2 && v.payload.panels[1].title !== {json.dumps(before)}"))


def engineer(w: Walk):
    "Which encoder takes 100 ms for 10 s and 2 MB on disk, and streams?"
    w.open_tab("Compare")
    w.unfold("compare")
    fill = lambda field, text: lambda: w.page.fill(f"#budget-{field} input, #budget-{field} textarea", text)
    w.step("at most 100 ms", fill("deployment_latency_s", "100 ms"), w.seen("#compare-answer strong, #compare-answer .essl-choice"))
    w.step("at most 2 MB", fill("disk_bytes", "2 MB"), w.seen("#compare-answer p:has-text('2 MB')"))
    w.step("streaming", w.press("#pick-stream input"), w.seen("#compare-answer p:has-text('streaming')"))
    w.drawn("compare")()


def researcher(w: Walk, wave: Path, study: Path):
    "Her own recording, then her own study, and its numbers."
    w.unfold("listen")
    w.step("a sound of her own, chosen", w.press("label:has-text('your own')"), lambda: w.page.wait_for_selector("#own input[type=file]", state="attached"))
    w.step("her recording", lambda: w.page.set_input_files("#own input[type=file]", wave), w.drawn("listen", f"v.payload.transcript.startsWith('{wave.stem}')"))
    w.open_tab("Compare")
    w.unfold("compare")
    w.step("where a study is opened", w.press("#own-study > .label-wrap"), w.seen("#study-path input, #study-path textarea"))
    w.page.fill("#study-path input, #study-path textarea", str(study))
    before = w.page.evaluate("() => essl.views.compare.payload.stamp")
    w.step("her study", w.press("#study-open"), w.drawn("compare", f"v.payload.stamp > {before} && document.querySelector('#pick-study input').value === 'your study'"))
    with w.page.expect_download() as sent:
        w.step("its numbers", w.press("#compare-view button:has-text('the numbers')"), lambda: sent.value)


def tabs(w: Walk):
    "Each tab for the first time, and again."
    w.page.wait_for_timeout(2000)
    for name in TABS:
        w.open_tab(name)
        w.page.wait_for_timeout(500)
    for name, view in dict(Listen="listen-view", **TABS).items():
        w.step(f"{name}, again", w.press(f"button[role=tab]:has-text('{name}')"), w.seen(f"#{view} .essl-view[data-shown]"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--screenshots", type=Path, help="a folder for pictures of the page at the end of each walk")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        wave = Path(tmp) / "mine.wav"
        t = np.arange(3 * 16000) / 16000
        soundfile.write(wave, np.sin(2 * np.pi * (200 + 300 * t) * t) / 4, 16000)
        people = dict(student=student, engineer=engineer, researcher=lambda w: researcher(w, wave, study_dir("hybrid")), tabs=tabs)
        load = os.getloadavg()[0]
        begin = time.perf_counter()
        (process, address), answered = started(Path(tmp)), time.perf_counter() - begin
        try:
            browser = p.chromium.launch(executable_path=os.environ.get("ESSL_CHROMIUM") or shutil.which("chromium"), args=FLAGS)
            time.sleep(8)  # what is read ahead
            for width, theme in SHAPES:
                for name, walk in people.items():
                    begin, w = time.perf_counter(), Walk(browser, address, width, theme)
                    walk(w)
                    value = dict(steps=w.steps, seconds=round(time.perf_counter() - begin, 1), presses=sum(s["presses"] for s in w.steps), console=w.said, command_answers_s=round(answered, 2))
                    append_line(args.out, dict(what=dict(reader=name, width=width, theme=theme), value=value, made=dict(machine=machine_record(), git=revision(), load_before=round(load, 2))))
                    print(f"{name}, {width} px, {theme}: {value['seconds']} s, {value['presses']} presses; " + "; ".join(f"{s['what']} {s['seconds']}" for s in w.steps) + f"; console {w.said}", flush=True)
                    if args.screenshots:
                        w.page.screenshot(path=args.screenshots / f"{name}_{width}.png", full_page=True)
                    w.page.context.close()
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
