"""What an encoder and a mixer may be given, and what they answer to everything else."""
import copy

import pytest
import torch
from torch import nn

from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import check_lengths, lengths_to_mask
from essl_nb.mixers.base import build_mixer, list_mixers, mixers
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.models.frontend import LogMelFrontend, frontends
from essl_nb.models.sincnet import SincFilters

MIXER = next(e.name for e in mixers if e.meta.get("baseline"))
WAV = 0.1 * torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encoder():
    return build_encoder(EncoderConfig(MIXER, dim=16, depth=1), seed=0).eval()


REFUSED = {
    "one clip": ((WAV[0],), "wav\\[None\\]"), "channels": ((WAV[:, None],), "wav\\[:, 0\\]"), "an array": ((WAV.numpy(),), "torch.as_tensor"),
    "a list of clips": ((list(WAV),), "pad_sequences"), "integers": (((WAV * 3e4).short(),), "divide by 32768"), "too short": ((WAV[:, :150],), "too short"),
    "no clips": ((WAV[:0],), "no clip"), "nan": ((torch.where(WAV > 0.2, torch.nan, WAV),), "NaN or infinity"), "infinity": ((torch.where(WAV > 0.2, torch.inf, WAV),), "NaN or infinity"),
    "shares": ((WAV, torch.tensor([1.0, 0.5])), "shares of the longest"), "too long": ((WAV, torch.tensor([16000, 100])), "from 0 to 8000"),
    "negative": ((WAV, [-1, 100]), "from 0 to 8000"), "too few": ((WAV, [8000]), "each of the 2"), "a mask": ((WAV, torch.ones(2, 8000, dtype=torch.bool)), "mask.sum\\(1\\)"),
    "bools": ((WAV, torch.tensor([True, False])), "mask.sum\\(1\\)"), "a table": ((WAV, torch.ones(2, 1, dtype=torch.long)), "each of the 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_answered(case, encoder):
    given, said = REFUSED[case]
    with pytest.raises(EsslError, match=said):
        encoder(*given)


def test_lengths_in_any_form_are_the_same(encoder):
    want = encoder(WAV, torch.tensor([8000, 5000]))
    for lengths in ([8000, 5000], torch.tensor([8000, 5000]).numpy(), torch.tensor([8000, 5000], dtype=torch.int32)):
        assert torch.equal(encoder(WAV, lengths).frames, want.frames)
    assert check_lengths([7, 7], 2, 7) is None and want.lengths.dtype == torch.int64


def test_all_real_is_the_same_with_and_without_lengths():
    for name in list_mixers():
        encoder = build_encoder(EncoderConfig(name, dim=16, depth=1, mixer_kw=mixers.get(name).meta.get("tiny", {})), seed=0).eval()
        assert torch.equal(encoder(WAV).frames, encoder(WAV, [8000, 8000]).frames)


def test_padding_may_hold_anything(encoder):
    lengths = torch.tensor([8000, 5000])
    dirty = torch.where(lengths_to_mask(lengths), WAV, torch.nan)
    assert torch.equal(encoder(dirty, lengths).frames, encoder(WAV, lengths).frames)


def test_features_pass_the_same_door(encoder):
    lengths, span = torch.tensor([8000, 5000]), torch.zeros(2, 25, dtype=torch.bool)
    span[:, 4:8] = True
    mel, frames = encoder.frontend.features(WAV, lengths)
    draw = lambda: torch.Generator().manual_seed(0)
    assert torch.equal(encoder(mel, frames, features=True).frames, encoder(WAV, lengths).frames)
    assert torch.equal(encoder(mel, frames, features=True, span=span, generator=draw()).frames, encoder.from_features(mel, frames, span=span, generator=draw()).frames)
    for given, said in (((mel[0], frames), "B,T,F"), ((mel[:0], frames[:0]), "nothing in them"), ((mel, frames / 50), "shares"), ((mel.where(mel > 0, torch.nan), None), "NaN")):
        with pytest.raises(EsslError, match=said):
            encoder.from_features(*given)
    for wrong in (span[:, 1:], span.long(), span[:1]):
        with pytest.raises(EsslError, match="True = hidden"):
            encoder.from_features(mel, frames, span=wrong)


@pytest.mark.parametrize("name", list_mixers())
def test_mixers_answer_masks_and_frames_of_another_kind(name):
    mixer = build_mixer(name, 16, **mixers.get(name).meta.get("tiny", {}))
    x, mask = torch.randn(2, 12, 16), lengths_to_mask(torch.tensor([12, 7]))
    assert mixer(x).shape == mixer(x, mask).shape == x.shape
    for given, said in (((x, ~mask), "~key_padding_mask"), ((x, mask.float()), "bool"), ((x, mask[:1]), "bool"), ((x, mask[:, :-1]), "bool"), ((x[..., :-1],), "D = 16"), ((x[0],), "D = 16")):
        with pytest.raises(EsslError, match=said):
            mixer(*given)


@pytest.mark.parametrize("name", frontends.names())
def test_every_weight_of_every_front_end_gets_a_gradient(name):
    encoder = build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend=name), seed=0).train()
    encoder(WAV, [8000, 5000]).frames.square().mean().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", frontends.names())
