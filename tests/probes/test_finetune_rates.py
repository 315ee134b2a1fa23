"""A learning rate chosen on valid: each rate trains once, the best on valid is scored, and test has no say."""
import json
from types import SimpleNamespace

import pytest
from test_probe import Toy, probe

import essl_nb.probes.finetune as module
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.finetune import best_on_valid, candidate_rates
from essl_nb.study.grid import example_grid, grid_cells, grid_schema, read_grid
from essl_nb.study.results import frame_rows

RATES, BRIEF = (1e-4, 0.02, 0.003), dict(epochs=4, batch_seconds=4, start="scratch")


@pytest.fixture(scope="module")
def encoder():
    "A real encoder, small and untrained."
    return build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0)


@pytest.fixture(scope="module")
def chosen(encoder):
    "The score of a choice among three rates, and how many trainings it took."
    runs, fit = [], module.fit
    module.fit = lambda *args, **kw: runs.append(args[5].lr) or fit(*args, **kw)
    try:
        return probe(encoder, "finetune", Toy(20), lr=list(RATES), **BRIEF), runs
    finally:
        module.fit = fit


def test_the_rate_is_the_best_on_valid_and_all_looks_are_kept(chosen, encoder):
    score, runs = chosen
    assert runs == list(RATES), "each rate trains once, and the chosen one is not trained again"
    alone = {rate: probe(encoder, "finetune", Toy(20), lr=rate, **BRIEF) for rate in RATES}
    looks = {rate: s.settings["curve"][-1] for rate, s in alone.items()}
    assert score.settings["lrs_tried"] == {f"{rate:g}": look for rate, look in looks.items()}
    best = min(looks, key=lambda rate: (looks[rate]["valid_per"], looks[rate]["valid_loss"]))
    assert score.settings["lr"] == best and score.units == alone[best].units and score.settings["curve"] == alone[best].settings["curve"]
    assert len({look["valid_loss"] for look in looks.values()}) == 3, "the rates differ, so that there is something to choose"


def test_test_is_not_looked_at_before_the_choice(chosen, encoder, monkeypatch):
    "With other labels and other sound in test, all that is chosen and stored of valid stays; test is heard once."
    toy = Toy(20)
    for u in toy:
        if u.split == "test":
            u.phones = tuple(SimpleNamespace(label=toy[0].phones[0].label, start=p.start, end=p.end) for p in u.phones)
            toy.store[u.id] = toy.store[u.id].flip(1)
    heard, listen = [], module.listen
    monkeypatch.setattr(module, "listen", lambda model, raws, *args, **kw: heard.append(raws) or listen(model, raws, *args, **kw))
    score = probe(encoder, "finetune", toy, lr=list(RATES), **BRIEF)
    kept = ("lr", "lrs_tried", "curve")
    assert {k: score.settings[k] for k in kept} == {k: chosen[0].settings[k] for k in kept} and score.units != chosen[0].units
    test_clips = [toy.store[u.id].tolist() for u in toy if u.split == "test"]
    with_test = [i for i, raws in enumerate(heard) if any(r.tolist() in test_clips for r in raws)]
    assert with_test == [len(heard) - 1]


def test_one_rate_in_a_list_is_that_rate(encoder):
    one, plain = (probe(encoder, "finetune", Toy(20), lr=lr, epochs=1, batch_seconds=4) for lr in ([0.002], 0.002))
    assert one.units == plain.units and one.settings == plain.settings and one.settings["lrs_tried"] == {}


def test_a_rate_that_diverges_is_not_chosen(encoder):
    score = probe(encoder, "finetune", Toy(20), lr=[1e30, 1e-3], epochs=1, batch_seconds=4)
    assert score.settings["lr"] == 1e-3 and "diverged" in score.settings["lrs_tried"]["1e+30"]
    with pytest.raises(EsslError, match="diverged at each of 1e\\+30, 1e\\+31"):
        probe(encoder, "finetune", Toy(20), lr=[1e30, 1e31], epochs=1, batch_seconds=4)


def test_of_equal_errors_the_lower_loss_and_then_the_first():
    look = lambda per, loss: dict(valid_per=per, valid_loss=loss)
    assert best_on_valid({1: look(0.2, 3.0), 2: look(0.2, 2.0), 3: look(0.3, 1.0)}) == 2
    assert best_on_valid({1: look(0.2, 2.0), 2: look(0.2, 2.0)}) == 1


WRONG = {
    "empty": (dict(lr=[]), "empty list"),
    "zero": (dict(lr=[1e-3, 0]), "holds 0; learning rates are numbers above 0"),
    "negative": (dict(lr=-1e-3), "holds -0.001"),
    "twice": (dict(lr=[1e-3, 1e-4, 1e-3]), "0.001 2 times"),
    "words": (dict(lr=["fast", 1e-3]), "'fast'"),
    "true": (dict(lr=True), "True"),
    "nan": (dict(lr=[float("nan"), 1e-3]), "nan"),
    "infinite": (dict(lrs=(float("inf"), 1e-3)), "lrs holds inf"),
    "both": (dict(lr=[1e-3, 1e-4], lrs=(1e-3, 1e-4)), "Both lr and lrs"),
}


@pytest.mark.parametrize("what", WRONG)
def test_rates_that_are_none_are_refused(what, encoder):
    options, words = WRONG[what]
    with pytest.raises(EsslError) as e:
        probe(encoder, "finetune", Toy(20), **options)
    assert words in str(e.value)
    with pytest.raises(EsslError):
        candidate_rates(**options)


def test_short_runs_are_those_of_lrs(encoder):
    with pytest.raises(EsslError, match="tune_epochs"):
        probe(encoder, "finetune", Toy(20), lr=[1e-3, 1e-4], tune_epochs=1)


def with_probe(**point):
    "The example grid with one fine-tuning."
    return {**example_grid(), "probes": [{"name": "fine-tuning", "probe": "finetune", **point}]}


def test_a_grid_asks_for_a_choice_by_one_fact_each():
    grid = read_grid(with_probe(kw={"lr": [3e-4, 1e-3, 3e-3]}))
    cells = [c for c in grid_cells(grid) if c.kind == "score"]
    assert len(cells) == 4 and all(c.what["kw"]["lr"] == [3e-4, 1e-3, 3e-3] for c in cells), "two encoders, pre-trained and not"
    again = [c.key for c in grid_cells(read_grid(json.loads(json.dumps(with_probe(kw={"lr": [0.0003, 0.001, 0.003]}))))) if c.kind == "score"]
    assert again == [c.key for c in cells]
    assert grid_schema()["$defs"]["ProbePoint"]["properties"]["kw"]["type"] == "object"


@pytest.mark.parametrize("what", [w for w in WRONG if w not in ("nan", "infinite")])
def test_a_grid_refuses_such_rates_before_anything_runs(what):
    options, words = WRONG[what]
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    name = example_grid()["encoders"][0]["name"]
    for point in (dict(kw=options), dict(kw_for={name: options})):
        with pytest.raises(EsslError) as e:
            read_grid(with_probe(**point))
        assert words in str(e.value) and "probes[0] 'fine-tuning'" in str(e.value)


def test_the_chosen_rate_is_a_column_of_the_results(chosen):
    score = chosen[0]
    row = dict(key="k", kind="score", what=dict(encoder="a", mixer="a", family="guests", probe="fine-tuning"), made={}, value=dict(vars(score), settings=score.settings))
    assert frame_rows(row)[0]["lr"] == score.settings["lr"]
