"""A reader's own study in Compare: typed where the page is local, uploaded where it is hosted, for one visit."""
import json
import shutil

import pytest
from browser import quiet_page
from madeup import make_study

from essl_nb.app.compare import DEFAULT, compare_updates
from essl_nb.app.curves import CurvesFile
from essl_nb.app.library import Studies
from essl_nb.app.open_study import StudyOpener
from essl_nb.app.uploads import Uploads
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers


@pytest.fixture
def opener(tmp_path):
    (tmp_path / "up").mkdir()
    studies = Studies(make_study(tmp_path / "all" / "opened", seeds=1, names=list_mixers()[:3], ship=False))
    return StudyOpener(studies, Uploads(tmp_path / "up"), local=False)


def sent(opener, content: bytes, name="rows.jsonl") -> str:
    path = opener.uploads.folder / name
    path.write_bytes(content)
    opener.uploads.add("visitor", [str(path)])
    return str(path)


def test_an_uploaded_study_is_drawn_for_its_visit_and_gone_with_it(opener, tmp_path):
    mine = make_study(tmp_path / "mine", seeds=2, names=list_mixers()[3:6], ship=False)
    place = sent(opener, (mine / "rows.jsonl").read_bytes())
    key = opener.open("visitor", sent=place)
    u = compare_updates(opener.studies, CurvesFile(None), DEFAULT | dict(link="", study=key), True)
    d = json.loads(u["view"])
    assert {t["name"] for t in d["figure"]["data"]} >= set(list_mixers()[3:6]) and "'my_study'" in d["code"] and str(tmp_path) not in d["code"] and not d["link"]
    assert key not in [k for _, k in opener.studies.choices()] and key in [k for _, k in opener.studies.choices(key)]
    opener.leave("another")
    assert opener.studies.get(key) is not opener.studies.opened
    opener.leave("visitor")
    assert opener.studies.get(key) is opener.studies.opened and not list(opener.uploads.folder.iterdir())


@pytest.mark.parametrize("content, words", [(b"", "no scores yet"), (b"[]\n", "no row|not a row|is no"), (bytes(range(128, 256)), "UTF-8|not text|JSON"), (b"{" * 1000, "no scores yet")])
def test_what_is_no_study_is_refused_in_words_and_removed(opener, content, words):
    with pytest.raises(EsslError, match=words):
        opener.open("visitor", sent=sent(opener, content))
    assert not list(opener.uploads.folder.iterdir()) and not opener.opened


def test_no_path_is_read_on_a_hosted_page(opener, tmp_path):
    with pytest.raises(EsslError, match="not read on a hosted page"):
        opener.open("visitor", typed=str(tmp_path))
    with pytest.raises(EsslError, match="Choose"):
        opener.open("visitor")
    with pytest.raises(EsslError, match="not here"):
        opener.open("visitor", sent=str(tmp_path / "all" / "opened" / "rows.jsonl"))
    opener.local = True
    key = opener.open("visitor", typed=f'"{tmp_path}/all/opened/rows.jsonl"')
    assert opener.studies.get(key).folder == (tmp_path / "all" / "opened").absolute()


def open_study(page, folder, seen: str):
    page.fill("#study-path input, #study-path textarea", str(folder))
    page.keyboard.press("Tab")
    page.click("#study-open")
    page.wait_for_selector(seen)


def test_in_a_browser(tmp_path):
    mine = make_study(tmp_path / "somewhere" / "mine", seeds=1, names=list_mixers()[:4], ship=False)
    shutil.copy(mine / "rows.jsonl", tmp_path / "kept")
    with quiet_page(tmp_path / "up", 1440) as page:
        page.set_default_timeout(60_000)
        page.click("button[role=tab]:has-text('Compare')")
        page.wait_for_selector("#compare-view .essl-view[data-shown]")
        page.click("#own-study > .label-wrap")
        page.wait_for_function("() => { const v = essl.views.compare; return v.root.dataset.shown === String(v.payload.stamp) && !v.root.classList.contains('waiting'); }")
        open_study(page, mine.parent, "#study-error .essl-error:has-text('holds no rows.jsonl')")
        open_study(page, mine, "#compare-view .essl-caption:has-text('n = 20 utterances')")
        assert page.input_value("#pick-study input") == "your study" and not page.locator("#study-error .essl-error").count()
        assert page.evaluate("location.hash") in ("", "#compare") or "study=" not in page.evaluate("location.hash")
