"""What a figure of costs compares: one machine, beside attention, in one unit; and whom it calls the best."""
import io
import json

import numpy as np
import pandas as pd
import pytest
from madeup import make_curves, make_study

from essl_nb.app.clips import Sessions
from essl_nb.app.compare import BUDGETS, compare_message, limits_of
from essl_nb.app.curves import CurvesFile, curves_message
from essl_nb.app.library import EncoderLibrary, Studies
from essl_nb.app.listen import ListenController
from essl_nb.core.files import append_line
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.study.machines import chosen_machine, comparable_times, machines_of
from essl_nb.study.results import cost_points, cost_table, draws_of, load_results, pareto_table, tied_with_best
from essl_nb.viz.tradeoff import COSTS, cost_column, is_measured, limit_of, tradeoff_figure

HERE, THERE = dict(cpu="here", vector="AVX512", cores=2), dict(cpu="there", vector="AVX2", cores=4)


def card(folder, name, machine, latency, own, **more):
    "A deployment and a training card, as the cost cards write them."
    what = dict(encoder=name, mixer=name, family=mixers.get(name).meta["family"])
    made = dict(seconds=1.0, machine=machine)
    ratio = latency / own
    common = dict(threads=1, machine=machine, against=dict(mixer="a"), parameters=10**6, **more)
    use = dict(card="deployment", precision="fp32", reference_seconds=10.0, disk_bytes_fp32=4e6, rtf=latency / 10, latency_s=latency, baseline_latency_s=own, latency_s_ratio=ratio, latency_s_ratio_low=ratio * 0.9,
               latency_s_ratio_high=ratio * 1.1, peak_bytes=2e7, macs_per_second=1e8, points=[dict(seconds=1.0, latency_s=latency / 10)])
    train = dict(card="training", precision="bf16", step_s=3 * latency, baseline_step_s=3 * own, step_s_ratio=ratio, peak_bytes=3e7, macs_per_second=3e8)
    run = dict(steps=2000, stopped=None, parameters=10**6, last=dict(loss=1.0))
    append_line(folder / "rows.jsonl", dict(key=f"{name} run", kind="run", what=dict(what, objective="random", seed=0, pretrain=dict(encoder=dict(mixer=name))), value=run, made=dict(made, seconds_per_step=3 * latency)))
    for value in (use, train):
        append_line(folder / "rows.jsonl", dict(key=f"{name} {value['card']} new", kind="cost", what=dict(what, card=value["card"]), value=common | value, made=made))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    "Four encoders on one machine, which was busy for one of them, and two on a slower one that are truly quicker beside attention."
    folder = tmp_path_factory.mktemp("mixed")
    names = list_mixers()[:6]
    make_study(folder, seeds=1, names=names, ship=False)
    lines = [x for x in (folder / "rows.jsonl").read_text().splitlines() if json.loads(x)["kind"] != "cost"]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for name, machine, latency, own in zip(names, [HERE] * 4 + [THERE] * 2, (0.05, 0.04, 0.20, 0.03, 0.15, 0.10), (0.05, 0.05, 0.25, 0.05, 0.20, 0.20)):
        card(folder, name, machine, latency, own)
    return folder, names


MEASURED = [c for c in COSTS if is_measured(c)]


@pytest.mark.parametrize("cost", MEASURED)
@pytest.mark.parametrize("machine", ["here, AVX512", "there, AVX2"])
def test_an_axis_holds_the_measurements_of_one_machine(mixed, cost, machine):
    folder, names = mixed
    fig = tradeoff_figure(folder, "first question", cost=cost, machine=machine)
    drawn = {t.name for t in fig.data if (t.meta or {}).get("role") == "point"}
    assert drawn == set(names[:4] if machine.startswith("here") else names[4:])


@pytest.mark.parametrize("cost", [c for c in COSTS if not is_measured(c)])
def test_what_is_counted_is_the_same_everywhere(mixed, cost):
    folder, names = mixed
    fig = tradeoff_figure(folder, "first question", cost=cost)
    assert {t.name for t in fig.data if (t.meta or {}).get("role") == "point"} == set(names)


