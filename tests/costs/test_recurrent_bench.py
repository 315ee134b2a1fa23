"""The interleaved bench and the small recogniser, end to end at sizes of seconds."""
import json

import pandas as pd
import pytest
import torch

from essl_nb.core.files import read_lines
from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.costs import recurrent as b
from essl_nb.probes.recognise import CELLS, Bidirectional, SmallRecogniser, equal_units, parameters, recognise, recognition_rows, recognition_table

SMALL = b.Shape(1, 1, 24, 2, 12)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    names = ("LiGRU", "GRU", "floor")
    added = b.bench(path, [SMALL, SMALL._replace(frames=24), SMALL._replace(frames=48)], names=names, passes=("forward+backward",), repeats=3, progress=False)
    assert added == 3 * len(names)
    return path


def test_rows_hold_machine_and_spread(rows):
    for row in read_lines(rows)[0]:
        assert row["time_low"] <= row["time_s"] <= row["time_high"] and row["repeats"] == 3 and row["made"]["machine"]["cores"] >= 1
        assert row["name"] != "LiGRU" or row["ligru_over_it"] == 1


def test_known_points_are_not_measured_again(rows):
    before = rows.read_bytes()
    assert b.bench(rows, [SMALL], names=("LiGRU", "GRU"), passes=("forward+backward",), repeats=3, progress=False) == 0
    assert rows.read_bytes() == before


def test_table_and_growth_read_the_rows(rows):
    loaded = b.load_bench(rows)
    table = b.bench_table(loaded)
    assert len(table) == 3 and list(table.columns) == ["LiGRU, ms", "GRU", "floor"] and (table > 0).all().all()
    grown = b.growth_exponents(loaded)
    assert set(grown.name) == {"LiGRU", "GRU", "floor"} and grown.exponent.notna().all()


def test_shown_names_are_of_contestants():
    assert set(b.SHOWN_NAMES) < set(b.CONTESTANTS) and not set(b.SHOWN_NAMES.values()) & set(b.CUDA_CONTESTANTS)


def test_slow_contestants_stay_out_and_the_row_says_so(tmp_path):
    found = b.time_point(SMALL, "forward", ["LiGRU", "GRU"], 3, most_seconds=0.0)
    assert found["names"] == [] and "one call takes" in found["skipped"]["GRU"]


@pytest.mark.parametrize("which", b.PASSES)
def test_the_lower_bound_is_on_its_device(which):
    shape = b.Shape(2, 2, 6, 3, 8)
    bound = b.LowerBound(shape, "meta", torch.bfloat16)
    bound.run(which)  # products of matrices in two places would raise
    held = [t for v in vars(bound).values() for pair in (v if isinstance(v, list) else [(v,)]) for t in pair if isinstance(t, torch.Tensor)]
    assert len(held) == 12 and {(t.device.type, t.dtype) for t in held} == {("meta", torch.bfloat16)}
    assert set(b.CONTESTANTS) <= set(b.CUDA_CONTESTANTS)


def test_a_figure_mixes_no_machines(rows):
    from essl_nb.viz.recurrent import bench_figure

    loaded = b.load_bench(rows)
    point = dict(hidden=SMALL.hidden, batch=SMALL.batch)
    assert len(bench_figure(loaded, **point).data) == 3
    with pytest.raises(EsslError, match="another machine"):
        bench_figure(pd.concat([loaded, loaded.assign(machine="another machine")]), **point)


@pytest.mark.parametrize("version", ["eager", "scripted", "patched"])
def test_versions_of_speechbrains_layer_give_the_same(version):
    torch.manual_seed(0)
    shape, x = b.Shape(1, 2, 6, 3, 8), torch.randn(3, 8, 6)
    plain, other = b.speechbrains(shape), b.speechbrains(shape, version)
    other.load_state_dict(plain.state_dict())
    assert torch.allclose(plain(x)[0], other(x)[0], atol=1e-6)


def test_memory_is_of_training_alone():
    found = b.memory_point(b.Shape(1, 1, 64, 4, 2000), ["LiGRU"])
    least = 4 * 2000 * 4 * 64 * 4  # x, states and gates of 2,000 frames
    assert least < found["LiGRU"] < 30 * least


