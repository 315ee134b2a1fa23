"""The tab that measures: its first view, what it answers to a form that cannot be, points as they come, a stop, a visitor who leaves."""
import io
import json
import time

import pandas as pd
import pytest
from browser import quiet_page
from test_costs_compared import same_figure

from essl_nb.app.cards import cards_document, cards_html
from essl_nb.app.cost import HERE, STORED, CostController, first_mixer, view_message
from essl_nb.app.library import Studies
from essl_nb.app.work import Jobs
from essl_nb.core.places import study_dir
from essl_nb.core.registry import EsslError
from essl_nb.costs.trial import durations_of, load_warning, measure_trials, names_of, trial_curves, trial_of
from essl_nb.mixers.base import baseline_mixer, list_mixers
from essl_nb.models.config import EncoderConfig

SMALL = dict(show=STORED, scale="time and memory", a_width="16", a_depth="1", a_block="transformer", a_bits=32, b_mixer="", b_width="16", b_depth="1", b_block="transformer", b_bits=32, seconds="0.3, 0.6, 1")


@pytest.fixture(scope="module")
def controller():
    jobs = Jobs()
    yield CostController(Studies(study_dir("small")), jobs)
    jobs.close()


@pytest.fixture(scope="module")
def form(controller):
    return SMALL | dict(a_mixer=first_mixer(controller.curves))


def test_the_first_view_crosses_attention_near_ten_seconds(controller, form):
    d = json.loads(controller.view(form, {}))
    times, memory = (f["figure"] for f in d["figures"])
    named = {t["name"] for t in times["data"] if t.get("meta", {}).get("named")}
    assert named == {form["a_mixer"], baseline_mixer()}
    assert sum(t.get("meta", {}).get("role") == "ceiling" for t in times["data"]) == 1 and not any(t.get("meta", {}).get("role") == "ceiling" for t in memory["data"])
    assert sum(t.get("meta", {}).get("role") == "curve" and not t["meta"]["named"] for t in times["data"]) > 10, "the others, in grey"
    assert any(s["x0"] == s["x1"] == 10 for s in times["layout"]["shapes"]) and "crosses attention at" in d["figures"][0]["title"]
    assert "rounds" in d["caption"] and "Not shown" in d["caption"] and "at 10 s:" in d["finding"]
    table = pd.read_csv(io.StringIO(d["csv"]))
    assert {"duration_s", "time_s", "time_attention_1", "peak_bytes", "n_rounds", "measured_on"} <= set(table)


@pytest.mark.parametrize("scale", ["time and memory", "attention = 1"])
def test_the_code_makes_the_same_figures(controller, form, scale):
    d = json.loads(controller.view(form | dict(scale=scale), {}))
    *lines, first, second = d["code"].splitlines()
    space = {}
    exec("\n".join(lines), space)
    for line, shown in zip((first, second), d["figures"]):
        same_figure(eval(line, space), shown["figure"])


def test_without_stored_curves_the_view_says_what_to_do(tmp_path, form):
    d = json.loads(CostController(Studies(tmp_path / "none"), Jobs()).view(form, {}))
    assert "essl_curves" in d["finding"] and d["figures"] == []


