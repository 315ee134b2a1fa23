"""The figure of a run that trains: drawn from any stage of its log, and redrawn as it grows."""
import sys
import threading

import plotly.graph_objects
import plotly.io
import pytest

from essl_nb.core.files import append_line, read_json, write_json
from essl_nb.core.registry import EsslError
from essl_nb.objectives import alarms as page
from essl_nb.objectives.alarms import Band, loss_settings
from essl_nb.viz import training
from essl_nb.viz.training import PANELS, run_figure, watch_run, watched_run


def begin(folder, corpus="mine"):
    folder.mkdir()
    write_json(folder / "config.json", dict(objective="clusters", corpus=corpus, steps=100))
    return folder


def row(step, **more):
    return dict(step=step, loss=9 - step / 50, masked_accuracy=0.1, masked_share=0.4, grad_norm=2.0, lr=1e-3, hours=step / 225) | more


def test_a_figure_at_every_stage_of_a_log(tmp_path):
    folder = begin(tmp_path / "run")
    assert "No line" in run_figure(folder).layout.title.text
    append_line(folder / "metrics.jsonl", row(20))
    assert "No alarm at step 20 of 100, 0.09 h" in run_figure(folder).layout.title.text
    append_line(folder / "metrics.jsonl", row(40, loss=None, valid_loss=8.0, valid_dim=64, valid_effective_rank=9.0, valid_target_largest=0.1))
    drawn = run_figure(folder)
    assert {line.name for line in drawn.data} >= {"one batch", "fixed batches", "effective rank", "hidden", "gradient norm"}
    assert list(next(line for line in drawn.data if line.name == "one batch").customdata) == [20]
    assert [a.text for a in drawn.layout.annotations][: len(PANELS)] == list(PANELS)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 60, "lo')  # a line that is being written
    assert "step 40" in run_figure(folder).layout.title.text


def test_rows_without_hours_are_drawn_over_steps(tmp_path):
    folder = begin(tmp_path / "run")
    append_line(folder / "metrics.jsonl", {k: v for k, v in row(20).items() if k != "hours"})
    assert run_figure(folder).layout.xaxis5.title.text == "step"


def test_the_band_is_drawn_for_the_bundled_corpus_only(tmp_path, monkeypatch):
    settings = loss_settings(read_json(begin(tmp_path / "other") / "config.json"))
    band = Band("clusters", (0.05, 1.0), (7.0, 5.0), (10.0, 9.5), runs=5, about=dict(settings=settings))
    monkeypatch.setattr(page, "load_bands", lambda: {"clusters": band})
    for name, corpus in (("a", "bundled"), ("b", "mine")):
        append_line(begin(tmp_path / name, corpus) / "metrics.jsonl", row(20))
    assert ["5 healthy runs" in {line.name for line in run_figure(tmp_path / n).data} for n in ("a", "b")] == [True, False]


def test_an_alarm_is_the_title_and_a_line_in_every_panel_that_is_not_empty(tmp_path):
    folder = begin(tmp_path / "run")
    for step in range(20, 101, 20):
        append_line(folder / "metrics.jsonl", row(step, masked_share=0.02))
    drawn = run_figure(folder)
    assert "ALARM mask too small since step 20" in drawn.layout.title.text.replace("<br>", " ")
    assert sum(shape.x0 == shape.x1 == 20 / 225 for shape in drawn.layout.shapes) == 4  # panels that hold something


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(EsslError, match="no pre-training run"):
        run_figure(tmp_path)


def test_a_run_of_another_process_is_followed_until_its_result(tmp_path):
    folder, figures = tmp_path / "run", []

    def show(figure):
        figures.append(figure.layout.title.text)
        if len(figures) == 1:
            append_line(folder / "metrics.jsonl", row(100))
            write_json(folder / "result.json", {})

    def write():
        begin(folder)
        append_line(folder / "metrics.jsonl", row(50))

    timer = threading.Timer(0.1, write)  # it begins to be watched before it is there
    timer.start()
    assert watch_run(folder, every=0.01, seconds=20, show=show) == []
    assert "step 100" in figures[-1] and 2 <= len(figures) <= 3
    with pytest.raises(EsslError, match="no pre-training run"):
        watch_run(tmp_path / "nowhere", every=0.01, seconds=0.03, show=show)


def test_a_block_is_watched_and_its_error_goes_on(tmp_path):
    figures = []
    with pytest.raises(ZeroDivisionError):
        with watched_run(tmp_path / "run", every=0.01, show=figures.append):
            append_line(begin(tmp_path / "run") / "metrics.jsonl", row(50))
            1 / 0
    assert "step 50" in figures[-1].layout.title.text
    assert not any(t.name == "watched run" for t in threading.enumerate())


def test_a_notebook_shows_one_figure_and_replaces_it(monkeypatch):
    """A figure goes to the notebook as data: plotly's own display would ignore the id, and each update would add a figure."""
    shown, updated = [], []

    def title(bundle, raw):
        assert raw
        return bundle["application/vnd.plotly.v1+json"]["layout"]["title"]["text"]

    class Handle:
        update = staticmethod(lambda bundle, raw=False: updated.append(title(bundle, raw)))

    def display(bundle, raw=False, display_id=None):
        assert display_id
        shown.append(title(bundle, raw))
        return Handle()

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    show = training.shown_figure()
    for name in "abc":
        show(plotly.graph_objects.Figure(layout=dict(title=name)))
    assert shown == ["a"] and updated == ["b", "c"]
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(EsslError, match="run_figure"):
        training.shown_figure()
