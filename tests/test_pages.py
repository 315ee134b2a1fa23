"""README and the pages of results say what the rows say."""
import json
import re

import pytest

from essl_nb import load_results
from essl_nb.core.places import results_dir
from essl_nb.mixers.base import FAMILIES, baseline_mixer, mixers
from essl_nb.study.results import cost_table, score_table
from essl_nb.study.tables import interval_text
from essl_nb.viz.style import family_name

QUESTION, SETTINGS = "masked phones, 200 ms", {"pure": "small", "hybrid": "hybrid", "parameter-matched": "equal"}
CONTROL = next(e.name for e in mixers if e.meta.get("control"))


@pytest.fixture(scope="module")
def scores():
    found = {setting: score_table(load_results(results_dir() / folder), QUESTION) for setting, folder in SETTINGS.items()}
    return {setting: table[table.state != "untrained"].set_index("encoder") for setting, table in found.items()}


def table_under(page: str, heading: str) -> dict: # first cell → the others
    "The first table after a heading, its head under \"\"."
    part = page.split(f"\n## {heading}\n")[1]
    lines = [line for line in re.search(r"(?:^\|.*\n)+", part, re.M)[0].splitlines()]
    cells = [[c.strip().strip("*") for c in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]
    return {"": cells[0][1:]} | {row[0]: row[1:] for row in cells[1:]}


def texts(rows) -> dict:
    return {name: interval_text(r.value, r.low, r.high, r.seeds) for name, r in zip(rows.index, rows.itertuples())}


def test_the_table_of_all_mixers_is_that_of_the_rows(scores, request):
    table = table_under((request.config.rootpath / "docs/results.md").read_text(encoding="utf-8"), "All mixers in three settings")
    assert set(table) - {""} == {e.name for e in mixers if e.name in scores["pure"].index}
    for setting in SETTINGS:
        column = table[""].index(f"masked phones, %: {setting}")
        known = texts(scores[setting])
        assert {name: row[column] for name, row in table.items() if name} == {name: known.get(name, "") for name in table if name}


def test_readme_has_the_best_of_each_family_the_control_and_log_mel(scores, request):
    table, pure = table_under((request.config.rootpath / "README.md").read_text(encoding="utf-8"), "The best of each family"), scores["pure"]
    names = [n for n in table if n in pure.index and pure.state[n] == "pretrained"]
    assert sorted(pure.family[n] for n in names) == sorted(FAMILIES) and {CONTROL, baseline_mixer()} < set(names)
    for name in set(names) - {CONTROL, baseline_mixer()}:
        rivals = pure[(pure.family == pure.family[name]) & (pure.state == "pretrained")]
        assert rivals.value.idxmax() == name, f"{name} is not the best of {pure.family[name]}"
    costs = cost_table(results_dir() / "small").set_index("encoder")
    for name in names:
        assert table[name][:3] == [family_name(pure.family[name]), texts(pure)[name], texts(scores["hybrid"])[name]]
        assert table[name][3:] == [f"{costs.parameters[name] / 1e6:.2f}", f"{costs.training_step_s_ratio[name]:.2f}"]
    log_mel = pure[pure.state == "baseline"].value.idxmax()
    assert table[log_mel][1] == texts(pure)[log_mel] and len(table) == len(names) + 2


def test_readme_is_short_and_its_figure_of_costs_has_the_width_of_its_words(request):
    page = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 130 and page.count("\n|") < 40, "tables go to docs/results.ipynb"
    part = page.split("\n## What it costs as speech gets longer\n")[1].split("\n## ")[0]
    assert set(re.findall(r"width (\d+)|(\d+) wide", part)) == {("576", ""), ("", "576")}


def test_the_table_of_parity_is_that_of_its_file(request):
    rows = json.loads((results_dir() / "parity.json").read_text())
    page = (request.config.rootpath / "docs/parity.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("| **")]
    assert len(shown) == len({(r["ours"], r["system"], r["dtype"]) for r in rows})
    worst = max(r["difference"] for r in rows)
    assert f"| {worst:.1e} |" in page
