"""What a run is fed: streamed sound gives the same run with any number of readers and after any stop, for front ends over log-mel and over the waveform."""
import shutil

import pytest
import torch
from madeup import steps_of

from essl_nb.core.files import load_tensors, read_json, read_lines
from essl_nb.core.registry import EsslError
from essl_nb.data.opening import open_index
from essl_nb.data.shards import write_shards
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.frontend import frontends
from essl_nb.objectives.objective import list_objectives, objectives
from essl_nb.train import loop
from essl_nb.train.config import PretrainConfig
from essl_nb.train.feed import streams
from essl_nb.train.loop import pretrain

MIXER = list_mixers(family="pooling")[0]
WAVE = sorted((e.name for e in frontends if not e.obj.stored), key=lambda name: name != "sincnet")  # the small one first
OFTEN = dict(progress=False, log_every=1, watch_every=6, save_every=2)


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(open_index(clips), folder, seconds_per_shard=20)
    return folder


def settings(corpus, objective="best_rq", frontend="logmel", **kw):
    encoder = EncoderConfig(MIXER, dim=16, depth=1, frontend=frontend, mixer_kw=mixers.get(MIXER).meta.get("tiny", {}))
    own = dict(steps=6, batch_seconds=8.0, lr=5e-3, precision="fp32", objective=objective, objective_kw=objectives.get(objective).meta["tiny"])
    return PretrainConfig(encoder, corpus=str(corpus), **own | kw)


def value(folder):
    return read_json(folder / "result.json")["value"]


class PowerCut(BaseException):
    pass


def test_shards_give_one_run_with_any_number_of_readers_and_after_a_cut(shards, tmp_path, monkeypatch):
    config = settings(shards, "clusters")
    pretrain(config, tmp_path / "whole", **OFTEN)
    step = loop.train_step

    def cut(run):
        if run.step == 3:
            raise PowerCut
        return step(run)

    monkeypatch.setattr(loop, "train_step", cut)
    with pytest.raises(PowerCut):
        pretrain(config, tmp_path / "cut", workers=2, **OFTEN)
    monkeypatch.undo()
    pretrain(config, tmp_path / "cut", workers=1, **OFTEN)
    assert value(tmp_path / "whole") == value(tmp_path / "cut") and steps_of(tmp_path / "whole") == steps_of(tmp_path / "cut")


PAIRS = [(o, WAVE[0]) for o in list_objectives()] + [(list_objectives()[0], f) for f in WAVE[1:]]


@pytest.mark.parametrize("objective, frontend", PAIRS)
def test_every_objective_trains_every_front_end_over_the_waveform(objective, frontend, clips, tmp_path):
    config = settings(clips, objective, frontend, steps=2, batch_seconds=4.0)
    assert streams(config)
    pretrain(config, tmp_path / "run", **OFTEN)
    rows, _ = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < r["loss"] < 100 and r["grad_norm"] > 0 for r in rows) and 0 <= rows[-1]["waiting"] <= 1


def test_which_corpora_are_stored_and_which_are_streamed(clips, shards):
    assert not streams(settings(clips)) and streams(settings(clips, frontend=WAVE[0])) and streams(settings(shards))
    assert streams(settings(clips, reading="streamed")) and streams(settings(f"{shards}/*.tar"))
    with pytest.raises(EsslError, match="reads waveforms.*reading='streamed'"):
        settings(clips, frontend=WAVE[0], reading="stored")


def test_a_clip_that_cannot_be_read_is_counted_and_named_and_too_many_stop_the_run(clips, tmp_path, capsys):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    index, names = open_index(folder), sorted(folder.glob("*.opus"))
    for name in names[::6]:
        name.write_bytes(name.read_bytes()[:40])
    config = settings(folder, reading="streamed")
    pretrain(config, tmp_path / "run", corpus=index, max_fault_share=0.5, **OFTEN)
    assert "clips were left out" in capsys.readouterr().out and value(tmp_path / "run")["steps"] == 6
    counted = read_json(tmp_path / "run" / "faults.json")
    assert 0 < counted["count"] < counted["seen"]
    with pytest.raises(EsslError, match="more than max_fault_share = 0.0001"):
        pretrain(config, tmp_path / "strict", corpus=index, max_fault_share=1e-4, **OFTEN)


def test_a_run_may_begin_with_weights_and_those_of_another_encoder_are_refused(clips, tmp_path):
    pretrain(settings(clips), tmp_path / "first", **OFTEN)
    start = str(tmp_path / "first" / "encoder")
    pretrain(settings(clips, start=start, steps=1, lr=1e-9), tmp_path / "second", **OFTEN)
    a, b = (load_tensors(tmp_path / f / "encoder" / "model.safetensors") for f in ("first", "second"))
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    other = EncoderConfig(MIXER, dim=32, depth=1, mixer_kw=mixers.get(MIXER).meta.get("tiny", {}))
    with pytest.raises(EsslError, match="dim: 16 there, 32 here"):
        pretrain(PretrainConfig(other, corpus=str(clips), start=start), tmp_path / "third", **OFTEN)


def test_the_batch_that_gave_no_number_is_kept(clips, tmp_path, monkeypatch):
    forward = loop.Run.forward

    def sick(self, batch, generator):
        encoded, loss, span, mask = forward(self, batch, generator)
        return encoded, loss._replace(total=loss.total * float("nan")) if self.step >= 2 else loss, span, mask

    monkeypatch.setattr(loop.Run, "forward", sick)
    pretrain(settings(clips, steps=40), tmp_path / "run", **OFTEN)
    assert "not finite" in value(tmp_path / "run")["stopped"]
    kept = load_tensors(tmp_path / "run" / "batch-not-finite-rank0.safetensors")
    assert kept["raw"].ndim == 3 and kept["span"].any() and kept["codes"].shape == kept["span"].shape


def test_a_masking_is_named_in_the_configuration(clips, tmp_path):
    with pytest.raises(EsslError, match="wav2vec2"):
        settings(clips, masking={"preset": "wav2vec"})
    shares = []
    for masking in ({"preset": "hubert"}, {"span": 2, "unit": "frames", "share": 0.1}):
        pretrain(settings(clips, masking=masking), tmp_path / str(len(shares)), **OFTEN)
        shares.append(value(tmp_path / str(len(shares)))["masked_share"])
    assert shares[0] > 0.3 > 0.2 > shares[1]


def test_a_run_that_learns_nothing_raises_an_alarm_in_its_log(clips, tmp_path, capsys):
    config = settings(clips, masking={"span": 1, "unit": "frames", "share": 0.01}, steps=12)
    pretrain(config, tmp_path / "run", **OFTEN)
    rows, _ = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert "mask too small" in rows[-1]["alarms"]
    said = capsys.readouterr()
    assert (said.out + said.err).count("Alarm: mask too small") == 1
