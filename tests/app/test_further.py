"""Compare on several machines and after more steps: ratios of one machine each, what a title claims, and the two folded parts of the page."""
import io
import json

import numpy as np
import pandas as pd
import pytest
from browser import quiet_page
from madeup import make_study
from test_costs_compared import run_code, same_figure

from essl_nb.app.further import FurtherFiles, across_message, scaling_message
from essl_nb.app.library import Studies
from essl_nb.core.files import append_line, read_lines, write_json
from essl_nb.core.places import results_dir, study_dir
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers
from essl_nb.study.across_machines import COLUMNS, LAYER, MEMORY, QUANTITIES, TRAINING, USE, agreement, machine_ratios, ratios_of, sides
from essl_nb.study.machines import machine_name
from essl_nb.study.scaling import lacking, scaling, signature
from essl_nb.viz.across_machines import MARKS, across_figure, across_finding
from essl_nb.viz.scaling import scaling_figure, scaling_finding


@pytest.fixture(scope="module")
def files():
    return FurtherFiles(Studies(study_dir("small")))


def test_every_ratio_is_of_one_machine_and_stands_in_its_row(files):
    ratios = files.ratios()
    assert list(ratios.columns) == [*COLUMNS, "place"] and set(ratios.quantity) <= set(QUANTITIES) and {USE, TRAINING, MEMORY, LAYER.format(10)} <= set(ratios.quantity)
    for r in [r for r in read_lines(study_dir("small") / "rows.jsonl")[0] if r["kind"] == "cost" and r["value"]["card"] == "deployment"][-3:]:
        mine = ratios[(ratios.encoder == r["what"]["encoder"]) & (ratios.quantity == USE) & (ratios.machine == machine_name(r["value"]["machine"]))]
        assert mine.ratio.item() == r["value"]["latency_s_ratio"] and mine.low.item() == r["value"]["latency_s_ratio_low"]
    timed = [r for p in sorted((results_dir() / "gpu").glob("*/rows.jsonl")) for r in read_lines(p)[0] if r.get("kind") == "mixer" and r.get("seconds") == 10 and "time_s" in r]
    card = ratios[ratios.machine.str.contains("H100") & (ratios.quantity == LAYER.format(10))]
    assert set(card.encoder) == {r["mixer"] for r in timed} and np.isclose(card.set_index("encoder").ratio[timed[-1]["mixer"]], timed[-1]["ratio"])
    assert len(ratios.machine.unique()) >= 3 and (ratios.low <= ratios.ratio).all() and (ratios.ratio <= ratios.high).all()


def table(**places):
    "Ratios of made-up encoders: place → encoder → (low, ratio, high)."
    return pd.DataFrame([dict(zip(COLUMNS, (USE, place, "one way", name, baseline_mixer() if name == "attn" else "x", "convolution", r[1], r[0], r[2])), place=f"{place}: one way") for place, rows in places.items() for name, r in rows.items()])


def test_the_title_says_which_order_holds():
    same, under, over = (0.9, 1, 1.1), (0.5, 0.6, 0.7), (1.5, 1.6, 1.8)
    both = table(one=dict(attn=same, a=under, b=under, c=over), two=dict(attn=same, a=under, b=over, c=over, d=under))
    assert across_finding(both).startswith("1 of 3 encoders take less time than attention on both machines; 1 changes sides: b.")
    found = sides(both).set_index("encoder")
    assert found.sides["b"] == {"below", "above"} and "attn" not in found.index and "d" not in found.index, "attention is no rival of itself, and one place holds no comparison"
    turned = [t.meta["turns"] for t in across_figure(both).data if t.meta["role"] == "link"]
    assert sum(turned) == 1
    assert "none changes sides" in across_finding(table(one=dict(a=under), two=dict(a=(0.98, 0.99, 1.01)))), "level with attention is not the other side"
    assert "One place alone" in across_finding(table(one=dict(a=under, b=over)))
    assert agreement(both) < 1 and agreement(table(one=dict(a=under), two=dict(a=under))) is None
    with pytest.raises(EsslError, match="several quantities"):
        across_figure(pd.concat([both, both.assign(quantity=TRAINING)]))


@pytest.mark.parametrize("asked", [{}, dict(quantity=TRAINING), dict(encoder=list_mixers()[1]), "one place"], ids=str)
def test_the_machines_figure_its_numbers_and_its_code(files, asked):
    if asked == "one place":
        known = across_message(files, {}, None)[1]["places"]
        asked = dict(places=known[:1])
    value, choices, now = across_message(files, asked, list_mixers()[1])
    d = json.loads(value)
    same_figure(run_code(d["code"])["_"], d["figure"])
    numbers = pd.read_csv(io.StringIO(d["csv"]))
    marks = [t for t in d["figure"]["data"] if t["meta"]["role"] == "place"]
    assert len(numbers) == sum(len(t["hovertext"]) for t in marks) and numbers.machine.nunique() >= 1 and "ratio_attention_1" in numbers
    assert [t["meta"]["place"] for t in marks] == [p for p in choices["places"] if p in now["places"]] and len({t["marker"]["symbol"] for t in marks}) == len(marks) <= len(MARKS)
    assert f"n = {len(numbers)} ratios" in d["caption"] and "Not shown: seconds" in d["caption"]


