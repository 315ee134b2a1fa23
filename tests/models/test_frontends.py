"""Front ends, all of them: the padding law, lengths, causality, hiding, errors; and published models as encoders."""
import json

import pytest
import torch

from essl_nb.core.config import from_json, to_json
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.costs.macs import encoder_macs
from essl_nb.mixers.base import mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder, load_encoder
from essl_nb.models.frontend import LogMelFrontend, frontends
from essl_nb.models.sincnet import SincFilters, SincNetFrontend
from essl_nb.models.spectrogram import EfficientNetFrontend
from essl_nb.models.wav2vec2 import from_torchaudio, from_transformers, to_torchaudio
from essl_nb.models.waveform import TimeNorm, Wav2Vec2Frontend
from essl_nb.train.config import PretrainConfig

MIXER = next(e.name for e in mixers if e.meta.get("baseline"))
NARROW = {Wav2Vec2Frontend: dict(channels=32), SincNetFrontend: dict(filters=16), EfficientNetFrontend: dict(channels=(4, 6, 8))}
FORMS = [  # every registered front end as it is, then the forms of each
    *((e.obj, NARROW.get(e.obj, {})) for e in frontends),
    (Wav2Vec2Frontend, dict(channels=32, norm="group", bias=False)),
    (Wav2Vec2Frontend, dict(channels=32, normalise=True)),
    (SincNetFrontend, dict(filters=16, compress="abs")),
    (EfficientNetFrontend, dict(channels=(4, 6, 8), blocks=(2, 1, 1), norm="affine")),
    (LogMelFrontend, dict(stride=4)),
    (LogMelFrontend, dict(stride=8)),
    (LogMelFrontend, dict(stride=4, kernel=4)),
]
CAUSAL = [(cls, kw) for cls, kw in FORMS if kw.get("norm") != "group" and not kw.get("normalise")]


def name_of(form):
    return form[0].__name__ + "".join(f"-{k}={v}" for k, v in form[1].items()) if isinstance(form, tuple) else None


@pytest.fixture(params=FORMS, ids=name_of)
def front(request):
    torch.manual_seed(0)
    cls, kw = request.param
    return cls(16, **kw)


def clips():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 12000, generator=g) * 0.1, torch.tensor([12000, 7777, 1600, 0])


def test_a_padded_batch_equals_each_clip_alone(front):
    wav, lengths = clips()
    frames, out = front(*front.features(wav, lengths))
    assert out[-1] == 0 and frames.shape[1] == out[0]
    assert torch.equal(out, front.out_lengths(front.features(wav, lengths)[1]))
    assert frames[~lengths_to_mask(out)].abs().max() == 0
    for b, n in enumerate(lengths[:3]):
        alone, k = front(*front.features(wav[b : b + 1, :n], lengths[b : b + 1]))
        assert k[0] == out[b] == alone.shape[1]
        torch.testing.assert_close(frames[b, : k[0]], alone[0], atol=2e-5, rtol=1e-4)


def test_whoever_calls_a_front_end_on_a_cpu_gets_float32(front):
    wav, lengths = clips()
    raw, n = front.features(wav, lengths)
    plain, _ = front(raw, n)
    with torch.autocast("cpu", torch.bfloat16):
        frames, _ = front(raw, n)
        assert torch.is_autocast_enabled("cpu")
    assert frames.dtype == torch.float32 and torch.equal(frames, plain)


def test_nan_in_the_pads_reaches_neither_frames_nor_gradients(front):
    wav, lengths = clips()
    raw, n = front.features(wav, lengths)
    mask = lengths_to_mask(n, raw.shape[1])

    def outcome(padding):
        x = torch.where(mask[..., None], raw, torch.tensor(padding)).requires_grad_()
        frames, _ = front(x, n)
        front.zero_grad()
        frames.square().sum().backward()
        return frames.detach(), x.grad, [p.grad.clone() for p in front.parameters() if p.grad is not None]

    (a, g, w), (b, h, v) = outcome(0.0), outcome(torch.nan)
    assert torch.equal(a, b) and torch.equal(g, h) and h[~mask].abs().max() == 0
    assert len(w) >= 3 and all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(w, v))


