"""Intervals: draws of utterances, of voices, and of seeds and utterances together; p-values of many comparisons."""
import math
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pytest

from essl_nb.core.intervals import (
    adjusted_p,
    bootstrap_interval,
    joint_difference,
    joint_draws,
    joint_interval,
    p_value,
    paired_interval,
    percentiles,
    pooled_seeds,
    ratio,
    resampled,
    seed_score,
    seed_variance,
    student_draws,
)
from essl_nb.core.registry import EsslError


def scores(S=3, U=70, seeds=0.0, both=0.0, shift=0.0, key=0, totals=None):
    "Units of S seeds over U utterances with known spreads between seeds, and of seed and utterance together."
    rng = np.random.default_rng(key)
    share = 0.5 + shift + 0.08 * np.random.default_rng(99).standard_normal(U) + seeds * rng.standard_normal((S, 1)) + both * rng.standard_normal((S, U))
    n = np.full(U, 100.0) if totals is None else totals
    return np.stack([np.clip(share, 0, 1) * n, np.broadcast_to(n, (S, U))], -1)


def test_one_seed_is_the_bootstrap_over_utterances_to_the_last_digit():
    a, b = scores(1, key=1)[0], scores(1, key=2, both=0.1)[0]
    assert joint_interval(a[None]) == bootstrap_interval(a)
    pair = [SimpleNamespace(units=u, unit_ids_hash="x", metric="accuracy") for u in (a, b)]
    assert joint_difference(seed_score([a]), seed_score([b])) == paired_interval(*pair)
    assert np.array_equal(joint_draws(seed_score([a])), resampled(a))


def test_the_bootstrap_over_utterances_is_what_it_was():
    "Values of the form before seeds and voices were drawn, with the same seed of draws."
    rng = np.random.default_rng(1)
    units = [[int(rng.binomial(100, p)), 100] for p in rng.uniform(0.4, 0.8, 70)]
    assert bootstrap_interval(units) == pytest.approx((0.5837107142857143, 0.6441571428571428), abs=1e-12)


@pytest.mark.parametrize("seeds, both", [(0.0, 0.05), (0.01, 0.05), (0.05, 0.02)], ids=["none", "some", "much"])
def test_the_spread_is_that_of_the_two_way_analysis(seeds, both):
    "The draws' scale without Student's widening, against MS_seed + MS_utterance - MS_both over SU."
    units = scores(seeds=seeds, both=both, key=4)
    s = seed_score(units, samples=20_000)
    y = units[..., 0] / units[..., 1]
    S, U = y.shape
    rest = y - y.mean(0) - y.mean(1, keepdims=True) + y.mean()
    ms_both = (rest**2).sum() / ((S - 1) * (U - 1))
    ms_seed, ms_utterance = U * y.mean(1).var(ddof=1), S * y.mean(0).var(ddof=1)
    own, shared = seed_variance(s.by_seed, s.parts)
    assert own == pytest.approx(ms_seed / (S * U)) and shared == pytest.approx(ms_both / (S * U))
    kept = np.percentile(joint_draws(s) - math.sqrt(own) * student_draws(S - 1, 20_000, 0), [16, 84])
    assert np.diff(kept)[0] / 2 == pytest.approx(math.sqrt((ms_utterance * (U - 1) / U - ms_both) / (S * U)), rel=0.05)


