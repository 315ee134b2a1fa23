"Whatever a probe is given, its number is a number or a sentence: weights, types, modes, sounds, labels, splits."

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_probe import QUICK, Oracle, Store, Toy, probe

from essl_nb.core.intervals import bootstrap_interval, paired_interval, percentiles, ratio
from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.probes.finetune import Diverged, Recipe, Recogniser, ctc, ctc_weights, fit, frames_needed, listen
from essl_nb.probes.frames import Baseline, Source, evaluation_mode
from essl_nb.probes.probe import baseline_scores, probes, run_probe


def toy_for(name):
    return Toy(20) if probes.get(name).meta["needs"] == "phones" else Toy(40, phones=False)


@pytest.fixture
def encoder():
    "A real encoder, small and untrained, with dropout."
    return build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1, dropout=0.2), seed=0).eval()


# frames that are no numbers


@pytest.mark.parametrize("name", list(QUICK))
def test_weights_that_are_nan_give_no_score(name, encoder):
    encoder.norm.weight.data[3] = float("nan")
    encoder.blocks[0].mixer_norm.weight.data[3] = float("nan")
    with pytest.raises(EsslError, match="NaN"):
        probe(encoder, name, toy_for(name), **QUICK[name])


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_few_bits_are_scored_in_place_of_the_encoders_own(bits, encoder):
    encoder = build_encoder(EncoderConfig(list_mixers()[0], dim=32, depth=1), seed=0).eval()
    before, memo = encoder.norm.weight.clone(), {}
    own, small, again = (probe(encoder, "phones", toy_for("phones"), memo=memo, **QUICK["phones"], **kw) for kw in ({}, dict(bits=bits), dict(bits=bits)))
    assert small.units == again.units and len(memo) == 2, "frames of few bits are kept under another name"
    assert small.unit_ids_hash == own.unit_ids_hash and torch.equal(encoder.norm.weight, before)


def test_few_bits_are_for_frozen_encoders(encoder):
    for name, given, why in (("finetune", encoder, "trains its own"), ("phones", Baseline("logmel", 0, 2), "log-mel")):
        with pytest.raises(EsslError, match=why):
            probe(given, name, toy_for(name), bits="int8")
    with pytest.raises(EsslError, match="no scheme"):
        probe(encoder, "phones", toy_for("phones"), bits="int3")


class Fails(Oracle):
    "Infinite frames wherever the sound is louder than 100."

    def from_features(self, mel, lengths, **kw):
        out = super().from_features(mel, lengths, **kw)
        out.layers[1] = torch.where((mel > 100).any(-1).any(-1)[:, None, None], torch.inf, out.layers[1])
        return out


@pytest.mark.parametrize("name", ["phones", "masked_phones", "units", "voice"])
def test_the_utterance_with_infinite_frames_is_named(name):
    toy = toy_for(name)
    id = next(u.id for u in toy if u.split == "test")
    toy.store[id][:] += 200
    with pytest.raises(EsslError, match=rf"{id}\b.*NaN or infinite"):
        probe(Fails(), name, toy, **QUICK[name])


def test_padding_may_hold_anything():
    class Dirty(Oracle):
        def from_features(self, mel, lengths, **kw):
            out = super().from_features(mel, lengths, **kw)
            pads = torch.arange(out.layers[1].shape[1]) >= out.lengths[:, None]
            out.layers[1] = torch.where(pads[..., None], torch.nan, out.layers[1])
            return out

    toy = Toy(20)
    for i, u in enumerate(toy):
        toy.store[u.id] = toy.store[u.id][: 100 - 2 * (i % 5)]
    assert probe(Dirty(), "phones", toy, **QUICK["phones"]).units == probe(Oracle(), "phones", toy, **QUICK["phones"]).units


def test_activations_too_large_for_half_precision_are_kept():
    class Loud(Oracle):
        def from_features(self, mel, lengths, **kw):
            out = super().from_features(mel, lengths, **kw)
            out.layers[1] = out.layers[1] * 2.0**20
            return out

    toy, kw = Toy(40), dict(steps=60, lr=0.03, batch=256)
    loud, plain = (probe(e, "phones", toy, **kw) for e in (Loud(), Oracle()))
    assert abs(loud.value - plain.value) < 0.02 and loud.value > 0.9


