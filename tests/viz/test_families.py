"""Families of mixers: what the registry says of a mixer is what tables and figures say, and every family looks like itself everywhere."""
import json

import pytest
from madeup import make_curves, make_study

from essl_nb.app.curves import CurvesFile, curves_message
from essl_nb.core.files import read_lines
from essl_nb.core.registry import EsslError
from essl_nb.costs.growth import exponents, load_curves
from essl_nb.mixers.base import FAMILIES, baseline_mixer, family_of, list_mixers, mixers
from essl_nb.study.results import cost_points, cost_table, load_results, paired_table, pareto_table, score_table
from essl_nb.viz import recurrent
from essl_nb.viz.curves import FAINT, curve_figure
from essl_nb.viz.pareto import pareto_figure
from essl_nb.viz.style import FAMILY_COLOURS, FAMILY_SHAPES, family_colour, family_ink, family_key, family_name, plain

ONE_OF_EACH = [list_mixers(family)[-1] for family in FAMILIES]
MLPS, FOURIER = list_mixers("mlp"), list_mixers("fourier")
NAMES = sorted({*ONE_OF_EACH, baseline_mixer(), *MLPS, *FOURIER})


def in_other_words(file, word="fourier", guest="somebody's"):
    "Rows as they may stand in older files: MLPs under another family's name, and one mixer that nobody has registered."
    rows = read_lines(file)[0]
    for row in rows:
        what = row.get("what", row)
        if what["mixer"] in MLPS:
            what["family"] = word
        if what["mixer"] == list_mixers("pooling")[-1]:
            what["mixer"], what["family"] = guest, "guests"
            what["encoder"] = guest
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    make_study(folder / "study", seeds=1, names=NAMES, ship=False)
    make_curves(folder / "curves", NAMES)
    for part in ("study", "curves"):
        in_other_words(folder / part / "rows.jsonl")
    return folder


def test_mlps_are_mlps_and_fourier_holds_transforms_and_filters():
    assert set(FOURIER) == {e.name for e in mixers if e.meta["complexity"] == "T log T"} and len(MLPS) == 4
    assert {e.meta["family"] for e in mixers} == set(FAMILIES)
    assert family_of(MLPS[0], "fourier") == "mlp" and family_of("nobody's", "guests") == "guests" and family_of(None, "none") == "none"


@pytest.mark.parametrize("table", [load_results, score_table, cost_table, cost_points, paired_table, lambda f: pareto_table(f, "first question")],
                         ids=["load_results", "score_table", "cost_table", "cost_points", "paired_table", "pareto_table"])
def test_a_row_with_an_older_word_has_the_family_of_the_registry(older, table):
    if table is paired_table:
        rows = paired_table(older / "study", against="some features")
    else:
        rows = table(older / "study")
    known = {name: family for name, family in zip(rows.get("mixer", []), rows.get("family", [])) if name in list_mixers()}
    assert all(family == mixers.get(name).meta["family"] for name, family in known.items())
    assert table is cost_points or {MLPS[0], FOURIER[0]} <= set(known)
    assert table is cost_points or set(rows[rows.mixer == "somebody's"].family) == {"guests"}, "a mixer that is not registered keeps its row's word"


def test_curves_with_an_older_word_have_the_family_of_the_registry(older):
    curves = load_curves(older / "curves")
    for rows in (curves, exponents(curves, start=1.0)):
        assert set(rows[rows.mixer == MLPS[0]].family) == {"mlp"} and set(rows[rows.mixer == "somebody's"].family) == {"guests"}


def test_shipped_rows_have_families_of_today(request):
    for study in ("small", "hybrid", "equal", "recipe"):
        rows = load_results(request.config.rootpath / "results" / study)
        mixed = rows[rows.mixer.notna()]
        assert len(mixed) and all(family_of(m) == f and f in FAMILIES for m, f in zip(mixed.mixer, mixed.family))


def test_every_family_has_a_colour_a_shape_an_ink_and_a_name_of_its_own():
    assert list(FAMILIES) and set(FAMILIES) == set(FAMILY_COLOURS) == set(FAMILY_SHAPES)
    for of in (family_colour, family_ink, family_name, FAMILY_SHAPES.get):
        assert len({of(f) for f in FAMILIES}) == len(FAMILIES)


def brightness(colour: str) -> float:
    "Relative luminance, 0 … 1 (WCAG)."
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))


