"""What is amiss around the page, seen in a real browser: no microphone, folders beside the study that no study is, a study of 10,000 rows."""
import json
import time

import numpy as np
import pytest
import soundfile as sf
from browser import quiet_page
from madeup import make_study
from test_app import FLAGS

from essl_nb.core.places import study_dir
from essl_nb.mixers.base import list_mixers

READY = "() => window.essl && essl.views.listen && essl.views.listen.payload"
SHOWN = "() => { const v = window.essl && essl.views.compare; return v && v.payload && v.root.dataset.shown === String(v.payload.stamp) && !v.root.classList.contains('waiting'); }"
NO_DEVICE = [f for f in FLAGS if not f.startswith("--use-fake")]
REFUSED = [*(f for f in FLAGS if not f.startswith("--use-fake-ui")), "--deny-permission-prompts"]


@pytest.mark.parametrize("flags, words", [(NO_DEVICE, "There is no microphone here."), (REFUSED, "The browser refused the microphone")], ids=["none", "refused"])
def test_no_microphone_is_said_beside_it(tmp_path, flags, words):
    with quiet_page(tmp_path, 1440, flags=flags) as page:
        page.set_default_timeout(120_000)
        page.wait_for_function(READY)
        for tab, box in (("Stream", "#stream-mic"), ("Listen", "#record")):
            page.click(f"button[role=tab]:has-text('{tab}')")
            page.click("label:has-text('your own') >> visible=true")
            page.click(f"{box} button:has-text('Record') >> visible=true")
            page.wait_for_selector(".essl-mic:visible")
            said = page.locator(".essl-mic").inner_text()
            assert said.startswith(words) and said.endswith("Choose a clip or a file instead.") and page.locator(".essl-mic").count() == 1
        page.wait_for_function(READY)


def compare(page):
    page.click("button[role=tab]:has-text('Compare')")
    page.wait_for_function(SHOWN)


def grown(folder, rows: int):
    "The shipped study, each encoder many times over under other names."
    text = (study_dir("small") / "rows.jsonl").read_text()
    shipped = [json.loads(line) for line in text.splitlines()]
    folder.mkdir()
    (folder / "grid.json").write_bytes((study_dir("small") / "grid.json").read_bytes())
    with (folder / "rows.jsonl").open("w") as out:
        out.write(text)
        for k in range(1, rows // len(shipped) + 1):
            for row in shipped:
                what = {name: f"{v} {k}" if name in ("encoder", "run") else v for name, v in row["what"].items()}
                out.write(json.dumps(row | dict(key=f"{row['key']} {k}", what=what)) + "\n")
    return folder


def test_an_upload_leaves_the_console_silent(tmp_path):
    wave = tmp_path / "mine.wav"
    sf.write(wave, np.random.default_rng(0).normal(0, 0.1, 10 * 16000), 16000)
    with quiet_page(tmp_path / "up", 1440) as page:
        page.wait_for_function(READY)
        page.click("label:has-text('your own')")
        page.set_input_files("#own input[type=file]", wave)
        page.wait_for_function("() => essl.views.listen.payload.transcript.startsWith('mine') && !essl.views.listen.root.classList.contains('waiting')")
        page.evaluate("console.warn('a warning')")
        page.wait_for_timeout(500)
        assert page.told == ["a warning"], page.told
        page.told.clear()


def test_ten_thousand_rows_are_drawn_chosen_from_and_clicked(tmp_path):
    study = grown(tmp_path / "grown", 10_000)
    with quiet_page(tmp_path, 1440, study=study) as page:
        page.set_default_timeout(120_000)
        page.wait_for_function(READY)
        compare(page)
        many = "t => t.meta && t.meta.role === 'point' && t.x.length > 1"
        unnamed = page.evaluate(f"() => essl.views.compare.div.data.filter({many}).reduce((n, t) => n + t.x.length, 0)")
        assert 1 < page.locator("#compare-view .annotation").count() < unnamed > 300, "the front, whose copies are equal, and no more"
        name = page.evaluate(f"""() => {{ const d = essl.views.compare.div, i = d.data.findIndex({many}), t = d.data[i];
            d.emit('plotly_click', {{points: [{{data: t, customdata: t.customdata[3]}}]}}); return t.customdata[3]; }}""")
        page.wait_for_selector(f"#card h3:text-is('{name}')")
        page.wait_for_function(SHOWN)
        began, before = time.perf_counter(), page.evaluate("() => essl.views.compare.payload.stamp")
        page.focus("#pick-log input")
        page.keyboard.press("Space")
        page.wait_for_function(f"() => essl.views.compare.payload.stamp > {before}")
        page.wait_for_function(SHOWN)
        print(f"a choice at 10,000 rows: {time.perf_counter() - began:.1f} s")
        assert page.evaluate("() => essl.views.compare.div.layout.xaxis.type") == "log"


@pytest.fixture
def neighbours(tmp_path):
    "A study between folders that are torn, empty, cut off or no folders at all."
    study = make_study(tmp_path / "all" / "opened", seeds=1, names=list_mixers()[:3])
    good = (study / "rows.jsonl").read_text()
    for name, content in dict(torn=good[: len(good) // 2].encode(), noise=bytes(range(128, 256)) * 50, lists=b"[]\n[1, 2]\n", empty=b"", deep=b"[" * 100_000, zeros=b"\0" * 10_000_000).items():
        (beside := study.parent / name).mkdir()
        (beside / "grid.json").write_bytes((study / "grid.json").read_bytes())
        (beside / "rows.jsonl").write_bytes(content)
    (study.parent / "folder" / "rows.jsonl").mkdir(parents=True)
    (study.parent / "folder" / "grid.json").mkdir()
    (study.parent / "loop").symlink_to(study.parent, target_is_directory=True)
    (study.parent / "nowhere").symlink_to(study.parent / "gone")
    return study


def test_every_neighbour_is_answered_and_the_page_lives(tmp_path, neighbours):
    with quiet_page(tmp_path, 1440, study=neighbours) as page:
        page.set_default_timeout(120_000)
        page.wait_for_function(READY)
        compare(page)
        page.click("#pick-study input")
        listed = [t.strip("✓ \n") for t in page.locator("#pick-study [role=option]").all_inner_texts()]
        page.keyboard.press("Escape")
        assert any("torn" in t for t in listed) and not any("gone" in t or "loop" in t for t in listed), listed
        for label in [*listed, listed[0]]:
            before = page.evaluate("() => essl.views.compare.payload.stamp")
            if page.input_value("#pick-study input") == label:
                continue
            page.click("#pick-study input")
            page.fill("#pick-study input", label)
            page.keyboard.press("Enter")
            page.wait_for_function(f"() => essl.views.compare.payload.stamp > {before}")
            page.wait_for_function(SHOWN)
            value = page.evaluate("() => essl.views.compare.payload")
            assert value.get("figure") or len(value["finding"]) > 20 and "Traceback" not in value["finding"], (label, value["finding"])
        assert page.evaluate("() => Boolean(essl.views.compare.payload.figure)")