def test_every_measured_column_of_the_tables_is_of_one_machine(mixed):
    folder, names = mixed
    frame = load_results(folder)
    assert machines_of(frame).to_dict() == {"here, AVX512": 4, "there, AVX2": 2} and chosen_machine(frame) == "here, AVX512"
    for machine, own in (("here, AVX512", names[:4]), ("there, AVX2", names[4:])):
        for table in (cost_table(frame, machine), pareto_table(frame, "first question", "accuracy", machine)):
            measured = [c for c in table if c.startswith(("deployment_latency", "deployment_rtf", "deployment_peak", "training_step", "training_peak", "pretrain"))]
            assert len(measured) > 6 and set(table[table[measured].notna().any(axis=1)].encoder) <= set(own) and table.parameters.notna().all()
        assert set(cost_points(folder, machine).encoder) == set(own)
    with pytest.raises(EsslError, match="here, AVX512"):
        cost_table(frame, "nowhere")


def test_a_busy_machine_spoils_no_time(mixed):
    "One encoder took 200 ms while attention took 250 beside it: it is as quick as the one that took 40 beside 50."
    costs = comparable_times(cost_table(mixed[0])).set_index("encoder")
    names = mixed[1]
    assert np.isclose(costs.deployment_latency_s[names[2]], costs.deployment_latency_s[names[1]]) and np.isclose(costs.deployment_latency_s[names[0]], 0.05)
    assert np.isclose(costs.deployment_rtf[names[2]], 0.004) and np.isclose(costs.training_step_s[names[2]], 0.12)


def test_budgets_hold_on_the_same_machine(mixed):
    folder, names = mixed
    study = Studies(folder).opened
    _, t = compare_message(study, {}, "parameters", False, {b: "" for b in BUDGETS} | dict(deployment_latency_s="45 ms"), None, False, "here, AVX512")
    assert set(t.points[t.points.within].encoder) == {names[1], names[2], names[3]}, "40, 40 and 30 ms on that machine; the two others were not measured there"


def test_the_caption_names_the_machine_and_who_is_missing(mixed):
    folder, names = mixed
    value, _ = compare_message(Studies(folder).opened, {}, "deployment_latency_s", False, {}, None, False, "here, AVX512")
    caption = json.loads(value)["caption"]
    assert "one machine: here, AVX512, 1 thread, fp32, 10 s of audio" in caption and f"Left out, since not measured there: {', '.join(names[4:])}." in caption and "50 ms (median of 4 measurements, 50 to 250)" in caption


def test_other_threads_or_lengths_are_not_compared(tmp_path):
    names = list_mixers()[:3]
    for name, more in zip(names, ({}, {}, dict(threads=4))):
        card(tmp_path, name, HERE, 0.04, 0.05, **{}) if not more else None
    card(tmp_path, names[2], HERE, 0.04, 0.05)
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows[-2:]:
        row["value"]["threads"] = 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    costs = cost_table(tmp_path).set_index("encoder")
    assert costs.deployment_latency_s.notna().tolist() == [True, True, False]


def test_curves_of_two_machines_do_not_meet(tmp_path):
    names = list_mixers()[:4]
    make_curves(tmp_path, names)
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["made"]["machine"] = dict(cpu="there") if row["mixer"] == names[3] else dict(cpu="here")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    value, *_ = curves_message(CurvesFile(tmp_path), {}, None)
    d = json.loads(value)
    drawn = {t["name"] for t in d["figure"]["data"] if t.get("meta", {}).get("role") == "curve"}
    assert names[3] not in drawn and len(drawn) >= 2 and (names[3] in d["caption"] or mixers.get(names[3]).meta.get("control"))


def scores(**values):
    "Score rows over the same 40 utterances; the utterances differ much more than the encoders."
    generator = np.random.default_rng(0)
    hard = generator.normal(0, 15, 40)
    rows = []
    for name, shift in values.items():
        right = np.clip(50 + hard + shift + generator.normal(0, 0.5, 40), 0, 100).round()
        rows.append(dict(encoder=name, objective="o", state="pretrained", probe="p", metric="accuracy", seed=0, units=[[int(r), 100] for r in right], unit_ids_hash="same", better="higher"))
    return pd.DataFrame(rows)


def test_the_best_is_tied_with_those_that_pairs_cannot_tell_from_it():
    ties = tied_with_best(draws_of(scores(a=0, b=2, c=2.02, d=-20)))
    assert set(ties[ties.tied].encoder) == {"b", "c"} and ties.encoder.iloc[0] in "bc", "intervals of a and b overlap almost wholly, and in pairs a is clearly behind"
    lower = tied_with_best(draws_of(scores(a=0, b=2, d=-20)), lower=True)
    assert lower.encoder.iloc[0] == "d" and lower.tied.tolist() == [True, False, False]


