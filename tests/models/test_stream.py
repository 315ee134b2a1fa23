"""Streams: what comes out piece by piece is what whole utterances give, for every mixer, block and front end that can."""
import warnings
from contextlib import suppress
from inspect import signature

import pytest
import torch

from essl_nb.core.registry import EsslError
from essl_nb.mixers.base import list_mixers, mixers
from essl_nb.models.block import blocks
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.frontend import frontends
from essl_nb.models.stream import stream_facts

N = 9000  # samples: 0.56 s, 28 frames
SOUND = 0.1 * torch.randn(3, N, generator=torch.Generator().manual_seed(0))
CHUNKED, CAUSAL = dict(chunk_frames=8), dict(causal=True)
FIRST = next(name for name in list_mixers() if mixers.get(name).obj.can_be_chunked and mixers.get(name).obj.streams)


def streamable(form):
    "Names of the mixers that stream in a form."
    able = "can_be_causal" if "causal" in form else "can_be_chunked"
    return [name for name in list_mixers() if getattr(mixers.get(name).obj, able) and mixers.get(name).obj.streams]


def encoder(mixer=FIRST, **options):
    kw = mixers.get(mixer).meta.get("tiny", {})
    return build_encoder(EncoderConfig(mixer, dim=16, depth=2, mixer_kw=kw, **options), seed=0).eval()


def pieces(size, total=N):
    "Sizes that add up to `total`; of single samples the first thousand only."
    if size == "random":
        draws = torch.randint(1, 2000, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    else:
        draws = [size] * (1000 if size == 1 else total)
    out = []
    while sum(out) < total:
        out.append(min(draws[len(out)] if len(out) < len(draws) else total, total - sum(out)))
    return out


def streamed(model, wav, size):
    stream = model.stream(len(wav))
    parts = [stream.accept(x).frames for x in wav.split(pieces(size, wav.shape[1]), 1)]
    return torch.cat([*parts, stream.flush().frames], 1)


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 160, 5000, "random")), 333])
@pytest.mark.parametrize("form, mixer", [(form, m) for form in ("causal", "chunk_frames") for m in streamable({form: 0})])
def test_every_mixer_that_can_streams_as_it_hears_whole_utterances(form, mixer, size):
    model = encoder(mixer, **(CAUSAL if form == "causal" else CHUNKED))
    with torch.no_grad():
        torch.testing.assert_close(streamed(model, SOUND[:1], size), model(SOUND[:1]).frames, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [CAUSAL, CHUNKED], ids=["causal", "chunks"])
@pytest.mark.parametrize("block", [e.name for e in blocks if e.obj.streams])
def test_every_block_streams(block, form):
    model = encoder(block=block, **form)
    for size in (1, 160, 5000, "random"):
        with torch.no_grad():
            torch.testing.assert_close(streamed(model, SOUND[:1], size), model(SOUND[:1]).frames, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [CAUSAL, CHUNKED], ids=["causal", "chunks"])
@pytest.mark.parametrize("front", sorted(frontends.names()))
def test_every_front_end_streams(front, form):
    model = encoder(frontend=front, **form)
    for size in (1, 333, 5000):
        with torch.no_grad():
            torch.testing.assert_close(streamed(model, SOUND[:1, :5000], size), model(SOUND[:1, :5000]).frames, rtol=0, atol=3e-5)


@pytest.mark.parametrize("mixer", list_mixers())
def test_what_cannot_stream_says_why(mixer):
    kind = mixers.get(mixer).obj
    with pytest.raises(EsslError, match="looks ahead to the end|has no streaming form|has no step"):
        encoder(mixer).stream()
    if not kind.can_be_chunked:
        with pytest.raises(EsslError) as refused:
            encoder(mixer, **CHUNKED)
        assert (kind.why_not_chunked or kind.why_not_causal) in str(refused.value)


def test_every_chunk_is_a_latency_of_the_same_weights():
    model, whole = encoder(), encoder()(SOUND).frames
    waits = []
    for chunk in (1, 8, 16, 32, 1000):
        model.set_chunk(chunk)
        torch.testing.assert_close(streamed(model, SOUND, 1600), model(SOUND).frames, rtol=0, atol=1e-5)
        waits.append(stream_facts(model)["latency_ms"])
    assert torch.allclose(model(SOUND).frames, whole, atol=1e-5)  # one long chunk
    assert waits[:4] == [12.5, 152.5, 312.5, 632.5]
    assert stream_facts(encoder(**CAUSAL))["latency_ms"] == 0


