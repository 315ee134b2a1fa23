"""Tables of a study hold seeds and utterances together, pair by seed, and draw voices where a score knows them."""
import json

import numpy as np
import pandas as pd
import pytest

from essl_nb.core.intervals import bootstrap_interval, joint_difference, joint_interval, percentiles, joint_draws, seed_score
from essl_nb.core.registry import EsslError
from essl_nb.study.results import SCORED, cost_points, cost_table, difference, draws_of, load_results, over_seeds, paired_table, pareto_table, score_table, tied_with_best


def units_of(chance, seed, U=40, spread=0.0):
    "Counts of U utterances, alike in difficulty for every encoder."
    ease = np.random.default_rng(5).uniform(-0.1, 0.1, U)
    rng = np.random.default_rng([seed or 0, round(1000 * chance)])
    moved = chance + spread * rng.standard_normal()
    return [[int(rng.binomial(100, moved + e)), 100] for e in ease]


def row(encoder, seed, units, state="pretrained", **settings):
    "One line of a study."
    value = sum(u[0] for u in units) / sum(u[1] for u in units)
    score = dict(probe="phones", metric="accuracy", value=value, low=0.0, high=1.0, n=len(units), count=100 * len(units), units=units, unit_ids_hash="same", head="linear", labels="all", split="test", settings=settings)
    what = dict(encoder=encoder, mixer=encoder, family="guests", objective="clusters" if state == "pretrained" else None, seed=seed, state=state, probe="phones", call="phones", kw={})
    return dict(key=f"{encoder}{seed}{state}", kind="score", what=what, value=score, made=dict(seconds=1.0))


def written(folder, rows):
    "A study's folder."
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def study(tmp_path):
    rows = [row("old", s, units_of(0.5, s)) for s in (2, 0, 1)] + [row("new", s, units_of(0.54, s)) for s in range(3)]
    rows += [row("lone", 0, units_of(0.53, 0)), row("log-mel ±100 ms", None, units_of(0.45, None), "baseline")]
    return written(tmp_path, rows)


def test_score_table_has_the_joint_interval_and_one_seed_the_old_one(study):
    table = score_table(study).set_index("encoder")
    assert (table.loc["new", "low"], table.loc["new", "high"]) == joint_interval([units_of(0.54, s) for s in range(3)])
    assert (table.loc["lone", "low"], table.loc["lone", "high"]) == bootstrap_interval(units_of(0.53, 0))
    assert (table.loc["log-mel ±100 ms", "low"], table.loc["log-mel ±100 ms", "high"]) == bootstrap_interval(units_of(0.45, None))
    assert table.seeds.to_dict() == {"old": 3, "new": 3, "lone": 1, "log-mel ±100 ms": 1}


def test_differences_pair_by_seed_whatever_the_order_of_the_rows(study):
    pairs = paired_table(study, against=["old", "log-mel ±100 ms"]).set_index(["encoder", "against"])
    new, old = (seed_score([units_of(c, s) for s in range(3)]) for c in (0.54, 0.5))
    got = pairs.loc[("new", "old"), ["value", "low", "high"]]
    assert tuple(got) == pytest.approx(joint_difference(new, old), abs=1e-12)
    assert pairs.loc[("new", "log-mel ±100 ms"), "seeds_against"] == 1 and pairs.loc[("new", "log-mel ±100 ms"), "clear"]
    lone = pairs.loc[("lone", "old")]
    assert lone.seeds == 1 and lone.seeds_against == 3 and lone.low < lone.value < lone.high


def test_ties_are_decided_by_the_same_draws(study):
    draws = draws_of(load_results(study).query("kind == 'score'"))
    ties = tied_with_best(draws).set_index("encoder")
    best = ties.index[0]
    assert (ties.loc[best, ["difference", "low", "high"]] == 0).all() and ties.loc[best, "tied"]
    old, top = (next(d[2] for who, d in draws.items() if who[0] == name) for name in ("old", best))
    assert (ties.loc["old", "low"], ties.loc["old", "high"]) == percentiles(joint_draws(old, top), 0.95)


def test_many_seeds_apart_widen_the_interval(tmp_path):
    near = written(tmp_path, [row("a", s, units_of(0.5, s, spread=0.0)) for s in range(3)])
    width = np.ptp(score_table(near)[["low", "high"]].to_numpy())
    far = written(tmp_path, [row("a", s, units_of(0.5, s, spread=0.05)) for s in range(3)])
    assert np.ptp(score_table(far)[["low", "high"]].to_numpy()) > 1.5 * width


def test_voices_are_drawn_where_the_score_names_them(tmp_path):
    voices = np.repeat(np.arange(8), 5).tolist()
    units = [[30 + 5 * v + i % 2, 100] for i, v in enumerate(voices)]
    table = score_table(written(tmp_path, [row("a", 0, units, voices=voices)]))
    assert (table.low[0], table.high[0]) == bootstrap_interval(units, groups=voices) != bootstrap_interval(units)
    one = score_table(written(tmp_path, [row("a", 0, units, voices=[0] * 40)]))
    assert (one.low[0], one.high[0]) == bootstrap_interval(units), "a single voice cannot be resampled"
    with pytest.raises(EsslError, match="groups holds 3 labels"):
        score_table(written(tmp_path, [row("a", 0, units, voices=[0, 1, 2])]))


def test_a_seed_that_stands_twice_pairs_with_nobody(study):
    frame = load_results(study)
    twice = pd.concat([frame[frame.encoder == "new"], frame[(frame.encoder == "new") & (frame.seed == 0)]])
    assert over_seeds(twice).seeds[0] == ("new", 0)
    assert difference(twice, frame[frame.encoder == "old"])["seeds"] == 4


def test_other_utterances_and_other_metrics_are_not_paired(study):
    frame = load_results(study)
    new, old = frame[frame.encoder == "new"], frame[frame.encoder == "old"]
    for column in ("unit_ids_hash", "metric"):
        with pytest.raises(EsslError, match="cannot be paired"):
            difference(new, old.assign(**{column: "other"}))


@pytest.mark.parametrize("kinds", [(), ("run",), ("cost",), ("score",)], ids=lambda k: "-".join(k) or "nothing")
def test_a_study_with_some_kinds_of_facts_has_the_columns_of_all(kinds, tmp_path):
    rows = dict(
        run=dict(key="r", kind="run", what=dict(encoder="a", mixer="a", family="guests", objective="clusters", seed=0, pretrain={}), value=dict(steps=10, parameters=7, last=dict(step=10)), made=dict(seconds=1.0)),
        cost=dict(key="c", kind="cost", what=dict(encoder="a", mixer="a", family="guests", card="deployment", config={}, kw={}), value=dict(card="deployment", latency_s=0.1, points=[dict(seconds=1.0)]), made=dict(seconds=1.0)),
        score=row("a", 0, units_of(0.5, 0)),
    )
    frame = load_results(written(tmp_path, [rows[k] for k in kinds]))
    assert {"probe", "card", "machine", "train_seconds", "steps", *SCORED} <= set(frame.columns)
    for table in (score_table(frame), paired_table(frame, against=["untrained"])):
        assert len(table) == (kinds == ("score",) and "clear" not in table) and {"probe", "metric", "value", "low", "high"} <= set(table.columns)
    assert set(cost_table(frame).columns) >= {"encoder", "mixer", "family", "pretrain_minutes"}
    assert len(cost_points(tmp_path)) == ("cost" in kinds) and "seconds" in cost_points(tmp_path)
    if kinds != ("score",):
        with pytest.raises(EsslError, match="no probe 'phones'"):
            pareto_table(frame, "phones")
