"""Ranks: pairs, corrections, groups of encoders that are not separable, and what a table and a sentence say of them."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from essl_nb.core.intervals import adjusted_p
from essl_nb.core.registry import EsslError
from essl_nb.study.ranks import largest_groups, letters, rank_encoders, rank_finding, rank_text
from essl_nb.study.results import paired_table, score_table
from essl_nb.viz.ranks import pair_matrix, rank_figure


def scores(shifts: dict, seeds=3, spread=0.002, metric="accuracy", objectives=("o",), key=0):
    "Encoders so far from one half, over the same 50 utterances."
    ease = 0.5 + 0.08 * np.random.default_rng(7).standard_normal(50)
    rng, rows = np.random.default_rng(key), []
    for objective in objectives:
        for name, shift in shifts.items():
            for seed in range(seeds if isinstance(seeds, int) else seeds[name]):
                share = ease + shift + spread * rng.standard_normal() + 0.01 * rng.standard_normal(50)
                units = [[float(100 * s), 100.0] for s in share]
                rows.append(dict(encoder=name, mixer=name, family="guests", objective=objective, seed=seed, state="pretrained", kind="score", probe="p", task="p", metric=metric, head="linear", labels="all", split="test",
                                 span_ms=200, value=float(np.mean(share)), units=units, unit_ids_hash="same", better="lower" if metric == "per" else "higher"))
    return pd.DataFrame(rows)


def test_pairs_are_those_of_the_paired_table():
    frame = scores(dict(a=0.0, b=0.05, c=0.001))
    r = rank_encoders(frame, "p")
    assert r.table.encoder[0] == "b" and r.table.value.is_monotonic_decreasing and len(r.pairs) == 3
    names = r.table.encoder
    for p in r.pairs.itertuples():
        other = paired_table(frame, against=names[p.second]).set_index("encoder").loc[names[p.first]]
        assert p.value == pytest.approx(other.value) and (p.low, p.high) == pytest.approx((other.low, other.high), abs=0.004)
    want = score_table(frame).set_index("encoder")
    assert r.table.set_index("encoder")[["low", "high"]].equals(want.loc[names, ["low", "high"]])


@pytest.mark.parametrize("how", ["none", "fdr", "holm"])
def test_separable_pairs_are_those_whose_adjusted_p_is_small(how):
    r = rank_encoders(scores(dict(a=0.0, b=0.02, c=0.021, d=0.08)), "p", correction=how)
    assert np.allclose(r.pairs.adjusted_p, adjusted_p(r.pairs.p, how)) and (r.pairs.separable == (r.pairs.adjusted_p <= 0.05)).all()
    clear = (r.pairs.low > 0) | (r.pairs.high < 0)
    assert (clear | ~r.pairs.separable).all(), "whatever is separable has an interval without zero"


def test_counts_and_letters_say_the_same_as_the_pairs():
    r = rank_encoders(scores({f"e{i}": 0.006 * i for i in range(9)}, key=3), "p")
    t = r.table
    assert 0 < r.pairs.separable.sum() < len(r.pairs)
    assert (t.better_than + t.worse_than + t.not_separable == 8).all()
    for p in r.pairs.itertuples():
        assert p.separable != bool({*t.groups[p.first]} & {*t.groups[p.second]})
    assert rank_text(r).index.tolist() == t.label.tolist() and rank_text(r).iloc[0]["score, %"].endswith("×3")


def test_pooled_seeds_separate_more_and_cover_single_ones():
    shifts = {f"e{i}": 0.01 * i for i in range(6)}
    own, pooled = (rank_encoders(scores(shifts, key=1, spread=0.004), "p", correction="holm", seeds=s) for s in ("own", "pooled"))
    assert pooled.pairs.separable.sum() > own.pairs.separable.sum() and "pooled" in rank_finding(pooled) and "pooled" not in rank_finding(own)
    assert own.table[["encoder", "value", "low", "high"]].equals(pooled.table[["encoder", "value", "low", "high"]])
    single = dict(seeds=dict.fromkeys(shifts, 3) | dict(e0=1, e5=1), spread=0.03, key=1)
    own, pooled = (rank_encoders(scores(shifts, **single), "p", seeds=s) for s in ("own", "pooled"))
    lone = (own.table.seeds[own.pairs["first"]].to_numpy() == 1) & (own.table.seeds[own.pairs["second"]].to_numpy() == 1)
    width = lambda r: float((r.pairs.high - r.pairs.low)[lone].iloc[0])
    assert lone.sum() == 1 and width(pooled) > 3 * width(own)
    with pytest.raises(EsslError, match="has two seeds or more"):
        rank_encoders(scores(shifts, seeds=1), "p", seeds="pooled")


def test_lower_is_better_where_it_is_an_error_rate():
    r = rank_encoders(scores(dict(a=0.0, b=0.1, c=0.2), metric="per"), "p", "per")
    assert r.table.encoder.tolist() == ["a", "b", "c"] and r.table.better_than.tolist() == [2, 1, 0] and (r.pairs.value < 0).all()
    points, _ = pair_matrix(r)
    assert points[0, 2] > 15 and points[2, 0] < -15


def brute_force(alike):
    "Every set of alike rows that nothing can be added to."
    n = len(alike)
    sets = [s for k in range(1, n + 1) for s in combinations(range(n), k) if all(alike[i, j] for i, j in combinations(s, 2))]
    return sorted(s for s in sets if not any({*s} < {*other} for other in sets))


@pytest.mark.parametrize("n, share", [(1, 0.5), (4, 0.5), (7, 0.3), (8, 0.7), (9, 1.0), (9, 0.0)])
def test_groups_are_all_the_largest_ones(n, share):
    alike = np.random.default_rng(n).random((n, n)) < share
    alike = np.triu(alike, 1) | np.triu(alike, 1).T | np.eye(n, dtype=bool)
    assert largest_groups(alike) == brute_force(alike)
    assert largest_groups(np.zeros((0, 0), dtype=bool)) == []


def test_more_groups_than_letters():
    assert letters([(k,) for k in range(28)], 28)[-3:] == ["z", "a2", "b2"]


def test_other_utterances_are_not_separable_and_not_counted():
    frame = scores(dict(a=0.0, b=0.1, c=0.2))
    frame.loc[frame.encoder == "c", "unit_ids_hash"] = "others"
    r = rank_encoders(frame, "p")
    odd = (r.table.encoder[r.pairs["first"]] == "c").to_numpy()
    assert not r.pairs.separable[odd].any() and r.pairs.p[odd].isna().all() and r.pairs.separable[~odd].all()
    assert r.pairs.adjusted_p[~odd].tolist() == r.pairs.p[~odd].tolist(), "one known pair is not many"
    assert rank_figure(r).data


def test_objectives_stand_in_the_label():
    r = rank_encoders(scores(dict(a=0.0, b=0.1), objectives=("x", "y")), "p")
    assert set(r.table.label) == {"a, x", "a, y", "b, x", "b, y"}


@pytest.mark.parametrize("frame, words", [
    (scores(dict(a=0.0)), "a is the only encoder"),
    (scores(dict(a=0.0, b=0.2)), "1 of 1 pair is separable; b is separable from all others."),
    (scores(dict(a=0.0, b=0.0), seeds=1), "0 of 1 pair is separable; 1 of the other 1 encoder is not separable from the best"),
    (scores(dict(a=0.0, b=0.2, c=-0.2), seeds=dict(a=3, b=3, c=1)), "1 of the 3 has one seed."),
], ids=["one", "two", "alone", "one of three"])
def test_the_sentence(frame, words):
    r = rank_encoders(frame, "p")
    assert words in rank_finding(r) and rank_figure(r).layout.title.text


def test_the_figure_shows_every_pair_once_in_each_order():
    r = rank_encoders(scores({f"<{i}>": 0.01 * i for i in range(6)}, key=2), "p")
    figure = rank_figure(r)
    filled, dots = figure.data[1], figure.data[2]
    assert np.isfinite(np.array(filled.z, dtype=float)).sum() == 2 * r.pairs.separable.sum()
    assert len(dots.x) == 2 * (~r.pairs.separable).sum()
    assert "&lt;5&gt;" in figure.layout.yaxis.ticktext[0] and figure.layout.yaxis.range == (5.5, -0.5)
    assert rank_figure(r, "a finding").layout.title.text == "a finding"
    assert figure.layout.yaxis.title.text.startswith("p, accuracy, %") and "Benjamini" in figure.layout.xaxis.title.text


def test_many_encoders_take_seconds_and_not_minutes():
    from time import perf_counter

    frame, start = scores({f"e{i}": 0.002 * i for i in range(24)}), perf_counter()
    r = rank_encoders(frame, "p", correction="holm")
    assert len(r.pairs) == 276 and perf_counter() - start < 10
