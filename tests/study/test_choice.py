"""Which encoder is taken under limits, and what is said of it: ties, what it gives up, what was not measured, and the nearest where nothing fits."""
import math

import numpy as np
import pandas as pd
import pytest

from essl_nb.core.places import study_dir
from essl_nb.core.registry import EsslError
from essl_nb.study.choice import LIMITS, choice_lines, choose, choose_encoder, lost_by, note_line, read_limit, use_line, within_limits
from essl_nb.study.results import cost_table, draws_of, load_results, scores_of
from essl_nb.viz.tradeoff import limit_of, tradeoff_figure

SHARES = dict(large=0.60, middle=0.59, small=0.40, unmeasured=0.80)


def rows(metric="accuracy", shares=SHARES):
    "One score of some encoders over the same 200 utterances; middle and twin differ in three of ten utterances, in both directions."
    out = []
    for name, share in shares.items():
        units = [[int(share * 100) + {("middle", 0): 6, ("middle", 1): -3, ("twin", 2): 3}.get((name, i % 10), 0), 100] for i in range(200)]
        out.append(dict(kind="score", encoder=name, mixer=name, family="none", objective="o", seed=0, state="pretrained", probe="p", task="t", metric=metric, head="linear", labels="all", split="test", span_ms=None,
                        value=sum(u for u, _ in units) / 20000, units=units, unit_ids_hash="x", voices=None, better="lower" if metric == "per" else "higher"))
    return pd.DataFrame(out)


COSTS = pd.DataFrame([
    dict(encoder="large", disk_bytes_fp32=8e6, disk_bytes_int8=2e6, deployment_peak_bytes=60 * 2**20, streaming_latency_ms=np.nan, streaming_streams=False, training_step_s_ratio=1.0),
    dict(encoder="middle", disk_bytes_fp32=4e6, disk_bytes_int8=1e6, deployment_peak_bytes=40 * 2**20, streaming_latency_ms=150.0, streaming_streams=True, training_step_s_ratio=0.8),
    dict(encoder="small", disk_bytes_fp32=2e6, disk_bytes_int8=0.5e6, deployment_peak_bytes=50 * 2**20, streaming_latency_ms=50.0, streaming_streams=True, training_step_s_ratio=0.4),
    dict(encoder="unmeasured"),
])


def ask(metric="accuracy", **limits):
    return choose(draws_of(rows(metric)), COSTS, limits, metric == "per")


def test_the_pick_keeps_the_limits_in_the_most_precise_form_that_does():
    assert [ask(disk_bytes=b).pick[["encoder", "form"]].tolist() for b in (9e6, 3e6, 1.5e6, 0.6e6)] == [["large", "float32"], ["large", "int8"], ["middle", "int8"], ["small", "int8"]]
    assert ask(disk_bytes_fp32=3e6).pick.encoder == "small" and "small in float32" in choice_lines(ask(disk_bytes_fp32=3e6))[0]
    assert ask(streaming_latency_ms=math.inf).pick.encoder == "middle" and ask(streaming_latency_ms=100).pick.encoder == "small"
    assert ask("per", disk_bytes=9e6).pick.encoder == "small", "fewer errors are better"


def test_what_was_not_measured_is_never_picked_and_always_named():
    choice = ask(disk_bytes=9e6)
    assert choice.table.encoder[0] == "unmeasured" and not choice.table.keeps[0] and not choice.table.excess.map(lambda x: x > 0)[1:].any()
    lines = choice_lines(choice)
    assert "its size on disk was not measured" in lines[2] and "better by 20.0 points" in lines[2] and "unmeasured" in note_line(choice) and "large" not in note_line(choice)
    assert "unmeasured" not in lines[1]


def test_three_lines_say_pick_ties_and_what_is_given_up():
    pick, ties, gives_up = choice_lines(ask(disk_bytes=1.5e6, deployment_peak_bytes=55 * 2**20))
    assert pick.startswith("At most 1.5 MB on disk, 55 MiB in use: middle in int8, 59.") and "[" in pick and "(1 MB, 40 MiB)" in pick
    assert ties.startswith("It is significantly better than every other encoder that keeps them. The next best, small, is 19.")
    assert gives_up.startswith("Without limits the best is unmeasured")
    shares = {k: v for k, v in SHARES.items() if k != "unmeasured"}
    choice = choose(draws_of(rows(shares=shares)), COSTS, dict(streaming_latency_ms=math.inf))
    assert "streaming: middle" in choice_lines(choice)[0].lower() and choice_lines(choice)[2].endswith("it does not stream.")
    choice = choose(draws_of(rows(shares=shares | dict(twin=0.59))), pd.concat([COSTS, COSTS[COSTS.encoder == "middle"].assign(encoder="twin", disk_bytes_int8=0.9e6)]), dict(disk_bytes=1.5e6))
    assert "Not significantly different from it over the same utterances: " in choice_lines(choice)[1] and "twin has the least size on disk, 0.9 MB in int8" in choice_lines(choice)[1]
    assert choice_lines(ask())[2:] == ["Without limits nothing is given up."] and choice_lines(ask())[0].startswith("Without limits: unmeasured, 80.0 %")
    assert choice_lines(choose(draws_of(rows(shares=dict(large=0.6))), COSTS, {}))[1] == "There is no other encoder."