def test_encoders_in_half_precision_read_waveforms(name, dtype):
    encoder = build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend=name), seed=0).eval()
    want, half = encoder(WAV, [8000, 5000]).frames, copy.deepcopy(encoder).to(dtype)
    for wav in (WAV, WAV.to(dtype)):
        frames = half(wav, [8000, 5000]).frames
        assert frames.dtype == dtype and (frames.float() - want).norm() < 0.04 * want.norm()  # measured: .016 at most


def test_learnt_cutoffs_keep_their_digits():
    filters = SincFilters(8)
    want = filters.weight()
    for convert in (nn.Module.bfloat16, nn.Module.half, lambda m: m.to(torch.bfloat16), lambda m: nn.Sequential(m).half()[0]):
        half = convert(copy.deepcopy(filters))
        assert torch.equal(half.weight(), want) and {p.dtype for p in half.parameters()} == {torch.float32}
    assert {t.dtype for t in (*copy.deepcopy(filters).double().parameters(), copy.deepcopy(filters).double().window)} == {torch.float64}
    half = copy.deepcopy(filters)
    half.weight().sum().backward()
    half.half()
    assert half.low.grad.dtype == torch.float32 and half.to("meta").low.is_meta
    half = build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend="sincnet"), seed=0).bfloat16()
    assert half.state_dict()["frontend.filters.low"].dtype == torch.float32
    half(WAV).frames.square().mean().backward()
    torch.optim.AdamW(half.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in half.parameters())


def test_mel_filters_follow_the_module_and_keep_their_digits():
    front = LogMelFrontend(8)
    want = front.filters.clone()
    assert "filters" not in front.state_dict() and torch.equal(copy.deepcopy(front).filters, want)
    assert torch.equal(copy.deepcopy(front).bfloat16().filters, want) and copy.deepcopy(front).double().filters.dtype == torch.float64
    with torch.device("meta"):
        empty = LogMelFrontend(8)
    assert empty.filters.is_meta and torch.equal(copy.deepcopy(empty).to_empty(device="cpu").filters, want)
    empty.load_state_dict(front.state_dict(), assign=True)
    assert torch.equal(empty.filters, want)


def test_a_gradient_reaches_the_waveform_after_inference_mode():
    encoder = build_encoder(EncoderConfig(MIXER, dim=16, depth=1), seed=0)
    with torch.inference_mode():
        encoder(WAV)
    wav = WAV.clone().requires_grad_()
    encoder(wav).frames.sum().backward()
    assert wav.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_another_default_type_builds_encoders_of_that_type(dtype):
    torch.set_default_dtype(dtype)
    try:
        for name in list_mixers():
            encoder = build_encoder(EncoderConfig(name, dim=16, depth=1, mixer_kw=mixers.get(name).meta.get("tiny", {})), seed=0).eval()
            frames = encoder(WAV.float(), [8000, 5000]).frames
            assert frames.dtype == dtype and frames.isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("front", frontends.names())
def test_another_default_device_changes_nothing(front):
    encoder = build_encoder(EncoderConfig(MIXER, dim=16, depth=1, frontend=front), seed=0).eval()
    want = encoder(WAV, torch.tensor([8000, 5000])).frames
    with torch.device("meta"):  # what is born on the default device cannot be read there
        for lengths in (torch.tensor([8000, 5000], device="cpu"), [8000, 5000]):
            assert torch.equal(encoder(WAV, lengths).frames, want)


@pytest.mark.parametrize("name", list_mixers())
def test_encoders_born_without_weights_are_filled_from_a_file(name):
    config = EncoderConfig(name, dim=16, depth=2, mixer_kw=mixers.get(name).meta.get("tiny", {}))
    whole = build_encoder(config, seed=0).eval()
    with torch.device("meta"):
        given, made = build_encoder(config), build_encoder(config).to_empty(device="cpu")
    given.load_state_dict(whole.state_dict(), assign=True)
    made.load_state_dict(whole.state_dict())
    want = whole(WAV, [8000, 5000]).frames
    for other in (given, made):
        assert torch.equal(other.eval()(WAV, [8000, 5000]).frames, want)
    with torch.device("meta"):
        assert torch.equal(whole(WAV, [8000, 5000]).frames, want)
