"""Cost curves and what is held equal: counts are exact, memory is exact, tables are checked on curves with known answers; no timing decides a test."""
import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from essl_nb.core.files import append_line, read_lines
from essl_nb.core.memory import allocated_peak
from essl_nb.core.registry import EsslError, UnknownName
from essl_nb.costs import cards, curves, growth
from essl_nb.costs.macs import encoder_macs, parameter_count
from essl_nb.costs.width import matched
from essl_nb.mixers.base import FAMILIES, Mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.viz.curves import QUANTITIES, curve_figure

BASE = cards.baseline_mixer()
CONTROL = next(e.name for e in mixers if e.meta.get("control"))
SMALL = dict(widths=(32,), batches=(1,), passes=("forward",), budget=0.0, least=2, progress=False)


class Short(Mixer):
    "A guest: adds the mean, of utterances up to 100 frames."
    max_frames = 100

    def forward(self, x, mask=None):
        if x.shape[1] > self.max_frames:
            raise EsslError("too long")
        return x + x.mean(1, keepdim=True)


class Broken(Mixer):
    "A guest that fails when it is called, but not where it is counted."

    def forward(self, x, mask=None):
        if x.device.type != "meta":
            raise RuntimeError("no room")
        return x + 0


@pytest.fixture
def guests():
    for cls in (Short, Broken):
        mixers.register(f"guest-{cls.__name__.lower()}", family=FAMILIES[-1], complexity="T", paper="none", tiny={})(cls)
    yield "guest-short", "guest-broken"
    mixers.remove("guest-short")
    mixers.remove("guest-broken")


@pytest.mark.parametrize("name", list_mixers())
@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_no_neighbour_comes_nearer(name, what):
    against, config = EncoderConfig(BASE, dim=64, depth=1), EncoderConfig(name, dim=64, depth=1)
    found = matched(config, against, what, 2.0)
    count = parameter_count if what == "parameters" else lambda c: encoder_macs(c, 2.0)["total"]
    assert found.target == count(against) and found.own == count(found.config) and found.config.dim % 8 == 0
    assert dataclasses.replace(found.config, dim=64) == config
    for step in (-16, -8, 8, 16):
        try:
            other = count(dataclasses.replace(config, dim=found.config.dim + step))
        except ValueError:
            continue  # a width that the mixer refuses
        assert abs(found.own - found.target) <= abs(other - found.target)


def test_equal_is_equal_to_itself_and_says_what_cannot_be():
    base = EncoderConfig(BASE, dim=64, depth=1)
    assert all(matched(base, base, what).ratio == 1 for what in ("width", "parameters", "macs"))
    wide = matched(dataclasses.replace(base, mixer_kw={"num_heads": 5}), base, "parameters")
    assert wide.config.dim % 5 == 0
    for kw, part in [(dict(what="weight"), "width, parameters, macs"), (dict(what="macs", seconds=0), "durations between"), (dict(what="macs", step=0), "1 or more")]:
        with pytest.raises(EsslError, match=part):
            matched(base, base, **kw)
    with pytest.raises(EsslError, match="takes no width"):
        matched(dataclasses.replace(base, mixer_kw={"num_heads": 10007}), base, "parameters")
    with pytest.raises(EsslError, match="does not fit"):
        matched(dataclasses.replace(base, mixer_kw={"num_heads": 5}), base, "width")
    without = list_mixers("none")[0]
    with pytest.raises(EsslError, match="smaller baseline"):
        matched(EncoderConfig(without, depth=1), EncoderConfig(BASE, dim=4096, depth=24), "parameters")


def test_a_card_leaves_out_what_the_mixer_cannot_take(guests):
    card = cards.deployment_cost(EncoderConfig(guests[0], dim=32, depth=1), seconds=(1, 2, 40, 80), repeats=1)
    assert [p["seconds"] for p in card["points"]] == [1, 2] and card["protocol"]["left_out_seconds"] == [40, 80]
    assert json.loads(json.dumps(card)) == card
    with pytest.raises(EsslError, match="take up to 2 s"):
        cards.deployment_cost(EncoderConfig(guests[0], dim=32, depth=1), seconds=(40, 80))


@pytest.mark.parametrize("which", curves.PASSES)
@pytest.mark.parametrize("name", list_mixers())
def test_peaks_are_those_of_the_public_profiler_and_repeat(name, which):
    call = curves.one_call(curves.timed_module(name, 32), 40, 32, 2, which)
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        call()
    steps = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert allocated_peak(call) == allocated_peak(call) == max(0, *np.cumsum([0, *steps]))


