"A score from sound alone: the same twice, kept by content, with its baselines, from any folder."

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_probe import Oracle, Store, Toy, probe

from essl_nb.core.registry import EsslError
from essl_nb.data.corpus import load_corpus
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.command import baseline_lines, essl_probe, read_options
from essl_nb.probes.frames import Baseline, Segment
from essl_nb.probes.probe import default_probe, list_probes, run_probe, runnable
from essl_nb.probes.units import fit_units, in_segments, some_of_each_voice, unit_of, voice_groups

QUICK = dict(clusters=8, steps=40, batch=256, lr=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Sixty clips of plain sound, and nothing else."
    import soundfile

    root, generator = tmp_path_factory.mktemp("plain"), np.random.default_rng(0)
    for i in range(60):
        heights = 200.0 * 2 ** (np.repeat((np.arange(10) + i) % 5, 800) / 2)
        sound = 0.3 * np.sin(2 * np.pi * np.cumsum(heights) / 16000) + 0.01 * generator.standard_normal(8000)
        soundfile.write(root / f"{i:02}.wav", sound, 16000)
    return root


class Spoken(Toy):
    "Clips in which six spectra follow one another, 200 ms each."

    def __init__(self):
        super().__init__(40, phones=False)
        generator = torch.Generator().manual_seed(0)
        spectra = 2 * torch.randn(6, 80, generator=generator)
        for u in self:
            order = torch.randint(6, (5,), generator=generator)
            self.store[u.id] = spectra[order].repeat_interleave(20, 0) + 0.3 * torch.randn(100, 80, generator=generator)


def test_it_needs_sound_and_nothing_else():
    bare = Spoken()
    for u in bare:
        u.language = u.voice = ""
    assert runnable(bare) == ["units"] and default_probe(bare) == "units" and default_probe(Toy(8)) == "masked_phones" and "units" in list_probes()
    score = probe(Oracle(), "units", bare, **QUICK)
    assert score.value > 0.5 > score.settings["chance"] and score.low > score.settings["chance"]
    assert 1 < score.settings["rankme"] <= score.settings["dim"] == 80 and score.settings["rank_frames"] <= 2000
    again = probe(Oracle(), "units", bare, **QUICK)
    assert (again.units, again.settings) == (score.units, score.settings)


def test_constant_frames_are_at_chance_and_have_rank_one():
    class Blind(Oracle):
        def from_features(self, mel, lengths, **kw):
            out = super().from_features(mel, lengths, **kw)
            return SimpleNamespace(frames=out.frames, lengths=out.lengths, layers=[torch.ones_like(x) for x in out.layers])

    score = probe(Blind(), "units", Toy(40, phones=False), **QUICK)
    assert abs(score.value - score.settings["chance"]) < 0.08 and score.settings["rankme"] < 1.01


def test_units_are_kept_by_content_and_learnt_again_where_the_file_is_torn(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path))
    corpus = load_corpus(folder)
    features, ids = corpus.features(progress=False), [u.id for u in corpus if u.split == "train"]
    first = fit_units(features, ids, clusters=8)
    kept = sorted((tmp_path / "units").iterdir())
    assert len(kept) == 1 and torch.equal(fit_units(features, ids, clusters=8).centroids, first.centroids)
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert torch.equal(fit_units(features, ids, clusters=8).centroids, first.centroids)
    fit_units(features, ids[1:], clusters=8), fit_units(features, ids, clusters=9), fit_units(features, ids, clusters=8, seed=1)
    assert len([p for p in (tmp_path / "units").iterdir() if p.suffix == ".safetensors"]) == 4


def test_a_unit_is_of_the_sound_and_not_of_its_level():
    toy = Toy(40, phones=False)
    model = fit_units(toy.store, [u.id for u in toy], clusters=8)
    mel, at = toy.store["toy0"], torch.arange(100)
    codes = unit_of(model, mel, at)
    assert torch.equal(codes, unit_of(model, mel + torch.linspace(-3, 3, 80), at)) and len(codes.unique()) > 2


