"""The Light GRU's tab: stored timings on one machine at a time, the cell's gates on a sentence, a measurement that comes point by point."""
import io
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from browser import quiet_page
from test_costs_compared import run_code, same_figure

from essl_nb.app.clips import Sessions
from essl_nb.app.library import EncoderLibrary, Studies
from essl_nb.app.light_gru import GPU, MEASURED, LoopController, light_names, packed
from essl_nb.app.listen import ListenController
from essl_nb.app.work import Jobs
from essl_nb.core.places import study_dir
from essl_nb.core.registry import EsslError
from essl_nb.costs.loops import loop_shapes, loop_table, measure_loops
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import baseline_mixer
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.viz.light_gru import light_gates, step_figure
from essl_nb.viz.mixing import mixer_at, mixer_input

FORM = {"units": "16", "batch": "2", "frames": "20, 40", "pass": "forward", "slow": False}


@pytest.fixture(scope="module")
def controller():
    corpus, jobs = load_corpus("bundled"), Jobs()
    yield LoopController(Studies(study_dir("small")), ListenController(lambda: corpus, EncoderLibrary(study_dir("small")), Sessions(), None), jobs)
    jobs.close()


def test_every_machine_with_rows_can_be_chosen_and_no_other(controller):
    places = [k for _, k in controller.files.places()]
    assert len([p for p in places if not p.startswith(GPU)]) >= 1 and len(places) == len(set(places))
    for place in places:
        d = json.loads(controller.view(place, "forward+backward", {}))
        assert d["figures"] and "LiGRU takes" in d["finding"] and "Not shown" in d["caption"], place
        assert (place in d["caption"]) != place.startswith(GPU)
        assert len(pd.read_csv(io.StringIO(d["csv"])))
    first, *_ = places
    assert json.loads(controller.view("elsewhere", "forward", {}))["caption"].startswith(first)


def test_a_pass_that_was_not_timed_is_said(controller):
    answers = {p: json.loads(controller.view(p, "forward", {})) for _, p in controller.files.places()}
    missing = [d for d in answers.values() if not d["figures"]]
    assert missing and all("was measured" in d["finding"] or "was timed" in d["finding"] for d in missing)


def test_the_code_of_stored_timings_makes_the_same_figures(controller):
    d = json.loads(controller.view(None, "forward+backward", {}))
    first, _ = d["code"].split("from essl_nb.costs.step_bench")
    assert len(d["figures"]) == 2
    same_figure(run_code(first)["_"], d["figures"][0]["figure"])
    same_figure(run_code(d["code"])["_"], d["figures"][1]["figure"])


def test_without_timings_the_view_says_what_to_do(tmp_path, controller):
    d = json.loads(LoopController(Studies(tmp_path / "none"), controller.listen, Jobs()).view(None, "forward", {}))
    assert "essl_ligru_bench" in d["finding"] and d["figures"] == []
    with pytest.raises(EsslError, match="No call of 3 frames"):
        step_figure([], 3)


@pytest.mark.parametrize("name", light_names())
@pytest.mark.parametrize("backward", [False, True])
def test_gates_are_those_of_the_cell(name, backward):
    encoder = build_encoder(EncoderConfig(name, dim=16, depth=2), seed=1).eval()
    wav = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 0.1
    gates = light_gates(encoder, wav, 2, backward)
    with torch.inference_mode():
        x, _ = mixer_input(encoder, wav, 2)
        mixer = mixer_at(encoder, 2)
        mixer.ahead.backend = mixer.back.backend = "reference"
        truth = mixer.run(mixer.back, x.flip(1))[0][0].flip(0) if backward else mixer.run(mixer.ahead, x)[0][0]
    assert np.allclose(gates.state, truth.numpy(), atol=1e-5)
    before = np.concatenate([gates.state[1:], 0 * gates.state[:1]]) if backward else np.concatenate([0 * gates.state[:1], gates.state[:-1]])
    assert np.allclose(gates.gate * before + (1 - gates.gate) * gates.candidate, gates.state, atol=1e-5)
    assert (np.diff(gates.memory) >= 0).all() and gates.memory[0] > 0


def test_other_mixers_have_no_such_gates():
    with pytest.raises(EsslError, match="no gates of a Light GRU"):
        light_gates(build_encoder(EncoderConfig(baseline_mixer(), dim=16, depth=1), seed=0).eval(), torch.zeros(8000), 1)
    with pytest.raises(EsslError, match="causal"):
        light_gates(build_encoder(EncoderConfig(light_names()[0], dim=16, depth=1, causal=True), seed=0).eval(), torch.ones(8000) / 9, 1, backward=True)