def test_a_peak_counts_scratch_space_and_not_what_was_there():
    x = torch.ones(2**20)
    assert allocated_peak(lambda: x * x * x) == 2 * 4 * 2**20
    assert allocated_peak(lambda: None) == 0


def test_attention_stands_before_and_after_every_two():
    said = []
    note = lambda word: lambda: said.append(word)
    times = curves.interleaved_rounds(note("A"), {n: note(n) for n in "wxyz"}, every=2, budget=0, least=3)
    assert "".join(said) == "AwxAyzA" * 3 and all(len(t) == 3 and len(t[0]) == 2 for t in times.values())
    assert len(curves.interleaved_rounds(note("A"), {"w": note("w")}, budget=0)["w"]) == 7


def test_rows_are_appended_resumed_and_say_why_not(guests, tmp_path):
    file, names = tmp_path / "rows.jsonl", [BASE, *guests]
    added = curves.cost_curves(file, names=names, seconds=(1, 4), **SMALL)
    rows = read_lines(file)[0]
    assert added == len(rows) == 6 and [r["seconds"] for r in rows] == [1] * 3 + [4] * 3
    by = {(r["mixer"], r["seconds"]): r for r in rows}
    assert "no room" in by["guest-broken", 1]["skipped"] and "100 frames at most" in by["guest-short", 4]["skipped"]
    row = by["guest-short", 1]
    assert row["level"] == "mixer" and row["rounds"] == 2 and 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["peak_bytes"] == 4 * 32 * (50 + 1) and row["baseline_peak_bytes"] == by[BASE, 1]["peak_bytes"] and by[BASE, 1]["macs_ratio"] == 1
    assert row["made"]["threads"] == 1 and row["made"]["versions"]["torch"] == torch.__version__
    assert curves.cost_curves(file, names=names, seconds=(1, 4), **SMALL) == 0, "what is there is not measured again, and what is skipped for the same reason is not told twice"
    assert curves.cost_curves(file, names=[BASE], seconds=(1,), again=True, **SMALL) == 1
    assert len(growth.load_curves(tmp_path)) == 3 and len(growth.load_curves(file, skipped=True)) == 3
    assert len(growth.crossover(growth.load_curves(file))) == 2 and set(growth.exponents(growth.load_curves(file))) >= {"time", "memory", "complexity"}


def test_another_processor_and_empty_files_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_line(file, dict(mixer=BASE, width=32, batch=1, **{"pass": "forward"}, seconds=1.0, made={"machine": {"cpu": "Abacus"}}))
    with pytest.raises(EsslError, match="measured on Abacus"):
        curves.cost_curves(file, names=[BASE], seconds=(1,), **SMALL)
    with pytest.raises(EsslError, match="essl_curves"):
        growth.load_curves(tmp_path / "none")
    append_line(tmp_path / "s.jsonl", dict(mixer=BASE, width=32, batch=1, **{"pass": "forward"}, seconds=1.0, skipped="so"))
    with pytest.raises(EsslError, match="no measured point yet"):
        growth.load_curves(tmp_path / "s.jsonl")


def test_long_calls_and_large_ones_are_predicted_from_shorter_ones():
    point, row = (64, 1, "forward", 10.0), lambda s, t, m: dict(mixer=BASE, width=64, batch=1, **{"pass": "forward"}, seconds=s, time_s=t, peak_bytes=m)
    known = {(BASE, 64, 1, "forward", 10.0): row(10.0, 2.0, 2**20)}
    seconds, held = curves.predicted(BASE, point, known)
    assert seconds == pytest.approx(2) and held == 2**20
    seconds, held = curves.predicted(BASE, (64, 2, "forward", 40.0), known)
    growth = (4 * 2000 * 64**2 + 2 * 2000**2 * 64) / (4 * 500 * 64**2 + 2 * 500**2 * 64)
    assert seconds == pytest.approx(2 * 2 * growth) and held == 2 * 4 * 2**20
    assert "allowed" in curves.skip_reason(BASE, (64, 2, "forward", 40.0), known, 3.0, 1.0)
    assert "GiB" in curves.skip_reason(BASE, (64, 2, "forward", 40.0), known, 1e9, 1e-3)
    assert curves.skip_reason(BASE, point, known, 3.0, 1.0) is None


