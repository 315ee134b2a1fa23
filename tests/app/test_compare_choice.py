"""Compare: limits and their answer in words, links that restore the view, and the cost label, in a real browser."""
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import quiet_page
from madeup import make_study

from essl_nb.app.compare import DEFAULT, LINKED, compare_updates, from_link
from essl_nb.app.curves import CurvesFile
from essl_nb.app.library import Studies
from essl_nb.app.links import LONGEST, NO_VIEW, link_to, read_link
from essl_nb.app.picker import BUDGETS, FIELDS, PRESETS, budget_of, limits_of, preset_values
from essl_nb.core.places import study_dir
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    make_study(folder / "beside", seeds=1, names=list_mixers()[:3], ship=False)
    return Studies(make_study(folder / "opened", seeds=1, names=list_mixers()[:5], ship=False))


def updates(studies, link="", fresh=True, **values) -> dict:
    return compare_updates(studies, CurvesFile(None), DEFAULT | dict(link=link) | values, fresh)


def payload(u) -> dict:
    return json.loads(u["view"])


# ---- limits

def test_a_wrong_field_says_so_under_itself_and_the_others_hold(studies):
    u = updates(studies, budget_disk_bytes="nine <b>", budget_deployment_latency_s="10x real time")
    assert "no number" in u["error_disk_bytes"] and "<b>" not in u["error_disk_bytes"] and not any(u["error_" + b] for b in BUDGETS if b != "disk_bytes") and u["error"] == ""
    assert payload(u)["figure"] and "at least 10 × real time" in u["answer"].lower() and "'deployment_rtf': '10x real time'" in payload(u)["code"]
    assert "nine" not in payload(u)["link"] and "10x" in payload(u)["link"], "a link holds what can be read back"


def test_every_preset_can_be_read_and_fills_every_field():
    for name in PRESETS:
        values = dict(zip(FIELDS, preset_values(name), strict=True))
        limits, wrong = limits_of(budget_of(values))
        assert not wrong and bool(limits) == bool(PRESETS[name])


def test_a_study_without_such_costs_is_answered_in_words(studies):
    u = updates(studies, stream=True)
    assert "No encoder here has a measured look-ahead" in u["answer"] and payload(u)["figure"] and "loosen it" in payload(u)["finding"]
    assert updates(studies)["answer"] == ""


# ---- links

def test_a_link_brings_back_what_it_was_made_of(studies):
    first = updates(studies, study="beside", task="phones", cost="parameters", log=True, chosen=list_mixers()[1], budget_disk_bytes="9 MB", form="float32", untrained=False, fresh=False)
    link = payload(first)["link"]
    again = updates(studies, link)
    assert again["error"] == "" and again["study"].value == "beside" and again["task"].value == "phones" and again["cost"].value == "parameters" and again["chosen"].value == list_mixers()[1]
    assert (again["log"], again["budget_disk_bytes"], again["form"], again["untrained"], again["stream"]) == (True, "9 MB", "float32", False, False)
    assert payload(again)["link"] == link and payload(again)["figure"] == payload(first)["figure"] and again["answer"] == first["answer"] != ""


STALE = ["study=gone", "study=..%2F..%2Fetc", "study=opened&task=nothing", "cost=gold", "machine=elsewhere", "chosen=nobody", "chosen=%3Cimg+src%3Dx%3E", "form=int2", "log=yes", "budget_disk_bytes=nine", "head=none&metric=none"]
HOSTILE = ["", "a", "cost=%FF", "cost=parameters&cost=parameters", "evil=1", "cost=a%00b", "cost=" + "a" * 5000, "=&=", "&" * 100, "cost=a%E2%80%AEb", "__proto__=1", "cost=%"]


@pytest.mark.parametrize("query", STALE + HOSTILE, ids=range(len(STALE + HOSTILE)))
def test_a_link_to_what_is_not_there_gives_the_default_view_and_one_sentence(studies, query):
    u, plain = updates(studies, "#compare?" + query), updates(studies)
    if query:
        assert u["error"].count("default view is shown.") == 1 and "<img" not in u["error"] and "alert" in u["error"]
    assert payload(u)["link"] == payload(plain)["link"] and payload(u)["figure"] == payload(plain)["figure"] and {n: u[n] for n in ("log", *FIELDS)} == {n: DEFAULT[n] for n in ("log", *FIELDS)}


def test_a_link_opens_no_other_visits_study(studies):
    studies.private["secret"] = studies.get("beside")
    try:
        assert from_link(studies, "#compare?study=secret")[2] and payload(updates(studies, study="secret"))["link"] in ("", payload(updates(studies, study="beside"))["link"])
        assert "secret" not in payload(updates(studies, study="secret"))["link"]
    finally:
        studies.private.clear()


def test_links_are_bounded():
    assert link_to("compare", dict(cost="a" * 300)) == "" == link_to("compare", {f"n{i}": "a" * 150 for i in range(20)})
    assert link_to("compare", dict(log=False, cost=None, form="")) == "#compare" and read_link("#compare", "compare", LINKED) == {} == read_link("", "compare", LINKED)
    with pytest.raises(EsslError, match=re.escape(NO_VIEW)):
        read_link("#compare?cost=" + "a" * LONGEST, "compare", LINKED)


# ---- in the browser

