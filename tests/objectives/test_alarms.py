"""Faults planted in real, tiny runs raise the alarm that names them; healthy runs raise none."""
import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
import torch

from essl_nb.core.files import append_line, read_lines, write_json
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import baseline_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig, named_config
from essl_nb.objectives import alarms as page
from essl_nb.objectives.alarms import ADVICE, Band, Limits, alarm_line, alarms, alarms_of, bands_of, load_bands, save_bands
from essl_nb.objectives.health import recurrent_bound, silent_share
from essl_nb.objectives.objective import objectives
from essl_nb.train import loop
from essl_nb.train.config import PretrainConfig

SOON = Limits(settle_steps=40, rank=3.0)  # encoders of one block, trained for seconds


def tones(seed, seconds=3.0, rate=16000):
    "Tones of eight pitches, a few tenths of a second each, over faint noise: what is hidden can be told from what surrounds it."
    draw = np.random.default_rng(seed)
    parts = []
    while sum(map(len, parts)) < seconds * rate:
        pitch, length = 200 * 1.5 ** draw.integers(8), int(rate * draw.uniform(0.4, 0.8))
        parts.append(0.3 * np.sin(2 * np.pi * pitch * np.arange(length) / rate))
    x = np.concatenate(parts)[: int(seconds * rate)]
    return (x + 0.003 * draw.standard_normal(len(x))).astype(np.float32)


def write_clips(folder, silent=0.0, clips=40):
    for n in range(clips):
        x = tones(n)
        soundfile.write(folder / f"clip{n:02}.wav", np.zeros_like(x) if n < silent * clips else x, 16000)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def silence(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("silence"), silent=0.8)


def one_code(run):
    "A head whose bias drowns everything else."
    bias = next(m for m in run.objective.modules() if isinstance(m, torch.nn.Linear)).bias
    for group in run.optimiser.param_groups:
        group["params"] = [p for p in group["params"] if p is not bias]
    bias.requires_grad_(False)[3] = 60.0


def one_direction(run):
    "An encoder whose frames lie on a line."
    way = torch.nn.functional.normalize(torch.randn(run.config.encoder.dim, generator=torch.Generator().manual_seed(0)), dim=0)
    run.encoder.blocks[-1].register_forward_hook(lambda module, given, out: ((out[0] @ way)[..., None] * way, *out[1:]))


def foreign_labels(run):
    "Codes that belong to other frames."
    codes = torch.cat([i.targets["codes"] for i in run.feed.items])
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    for item, part in zip(run.feed.items, codes.split([len(i.targets["codes"]) for i in run.feed.items])):
        item.targets["codes"] = part


def logged(config, folder, monkeypatch, plant=lambda run: None):
    "The log of a run in which something was planted after it was made."
    prepare = loop.prepare

    def planted(*given):
        run = prepare(*given)
        plant(run)
        return run

    monkeypatch.setattr(loop, "prepare", planted)
    loop.pretrain(config, folder, progress=False, log_every=2, watch_every=20, save_every=1000)
    return read_lines(folder / "metrics.jsonl")[0]


def settings(corpus, objective="clusters", mixer=None, **changes):
    mixer = mixer or baseline_mixer()
    encoder = EncoderConfig(mixer, dim=64, depth=1, mixer_kw=mixers.get(mixer).meta.get("tiny", {}))
    kw = dict(objective=objective, objective_kw=objectives.get(objective).meta["tiny"], steps=60, batch_seconds=6.0, lr=5e-3)
    return PretrainConfig(encoder, corpus=str(corpus), **kw | changes)