def test_a_sentence_is_drawn_over_one_time_axis_and_its_code_draws_it_too(controller):
    clip, key = controller.listen.first_clip()[-1][0][1], controller.encoders()[0][1]
    d = json.loads(controller.gates(clip, key, 1, False))
    rows = d["figure"]["layout"]["meta"]["rows"]
    assert {"wave", "mel", "phones", "below0", "below1"} <= set(rows) and d["phones"] and "units keep their state" in d["finding"]
    strips = [t for t in d["figure"]["data"] if t.get("meta", {}).get("role", "").startswith("below")]
    assert len(strips) == 2 and all(np.isclose(t["dx"], d["dt"]) for t in strips)
    assert controller.gates(clip, key, 1, False) == json.dumps(d, ensure_ascii=False, separators=(",", ":")), "computed once"
    same_figure(run_code(d["code"])["_"], d["figure"])


def test_numbers_of_a_frame_are_exact_enough():
    import base64

    values = np.array([[0.0, 0.25], [1.0, 0.5]])
    read = np.frombuffer(base64.b64decode(packed(values, 1.0)), "<u2").reshape(2, 2) / 65535
    assert np.abs(read - values).max() < 1e-5
    read = np.frombuffer(base64.b64decode(packed(values - 0.5, 0.5)), "<u2").reshape(2, 2) / 65535
    assert np.abs((2 * read - 1) * 0.5 - (values - 0.5)).max() < 1e-5


@pytest.mark.parametrize("change, words", [
    (dict(units="0"), "The number of units 0 was given; give a whole number from 8 to 1024"), (dict(units="nan"), "from 8 to 1024"), (dict(batch="many"), "The number of utterances many"), (dict(batch=""), "is missing"),
    (dict(frames="0"), "from 10 to 4000"), (dict(frames="nan, 20"), "number of frames nan"), (dict(frames=""), "No number of frames"), (dict(frames="20; x"), "number of frames x")],
    ids=lambda v: " ".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "")
def test_a_form_that_cannot_be_is_answered_and_starts_nothing(controller, change, words):
    (found, measured), = controller.measuring(FORM | change, {}, "a visitor")
    assert words in found["error"] and found["running"] is False and measured == {} and not controller.jobs.open


def test_points_come_and_a_stop_keeps_them(controller):
    measured, stopped, views = {}, False, []
    for found, measured in controller.measuring(FORM | dict(frames="20, 40, 400, 800, 1600, 3200", units="256", batch="32"), {}, "a visitor"):
        views += [json.loads(found["view"])] if "view" in found else []
        if measured.get("rows") and not stopped:
            stopped = True
            controller.jobs.stop("a visitor")
    drawn = [v for v in views if v.get("figures")]
    assert drawn and found["running"] is False and found["place"] == MEASURED and found["error"] == "" and views[-1]["note"].startswith("Stopped")
    assert "Here, now" in drawn[-1]["caption"] and 0 < len({r["frames"] for r in measured["rows"]}) < 6
    table = pd.read_csv(io.StringIO(drawn[-1]["csv"]))
    assert {"name", "frames", "units", "time_s", "load"} <= set(table)
    compile(drawn[-1]["code"], "the code", "exec")
    until = time.monotonic() + 20
    while controller.jobs.open:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_too_slow_is_left_out_of_longer_ones(monkeypatch):
    import essl_nb.costs.loops as module

    asked = []
    found = lambda shape, which, names, *more: asked.append(list(names)) or dict(times=[[1e-3] * (len(names) - (shape.frames == 20))] * 3, names=names[: len(names) - (shape.frames == 20)], skipped={names[-1]: "one call takes 11 s"} if shape.frames == 20 else {}, took="")
    monkeypatch.setattr(module, "time_point", found)
    rows = [r for report in measure_loops(loop_shapes(16, 2, "20, 40"), "forward", ("LiGRU", "GRU", "LSTM")) for r in report.get("part", [])]
    assert asked == [["LiGRU", "GRU", "LSTM"], ["LiGRU", "GRU"]] and sum("skipped" in r for r in rows) == 1 and len(loop_table(rows)) == 5
    with pytest.raises(EsslError, match="Nothing was timed"):
        loop_table([dict(name="LiGRU", skipped="x")])


def test_in_the_browser(tmp_path_factory):
    with quiet_page(tmp_path_factory.mktemp("uploads")) as page:
        page.click("button[role=tab]:has-text('LiGRU')")
        page.wait_for_selector("#gates-view .essl-view[data-shown]")
        page.wait_for_selector("#gru-view .main-svg")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        before = page.inner_text("#gates-view .essl-readout")
        page.focus("#essl-gate-frame")
        page.keyboard.press("ArrowRight")
        after = page.inner_text("#gates-view .essl-readout")
        assert before != after and "of the state" in after and page.evaluate("() => essl.views.gates.line.getBoundingClientRect().height") > 100
        page.click("#gru-sidebar > .label-wrap[data-folded]")
        page.click("#gru-layer label:has-text('2')")
        page.wait_for_selector("#gates-view .essl-caption:has-text('layer 2')")
        page.fill("#gru-units input", "none")
        page.click("#gru-measure")
        page.wait_for_selector("#gru-error .essl-error:has-text('number of units none')")