SHOWN = "() => { const v = window.essl && essl.views.compare; return v && v.payload && v.root.dataset.shown === String(v.payload.stamp) && !v.root.classList.contains('waiting') && !essl.wanted; }"
FIELD = "#budget-{0} input, #budget-{0} textarea"
STATE = """() => ({hash: location.hash, finding: essl.views.compare.payload.finding, x: essl.views.compare.div.layout.xaxis.title.text, type: essl.views.compare.div.layout.xaxis.type, answer: (document.querySelector('#compare-answer .essl-choice') || {}).innerText,
    card: (document.querySelector('#card h3') || {}).innerText, faded: essl.views.compare.div.data.filter(t => t.meta && t.meta.role === 'point' && t.opacity < 1).map(t => t.name), tab: document.querySelector('button[role=tab][aria-selected=true]').innerText,
    disk: document.querySelector('#budget-disk_bytes input, #budget-disk_bytes textarea').value, stream: document.querySelector('#pick-stream input').checked, log: document.querySelector('#pick-log input').checked})"""


def opened(page, link: str) -> tuple: # a new page, and what its console says
    "Another reader who opens a link."
    fresh, told = page.context.browser.new_page(viewport=dict(width=1440, height=900)), []
    fresh.on("console", lambda m: told.append(m.text))
    fresh.on("pageerror", lambda e: told.append(str(e)))
    fresh.set_default_timeout(120_000)
    fresh.goto(link)
    return fresh, told


def choose(page, name: str, text: str):
    page.click(f"#{name} input")
    page.fill(f"#{name} input", text)
    page.keyboard.press("Enter")


def test_the_picker_its_link_and_the_label(tmp_path):
    with quiet_page(tmp_path, 1440) as page:
        page.set_default_timeout(120_000)
        page.wait_for_function("() => window.essl && essl.views.listen && essl.views.listen.payload")
        assert page.evaluate("location.hash") == "", "Listen has no link"
        page.click("button[role=tab]:has-text('Compare')")
        page.wait_for_function(SHOWN)
        page.wait_for_function("() => location.hash.startsWith('#compare?study=small')")
        length = page.evaluate("history.length")
        page.click("button:has-text('A phone')")
        page.wait_for_selector("#compare-answer .essl-choice p:has-text('streaming: ')")
        assert page.locator("#compare-answer .essl-choice > p:not(.essl-note)").count() == 3 and "The score is that of float32 weights" in page.locator("#compare-answer .essl-note").inner_text()
        page.fill(FIELD.format("deployment_peak_bytes"), "nine")
        page.wait_for_selector("#error-deployment_peak_bytes .essl-error:has-text('no number')")
        assert page.locator(".essl-field .essl-error:visible").count() == 1 and page.evaluate("essl.views.compare.div.data.length") > 20, "the figure stays"
        page.fill(FIELD.format("deployment_peak_bytes"), "50 MiB")
        page.wait_for_selector("#error-deployment_peak_bytes .essl-error", state="hidden")
        picked = re.search("streaming: (.+) in int8", page.locator("#compare-answer p").first.inner_text())[1]
        choose(page, "chosen", picked)
        page.wait_for_selector(f"#card h3:has-text('{picked}')")
        choose(page, "pick-cost", "parameters")
        page.wait_for_function("() => location.hash.includes('cost=parameters')")
        page.focus("#pick-log input")
        page.keyboard.press("Space")
        page.wait_for_function("() => location.hash.includes('log=1') && location.hash.includes('cost=parameters') && location.hash.includes('chosen=')")
        page.wait_for_function(SHOWN)
        before = page.evaluate(STATE)
        assert page.evaluate("history.length") == length, "choices do not fill the history"

        with page.expect_download() as download:
            page.click("button:has-text('Save its cost label')")
        root = ElementTree.fromstring(Path(download.value.path()).read_bytes())
        assert download.value.suggested_filename == f"cost-label-{picked}.svg" and picked in [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
        page.evaluate("() => { window.printed = 0; new MutationObserver(all => { for (const m of all) for (const n of m.addedNodes) if (n.className === 'essl-print') printed = n.srcdoc; }).observe(document.body, {childList: true}); }")
        page.click("#cost-label button:has-text('Print it')")
        assert page.evaluate("printed").count("<svg") == 1

        at = page.url.split("#")[0]
        fresh, told = opened(page, at + before["hash"])
        fresh.wait_for_function(SHOWN)
        fresh.wait_for_selector("#card h3")
        fresh.wait_for_function("hash => location.hash === hash", arg=before["hash"])
        after = fresh.evaluate(STATE)
        assert after == before and after["tab"] == "Compare" and after["type"] == "log" and after["faded"]

        fresh.evaluate("() => { location.hash = '#compare?cost=gold&chosen=<img src=x onerror=alert(1)>'; }")  # followed on the page itself
        fresh.wait_for_selector("#compare-error .essl-error:has-text('the default view is shown')")
        fresh.wait_for_function("() => !location.hash.includes('gold') && !location.hash.includes('budget')")
        assert fresh.evaluate(STATE)["disk"] == "" and not fresh.evaluate(STATE)["log"] and fresh.locator("#compare-error .essl-error").count() == 1
        assert not told, told
        fresh.close()

        fresh, told = opened(page, at + "#compare?%ff%00" + "a" * 9000)
        fresh.wait_for_selector("#compare-error .essl-error:has-text('does not describe a view')")
        fresh.wait_for_function(SHOWN)
        fresh.click("button:has-text('50 MB')")  # alive
        fresh.wait_for_selector("#compare-answer p:has-text('At most 50 MB on disk')")
        fresh.click("button[role=tab]:has-text('Listen')")
        fresh.wait_for_function("() => location.hash === ''")
        assert not told, told
        fresh.close()