FAULTS = {  # alarm → what was planted, changes of the settings
    "learning rate too high": (lambda run: None, dict(lr=0.5)),
    "code collapse": (one_code, {}),
    "dimensional collapse": (one_direction, {}),
    "mask too small": (lambda run: None, dict(span_share=0.02)),
    "loss at chance": (foreign_labels, {}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_raises_its_alarm_first(name, sound, tmp_path, monkeypatch):
    plant, changes = FAULTS[name]
    rows = logged(settings(sound, **changes), tmp_path / "run", monkeypatch, plant)
    found = alarms(rows, objective="clusters", limits=SOON)
    assert found and found[0].name == name, found
    assert found[0].advice == ADVICE[name] and 1 <= found[0].step <= 60


@pytest.mark.filterwarnings("ignore")
def test_digital_silence_is_told(silence, tmp_path, monkeypatch):
    rows = logged(settings(silence, steps=20), tmp_path / "run", monkeypatch)
    assert alarms(rows, objective="clusters", limits=SOON)[0].name == "silent data"


@pytest.mark.parametrize("objective", ["clusters", "best_rq"])
def test_a_healthy_run_raises_none(objective, sound, tmp_path, monkeypatch):
    rows = logged(settings(sound, objective, steps=60 if objective == "clusters" else 100), tmp_path / "run", monkeypatch)
    assert rows[-1]["valid_masked_accuracy"] > 1.5 * rows[-1]["valid_target_largest"]
    for end in range(1, len(rows) + 1, 4):
        assert alarms(rows[:end], objective=objective, limits=SOON) == []
    assert alarms_of(tmp_path / "run", limits=SOON) == []


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["clusters", "best_rq"])
def test_healthy_runs_of_five_mixers_raise_none(objective, sound, tmp_path, monkeypatch, root):
    "The best mixers of five families, on tones; tools/bands.py asks the same of the bundled corpus and real sizes."
    monkeypatch.syspath_prepend(root / "tools")
    import bands

    for name in bands.usual_mixers(5):
        rows = logged(settings(sound, objective, name, steps=200), tmp_path / name, monkeypatch)
        for end in range(1, len(rows) + 1, 5):
            assert alarms(rows[:end], objective=objective, limits=dataclasses.replace(SOON, settle_steps=100)) == [], name


def test_alarms_that_hold_no_more_are_none_and_gaps_are_no_harm():
    rows = [dict(step=s, loss=5.0 if s != 60 else None, masked_share=0.02 if s < 100 else 0.4) for s in range(20, 600, 20)]
    assert [a.name for a in alarms(rows[:4], objective="any")] == ["mask too small"]
    assert alarms(rows, objective="any") == [] == alarms([], objective="any")
    assert alarms([dict(step=20, loss=None, grad_norm=None, skipped=20)], objective="any")[0].name == "learning rate too high"


def test_collapses_that_other_objectives_log():
    rows = [dict(step=s, loss=0.1, code_perplexity=2.0, target_variance=0.5) for s in range(20, 800, 20)]
    assert [a.name for a in alarms(rows, objective="wav2vec2")] == ["code collapse"]
    rows = [dict(step=s, loss=0.1, target_variance=0.02) for s in range(20, 800, 20)]
    assert [a.name for a in alarms(rows, objective="data2vec")] == ["dimensional collapse"]
    rows = [dict(step=s, loss=4.6, masked_accuracy=0.0101) for s in range(20, 800, 20)]
    assert [a.name for a in alarms(rows, objective="wav2vec2", chance=1 / 101)] == ["loss at chance"]
    assert alarms(rows, objective="wav2vec2") == []  # the log alone does not say what chance is


def write_run(folder, height=9.0, decay=500, objective="clusters", every=100, steps=2000, **settings):
    folder.mkdir()
    write_json(folder / "config.json", dict(objective=objective, corpus="bundled", **settings))
    for s in range(every, steps + 1, every):
        loss = 4 + height * math.exp(-s / decay)
        append_line(folder / "metrics.jsonl", dict(step=s, loss=loss, valid_loss=loss, hours=s * 16 / 3600))
    return folder


def test_bands_are_made_kept_and_asked(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / f"run{n}", height=9 + n / 4) for n in range(3)]
    bands = bands_of(runs)
    band = bands["clusters"]
    assert band.runs == 3 and all(a <= b for a, b in zip(band.low, band.high)) and list(band.hours) == sorted(band.hours)
    low, high = band.at([band.hours[3], 1000.0])
    assert (low[0], high[0]) == (band.low[3], band.high[3]) and math.isnan(low[1])
    save_bands(bands, tmp_path / "health" / "bands.json")
    save_bands({"other": dataclasses.replace(band, objective="other")}, tmp_path / "health" / "bands.json")
    assert load_bands(tmp_path / "health" / "bands.json") == bands | {"other": dataclasses.replace(band, objective="other")}
    monkeypatch.setattr(page, "results_dir", lambda: tmp_path)
    assert alarms_of(runs[0]) == []
    found = alarms_of(write_run(tmp_path / "stuck", decay=2000))
    assert [a.name for a in found] == ["loss outside the band"]
    assert alarm_line(found) == f"ALARM loss outside the band since step {found[0].step}" and alarm_line([]) == ""