@pytest.mark.parametrize("clusters", [1, 0, 5000])
def test_a_number_of_units_that_cannot_be_is_refused(clusters):
    with pytest.raises(EsslError, match="2 to 2000"):
        probe(Baseline(), "units", Toy(40), clusters=clusters)


def test_too_little_speech_says_what_to_ask_for():
    with pytest.raises(EsslError, match="fewer clusters"):
        probe(Baseline(), "units", Toy(8, phones=False), clusters=1500)


def test_long_recordings_are_read_in_segments():
    generator = torch.Generator().manual_seed(0)
    long = Toy(0)
    long.store = Store({f"hour{i}": torch.randn(1000, 80, generator=generator) for i in range(3)})
    long.extend(SimpleNamespace(id=f"hour{i}", phones=None, part="", seconds=10.0, split=s, language="", voice="") for i, s in enumerate(("train", "test", "valid")))
    segments = in_segments(long.store, long, 3.0)
    assert len(segments) == 12 and all(isinstance(s, Segment) and s.frames <= 300 for s in segments)
    assert [sum(p.frames for p in segments if p.whole is u) for u in long] == [1000] * 3
    score = probe(Oracle(), "units", long, segment_seconds=3.0, **QUICK)
    assert score.n == 4 and score.settings["recordings"] == 1 and score.count < 500
    with pytest.raises(EsslError, match="one recording"):
        probe(Oracle(), "units", long, **QUICK)
    with pytest.raises(EsslError, match="1 to 600"):
        probe(Oracle(), "units", long, segment_seconds=0.5, **QUICK)


def test_the_command_scores_a_folder_of_plain_sound_with_its_baselines(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    encoder, out = tmp_path / "encoder", tmp_path / "scores.jsonl"
    build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0).save(encoder)
    essl_probe(str(encoder), corpus=str(folder), options="clusters=8,steps=20,batch=256", out=str(out))
    said, rows = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    assert said.startswith("units accuracy") and all(word in said for word in ("log-mel ±100 ms", "untrained", "most frequent", "RankMe", "["))
    assert [r["encoder"].removeprefix(str(encoder)) for r in rows] == ["", ": log-mel", ": log-mel ±40 ms", ": log-mel ±100 ms", ": untrained"]
    assert len({r["unit_ids_hash"] for r in rows}) == 1
    essl_probe(str(encoder), corpus=str(folder), options="clusters=8,steps=20,batch=256", out=str(out), no_baselines=True)
    assert "log-mel" not in capsys.readouterr().out and len(out.read_text().splitlines()) == 6
    for wrong in (dict(probe="phones"), dict(options="clusters=eight"), dict(options="clusters"), dict(threads=0), dict(device="gpu7")):
        with pytest.raises(EsslError):
            essl_probe(str(encoder), corpus=str(folder), out=str(out), **wrong)
    assert len(out.read_text().splitlines()) == 6