@pytest.mark.parametrize("freedom, at", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_students_t_has_its_published_quantiles(freedom, at):
    t = student_draws(freedom, 40_000, 0)
    assert np.quantile(t, 0.975) == pytest.approx(at, rel=2e-3) and np.quantile(t, 0.025) == pytest.approx(-at, rel=2e-3)
    assert abs(np.corrcoef(t.clip(-9, 9), student_draws(freedom, 40_000, 1).clip(-9, 9))[0, 1]) < 0.03


def held(S, between, both, trials=250):
    "How many intervals of a difference hold its true value, seeds paired."
    inside = 0
    for k in range(trials):
        a, b = (scores(S, seeds=between, both=both, key=2 * k + i, shift=0.02 * (1 - i)) for i in (0, 1))
        # the clip of `scores` is far away, so the true difference is 0.02
        _, low, high = joint_difference(seed_score(a, samples=500), seed_score(b, samples=500))
        inside += low <= 0.02 <= high
    return inside / trials


@pytest.mark.parametrize("S, between", [(3, 0.0), (3, 0.01), (3, 0.05), (5, 0.01)])
def test_differences_are_covered(S, between):
    assert 0.91 < held(S, between, 0.04) <= 0.995


def test_pairing_by_seed_removes_what_a_seed_does_to_both():
    a = scores(seeds=0.05, key=1)
    b = a - [1.0, 0.0] * np.ones_like(a)  # a point worse with each seed
    paired = joint_difference(seed_score(a, seeds=(0, 1, 2)), seed_score(b, seeds=(0, 1, 2)))
    apart = joint_difference(seed_score(a, seeds=(0, 1, 2)), seed_score(b, seeds=(3, 4, 5)))
    assert paired == pytest.approx((0.01, 0.01, 0.01)) and apart[1] < 0 < apart[2]


def test_a_side_of_one_seed_brings_no_spread_of_seeds():
    a, b = scores(seeds=0.02, both=0.02, key=3), scores(1, key=8)
    one = seed_score(b, seeds=("a baseline",))
    d, low, high = joint_difference(seed_score(a), one)
    assert d == pytest.approx(ratio(a.mean(0)) - ratio(b[0])) and low < d < high
    narrower = joint_difference(seed_score(a[:1]), one)
    assert high - low > narrower[2] - narrower[1]


def test_seeds_that_agree_wholly_leave_the_interval_of_utterances():
    a = scores(1, key=5)
    assert joint_interval(np.repeat(a, 3, 0)) == pytest.approx(bootstrap_interval(a[0]))


def test_the_pool_is_the_mean_variance_with_all_degrees_of_freedom():
    all_of = [seed_score(scores(S, seeds=0.02, both=0.03, key=k)) for k, S in enumerate((3, 5, 1, 2))]
    pool = pooled_seeds(all_of)
    assert pool.freedom == 2 + 4 + 1
    assert pool.variance == pytest.approx(sum(((s.by_seed - s.by_seed.mean()) ** 2).sum() for s in all_of) / 7)
    mean_square = sum(((s.parts - s.parts.mean(0)) ** 2).sum() / 69 for s in all_of if len(s.by_seed) > 1) / 7
    assert pool.both == pytest.approx(mean_square / 70)
    with pytest.raises(EsslError, match="None of these scores has two seeds"):
        pooled_seeds(all_of[2:3])


def test_a_pool_gives_single_seeds_an_interval_that_holds_seeds():
    pool = pooled_seeds([seed_score(scores(seeds=0.03, both=0.02, key=k)) for k in range(6)])
    one, other = (seed_score(scores(1, key=k)) for k in (11, 12))
    (_, low, high), (_, near, far) = joint_difference(one, other, pool=pool), joint_difference(one, other)
    assert high - low > 2 * (far - near) and (high - low) / 2 == pytest.approx(2.18 * math.sqrt(2 * pool.variance), rel=0.1)  # t of 12 degrees of freedom


def test_utterances_of_unequal_length_and_silent_ones():
    totals = np.random.default_rng(0).integers(0, 200, 70).astype(float)
    totals[:5] = 0
    low, high = joint_interval(scores(seeds=0.01, both=0.03, totals=totals))
    assert 0.4 < low < high < 0.6


def test_voices_are_drawn_whole():
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(8), 9)
    shares = np.clip(0.5 + 0.1 * rng.standard_normal(8)[of] + 0.02 * rng.standard_normal(72), 0, 1)
    units = np.stack([100 * shares, np.full(72, 100.0)], -1)
    low, high = bootstrap_interval(units, groups=of, samples=10_000)
    by_voice = [shares[of == g].mean() for g in range(8)]
    want = np.percentile(np.random.default_rng(1).choice(by_voice, (10_000, 8)).mean(1), [2.5, 97.5])
    assert (low, high) == pytest.approx(want, abs=0.008)
    plain = bootstrap_interval(units)
    assert high - low > 1.5 * (plain[1] - plain[0])
    assert joint_interval(units[None], groups=of) == bootstrap_interval(units, groups=of)
    a = SimpleNamespace(units=units, unit_ids_hash="x", metric="m")
    assert paired_interval(a, a, groups=of) == (0, 0, 0)