def test_a_band_counts_for_runs_with_its_own_settings_only(tmp_path, monkeypatch):
    kw, slow = dict(objective_kw={"clusters": 50}, span_seconds=0.2, span_share=0.4), dict(decay=2000)
    save_bands(bands_of([write_run(tmp_path / f"run{n}", **kw) for n in range(3)]), tmp_path / "health" / "bands.json")
    monkeypatch.setattr(page, "results_dir", lambda: tmp_path)
    assert alarms_of(write_run(tmp_path / "stuck", **slow, **kw))
    for name, other in dict(codes=dict(objective_kw={"clusters": 60}), spans=dict(span_share=0.5), masking=dict(masking={"preset": "hubert"}), start=dict(start="runs/a")).items():
        assert alarms_of(write_run(tmp_path / name, **slow, **kw | other)) == [], name
    with pytest.raises(EsslError, match="cannot be compared"):
        bands_of([tmp_path / "stuck", tmp_path / "codes"])


def test_what_is_no_run_and_no_band_is_refused(tmp_path, monkeypatch):
    with pytest.raises(EsslError, match="no pre-training run"):
        alarms_of(tmp_path)
    with pytest.raises(EsslError, match="health reports"):
        bands_of([write_run(tmp_path / "short", steps=100)])
    far = write_run(tmp_path / "far", every=2000, steps=8000)
    with pytest.raises(EsslError, match="in common"):
        bands_of([far, write_run(tmp_path / "near", steps=500)])
    (tmp_path / "bands.json").write_text(json.dumps({"clusters": {"what": 1}}))
    with pytest.raises(EsslError, match="save_bands"):
        load_bands(tmp_path / "bands.json")
    assert load_bands(tmp_path / "nothing.json") == {}
    monkeypatch.setenv("ESSL_RESULTS", str(tmp_path / "nowhere"))
    assert load_bands() == {}


def test_shipped_bands_hold_the_runs_that_made_them():
    for objective, band in load_bands().items():
        assert band.objective == objective in objectives.names() and band.runs >= 3
        assert all(0 < a <= b for a, b in zip(band.low, band.high)) and list(band.hours) == sorted(band.hours)


def test_silence_is_counted_in_real_frames_only():
    raw = torch.zeros(2, 10, 80)
    raw[:, 4:] = math.log(1e-8)
    assert silent_share(raw, torch.tensor([4, 4])) == 0 and silent_share(raw, torch.tensor([8, 4])) == pytest.approx(4 / 12)
    assert silent_share(raw.half().float(), torch.tensor([10, 10])) == pytest.approx(0.6)
    raw[0, 5, 3] = -5.0  # one bin with sound in it
    assert silent_share(raw, torch.tensor([10, 10])) == pytest.approx(11 / 20)
    wave = torch.zeros(1, 3200)
    wave[0, :1600] = 0.1
    assert silent_share(wave, torch.tensor([3200])) == 0.5 and silent_share(wave, torch.tensor([0])) == 0


@pytest.mark.parametrize("light", [n for n in list_mixers() if mixers.get(n).obj.__module__ == "essl_nb.mixers.ligru"])
def test_the_bound_of_recurrent_weights_is_that_of_singular_values(light):
    from essl_nb.ligru.layer import LightGRU
    from essl_nb.models.encoder import build_encoder

    encoder = build_encoder(named_config("tiny", light), seed=0)
    layers = [m for m in encoder.modules() if isinstance(m, LightGRU)]
    if layers[0].cell != "ligru":
        assert recurrent_bound(encoder) is None
        return
    U = layers[-1].layers[0][0].u
    with torch.no_grad():
        U[: len(U) // 2] *= 7
    h, z = U.detach().double().chunk(2)
    expected = float(torch.linalg.svdvals(h)[0] + torch.linalg.svdvals(z)[0] / 4)
    assert recurrent_bound(encoder) == pytest.approx(expected, rel=1e-5)
    assert recurrent_bound(encoder, h_max=2.0) > recurrent_bound(encoder)