def test_a_head_that_diverges_gives_no_score(encoder):
    with pytest.raises(EsslError, match="smaller lr"):
        probe(encoder, "phones", Toy(20), lr=1e38, steps=20, batch=64)


def test_a_probe_of_ones_own_cannot_score_nan():
    @probes.register("never", needs="voice")
    def never(job):
        return job.score("accuracy", [[float("nan"), 1]] * 8, [u.id for u in job.corpus], 8)

    try:
        with pytest.raises(EsslError, match="NaN"):
            probe(Baseline(), "never", Toy(8))
    finally:
        probes.remove("never")


# what an encoder is kept in, and what a program has set


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["masked_phones", "finetune", "units"])
def test_weights_of_another_type_are_read_in_float32(name, dtype, encoder):
    other = encoder.to(dtype)
    same = build_encoder(encoder.config, seed=0).eval()
    same.load_state_dict({k: v.float() for k, v in other.state_dict().items()})
    a, b = (probe(e, name, toy_for(name), **QUICK[name]) for e in (other, same))
    assert a.units == b.units and {p.dtype for p in other.parameters()} == {dtype}


def test_dropout_is_off_and_every_part_keeps_its_mode(encoder):
    toy = Toy(20)
    wanted = probe(encoder, "masked_phones", toy, **QUICK["masked_phones"]).units
    encoder.train()
    encoder.frontend.eval()
    modes = [m.training for m in encoder.modules()]
    assert probe(encoder, "masked_phones", toy, **QUICK["masked_phones"]).units == wanted
    assert [m.training for m in encoder.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluation_mode(encoder):
        1 / 0
    assert [m.training for m in encoder.modules()] == modes


@pytest.mark.parametrize("set_up", ["float64", "bfloat16", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("name", ["masked_phones", "finetune", "voice", "units"])
def test_a_program_s_settings_change_no_score(name, set_up, encoder):
    toy = toy_for(name)
    wanted = probe(encoder, name, toy, **QUICK[name]).units
    inside = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    before = torch.get_default_dtype()
    try:
        if set_up not in inside:
            torch.set_default_dtype(getattr(torch, set_up))
        with inside.get(set_up, nullcontext)():
            assert probe(encoder, name, toy, **QUICK[name]).units == wanted
        assert torch.get_default_dtype() == (before if set_up in inside else getattr(torch, set_up))
    finally:
        torch.set_default_dtype(before)


def test_an_encoder_goes_to_the_device_and_back(encoder, monkeypatch):
    went, real = [], type(encoder).to
    monkeypatch.setattr(type(encoder), "to", lambda self, *a, **kw: went.append(str(a[0])) or real(self, *a, **kw))
    assert probe(encoder, "masked_phones", Toy(20), device="cpu", **QUICK["masked_phones"]).n == 4
    assert went == ["cpu", "cpu"]
    with pytest.raises(EsslError, match="'cuda' where there is a GPU"):
        probe(encoder, "masked_phones", Toy(20), device="gpu0", **QUICK["masked_phones"])


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(QUICK))
def test_a_gpu_gives_about_the_score_of_the_cpu(name, encoder):
    toy = toy_for(name)
    cpu, gpu = (probe(encoder, name, toy, device=d, **QUICK[name]) for d in ("cpu", "cuda"))
    assert abs(cpu.value - gpu.value) < 0.1 and next(encoder.parameters()).device.type == "cpu"


# one memo for many things


def test_a_memo_tells_sounds_labels_and_settings_apart(encoder):
    memo, kw = {}, QUICK["masked_phones"]
    first, other = Toy(20), Toy(20, seed=5)
    moved = Toy(20)
    for u in moved:
        u.phones = tuple(SimpleNamespace(label="pau" if i % 3 == 0 else p.label, start=p.start, end=p.end) for i, p in enumerate(u.phones))
    for toy in (first, other, first, moved):
        if toy is moved:
            moved.store = first.store
        assert probe(encoder, "masked_phones", toy, memo=memo, **kw).units == probe(encoder, "masked_phones", toy, **kw).units

    class Halved(Oracle):
        def __init__(self, by):
            super().__init__()
            self.config = f"by {by}"
            self.by = by

        def from_features(self, mel, lengths, **kw):
            return super().from_features(torch.cat([mel[..., : 80 // self.by], 0 * mel[..., 80 // self.by :]], -1), lengths, **kw)

    memo = {}
    assert probe(Halved(1), "phones", first, memo=memo, **QUICK["phones"]).units != probe(Halved(40), "phones", first, memo=memo, **QUICK["phones"]).units


# corpora and splits


@pytest.mark.parametrize("name", ["phones", "masked_phones", "finetune", "units"])
@pytest.mark.parametrize("left", [0, 1])
def test_too_small_a_split_is_refused_before_anything_is_read(name, left):
    class Unread(Oracle):
        def from_features(self, *a, **kw):
            raise AssertionError("the encoder was asked")

    toy = Toy(20)
    spare = [u for u in toy if u.split == "test"][left:]
    toy[:] = [u for u in toy if u not in spare]
    with pytest.raises(EsslError, match="'test'"):
        probe(Unread(), name, toy, **QUICK[name])


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_split_is_named(split):
    toy = Toy(20)
    toy[:] = [u for u in toy if u.split != split]
    with pytest.raises(EsslError, match=f"'{split}'"):
        probe(Baseline(), "phones", toy, **QUICK["phones"])


@pytest.mark.parametrize("name", ["phones", "masked_phones", "finetune"])
def test_labels_that_are_pauses_alone_are_refused(name):
    toy = Toy(20)
    for u in toy:
        u.phones = (SimpleNamespace(label="sil", start=0.0, end=1.0),)
    with pytest.raises(EsslError, match="pauses only"):
        probe(Oracle(), name, toy, **QUICK[name])


@pytest.mark.parametrize("name", ["masked_phones", "finetune"])
def test_a_train_split_of_pauses_is_refused(name):
    toy = Toy(20)
    for u in toy:
        if u.split == "train":
            u.phones = (SimpleNamespace(label="sil", start=0.0, end=1.0),)
    with pytest.raises(EsslError, match="train"):
        probe(Oracle(), name, toy, **QUICK[name])


def test_an_utterance_without_scored_frames_is_not_counted():
    toy = Toy(40)
    quiet = next(u for u in toy if u.split == "test")
    quiet.phones = (SimpleNamespace(label="pau", start=0.0, end=1.0),)
    for name in ("phones", "masked_phones", "finetune"):
        score = probe(Oracle(), name, toy, **QUICK[name]) if name != "finetune" else probe(build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0), name, toy, **QUICK[name])
        assert score.n == len(score.units) - 1 and score.low <= score.value <= score.high < 10


def test_a_class_that_train_does_not_have_is_named_and_wrong():
    toy = Toy(40)
    for u in toy:
        if u.split == "test":
            u.phones = tuple(SimpleNamespace(label="z", start=p.start, end=p.end) for p in u.phones)
    score = probe(Oracle(), "masked_phones", toy, **QUICK["masked_phones"])
    assert score.value == 0 and score.settings["never_learnt"] == ["z"]


def test_empty_and_short_clips_are_read(encoder):
    toy = Toy(40)
    shortened = [u for split in ("train", "valid", "test") for u in [u for u in toy if u.split == split][:2]]
    for i, u in enumerate(shortened):
        toy.store[u.id] = toy.store[u.id][: i % 2]
    for name in ("phones", "masked_phones", "finetune"):
        who = encoder
        score = probe(who, name, toy, **QUICK[name])
        assert all(math.isfinite(v) for v in (score.value, score.low, score.high))
    for name in ("phones", "masked_phones"):
        assert probe(Baseline(context_ms=40), name, toy, **QUICK[name]).count > 0
    for u in toy:
        toy.store[u.id] = toy.store[u.id][:0]
    for who in (encoder, Baseline()):
        with pytest.raises(EsslError):
            probe(who, "phones", toy, **QUICK["phones"])


def test_ids_that_occur_twice_and_corpora_of_nothing_are_refused():
    toy = Toy(8)
    toy.append(toy[3])
    with pytest.raises(EsslError, match="'toy3'"):
        probe(Baseline(), "phones", toy)
    with pytest.raises(EsslError, match="no utterances"):
        probe(Baseline(), "units", Toy(0))


@pytest.mark.parametrize("options,says", [
    (dict(steps="many"), "steps.*'many'.*whole number"), (dict(steps=2.5), "steps"), (dict(lr="0.1"), "lr.*a number"),
    (dict(lr=float("nan")), "lr"), (dict(share=True), "share"), (dict(steps=0), "at least one"), (dict(batch=0), "at least one"), (dict(part=3), "part.*a word"),
])
def test_options_of_another_kind_are_answered(options, says):
    with pytest.raises(EsslError, match=says):
        probe(Baseline(), "masked_phones", Toy(20), **options)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, 3])
def test_what_is_no_encoder_is_answered(thing):
    with pytest.raises(EsslError, match="cannot be probed"):
        run_probe(thing, "phones", Toy(8), progress=False)


# intervals


def test_draws_with_nothing_to_score_are_left_out():
    units = [[1, 2], [3, 4]] + [[0, 0]] * 30
    low, high = bootstrap_interval(units)
    assert 0.5 <= low <= ratio(units) <= high <= 0.75
    a, b = (SimpleNamespace(units=u, unit_ids_hash="x", metric="per") for u in (units, [[2, 2], [4, 4]] + [[5, 0]] * 30))
    assert all(math.isfinite(v) for v in paired_interval(a, b))


@pytest.mark.parametrize("units,says", [
    ([[1, 2], [0, 0]], "at least two"), ([[1, 2, 3]], "shape"), ([1, 2], "shape"), ([], "shape"), ([[float("nan"), 1], [1, 1]], "NaN"), ([[-1, 2], [1, 2]], "below zero"),
])
def test_units_that_are_none_are_refused(units, says):
    with pytest.raises(EsslError, match=says):
        bootstrap_interval(units)


@pytest.mark.parametrize("level", [0, 1, 95, -1])
def test_a_level_is_a_share(level):
    with pytest.raises(EsslError, match="0.95"):
        percentiles([1, 2], level)


def test_scores_of_unlike_numbers_of_utterances_are_not_paired():
    a, b = (SimpleNamespace(units=[[1, 2]] * n, unit_ids_hash="x", metric="per") for n in (3, 4))
    with pytest.raises(EsslError, match="3 utterances"):
        paired_interval(a, b)


# fine-tuning


def test_ctc_is_torch_s_where_phones_fit_and_leaves_out_where_not():
    logp = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1).requires_grad_()
    lengths, phones = torch.tensor([6, 3, 6, 0]), [[1, 2, 2], [1, 1, 1], [], [3]]
    assert [frames_needed(p) for p in phones] == [4, 5, 0, 1] and ctc_weights(lengths, phones).tolist() == [3, 0, 1, 0]
    loss = ctc(logp, lengths, phones)
    one = torch.nn.functional.ctc_loss(logp[:1].transpose(0, 1), torch.tensor([1, 2, 2]), (6,), (3,), reduction="sum")
    wanted = (one - logp[2, :, 0].sum()) / 4
    assert torch.allclose(loss, wanted, atol=1e-5)
    loss.backward()
    assert logp.grad.isfinite().all() and logp.grad[1].abs().max() == 0 and logp.grad[0].abs().max() > 0
    for none in ([[1, 1, 1]], [[1] * 9]):
        assert ctc(logp[1:2], torch.tensor([3]), none) == 0


def fitted(raws, phones, lr=1e-3, bf16=False, bias=0.0):
    model = Recogniser(build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1), seed=0), 5, torch.Generator().manual_seed(0))
    torch.nn.init.constant_(model.out.bias, bias)
    curve = fit(model, raws, phones, torch.zeros(80), ([torch.randn(50, 80)], [[1]]), Recipe(2, lr, batch_seconds=1, bf16=bf16), progress=False)
    return model, curve