def test_lines_and_letters_of_every_family_can_be_read_on_white():
    assert min(1.05 / (brightness(family_ink(f)) + 0.05) for f in FAMILIES) > 2, "Okabe and Ito's orange and light blue are the palest; yellow has an ink"


def test_points_of_a_pale_family_are_outlined(older):
    points = pareto_table(older / "study", "first question").assign(label=lambda t: t.encoder)
    drawn = {t.name: t.marker for t in pareto_figure(points, "parameters", "value").data if (t.meta or {}).get("role") == "point"}
    assert drawn[MLPS[0]].color == family_colour("mlp") and drawn[MLPS[0]].line.color == family_ink("mlp") and drawn[MLPS[0]].line.width
    assert not drawn[baseline_mixer()].line.width


def named(fig) -> set:
    return {t.name for t in fig.data if (t.meta or {}).get("role") == "curve" and t.meta["named"]}


def test_curves_name_attention_and_one_of_each_family_and_leave_the_rest_grey(older):
    curves = load_curves(older / "curves")
    fig = curve_figure(curves, width=64)
    drawn = {t.name: t for t in fig.data if (t.meta or {}).get("role") == "curve"}
    families = [drawn[name].meta["family"] for name in named(fig)]
    assert sorted(families) == sorted({t.meta["family"] for t in drawn.values()}) and baseline_mixer() in named(fig)
    assert {a.text for a in fig.layout.annotations if a.name == "end"} == named(fig) | {"ceiling of a block"}
    for name, trace in drawn.items():
        assert (trace.line.color == FAINT) == (name not in named(fig)) and trace.hovertemplate.startswith(name)
    for family in ("mlp", "fourier"):
        mine = {n: t for n, t in drawn.items() if t.meta["family"] == family}
        assert min(mine, key=lambda n: mine[n].y[-1]) in named(fig), "the cheapest at the longest duration stands for its family"


def test_whoever_asks_for_mixers_or_families_has_them_named(older):
    curves, base = load_curves(older / "curves"), baseline_mixer()
    assert named(curve_figure(curves, width=64, names=MLPS[:2])) == {*MLPS[:2], base}
    assert named(curve_figure(curves, width=64, families=["mlp"])) == {*MLPS, base}
    assert named(curve_figure(curves, width=64, only=[MLPS[0], FOURIER[0]])) == {MLPS[0], FOURIER[0]}
    chosen = curve_figure(curves, width=64, chosen=MLPS[-1])
    assert [n for n in named(chosen) if family_of(n) == "mlp"] == [MLPS[-1]], "the chosen one stands for its family"
    assert max(t.line.width for t in chosen.data if t.name == MLPS[-1]) == 4
    with pytest.raises(EsslError, match=f"did you mean '{MLPS[0]}'"):
        curve_figure(curves, width=64, names=[MLPS[0] + "s"])


def test_the_title_of_a_figure_of_curves_says_the_width(older):
    assert "width 128, batch 1, forward+backward" in curve_figure(load_curves(older / "curves"), width=128, which="forward+backward").layout.title.text


def test_the_page_draws_every_family_with_a_switch_and_the_code_it_shows_runs(older):
    message, _, _ = curves_message(CurvesFile(older / "curves"), {}, MLPS[0])
    told = json.loads(message)
    traces = [t for t in told["figure"]["data"] if t.get("meta", {}).get("role") == "curve"]
    assert {t["meta"]["family"] for t in traces} == {f["family"] for f in told["figure"]["layout"]["meta"]["families"]}
    assert any(t["name"] == MLPS[0] and t["meta"]["named"] for t in traces) and not all(t["meta"]["named"] for t in traces)
    exec(told["code"], {})


def test_a_key_says_the_ink_of_a_pale_family():
    import plotly.graph_objects as go

    key = family_key(plain(go.Figure(), height=80), ["mlp", "none"]).layout.meta["families"]
    assert [f["ink"] != f["colour"] for f in key] == [True, False]


def test_recurrent_layers_have_no_other_family_s_colour():
    others = {family_colour(f) for f in FAMILIES if f != "recurrent"} | {family_ink(f) for f in FAMILIES if f != "recurrent"}
    colours = {colour.lower() for colour, _, _ in recurrent.LOOK.values()}
    assert not colours & {c.lower() for c in others} and family_colour("recurrent").lower() in colours