def test_nan_in_the_pads_of_the_waveform_reaches_no_feature(front):
    wav, lengths = clips()
    dirty = torch.where(lengths_to_mask(lengths, 12000), wav, torch.tensor(torch.nan))
    assert torch.equal(front.features(wav, lengths)[0], front.features(dirty, lengths)[0])


def test_hidden_frames_leave_no_trace(front):
    wav, lengths = clips()
    raw, n = front.features(wav[:1], lengths[:1])
    T = int(front.out_lengths(n)[0])
    span = torch.zeros(1, T, dtype=torch.bool)
    span[:, T // 3 : T // 3 + 4] = True
    other = raw.clone()
    first, last = (T // 3) * front.stride, (T // 3 + 4) * front.stride
    other[:, first:last] = other[:, first:last] * 2 + 0.5
    draw = lambda x: front(x, n, span, torch.Generator().manual_seed(1))[0]
    a, b = draw(raw), draw(other)
    assert torch.equal(a[span], b[span])
    assert not torch.equal(front(raw, n)[0][span], a[span])
    if front.stored:
        assert torch.equal(a, b)  # hidden before anything looks at it


def test_durations_follow_from_what_a_frame_sees(front):
    wav, lengths = clips()
    raw, n = front.features(wav[:1], lengths[:1])
    assert front.frame_seconds == pytest.approx(front.stride * front.spec.hop / 16000)
    if getattr(front, "normalise", False) or any(isinstance(m, TimeNorm) for m in front.modules()):
        return  # one frame sees all
    x = raw.clone().requires_grad_()
    t = int(front.out_lengths(n)[0]) // 2
    (front(x, n)[0][0, t] * torch.randn(16)).sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero()
    assert seen.max() - seen.min() + 1 == front.view


@pytest.mark.parametrize("form", CAUSAL, ids=name_of)
def test_causal_front_ends_look_no_further_than_their_own_frame(form):
    cls, kw = form
    front = cls(16, causal=True, **kw)
    wav, lengths = clips()
    raw, n = front.features(wav[:1], lengths[:1])
    T = int(front.out_lengths(n)[0])
    for t in (0, T // 2):
        x = raw.clone().requires_grad_()
        front(x, n)[0][0, t].sum().backward()
        latest = t * front.stride if front.stored else t * front.stride + front.view - 1
        assert x.grad[0, latest + 1 :].abs().max() == 0


def test_statistics_over_the_utterance_cannot_be_causal():
    for kw in (dict(norm="group"), dict(normalise=True)):
        with pytest.raises(EsslError, match="cannot be causal"):
            Wav2Vec2Frontend(16, causal=True, **kw)


def test_every_second_fourth_and_eighth_mel_frame_is_exact():
    for stride in (2, 4, 8):
        front = LogMelFrontend(16, stride=stride)
        assert front.view == 2 * stride + 1 and front.frame_seconds == stride / 100
        for T in range(1, 40):
            assert front(torch.randn(1, T, 80), torch.tensor([T]))[0].shape[1] == front.out_lengths(T) == -(-T // stride)


def test_encoders_with_every_front_end(front, tmp_path):
    kw = next(kw for cls, kw in FORMS if type(front) is cls)
    config = EncoderConfig(MIXER, dim=16, depth=2, frontend=front.registered_name, frontend_kw={k: list(v) if isinstance(v, tuple) else v for k, v in kw.items()}, mixer_kw=mixers.get(MIXER).meta["tiny"])
    encoder = build_encoder(config, seed=0).eval()
    assert from_json(EncoderConfig, json.loads(json.dumps(to_json(config)))) == config
    wav, lengths = clips()
    out = encoder(wav, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(wav, lengths).frames.isfinite().all()
    assert torch.equal(load_encoder(encoder.save(tmp_path))(wav, lengths).frames, out.frames)
    assert encoder_macs(config, 1)["frontend"] > 0 and encoder.frame_seconds == front.__class__(16, **kw).frame_seconds
    assert encoder.double()(wav.double(), lengths).frames.dtype == torch.float64


@pytest.mark.parametrize("length", [0, 1, 399, 400, 719, 720])
def test_clips_shorter_than_a_view_have_no_frame(length):
    front = Wav2Vec2Frontend(16, channels=8)
    frames, out = front(*front.features(torch.randn(1, length), torch.tensor([length])))
    assert out.tolist() == [max(0, (length - 400) // 320 + 1)] and frames.isfinite().all()


def test_the_group_norm_sees_what_groupnorm_sees_and_no_padding():
    norm, x = TimeNorm(6).double(), torch.randn(2, 6, 30, dtype=torch.float64)
    real = lengths_to_mask(torch.tensor([30, 17]))
    want = torch.nn.functional.group_norm(x[1:, :, :17], 6)
    torch.testing.assert_close(norm(x, real)[1:, :, :17], want)
    torch.testing.assert_close(norm(x, None), torch.nn.functional.group_norm(x, 6))


def test_bad_options_are_told():
    for make, said in (
        (lambda: Wav2Vec2Frontend(8, norm="batch"), "layer or group"), (lambda: SincNetFrontend(8, compress="cube"), "log or abs"),
        (lambda: SincFilters(8, kernel=250), "odd number"), (lambda: EfficientNetFrontend(8, channels=(1, 2)), "three numbers"),
        (lambda: EfficientNetFrontend(8, norm="batch"), "can be"), (lambda: LogMelFrontend(8, stride=0), "1 or more"),
        (lambda: EncoderConfig(MIXER, dim=24, position="convolutional"), "16"), (lambda: EncoderConfig(MIXER, dim=32, position="convolutional", causal=True), "looks ahead"),
    ):
        with pytest.raises(EsslError, match=said):
            make()


@pytest.mark.parametrize("entry", [e for e in frontends if not e.obj.stored], ids=lambda e: e.name)
def test_stored_log_mel_is_refused_for_waveforms_at_once(entry):
    with pytest.raises(EsslError, match="reads waveforms, and reading=.stored. was given"):
        PretrainConfig(EncoderConfig(MIXER, frontend=entry.name), reading="stored")
    encoder = build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend=entry.name), seed=0)
    with pytest.raises(EsslError, match="reads the waveform"):
        encoder.from_features(torch.randn(1, 100, 80), torch.tensor([100]))


def test_sinc_filters_stay_in_order_whatever_is_learnt():
    sinc = SincFilters(20)
    with torch.no_grad():
        sinc.low.copy_(torch.randn(20) * 20)
        sinc.band.copy_(torch.randn(20) * 20)
    low, high = sinc.cutoffs()
    assert (low >= 30).all() and (high - low >= 50 - 1e-2).all() and (high <= 8000).all() and sinc.weight().isfinite().all()


def published(**kw):
    from torchaudio.models import wav2vec2_model

    given = dict(extractor_mode="group_norm", extractor_conv_layer_config=None, extractor_conv_bias=False, encoder_embed_dim=32, encoder_projection_dropout=0.0,
                 encoder_pos_conv_kernel=128, encoder_pos_conv_groups=16, encoder_num_layers=2, encoder_num_heads=4, encoder_attention_dropout=0.0,
                 encoder_ff_interm_features=48, encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.0, aux_num_out=None)
    return wav2vec2_model(**{**given, **kw}).eval()


@pytest.mark.parametrize("mode", ["group_norm", "layer_norm"])
def test_a_published_model_in_a_batch_is_what_it_is_alone(mode):
    encoder, (wav, lengths) = from_torchaudio(published(extractor_mode=mode, encoder_layer_norm_first=mode == "layer_norm")), clips()
    with torch.no_grad():
        together = encoder(wav, lengths)
        for b, n in enumerate(lengths[:3]):
            alone = encoder(wav[b : b + 1, :n])
            for x, y in zip([together.frames, *together.layers], [alone.frames, *alone.layers]):
                torch.testing.assert_close(x[b, : alone.lengths[0]], y[0], atol=1e-4, rtol=1e-4)


def test_wrappings_and_older_names():
    model = published(aux_num_out=29)
    wav = torch.randn(1, 4000) * 0.1
    want = from_torchaudio(model)(wav).frames
    old = {k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v for k, v in model.state_dict().items()}
    hidden = torch.rand(32)
    wrapped = {f"wav2vec2.{k}": v for k, v in old.items()} | {"mask_generator.mask_embedding": hidden, "logit_generator.label_embeddings": torch.zeros(3)}
    encoder = from_torchaudio(wrapped, heads=4)
    assert torch.equal(encoder(wav).frames, want) and torch.equal(encoder.frontend.hidden, hidden)
    assert torch.equal(from_torchaudio({k: v.half() for k, v in old.items()}, heads=4)(wav).frames, from_torchaudio({k: v.half().float() for k, v in old.items()}, heads=4)(wav).frames)
    assert all(p.requires_grad and not p.is_meta for p in encoder.parameters())
    next(encoder.parameters()).data.zero_()
    assert model.state_dict()["feature_extractor.conv_layers.0.conv.weight"].abs().max() > 0  # the model's own weights stay


def test_a_bundles_model_tells_of_its_normalisation():
    from torchaudio.pipelines._wav2vec2.utils import _extend_model

    model = _extend_model(published(extractor_mode="layer_norm", extractor_conv_bias=True, encoder_layer_norm_first=True), normalize_waveform=True)
    encoder, wav = from_torchaudio(model), torch.randn(1, 6000) * 0.02 + 0.1
    with torch.no_grad():
        torch.testing.assert_close(encoder(wav).layers[-1], model.extract_features(wav)[0][-1], atol=1e-5, rtol=1e-4)
    assert encoder.config.frontend_kw["normalise"] and encoder.config.block == "transformer"


def test_a_hubert_pretraining_model():
    from torchaudio.models import hubert_pretrain_model

    model = hubert_pretrain_model("group_norm", None, False, 32, 0.0, 128, 16, 1, 4, 0.0, 64, 0.0, 0.0, False, 0.0, 0.8, "static", 0.0, 10, False, 1, 0.0, "static", 0.0, 10, False, 1, False, False, 16, 5, None).eval()
    encoder, wav = from_torchaudio(model), torch.randn(1, 6000) * 0.1
    with torch.no_grad():
        torch.testing.assert_close(encoder(wav).frames, model.wav2vec2(wav)[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.frontend.hidden, model.mask_generator.mask_embedding)


def test_there_and_back():
    model, again = published(), published()
    again.load_state_dict(to_torchaudio(from_torchaudio(model)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))
    with pytest.raises(EsslError, match="no such encoder"):
        to_torchaudio(build_encoder(EncoderConfig(MIXER, dim=16, depth=1), seed=0))


def test_transformers_head_and_hidden_vector():
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=11, conv_dim=(16,) * 7)
    model = transformers.Wav2Vec2ForCTC(config).eval()
    encoder, wav = from_transformers(model), torch.randn(1, 6000) * 0.1
    with torch.no_grad():
        torch.testing.assert_close(encoder(wav).frames, model.wav2vec2(wav).last_hidden_state, atol=1e-5, rtol=1e-4)
    assert torch.equal(encoder.frontend.hidden, model.wav2vec2.masked_spec_embed) and not encoder.config.frontend_kw["normalise"]


def test_models_of_another_kind_are_refused():
    from torchaudio.models import wavlm_model

    wavlm = wavlm_model("group_norm", None, False, 32, 0.0, 128, 16, 1, 4, 32, 80, 0.0, 64, 0.0, 0.0, False, 0.0, None)
    for make, said in (
        (lambda: from_torchaudio({}), "no wav2vec 2.0"), (lambda: from_torchaudio(torch.nn.Linear(2, 2)), "no wav2vec 2.0"), (lambda: from_torchaudio(wavlm), "another kind|lack"),
        (lambda: from_torchaudio(published(encoder_pos_conv_kernel=64)), "positional convolution"),
        (lambda: from_torchaudio(published(extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)])), "kernels"),
        (lambda: from_torchaudio(published().state_dict()), "number of heads"),
        (lambda: from_torchaudio(published(), heads=5), "num_heads=5"),
    ):
        with pytest.raises(EsslError, match=said):
            make()