@pytest.mark.parametrize("phones", [[[1, 2, 3], []], [[], []], [[1, 2, 3], [1] * 200], [[1] * 200, [2] * 200]])
def test_clips_without_phones_or_with_too_many_leave_the_weights_finite(phones):
    model, curve = fitted([torch.randn(100, 80), torch.randn(300, 80)], phones)
    assert all(p.isfinite().all() for p in model.parameters()) and math.isfinite(curve[-1]["train_loss"])


def test_a_loss_that_is_no_number_stops_before_the_step():
    with pytest.raises(Diverged, match="step 1 of"):
        fitted([torch.randn(100, 80)], [[1, 2]], bias=float("inf"))
    with pytest.raises(EsslError, match="NaN or infinity") as told:  # the clip's own fault, told before there is a loss
        fitted([torch.full((100, 80), float("inf"))], [[1, 2]])
    assert not isinstance(told.value, Diverged)


def test_clips_with_more_phones_than_frames_are_left_out_and_named(encoder):
    toy = Toy(20)
    long = next(u for u in toy if u.split == "train")
    long.phones = tuple(SimpleNamespace(label="ab"[i % 2], start=i / 200, end=(i + 1) / 200) for i in range(200))
    with pytest.warns(UserWarning, match=rf"1 of 12 training clips.*{long.id}"):
        score = probe(encoder, "finetune", toy, **QUICK["finetune"])
    assert score.settings["left_out"] == [long.id] and score.settings["train_utterances"] == 11


