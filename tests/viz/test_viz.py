"""Figures: what is drawn is what was given, in the project's colours, and within what the page's plotly.js draws."""
import numpy as np
import pandas as pd
import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.viz.audio import clip_figure, envelope, phone_class
from essl_nb.viz.mixing import INFLUENCE, MixingMap, finding, in_decibels, influence_map, map_kinds, mixing_figure, reach
from essl_nb.viz.pareto import pareto_figure
from essl_nb.viz.style import FAMILY_COLOURS

WAV = torch.sin(torch.arange(8000) / 20) / 2


def tiny(mixer: str):
    return build_encoder(EncoderConfig(mixer=mixer, dim=16, depth=2), seed=0)


def test_an_envelope_keeps_the_extremes():
    wav = np.random.default_rng(0).normal(size=12345)
    _, lows, highs = envelope(wav, columns=100)
    assert len(lows) <= 100 and np.isclose(highs.max(), wav.max()) and np.isclose(lows.min(), wav.min())


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_has_an_influence_map_that_repeats(name):
    encoder = tiny(name)
    a, b = (influence_map(encoder, WAV, 2) for _ in range(2))
    T = int(-(-len(WAV) // 320))
    assert a.values.shape == (T, T) and np.array_equal(a.values, b.values) and (a.values >= 0).all()
    assert map_kinds(encoder, 1)[0] == INFLUENCE
    for kind in map_kinds(encoder, 1):
        m = influence_map(encoder, WAV, 1, kind=kind, step=3)
        assert m.values.shape == (len(range(0, T, 3)), T) and np.isfinite(m.values).all()
        fig = mixing_figure(WAV, m)
        assert [t.meta["role"] for t in fig.data] == ["wave", "mel", "map"] and len({a.range for a in fig.select_xaxes()}) == 1


def test_a_map_leaves_the_encoder_as_it_was():
    encoder = tiny(list_mixers()[0]).train()
    influence_map(encoder, WAV, 1)
    assert encoder.training and all(p.grad is None for p in encoder.parameters())


def test_unknown_layers_and_kinds_are_answered():
    encoder = tiny(list_mixers()[0])
    with pytest.raises(EsslError, match="layers 1 to 2"):
        influence_map(encoder, WAV, 3)
    with pytest.raises(EsslError, match="influence"):
        influence_map(encoder, WAV, 1, kind="influense")


def band(T: int, radius: int, step: int = 1) -> MixingMap:
    t, s = np.arange(0, T, step)[:, None], np.arange(T)[None]
    return MixingMap((abs(t - s) <= radius).astype("float32"), INFLUENCE, 1, 0.02, step)


@pytest.mark.parametrize("step", [1, 4])
def test_reach_of_a_band_is_half_its_radius(step):
    assert abs(reach(band(200, 20, step)) - 10 * 0.02) <= 0.02
    assert "no frame stands out" not in finding(band(200, 20, step)) and "no frame stands out" in finding(band(200, 200, step))


def test_a_peak_on_an_even_ground_is_told():
    "Half within a wide radius says nothing of a bright diagonal: both are said."
    ground = np.full((100, 100), 1.0, "float32") + 21 * np.eye(100, dtype="float32")
    said = finding(MixingMap(ground, INFLUENCE, 1, 0.02))
    assert "the frame itself holds 18 %, 18 times an even share" in said and "even as" not in said
    column = np.ones((100, 100), "float32")
    column[:, 3] = 50
    assert "one single frame holds 34 %" in finding(MixingMap(column, INFLUENCE, 1, 0.02))
    assert "(100 %)" in finding(MixingMap(np.eye(50, dtype="float32"), INFLUENCE, 1, 0.02))


def test_decibels_of_empty_rows_are_the_floor():
    assert (in_decibels(np.zeros((3, 3))) == -40).all() and in_decibels(np.eye(2), "map").tolist() == [[0, -40], [-40, 0]]


def test_unknown_phone_sets_can_be_drawn():
    from essl_nb.data.tables import Phone

    phones = (Phone("ʃ", 0.0, 0.2), Phone("", 0.2, 0.3), Phone("aa1", 0.3, 0.5))
    fig = clip_figure(WAV.numpy(), np.zeros((50, 80)), phones=phones)
    assert fig.layout.meta["rows"]["phones"] == 3 and phone_class("ʃ") == "other"


POINTS = pd.DataFrame(dict(label=list("ABC"), family=["attention", "somebody's", "pooling"], cost=[3.0, np.nan, 1.0], score=[30.0, 20.0, 10.0], low=29.0, high=31.0))


@pytest.mark.parametrize("log_x", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_pareto_figure_draws_known_points_and_their_front(log_x, lower):
    fig = pareto_figure(POINTS, "cost", "score", log_x=log_x, lower_is_better=lower, within=[True, True, True])
    drawn = {t.name: t for t in fig.data}
    assert "B" not in drawn and drawn["A"].marker.color == FAMILY_COLOURS["attention"]
    assert (max(drawn["front"].y) if not lower else min(drawn["front"].y)) == (10.0 if lower else 30.0)
    assert fig.layout.xaxis.type == ("log" if log_x else None)


def test_pareto_figure_of_nothing_is_a_figure():
    assert pareto_figure(POINTS.iloc[:0], "cost", "score").layout.height


def test_figures_hold_nothing_that_a_page_would_fetch():
    text = pareto_figure(POINTS, "cost", "score").to_json() + mixing_figure(WAV, band(25, 3)).to_json()
    assert "http" not in text and "$" not in text and '"map' not in text.replace('"role":"map"', "").replace('"mapbox', "")


@pytest.mark.parametrize("peak", [0.25, 3.0])
def test_the_page_plays_a_loud_sound_whole(peak):
    import base64
    import io

    import soundfile

    from essl_nb.app.listen import wave_file

    shape = torch.sin(torch.arange(1600) / 9)
    played, rate = soundfile.read(io.BytesIO(base64.b64decode(wave_file(peak * shape))), dtype="float32")
    assert rate == 16000 and abs(torch.from_numpy(played) - shape * min(peak, 1)).max() < 2e-4