@pytest.mark.parametrize("form", [CAUSAL, CHUNKED], ids=["causal", "chunks"])
@pytest.mark.parametrize("front", sorted(frontends.names()))
def test_the_latency_is_as_long_as_the_future_that_moves_a_frame(front, form):
    "A frame is moved by the last sample that its latency allows for, and by none behind it."
    model = encoder(frontend=front, **form)
    frame = 8  # the first of the second chunk
    last = model.frontend.samples_until(frame + (model.chunk_frames or 1) - 1)
    wav = SOUND[:1].clone().requires_grad_()
    model(wav).frames[0, frame].square().sum().backward()
    moved = wav.grad[0].nonzero()[:, 0]
    assert moved.max() < last and moved.max() >= last - 16  # the window is near 0 at its end
    wait = last - (frame + 1) * model.frontend.stride * model.frontend.spec.hop
    assert stream_facts(model)["latency_ms"] == pytest.approx(max(0, wait) / 16)


@pytest.mark.parametrize("form, mixer", [(form, m) for form in ("causal", "chunk_frames") for m in streamable({form: 0})])
def test_streams_start_and_stop_when_they_like_and_nan_stays_where_it_is(form, mixer):
    model = encoder(mixer, **(CAUSAL if form == "causal" else CHUNKED))
    turns = [  # samples of each of three streams
        (SOUND[0, :3000], None, SOUND[2, :1000]),
        (SOUND[0, 3000:5000], SOUND[1, :4000], SOUND[2, 1000:]),
        (SOUND[0, 5000:], SOUND[1, 4000:], None),
    ]

    def heard(spoilt):
        stream, got = model.stream(3), [[], [], []]

        def keep(new):
            for b in range(3):
                got[b].append(new.frames[b, : new.lengths[b]])

        for n, turn in enumerate(turns):
            turn = list(turn)
            if spoilt and n == 1:
                turn[1] = turn[1].clone()
                turn[1][1234] = torch.nan
            with warnings.catch_warnings():
                warnings.simplefilter("error" if not spoilt else "ignore")
                keep(stream.accept(turn))
            if n == 1:
                keep(stream.flush(2))
        keep(stream.flush([0, 1]))
        return stream, [torch.cat(g) for g in got]

    (_, clean), (stream, spoilt) = heard(False), heard(True)
    whole = model(SOUND).frames
    for b in range(3):
        torch.testing.assert_close(clean[b], whole[b], rtol=0, atol=1e-5)
    assert torch.equal(spoilt[0], clean[0]) and torch.equal(spoilt[2], clean[2])
    assert spoilt[1].isnan().all() and stream.broken == {1: 1234}
    stream.reset(1)
    again = [stream.accept([None, SOUND[1], None]), stream.flush(1)]
    torch.testing.assert_close(torch.cat([n.frames[1, : n.lengths[1]] for n in again]), whole[1], rtol=0, atol=1e-5)


def test_bad_input_is_refused_and_nothing_is_lost():
    model = encoder(**CHUNKED)
    stream, whole = model.stream(), model(SOUND[:1]).frames[0]
    out = [stream.accept(SOUND[0, :4000]).frames[0]]
    for bad, why in [
        (torch.zeros(4, 5, 6), "is a tensor"), (SOUND[:2], "B = 1"), ((SOUND[0] * 100).short()[None], "of int16"), ([1, 2], "a list of 2"), ("sound", "a str"), (torch.full((9,), torch.nan), "Sample 4000 .* is NaN"),
    ]:
        with pytest.raises(EsslError, match=why):
            stream.accept(bad)
    with pytest.raises(EsslError, match="44100 samples per second, the encoder takes 16000"):
        stream.accept(SOUND[0], rate=44100)
    assert stream.accept(torch.zeros(0)).frames.shape == (1, 0, 16)
    out += [stream.accept(SOUND[0, 4000:], rate=16000).frames[0], stream.flush().frames[0]]
    torch.testing.assert_close(torch.cat(out), whole, rtol=0, atol=1e-5)
    assert stream.flush().frames.shape[1] == 0  # a second end changes nothing
    with pytest.raises(EsslError, match="was flushed"):
        stream.accept(SOUND[0])
    with pytest.raises(EsslError, match="numbered from 0 to 0"):
        stream.reset(3)
    stream.reset()
    assert stream.accept(SOUND[0]).frames.shape[1] > 0
    model.set_chunk(16)
    with pytest.raises(EsslError, match="chunk was changed to 16"):
        stream.accept(SOUND[0])
    with pytest.raises(EsslError, match="training mode"):
        model.train().stream()
    for batch in (0, 1.5, True):
        with pytest.raises(EsslError, match="whole number of streams"):
            model.eval().stream(batch)
    for chunk in (0, -1, 2.5):
        with pytest.raises(EsslError, match="1 or more"):
            model.set_chunk(chunk)
    with pytest.raises(EsslError, match="causal=False"):
        encoder(**CAUSAL).set_chunk(8)
    with pytest.raises(EsslError, match="statistics over the whole utterance"):
        encoder(frontend="wav2vec2", frontend_kw=dict(norm="group"), **CHUNKED).stream()
    with pytest.raises(EsslError, match="does not look ahead|causal=False"):
        EncoderConfig(FIRST, dim=64, position="convolutional", chunk_frames=8)