def test_the_plan_begins_with_what_tells_most():
    plan = curves.points()
    assert plan[0] == (256, 1, "forward", 1.0) and plan[: len(curves.SECONDS)] == [(256, 1, "forward", s) for s in curves.SECONDS]
    assert max(s for w, b, p, s in plan if (w, b, p) == (576, 6, "forward")) == 40 and len(set(plan)) == len(plan)
    assert curves.points((576,), (6,), ("forward",), (160,)) == [(576, 6, "forward", 160.0)], "who names durations gets them"
    for kw, part in [(dict(passes=("backward",)), "forward"), (dict(widths=(0,)), "1 or more"), (dict(seconds=(0,)), "durations between")]:
        with pytest.raises(EsslError, match=part):
            curves.points(**kw)


def test_the_command_measures_and_answers(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    small = dict(path=str(file), only=BASE, widths="32", batches="1", passes="forward", budget=0.0)
    curves.essl_curves(**small, seconds="1", dry=True)
    assert "min in all" in capsys.readouterr().out and not file.exists()
    curves.essl_curves(**small, seconds="1")
    assert "1 rows added" in capsys.readouterr().out and len(read_lines(file)[0]) == 1
    for kw, part in [(dict(seconds="soon"), "commas between"), (dict(only="no-such", seconds="1"), "There is no mixer"), (dict(threads=0, seconds="1"), "whole number from 1")]:
        with pytest.raises(EsslError, match=part):
            curves.essl_curves(**{**small, **kw})
    with pytest.raises(UnknownName):
        curves.cost_curves(file, names=["no-such"])


def made(name, family, times, memory, seconds=(10.0, 20.0, 40.0, 80.0)):
    s = np.array(seconds)
    rival = s**2 / 100
    return pd.DataFrame(dict(mixer=name, family=family, complexity="T", memory_complexity="T", level="mixer", width=256, batch=1, **{"pass": "forward"}, seconds=s, time_s=times, time_s_low=times, time_s_high=times,
                             ratio=times / rival, ratio_low=times / rival, ratio_high=times / rival, peak_bytes=memory, peak_ratio=memory / (s * 1e6), macs=s))


def test_exponents_and_crossings_of_known_curves():
    s = np.array([10.0, 20.0, 40.0, 80.0])
    frame = pd.concat([made("line", "pooling", s * 0.3, s * 2e6), made("slow", "recurrent", s**2 / 50, s * 5e5), made(BASE, "attention", s**2 / 100, s * 1e6)])
    fits = growth.exponents(frame).set_index("mixer")
    assert np.allclose(fits.loc[["line", "slow", BASE], "time"], [1, 2, 2]) and np.allclose(fits.memory, 1)
    cross = growth.crossover(frame).set_index("mixer")
    assert cross.time["line"] == pytest.approx(30) and cross.memory["line"] == growth.NEVER
    assert cross.time["slow"] == growth.NEVER and cross.memory["slow"] == growth.ALWAYS
    assert not len(growth.exponents(frame[frame.seconds < 20]))


def test_a_crossing_is_the_last_one_and_equal_is_not_cheaper():
    assert growth.crossing([1, 2, 4, 8], [2, 0.5, 2, 0.5]) == pytest.approx(math.sqrt(32))
    assert growth.crossing([1, 2], [1, 1]) == growth.NEVER and growth.crossing([1, 2], [0.9, 0.8]) == growth.ALWAYS


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_figures_hold_every_curve_and_lead_to_those_that_end_early(quantity):
    s = np.array([10.0, 20.0, 40.0, 80.0])
    frame = pd.concat([made("line", "pooling", s * 0.3, s * 2e6), made("early", "recurrent", s**2 / 50, s * 5e5)[:2], made(BASE, "attention", s**2 / 100, s * 1e6)])
    fig = curve_figure(frame, quantity)
    roles = [(t.meta or {}).get("role") for t in fig.data]
    assert roles.count("curve") == 3 and "leader" in roles and ("ceiling" in roles) == (quantity == "time, attention = 1")
    assert {a.text for a in fig.layout.annotations} >= {"line", "early", BASE}
    drawn = lambda **kw: {t.meta["mixer"] for t in curve_figure(frame, quantity, **kw).data if (t.meta or {}).get("role") == "curve"}
    assert drawn(families=["pooling"]) == {"line", BASE} and drawn(only=["early"]) == {"early"}
    for kw, part in [(dict(only=["lime"]), "line"), (dict(families=["pools"]), "pooling"), (dict(batch=6), "there is")]:
        with pytest.raises(EsslError, match=part):
            curve_figure(frame, quantity, **kw)
