"What frames carry from afar: who speaks is told by frames that are hidden, and only where something beyond what is hidden reaches them."
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from test_probe import Store, probe

from essl_nb.core.registry import EsslError
from essl_nb.data.audio import load_audio
from essl_nb.mixers.base import mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.far_context import PassageSource, middle, passages_of
from essl_nb.probes.frames import Baseline, Segment

ASK = dict(hidden_ms=600, read_ms=200, seconds=3.0, steps=60, least_scored=3, lr=0.02)


class Voices(list):
    "Clips of 0.8 to 1.2 s; four voices, two languages, each voice with a spectrum of its own."

    def __init__(self, clips=160):
        generator = torch.Generator().manual_seed(0)
        self.store, spectra = Store(), torch.randn(4, 80, generator=generator)
        for i in range(clips):
            frames = int(torch.randint(80, 121, (), generator=generator))
            self.store[f"clip{i}"] = spectra[i % 4] + torch.randn(frames, 80, generator=generator)
            split = ("train", "train", "valid", "test", "test")[i // 4 % 5]
            self.append(SimpleNamespace(id=f"clip{i}", voice=f"v{i % 4}", language="xy"[i % 2], part=("one", "two")[i % 4 // 2], phones=None, seconds=frames / 100, split=split))

    def features(self, progress=True):
        return self.store


class Reach(torch.nn.Module):
    "Each frame with the mean of so many frames to each side; None: of the whole."
    stride, frame_seconds = 2, 0.02
    frontend = SimpleNamespace(out_lengths=lambda n: (n - 1) // 2 + 1)

    def __init__(self, reach=None):
        super().__init__()
        self.reach, self.calls = reach, 0

    def from_features(self, mel, lengths, span=None, generator=None):
        self.calls += 1
        x = torch.where(span[..., None], 0, mel[:, ::2])
        width = 2 * len(x[0]) + 1 if self.reach is None else 2 * self.reach + 1
        near = torch.nn.functional.avg_pool1d(x.mT, width, 1, width // 2, count_include_pad=False).mT
        return SimpleNamespace(frames=near, lengths=self.frontend.out_lengths(lengths), layers=[x, near])


@pytest.fixture(scope="module")
def toy():
    return Voices()


def test_passages_are_equal_of_one_voice_and_share_nothing(toy):
    train = [u for u in toy if u.split == "train"]
    made = passages_of(toy.store, train, 3.0, 99)
    assert {sum(c.frames for c in p.clips) for p in made} == {300} and len({p.id for p in made}) == len(made) and len(made) > 12
    for p in made:
        assert {(c.whole.voice, c.whole.language, c.whole.part) for c in p.clips} == {(p.voice, p.language, p.part)} and p.seconds == 3.0
    used = [(c.whole.id, t) for p in made for c in p.clips for t in range(c.start, c.start + c.frames)]
    assert len(used) == len(set(used))
    few = passages_of(toy.store, train[::-1], 3.0, 2)
    assert [sum(p.voice == f"v{k}" for p in few) for k in range(4)] == [2] * 4 and all(p in made for p in few)


def test_what_is_read_lies_in_the_middle_of_what_is_hidden():
    for T in (50, 51):
        span, centre = middle(T, hidden=10, read=5)
        assert int(span.sum()) == 25 and int(centre.sum()) == 5
        first, last = (f(span.nonzero().flatten().tolist()) for f in (min, max))
        assert centre.nonzero().flatten().tolist() == list(range(first + 10, last - 9)) and abs(first - (T - 1 - last)) <= 1
    span, centre = middle(20, hidden=0, read=3)
    assert torch.equal(span, centre)


@pytest.mark.parametrize("what", ["voice", "language"])
def test_only_what_reaches_beyond_the_hidden_stretch_tells(what, toy):
    told = {reach: probe(Reach(reach), "far_context", toy, what=what, **ASK) for reach in (None, 60, 20)}
    assert told[None].low > 0.9 and told[60].low > 0.8
    near, chance = told[20], told[20].settings["chance"]
    assert chance == (0.25 if what == "voice" else 0.5) and near.low <= chance + 0.1 and near.value < chance + 0.25
    mel = probe(Baseline(context_ms=100), "far_context", toy, what=what, **ASK)
    assert mel.value < chance + 0.25 and mel.unit_ids_hash == near.unit_ids_hash
    assert probe(Baseline(), "far_context", toy, what=what, read="visible", **ASK).low > 0.9


def test_what_stands_in_the_hidden_stretch_changes_nothing(toy):
    want, other = probe(Reach(), "far_context", toy, **ASK), Voices()
    hidden = dict(hidden=30, read=10)
    for p in [p for split in ("train", "test") for p in passages_of(other.store, [u for u in other if u.split == split], 3.0, 24)]:
        span, at = middle(150, **hidden)[0].repeat_interleave(2), 0
        for c in p.clips:
            other.store[c.whole.id][c.start : c.start + c.frames][span[at : at + c.frames]] = 77.0
            at += c.frames
    got = probe(Reach(), "far_context", other, **ASK)
    assert got.units == want.units and got.settings == want.settings


def test_voice_and_language_are_read_once(toy):
    encoder, memo = Reach(), {}
    first = probe(encoder, "far_context", toy, memo=memo, **ASK)
    calls = encoder.calls
    second = probe(encoder, "far_context", toy, what="language", memo=memo, **ASK)
    assert encoder.calls == calls and first.count == second.count and first.settings["classes"] != second.settings["classes"]
    assert first.settings["voices_by"] == "voice" and first.settings["voices"] == sorted(first.settings["voices"])


def test_classes_with_little_are_left_out_and_two_must_remain(toy):
    few = Voices()
    few[:] = [u for u in few if u.voice != "v3" or u.split != "test"]
    assert probe(Reach(), "far_context", few, **ASK).settings["classes"] == ["v0", "v1", "v2"]
    with pytest.raises(EsslError, match="two voices with 50 passages"):
        probe(Reach(), "far_context", toy, **ASK | dict(least_scored=50))


@pytest.mark.parametrize("wrong,why", [(dict(what="phone"), "voice"), (dict(read="both"), "visible"), (dict(seconds=2.3), "half a second"), (dict(hidden_ms=-1), "hidden_ms"),
    (dict(read_ms=0), "read_ms"), (dict(seconds=90.0), "60 s"), (dict(passages=0), "passages"), (dict(least_scored=1), "least_scored")])
def test_questions_that_cannot_be_asked(wrong, why, toy):
    with pytest.raises(EsslError, match=why):
        probe(Baseline(), "far_context", toy, **ASK | wrong)


def test_a_real_encoder_reads_the_visible_part_and_the_control_nothing(toy):
    "Other sound in the visible part: the layer that does not mix gives the same frames, attention others."
    other = Voices()
    for mel in other.store.values():
        mel *= -1.5
    for role, changes in (("control", False), ("baseline", True)):
        encoder = build_encoder(EncoderConfig(next(e.name for e in mixers if e.meta.get(role)), dim=32, depth=1), seed=0)
        a, b = (probe(encoder, "far_context", corpus, **ASK) for corpus in (toy, other))
        assert (a.settings["layer_weights"] != b.settings["layer_weights"]) == changes and (changes or a.units == b.units), role


def test_samples_of_a_passage_are_those_of_its_clips(tmp_path):
    clips, generator = [], np.random.default_rng(0)
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * generator.standard_normal(16000), 16000)
        clips.append(SimpleNamespace(id=f"{i}", path=tmp_path / f"{i}.wav", voice="a", language="", part=""))
    passage = passages_of({u.id: torch.zeros(100, 80) for u in clips}, clips, 2.5, 1)[0]
    encoder = Reach()
    encoder.frontend = SimpleNamespace(stored=False, spec=SimpleNamespace(rate=16000))
    source = PassageSource(encoder, Store())
    assert all(isinstance(c, Segment) for c in passage.clips) and len(source.samples(passage)) == 40000
    first = passage.clips[0]
    assert torch.equal(source.samples(passage)[: 160 * first.frames], load_audio(first.whole.path)[160 * first.start :][: 160 * first.frames])