def test_a_stream_moves_to_another_process_and_no_other_takes_it(tmp_path):
    model, whole = encoder(**CHUNKED), encoder(**CHUNKED)(SOUND[:2]).frames
    stream = model.stream(2)
    first = stream.accept(SOUND[:2, :4321]).frames
    path = stream.save(tmp_path / "stream.safetensors")
    moved = encoder(**CHUNKED).stream(2).load(path)
    rest = [moved.accept(SOUND[:2, 4321:]).frames, moved.flush().frames]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=0, atol=1e-5)
    assert torch.equal(stream.accept(SOUND[:2, 4321:]).frames, rest[0])  # saving changed nothing
    other = build_encoder(EncoderConfig(FIRST, dim=16, depth=2, mixer_kw=mixers.get(FIRST).meta.get("tiny", {}), **CHUNKED), seed=1).eval()
    for wrong, why in ((other.stream(2), "weights"), (model.stream(3), "batch 2 and here 3"), (encoder(chunk_frames=4).stream(2), "chunk_frames 8 and here 4")):
        with pytest.raises(EsslError, match=why):
            wrong.load(path)
    (tmp_path / "torn").write_bytes(path.read_bytes()[:200])
    for bad in (tmp_path / "torn", tmp_path / "missing"):
        with pytest.raises(EsslError, match="is not the state of a stream"):
            model.stream(2).load(bad)


def test_the_state_is_what_it_is_said_to_be():
    for mixer in streamable(CAUSAL):
        model = encoder(mixer, **CAUSAL)
        stream = model.stream()
        stream.accept(torch.zeros(16000 * 2))
        frames = stream.fronts[0].frames
        want = sum(block.state_bytes(frames) for block in model.blocks)
        assert stream.states.bytes() == want + 8, mixer  # the encoder's own position
        assert (stream_facts(model)["state_bytes_per_second"] > 0) == (mixers.get(mixer).meta["complexity"] == "T^2")


def test_a_bidirectional_recurrence_trained_without_its_way_back_can_leave_it_out():
    two_ways = [name for name in list_mixers("recurrent") if "direction_dropout" in signature(mixers.get(name).obj).parameters]
    assert two_ways
    for mixer in two_ways:
        kw = mixers.get(mixer).meta.get("tiny", {}) | {"direction_dropout": 0.5}
        model = build_encoder(EncoderConfig(mixer, dim=16, depth=1, mixer_kw=kw), seed=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen = {tuple(model(SOUND[:1]).frames[0, 0, :3].tolist()) for _ in range(12)}
        assert len(seen) == 2  # with the way back, and without
        model.eval().set_chunk(1)
        torch.testing.assert_close(streamed(model, SOUND[:1], 1600), model(SOUND[:1]).frames, rtol=0, atol=1e-5)
        back = getattr(model.blocks[0].mixer, "back", torch.nn.Module())  # some have one set of weights for both ways
        before = model(SOUND[:1]).frames
        with torch.no_grad(), suppress(StopIteration):
            next(back.parameters()).add_(1.0)
        assert torch.equal(model(SOUND[:1]).frames, before)
        for bad, options in ((1.0, {}), (0.3, CAUSAL)):
            with pytest.raises(EsslError, match="direction_dropout"):
                build_encoder(EncoderConfig(mixer, dim=16, depth=1, mixer_kw={"direction_dropout": bad}, **options), seed=0)