def test_names_of_voices_do_not_matter():
    units, of = scores(1, 12, key=2)[0], list("aabbccddeeff")
    assert bootstrap_interval(units, groups=of) == bootstrap_interval(units, groups=[{"a": 10, "b": 11, "c": 12, "d": 13, "e": 14, "f": 15}[g] for g in of])


BAD = {
    "ragged": (lambda: joint_interval([[[1, 2], [1, 2]], [[1, 2]]]), "different numbers of utterances"),
    "flat": (lambda: seed_score([[1, 2], [1, 2]]), "(S,U,2)"),
    "none": (lambda: seed_score([]), "(S,U,2)"),
    "nan": (lambda: seed_score([[[1, 2], [float("nan"), 2]]]), "NaN"),
    "silent seed": (lambda: seed_score([[[1, 2], [1, 2]], [[0, 0], [0, 0]]]), "at least one scored frame"),
    "twice": (lambda: seed_score(scores(2), seeds=(0, 0)), "its own label"),
    "labels": (lambda: seed_score(scores(2), seeds=(0,)), "its own label"),
    "other utterances": (lambda: joint_difference(seed_score(scores(2, 30)), seed_score(scores(2, 31))), "cannot be paired"),
    "one group": (lambda: bootstrap_interval(scores(1)[0], groups=["a"] * 70), "at least two scored groups"),
    "groups": (lambda: bootstrap_interval(scores(1)[0], groups=["a", "b"]), "2 labels for 70 utterances"),
    "correction": (lambda: adjusted_p([0.1], "bonferoni"), "'holm', 'fdr' or 'none'"),
    "level": (lambda: joint_interval(scores(2), level=95), "between 0 and 1"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_said(what):
    call, words = BAD[what]
    with pytest.raises(EsslError) as e:
        call()
    assert words in str(e.value)


def test_p_values_and_intervals_agree():
    rng = np.random.default_rng(0)
    for shift in np.linspace(-3, 3, 25):
        draws = rng.standard_normal(2000) + shift
        low, high = percentiles(draws, 0.95)
        assert (p_value(draws) < 0.05) == (low > 0 or high < 0) or min(abs(low), abs(high)) < 0.02
    assert p_value(np.array([np.nan, 1.0, 2.0])) == pytest.approx(2 / 3)


def test_corrections_against_their_definitions():
    p = np.random.default_rng(3).uniform(0, 0.2, 40)
    ordered = np.sort(p)
    rejected = next((k for k in range(40) if ordered[k] > 0.05 / (40 - k)), 40)
    assert (adjusted_p(p, "holm") <= 0.05).sum() == rejected
    below = [k + 1 for k in range(40) if ordered[k] <= 0.05 * (k + 1) / 40]
    assert (adjusted_p(p, "fdr") <= 0.05).sum() == max(below, default=0)
    assert np.array_equal(adjusted_p(p, "none"), p) and (adjusted_p(p, "holm") >= adjusted_p(p, "fdr")).all() and not len(adjusted_p([], "holm"))


def test_ten_thousand_draws_take_no_time():
    units = scores(seeds=0.01)
    joint_interval(units, samples=10_000)
    times = []
    for _ in range(3):
        start = perf_counter()
        joint_interval(units, samples=10_000)
        times.append(perf_counter() - start)
    assert min(times) < 0.1