@pytest.mark.parametrize("names", [("GRU", "LiGRU"), ("LiGRU", "LSMT")])
def test_unknown_contestants_are_refused(names, tmp_path):
    with pytest.raises(EsslError, match="allowed: 'LiGRU' first"):
        b.bench(tmp_path / "rows.jsonl", [SMALL], names=names)


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(EsslError, match="essl_ligru_bench"):
        b.load_bench(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("count", [3_000, 400_000])
def test_units_are_solved(cell, count):
    H = equal_units(cell, 32, 2, count)
    sizes = [parameters(CELLS[cell](32, h, 2)) for h in (H - 1, H, H + 1)]
    assert min(sizes, key=lambda n: abs(n - count)) == sizes[1]


def test_unknown_cells_are_refused():
    with pytest.raises(EsslError, match="'LSTM'"):
        equal_units("RNN", 8, 1, 100)


@pytest.mark.parametrize("cell", CELLS)
def test_a_recogniser_hears_each_utterance_alone(cell):
    model = SmallRecogniser(cell, 7, dim=12, count=3_000, seed=1).eval()
    mel, lengths = torch.randn(3, 64, 80), torch.tensor([64, 30, 9])
    for i, n in enumerate(lengths):
        mel[i, n:] = float("nan")
    with torch.no_grad():
        both, out = model(mel, lengths)
        for i, n in enumerate(lengths):
            assert torch.allclose(both[i, : out[i]], model(mel[i : i + 1, :n], lengths[i : i + 1])[0][0], atol=1e-5)


def test_torchs_layers_leave_zeros_in_the_padding():
    x, lengths = torch.randn(2, 6, 3), torch.tensor([6, 2])
    assert Bidirectional(torch.nn.LSTM, 3, 4, 2)(x, lengths)[0][1, 2:].eq(0).all()


@pytest.fixture(scope="module")
def few():
    "A dozen clips of one voice."
    whole = load_corpus("bundled")
    clips = sorted((u for u in whole if u.part == "prompts" and u.language == "it" and u.extra["text_ok"] == "1"), key=lambda u: u.seconds)
    chosen = {u.id for split, n in (("train", 8), ("valid", 2), ("test", 2)) for u in [u for u in clips if u.split == split][:n]}
    return whole.select(part="prompts", language="it"), chosen


def test_a_run_is_a_row_and_is_not_made_twice(few, tmp_path, monkeypatch):
    corpus, chosen = few
    import essl_nb.probes.recognise as module

    monkeypatch.setattr(module, "transcribed", lambda corpus, part: [u for u in corpus if u.id in chosen])
    monkeypatch.setattr(module, "load_corpus", lambda name: corpus)
    path = tmp_path / "rows.jsonl"
    kw = dict(cells=("LiGRU", "GRU"), progress=False, epochs=2, count=5_000, layers=1, part="prompts")
    assert recognition_rows(path, **kw) == 2 and recognition_rows(path, **kw) == 0
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert len(first["value"]["curve"]) == 2 and first["value"]["n"] == 2 and "eta" in first["value"]["curve"][0] and "eta" not in second["value"]["curve"][0]
    table = recognition_table(path)
    assert list(table.cell) == ["LiGRU", "GRU"] and ((0 <= table.low) & (table.low <= table.cer) & (table.cer <= table.high)).all()


def test_a_recogniser_that_diverges_is_a_row_and_the_next_is_trained(few, tmp_path, monkeypatch, capsys):
    corpus, chosen = few
    import essl_nb.probes.recognise as module

    monkeypatch.setattr(module, "transcribed", lambda corpus, part: [u for u in corpus if u.id in chosen])
    monkeypatch.setattr(module, "load_corpus", lambda name: corpus)
    path = tmp_path / "rows.jsonl"
    kw = dict(cells=("GRU", "LSTM"), progress=False, epochs=2, count=5_000, layers=1, part="prompts", lr=1e30)
    assert recognition_rows(path, **kw) == 2 and recognition_rows(path, **kw) == 0 and "diverged" in capsys.readouterr().out
    table = recognition_table(path)
    assert table.diverged.all() and table.cer.isna().all()

    def refuse(word):
        raise AssertionError(word)

    assert all(json.loads(line, parse_constant=refuse)["value"]["why"] for line in path.read_text().splitlines())


def test_a_part_without_transcripts_is_refused(few):
    with pytest.raises(EsslError, match="no transcripts"):
        recognise(few[0], "GRU", part="nowhere")