def test_a_baseline_is_not_its_own_rival(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESSL_CACHE", str(tmp_path / "cache"))
    essl_probe("logmel:40", corpus=str(folder), options="clusters=8,steps=20,batch=256", out=str(tmp_path / "scores.jsonl"))
    assert "log-mel ±40" not in (said := capsys.readouterr().out) and "untrained" not in said and "log-mel ±100" in said


def test_the_difference_is_said_with_its_interval():
    score = run_probe(Oracle(), "units", Toy(40, phones=False), progress=False, precision="fp32", **QUICK)
    lines = baseline_lines(score, {"log-mel": score})
    assert "+0.0% [+0.0%, +0.0%]" in lines[0] and "most frequent" in lines[1] and "RankMe" in lines[2]


@pytest.mark.parametrize("text,options", [
    ("", {}), ("a=1,b=x", dict(a=1, b="x")), ("lrs=0.1,0.2,epochs=3", dict(lrs=[0.1, 0.2], epochs=3)), ("lrs=[1,2]", dict(lrs=[1, 2])),
    ("part=a b,share=.5", dict(part="a b", share=0.5)), ("a=1,", dict(a=1)), ("part=null", dict(part=None)),
])
def test_options_from_the_command_line(text, options):
    assert read_options(text) == options


@pytest.mark.parametrize("text", ["span_ms", "400", "=3", "a=1,=2"])
def test_what_is_no_option_is_answered(text):
    with pytest.raises(EsslError):
        assert set(read_options(text)) == {"never"} or run_probe(Baseline(), "units", Toy(8), **read_options(text))


def clips_of(**seconds):
    "So many clips of a second of each voice."
    return [SimpleNamespace(id=f"{v}{i}", voice=v, part="far" if v > "m" else "near", language="", seconds=1.0) for v, n in seconds.items() for i in range(n)]


def test_no_voice_gets_more_seconds_than_asked_and_a_larger_cap_only_adds():
    clips = clips_of(anna=30, ben=4, zoe=12)
    few, more = some_of_each_voice(clips, 5), some_of_each_voice(clips, 9.5)
    count = lambda some: [sum(u.voice == v for u in some) for v in ("anna", "ben", "zoe")]
    assert count(few) == [5, 4, 5] and count(more) == [9, 4, 9] and {u.id for u in few} < {u.id for u in more}
    assert few == [u for u in clips if u in few] and few == sorted(some_of_each_voice(clips[::-1], 5), key=clips.index)
    assert some_of_each_voice(clips, None) == clips and len(some_of_each_voice(clips, 0.1)) == 3  # one of each at least
    for wrong in (0, -1, float("nan")):
        with pytest.raises(EsslError, match="voice_seconds"):
            some_of_each_voice(clips, wrong)


def test_groups_are_the_best_that_is_known_of_every_clip():
    clips = clips_of(anna=2, zoe=3)
    assert voice_groups(clips) == dict(voices=[0, 0, 1, 1, 1], voice_names=["anna", "zoe"], voices_by="voice")
    clips[0].voice = ""
    assert voice_groups(clips) == dict(voices=[1, 1, 0, 0, 0], voice_names=["far", "near"], voices_by="part")
    for u in clips:
        u.voice, u.part = "one", ""
    whole = SimpleNamespace(id="hour", voice="", part="", language="", seconds=9.0)
    groups = voice_groups([*clips[:2], Segment("a", whole, 0, 10), Segment("b", whole, 10, 10)])
    assert groups["voices_by"] == "recording" and groups["voices"][2] == groups["voices"][3] and len(groups["voice_names"]) == 3


def test_a_score_of_all_parts_holds_each_of_them_and_who_spoke():
    spoken = Spoken()
    for i, u in enumerate(spoken):
        u.voice, u.part = f"v{i % 4}", "near" if i % 4 < 3 else "far"
    score = probe(Oracle(), "units", spoken, **QUICK)
    kept = [u for u in spoken if u.split == "test"]
    assert [score.settings["voice_names"][k] for k in score.settings["voices"]] == [u.voice for u in kept] and score.settings["voices_by"] == "voice"
    assert [s.settings["view"] for s in score.also] == ["far", "near"] == sorted({s.settings["part"] for s in score.also})
    for k in (0, 1):
        assert sum(s.units[j][k] for s in score.also for j in range(len(s.units))) == sum(u[k] for u in score.units)
    alone = probe(Oracle(), "units", spoken, part="near", **QUICK)
    assert alone.also == () and alone.unit_ids_hash == score.also[1].unit_ids_hash and alone.settings["part"] == "near"
    some = probe(Oracle(), "units", spoken, voice_seconds=2.0, **QUICK)
    assert some.settings["train_utterances"] == 8 and max(np.bincount(some.settings["voices"])) <= 2
    with pytest.raises(EsslError, match="did you mean 'near'"):
        probe(Oracle(), "units", spoken, part="neer", **QUICK)