def test_other_utterances_cannot_be_told_apart():
    table = scores(a=0, b=5)
    table.loc[0, "unit_ids_hash"] = "others"
    assert tied_with_best(draws_of(table)).tied.all() and tied_with_best({}).empty


@pytest.mark.parametrize("text, limit", [("50", 50e6), ("50 MB", 50e6), ("50MB", 50e6), ("0,05 GB", 50e6), ("51200 kB", 51.2e6)])
def test_budgets_are_read_with_their_units(text, limit):
    assert np.isclose(limit_of("disk_bytes_fp32", text), limit)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-5", "nine", "5 ms", "1e999", "50 XB", "5 5", "<b>"])
def test_what_is_no_budget_is_told_and_the_others_hold(text):
    limits, wrong = limits_of(dict(disk_bytes_fp32=text, deployment_latency_s="100"))
    assert limits == dict(deployment_latency_s=0.1) and list(wrong) == ["disk_bytes_fp32"] and "size on disk" in wrong["disk_bytes_fp32"]


def test_a_file_of_points_has_one_unit_a_column_and_says_it(mixed):
    folder, names = mixed
    for cost in ("deployment_macs_per_second", "deployment_latency_s", "deployment_latency_s_ratio"):
        value, t = compare_message(Studies(folder).opened, {}, cost, False, {}, None, False, "here, AVX512")
        table = pd.read_csv(io.StringIO(json.loads(value)["csv"]))
        shares = [c for c in table if c.startswith(("accuracy", "seed_"))]
        assert len(shares) == 5 and all(c.endswith("_percent") for c in shares) and (table.seed_lowest_percent <= table.accuracy_percent + 1e-9).all() and (table.accuracy_percent <= table.seed_highest_percent + 1e-9).all()
        assert np.allclose(table[cost_column(cost)].dropna(), t.points.cost.dropna())


def run_code(lines: str) -> dict:
    "What some lines leave behind in an empty interpreter; the value of the last one is `_`."
    import ast

    tree = ast.parse(lines)
    assert isinstance(tree.body[-1], ast.Expr)
    tree.body[-1] = ast.Assign([ast.Name("_", ast.Store())], tree.body[-1].value)
    space = {}
    exec(compile(ast.fix_missing_locations(tree), "the code", "exec"), space)
    return space


def same_figure(a, b: dict):
    "Traces and axes are equal; the page has its own title and key."
    a = json.loads(a.to_json())
    assert a["data"] == b["data"]
    for axis in ("xaxis", "yaxis"):
        assert a["layout"][axis] == b["layout"][axis]


@pytest.mark.parametrize("cost, machine, budget, more", [
    ("deployment_latency_s_ratio", None, {}, {}), ("deployment_latency_s", "there, AVX2", dict(deployment_latency_s="1 s"), dict(log_x=True, untrained=True)), ("parameters", "here, AVX512", dict(disk_bytes_fp32="50 MB"), dict(chosen=list_mixers()[1]))],
    ids=["ratio", "time", "counted"])
def test_the_code_of_compare_makes_the_same_figure(mixed, cost, machine, budget, more):
    value, _ = compare_message(Studies(mixed[0]).opened, {}, cost, more.get("log_x", False), budget, more.get("chosen"), more.get("untrained", False), machine)
    d = json.loads(value)
    same_figure(run_code(d["code"])["_"], d["figure"])


def test_the_code_of_curves_makes_the_same_figure(tmp_path):
    make_curves(tmp_path, list_mixers()[:3])
    value, *_ = curves_message(CurvesFile(tmp_path), {}, list_mixers()[0])
    d = json.loads(value)
    same_figure(run_code(d["code"])["_"], d["figure"])


@pytest.mark.parametrize("trained", [True, False])
def test_the_code_of_listen_makes_the_same_figure(tmp_path, trained):
    from essl_nb.data.corpus import load_corpus

    corpus = load_corpus("bundled")
    make_study(tmp_path, seeds=1, names=list_mixers()[:2])
    controller = ListenController(lambda: corpus, EncoderLibrary(tmp_path), Sessions(), None)
    *_, clips = controller.first_clip()
    key = next(k for _, k in controller.library.choices() if k.startswith("trained:") == trained)
    *_, last = controller.draw("a clip of the corpus", clips[0][1], key, "", 2, "influence", "row", 0, "")
    panel = json.loads(last)["panels"][0]
    same_figure(run_code(panel["code"])["_"], panel["figure"])