def test_where_no_machine_measured_it_is_said(tmp_path):
    make_study(tmp_path / "alone", seeds=1, names=list_mixers()[:2], ship=False)
    alone = FurtherFiles(Studies(tmp_path / "alone"))
    with pytest.raises(EsslError, match="No machine's costs"):
        across_message(alone, {}, None)
    with pytest.raises(EsslError, match="No study with several step counts"):
        scaling_message(alone, {}, None)
    with pytest.raises(EsslError, match="No study is open"):
        FurtherFiles(Studies(None)).ratios()


def test_the_longer_runs_stand_beside_those_of_the_study(files):
    scores = files.scores("steps")
    assert scores.groupby("encoder").grown.nunique().max() >= 2 and 2000 in set(scores.grown)
    longer = next(r for r in read_lines(results_dir() / "learning" / "rows.jsonl")[0] if r["kind"] == "score")
    mine = scores[(scores.encoder == longer["what"]["encoder"]) & (scores.probe == longer["what"]["probe"]) & (scores.metric == longer["value"]["metric"])]
    assert mine.sort_values("grown").value.iloc[-1] == pytest.approx(longer["value"]["value"])
    for key in list(dict.fromkeys(zip(scores.probe, scores.metric)))[::3]:
        value, _, now = scaling_message(files, dict(probe=" · ".join(key)), None)
        d = json.loads(value)
        same_figure(run_code(d["code"])["_"], d["figure"])
        numbers = pd.read_csv(io.StringIO(d["csv"]))
        assert now["probe"] == " · ".join(key) and len(numbers) == sum(len(t["hovertext"]) for t in d["figure"]["data"] if t["meta"]["role"] == "scaling") and numbers.score_percent.max() > 1
    rows = scores[(scores.probe == scores.probe.iloc[0]) & (scores.metric == scores.metric.iloc[0])]
    one = [n for n, g in rows.groupby("encoder") if len(g) == 1]
    assert all(n in lacking(rows, results_dir()) for n in one), "who has one step count is said in words"
    with pytest.raises(EsslError, match="one probe and one metric"):
        scaling_figure(scores)


def test_widths_are_drawn_when_they_come(tmp_path):
    "Rows of two widths, made of the shipped ones with another width written into them."
    late = "attention"  # its wider run is still to come
    longer = [r for r in read_lines(results_dir() / "learning" / "rows.jsonl")[0] if r["what"]["encoder"] != late]
    grid = json.loads((results_dir() / "learning" / "grid.json").read_text())
    grid["objectives"] = [dict(name="clusters", pretrain=dict(steps=8000))]
    write_json(tmp_path / "width" / "grid.json", grid | dict(encoders=[e | dict(config=e["config"] | dict(dim=384)) for e in grid["encoders"]]))
    for folder, factor in (("small", 1), ("width", 2)):
        for r in json.loads(json.dumps(longer)):
            r["key"], r["what"] = f"{folder} {r['key']}", r["what"] | dict(run=f"{folder} {r['what'].get('run')}")
            if r["kind"] == "run":
                r["what"]["pretrain"]["encoder"]["dim"] *= factor
            append_line(tmp_path / folder / "rows.jsonl", r)
    scores = scaling(tmp_path, "width")
    assert set(scores.grown) == {192, 384} and scores.groupby(["encoder", "probe", "metric"]).grown.nunique().eq(2).all()
    rows = scores[(scores.probe == scores.probe.iloc[0]) & (scores.metric == scores.metric.iloc[0])]
    assert "192 to 384 wide" in scaling_finding(rows, "width") and f"Nothing yet: {late}." in lacking(rows, tmp_path, "width")
    assert scaling_figure(rows, "width").layout.xaxis.title.text == "width of the encoder"


def test_a_run_with_another_setting_is_no_point_of_the_line():
    run = next(r for r in read_lines(results_dir() / "learning" / "rows.jsonl")[0] if r["kind"] == "run")["what"]["pretrain"]
    assert signature(run | dict(steps=1, seed=7), "steps") == signature(run, "steps") != signature(run | dict(lr=1e-3), "steps")
    assert signature(run | dict(steps=1), "width") != signature(run, "width") == signature(run | dict(encoder=run["encoder"] | dict(dim=8)), "width")


def test_in_the_browser(tmp_path_factory):
    with quiet_page(tmp_path_factory.mktemp("uploads")) as page:
        page.click("button[role=tab]:has-text('Compare')")
        page.wait_for_selector("#compare-view .essl-view[data-shown]")
        page.click("#further-machines > .label-wrap")
        page.wait_for_selector("#machines-view .main-svg")
        assert page.locator("#machines-view .essl-finding").inner_text().count("attention") and page.evaluate("() => document.documentElement.scrollWidth") == 390
        shown = page.get_attribute("#machines-view .essl-view", "data-shown")
        page.click("#machines-places label >> nth=0")
        page.wait_for_function(f"() => document.querySelector('#machines-view .essl-view').dataset.shown !== '{shown}'")
        page.wait_for_selector("#machines-view .essl-finding:has-text('One place alone')")
        page.click("#further-scaling > .label-wrap")
        page.wait_for_selector("#scaling-view .essl-finding:has-text('percentage points')")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 390
        page.click("#scaling-along input")
        page.click("[role=option]:has-text('more width')")
        page.wait_for_selector("#scaling-view .essl-finding:has-text('wide')")