@pytest.mark.parametrize("change, words", [
    (dict(a_width="190", a_mixer=baseline_mixer()), "First encoder: num_heads=4 does not fit dim=190"),
    (dict(a_width="wide"), "The width wide was given; give a whole number from 8 to 1024"),
    (dict(a_width=""), "The width is missing"),
    (dict(a_width="nan"), "from 8 to 1024"),
    (dict(a_width="1e9"), "from 8 to 1024"),
    (dict(a_depth="0"), "The depth 0 was given; give a whole number from 1 to 24"),
    (dict(a_depth="2.5"), "from 1 to 24"),
    (dict(a_bits=7), "7 bits were given"),
    (dict(a_mixer="no such mixer"), "no such mixer"),
    (dict(b_mixer=baseline_mixer(), b_width="-4"), "Second encoder: The width -4 was given"),
    (dict(seconds="0"), "durations between 0.1 and 160 s"),
    (dict(seconds="nan, 1"), "seconds holds nan s"),
    (dict(seconds="1e9"), "between 0.1 and 160 s"),
    (dict(seconds=""), "no duration at all"),
    (dict(seconds="ten"), "give seconds with commas between"),
], ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_a_form_that_cannot_be_is_answered_and_starts_nothing(controller, form, change, words):
    (found, measured), = controller.measuring(form | change, {}, "a visitor")
    assert words in found["error"] and found["running"] is False and measured == {} and not controller.jobs.open
    assert "<p" in found["error"] and found["error"].count("<p") == 1


def test_two_equal_encoders_are_refused(controller, form):
    (found, _), = controller.measuring(form | dict(b_mixer=form["a_mixer"]), {}, "a visitor")
    assert "Both encoders are the same" in found["error"]


def test_points_come_one_duration_after_the_other(controller, form):
    form, views, measured = form | dict(b_mixer=baseline_mixer(), b_bits=32), [], {}
    for found, measured in controller.measuring(form, {}, "a visitor"):
        views += [json.loads(found["view"])] if "view" in found else []
    drawn = [v for v in views if v.get("figures")]
    assert len(drawn) >= 3 and any("of 6 points" in v["note"] for v in views) and views[-1]["note"] == "" and not found["running"]
    assert found["show"] == HERE and "Here, now" in drawn[-1]["finding"] and "encoders with random weights" in drawn[-1]["caption"]
    curves = trial_curves(measured["rows"])
    assert set(curves.mixer) == {baseline_mixer(), measured["names"][0]} and measured["names"][1] == baseline_mixer()
    assert (curves.time_s > 0).all() and (curves[curves.mixer == baseline_mixer()].ratio == 1).all() and (curves.peak_bytes > 0).all()
    table = pd.read_csv(io.StringIO(drawn[-1]["csv"]))
    assert len(table) == 6 and {"name", "duration_s", "time_attention_1", "load", "measured_when"} <= set(table)
    compile(drawn[-1]["code"], "the code", "exec")
    assert controller.view(form | dict(show=STORED), measured) != controller.view(form | dict(show=HERE), measured)


def test_a_stop_keeps_what_was_measured(controller, form):
    parts, ended = 0, {}
    for found, measured in controller.measuring(form | dict(seconds="1, 2, 3, 4, 5, 6, 7, 8"), {}, "a visitor"):
        if measured.get("rows") and not parts:
            parts = 1
            other = next(iter(controller.carding(form, {}, "a visitor")))[0]
            assert "Something of yours is running already" in other["error"]
            controller.jobs.stop("a visitor")
    assert json.loads(found["view"])["note"].startswith("Stopped; ") and found["running"] is False and 0 < len(measured["rows"]) < 16 and found["error"] == ""
    wait_for_none(controller.jobs)


def test_a_visitor_who_leaves_takes_his_measurement_along(controller, form):
    work = controller.measuring(form | dict(seconds="1, 2, 3, 4, 5"), {}, "a visitor")
    next(work), next(work)
    controller.jobs.stop("a visitor")  # what the end of a visit calls
    wait_for_none(controller.jobs)
    work = controller.measuring(form, {}, "another")
    next(work), next(work)
    work.close()  # what a dropped request does
    wait_for_none(controller.jobs)


def wait_for_none(jobs):
    until = time.monotonic() + 20
    while jobs.open:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_takes_too_long_is_skipped_with_a_reason(monkeypatch):
    import essl_nb.costs.trial as module

    monkeypatch.setattr(module, "MOST_SECONDS", 1e-9)
    trial = trial_of(list_mixers()[0], 16, 1)
    rows = [r for report in measure_trials([trial], (0.3, 0.6)) for r in report.get("part", [])]
    assert all("skipped" not in r for r in rows if r["seconds"] == 0.3) and all("are allowed" in r["skipped"] for r in rows if r["seconds"] == 0.6)


def test_names_tell_encoders_apart():
    trials = [trial_of(baseline_mixer(), 16, 1), trial_of(baseline_mixer(), 32, 2, "hybrid")]
    assert names_of(trials) == [baseline_mixer(), f"{baseline_mixer()}, 32 × 2, hybrid"]
    assert durations_of("5, 1;2") == (1.0, 2.0, 5.0)
    assert load_warning(0.2) == "" and load_warning(None) == "" and "load 2.3" in load_warning(2.3)


def test_cards_are_those_of_the_encoder_or_none(controller, form):
    shipped = form | dict(a_width="192", a_depth="4")
    card, document = controller.card(shipped, {})
    assert "In use" in card and "In training" in card and document.startswith("<!DOCTYPE html>") and "http" not in document and "<script" not in document
    card, document = controller.card(form, {})
    assert "no cards yet" in card and document == ""
    assert controller.card(form | dict(a_width="x"), {}) == ("", "")
    cards = controller.cards.of(EncoderConfig(form["a_mixer"]))
    assert {c["config"]["mixer"] for c in cards.values()} == {form["a_mixer"]} and len({c["machine"]["cpu"] for c in cards.values()}) == 1
    assert "&lt;b&gt;" in cards_html("<b>", cards) and "<b>" not in cards_document("<b>", cards)


def test_nothing_measured_draws_nothing():
    with pytest.raises(EsslError, match="Nothing was measured"):
        trial_curves([])
    assert json.loads(view_message(pd.DataFrame(columns=["width", "batch", "pass", "mixer", "time_s", "peak_bytes"]), ["a"], 8, "time and memory", finding="")).get("figures") == []


def test_in_the_browser(tmp_path_factory):
    with quiet_page(tmp_path_factory.mktemp("uploads")) as page:
        page.click("button[role=tab]:has-text('Cost')")
        page.wait_for_selector("#cost-view .essl-view[data-shown]")
        page.wait_for_selector("#cost-view .essl-plotted:nth-child(2) .main-svg")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        page.click("#cost-sidebar > .label-wrap[data-folded]")
        page.fill("#cost-a-width input", "wide")
        page.click("#cost-measure")
        page.wait_for_selector("#cost-error .essl-error:has-text('The width wide was given')")
        page.fill("#cost-a-width input", "16")
        page.fill("#cost-a-depth input", "1")
        page.fill("#cost-seconds input", "0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16")
        page.click("#cost-measure")
        page.wait_for_selector("#cost-view .essl-finding:has-text('Here, now')")
        assert page.locator("#cost-error .essl-error").count() == 0
        page.click("#cost-stop")
        page.wait_for_selector("#cost-view .essl-busy:has-text('Stopped; ')")
        page.wait_for_selector("#cost-measure:not([disabled])")
        page.click("#cost-show label:has-text('stored')")
        page.wait_for_selector("#cost-view .essl-caption:has-text('One layer of each mixer')")