def test_where_nothing_fits_the_narrowest_limit_and_the_nearest_are_named():
    first, second, third = choice_lines(ask(disk_bytes=0.4e6, deployment_peak_bytes=70 * 2**20))
    assert first.startswith("Nothing keeps these limits: at most 0.4 MB on disk") and "The narrowest is the size on disk: none of 3 measured" in second
    assert "small, 40.0 %" in third and "0.5 MB in int8 where the limit is 0.4 MB, 25 % beyond it" in third and "MiB" not in third
    lines = choice_lines(ask(disk_bytes=0.6e6, deployment_peak_bytes=45 * 2**20))  # each is kept by one
    assert "1 of 3 measured encoders keeps it, and none of these keeps the others too" in lines[1] and "small" in lines[2] and "50 MiB where the limit is 45 MiB, 11 % beyond it" in lines[2]
    assert "No encoder that streams" in choice_lines(choose(draws_of(rows(shares=dict(large=0.6))), COSTS, dict(streaming_latency_ms=math.inf)))[2]


def test_a_study_without_cards_says_so():
    choice = choose(draws_of(rows()), COSTS[["encoder"]], dict(disk_bytes=1e6, deployment_latency_s=0.1))
    assert choice.pick is None and "No encoder here has a measured size on disk or time for 10 s" in choice_lines(choice)[1]
    assert choose(draws_of(rows()), pd.DataFrame(), dict(disk_bytes=1e6)).pick is None
    with pytest.raises(EsslError, match="no pre-trained|No pre-trained"):
        choose({}, COSTS, {})


@pytest.mark.parametrize("column, text, limit", [
    ("deployment_rtf", "10x real time", 0.1), ("deployment_rtf", "real time x10", 0.1), ("deployment_rtf", "10 × real-time", 0.1), ("deployment_rtf", "20x", 0.05), ("deployment_rtf", "0.25", 0.25),
    ("training_step_s_ratio", "0.8", 0.8), ("training_step_s_ratio", "0,8x", 0.8), ("training_step_s_ratio", "1 x attention's", 1.0), ("streaming_latency_ms", "160", 160), ("streaming_latency_ms", "0.16 s", 160),
    ("streaming_latency_ms", "Any", math.inf), ("deployment_latency_s", "100 ms", 0.1), ("deployment_peak_bytes", "50 MiB", 50 * 2**20), ("deployment_peak_bytes", "50 MB", 50e6), ("disk_bytes", "2000 kB", 2e6)])
def test_limits_are_read_with_their_units(column, text, limit):
    assert np.isclose(limit_of(column, text), limit) or limit_of(column, text) == limit


@pytest.mark.parametrize("column, text", [("deployment_rtf", "0x"), ("deployment_rtf", "x"), ("deployment_rtf", "-3x"), ("disk_bytes", "any"), ("disk_bytes", "10x"), ("streaming_latency_ms", "5 MB"), ("training_step_s_ratio", "x"),
                                          ("training_step_s_ratio", "attention"), ("deployment_rtf", "10 ms"), ("deployment_latency_s", "9" * 400), ("disk_bytes", ""), ("disk_bytes", "١٠x10 MB")])
def test_what_is_no_limit_is_refused(column, text):
    with pytest.raises(EsslError, match=LIMITS[column][0]):
        read_limit(text, *LIMITS[column])


def test_the_shipped_study_is_answered_as_its_tables_say():
    frame, probe = load_results(study_dir("small")), "masked phones, 200 ms"
    choice = choose_encoder(frame, probe, at_most=dict(disk_bytes="2 MB", deployment_latency_s="100 ms", streaming_latency_ms="any"))
    table = choice.table
    fits = table[(table.disk_bytes <= 2e6) & (table.deployment_latency_s <= 0.1) & table.streaming_latency_ms.notna()]
    assert len(fits) > 5 and choice.pick.value == fits.value.max() and fits.keeps.all() and table.keeps.sum() == len(fits)
    drawn = tradeoff_figure(frame, probe, budget=dict(disk_bytes="2 MB", deployment_latency_s="100 ms", streaming_latency_ms="any"))
    whole = {t.name for t in drawn.data if (t.meta or {}).get("role") == "point" and t.opacity == 1}
    assert whole == set(fits.label), "the figure fades what the answer does not take"
    for wrong in (dict(probe=probe, metric="nothing"), dict(probe=probe, at_most=dict(weight="1 MB")), dict(probe="nothing")):
        with pytest.raises(EsslError):
            choose_encoder(frame, **wrong)
    assert within_limits(pd.DataFrame(), ["a"], dict(disk_bytes=1)).tolist() == [False] and within_limits(pd.DataFrame(), ["a"], {}).tolist() == [True]


def test_what_few_bits_and_chunks_change_is_said_where_it_was_scored():
    frame, variants = load_results(study_dir("small")), scores_of(load_results(study_dir("streaming")))
    of_ligru = frame[frame.encoder == "ligru"]
    choice = choose_encoder(of_ligru, "phones", at_most=dict(disk_bytes="2 MB", streaming_latency_ms="160"))
    line = use_line(choice, variants, "phones", "results/streaming")
    assert line.startswith("int8 changes it by ") and "chunks of 160 ms change it by " in line and line in note_line(choice, line)
    d = lost_by(variants, "ligru", "phones", "chunks of 160 ms")
    assert f"{100 * d['value']:.1f} points".replace("-", "−") in line and d["low"] <= d["value"] <= d["high"]
    assert "this study has none of the encoder stored in int8 and streamed" in note_line(choice)
    partly = use_line(choice, variants[~variants.probe.str.contains("int8")], "phones", "results/streaming")
    assert partly.endswith("int8: not scored") and partly.startswith("chunks")
    assert use_line(choice, variants.head(0), "phones", "") == use_line(choice, variants, "no such task", "") == ""


def test_a_card_that_knows_newer_options_is_compared_with_older_ones():
    table = cost_table(load_results(study_dir("small")))
    lacking = table[table.deployment_latency_s_ratio.isna()].encoder.tolist()
    assert not lacking, f"measured, and not comparable: {lacking}"