def test_a_clip_too_short_to_be_heard_has_lost_its_phones(encoder):
    model = Recogniser(encoder, 4, torch.Generator().manual_seed(0))
    heard = listen(model, [torch.randn(0, 80), torch.randn(60, 80)], [[1, 2], [3]], bf16=False)
    assert heard.units[0] == [2, 2] and heard.units[1][1] == 1 and math.isfinite(heard.loss)


def test_a_rate_that_diverges_is_not_chosen(encoder):
    score = probe(encoder, "finetune", Toy(20), lrs=(1e30, 1e-3), epochs=2, batch_seconds=4)
    assert score.settings["lr"] == 1e-3 and "diverged" in score.settings["lrs_tried"]["1e+30"]
    with pytest.raises(EsslError, match="diverged at each"):
        probe(encoder, "finetune", Toy(20), lrs=(1e30, 1e31), epochs=2, batch_seconds=4)


def test_scratch_needs_a_configuration():
    with pytest.raises(EsslError, match="config"):
        probe(Oracle(), "finetune", Toy(20), start="scratch")


def test_baselines_are_asked_at_the_encoder_s_rate(encoder):
    slow = build_encoder(EncoderConfig(list_mixers()[0], dim=16, depth=1, frontend_kw=dict(stride=4)), seed=0)
    rivals = baseline_scores(slow, "masked_phones", Toy(20), progress=False, **QUICK["masked_phones"])
    score = probe(slow, "masked_phones", Toy(20), **QUICK["masked_phones"])
    assert list(rivals) == ["log-mel", "log-mel ±40 ms", "log-mel ±100 ms", "untrained"]
    assert all([n for _, n in r.units] == [n for _, n in score.units] for r in rivals.values())
    assert list(baseline_scores(Oracle(), "masked_phones", Toy(20), progress=False, **QUICK["masked_phones"]))[-1] == "log-mel ±100 ms"


def test_source_of_nothing_says_so(encoder):
    with pytest.raises(EsslError, match="long enough"):
        Source(encoder, Store(a=torch.zeros(0, 80)), precision="fp32").frames([SimpleNamespace(id="a")], progress=False)
