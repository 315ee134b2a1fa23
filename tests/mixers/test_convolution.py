"""Whole convolutional blocks and MLPs over time: what the battery and the parity cases do not ask."""
import math

import pytest
import torch
from torch import nn

from essl_nb.core.registry import EsslError
from essl_nb.mixers.checks import small_batch
from essl_nb.mixers.convnext_block import ConvNeXtBlock, ConvNeXtV2, ResponseNorm
from essl_nb.mixers.mbconv import Affine, FusedMBConv, MBConv, fold_batchnorm
from essl_nb.mixers.mlp_asr import CMLP, FMLP, TSMLP, circular
from essl_nb.mixers.mlp_mixer import MLPMixer


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("cls", [ConvNeXtBlock, ConvNeXtV2, MBConv, FusedMBConv, CMLP])
def test_an_even_kernel_needs_the_causal_form(cls):
    with pytest.raises(EsslError, match="kernel=4 has no middle frame"):
        cls(8, kernel=4)
    with pytest.raises(EsslError, match="kernel=0"):
        cls(8, kernel=0, causal=True)
    assert cls(8, kernel=4, causal=True)(torch.randn(1, 9, 8)).shape == (1, 9, 8)


def test_arguments_that_cannot_be_are_answered():
    for cls in (MBConv, FusedMBConv):
        with pytest.raises(EsslError, match="it can be layer or affine"):
            cls(8, norm="batch")
    with pytest.raises(EsslError, match="taps=4 has no middle"):
        FMLP(8, taps=4)
    with pytest.raises(EsslError, match="shift=0"):
        TSMLP(8, shift=0)
    with pytest.raises(EsslError, match="crop=0"):
        MLPMixer(8, crop=0)
    with pytest.raises(EsslError, match="all frames of a chunk"):
        MLPMixer(8, causal=True)
    with pytest.raises(EsslError, match="circular"):
        FMLP(8, causal=True)


ONE_TAP = {ConvNeXtBlock: dict(kernel=1), MBConv: dict(kernel=1, squeeze=0), FusedMBConv: dict(kernel=1, squeeze=0), CMLP: dict(kernel=1), FMLP: dict(taps=1), MLPMixer: dict(crop=1, expand=4)}


@pytest.mark.parametrize("cls", ONE_TAP)
def test_one_tap_moves_nothing(cls):
    moved = cls(8, **ONE_TAP[cls]).double().influence(torch.randn(1, 9, 8, dtype=torch.float64), probes=None)[0]
    assert (moved.fill_diagonal_(0) < 1e-12).all()  # what a Fourier transform and its inverse leave is rounding


@pytest.mark.parametrize("causal", [False, True])
def test_fresh_response_norm_changes_nothing(causal):
    h = torch.randn(2, 9, 8)
    assert torch.equal(ResponseNorm(8, causal=causal)(h)[0], h)


def test_response_norm_does_not_grow_with_the_utterance():
    norm, h = ResponseNorm(8), torch.randn(1, 30, 8)
    nn.init.normal_(norm.weight)
    once, twice = norm(h)[0], norm(torch.cat([h, h], 1))[0]
    assert torch.allclose(twice[:, :30], once, atol=1e-5)


def test_response_norm_of_silence_is_finite_with_its_gradient():
    norm, h = ResponseNorm(8), torch.zeros(1, 5, 8, requires_grad=True)
    nn.init.normal_(norm.weight)
    norm(h)[0].sum().backward()
    assert h.grad.isfinite().all() and norm.weight.grad.isfinite().all()


def test_a_long_running_norm_keeps_its_digits_in_half_precision():
    mixer, x = ConvNeXtV2(8, kernel=1, causal=True), torch.randn(1, 8).expand(1, 6000, 8)
    nn.init.normal_(mixer.response.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert torch.allclose(y[:, -1], y[:, 10], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_folded_batchnorm_is_the_batchnorm(dtype):
    norm = nn.BatchNorm1d(8).to(dtype)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 3), nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x, affine = torch.randn(50, 8, dtype=dtype), fold_batchnorm(norm)
    assert isinstance(affine, Affine) and affine.weight.dtype == dtype
    assert torch.allclose(affine(x), norm.eval()(x), atol=1e-6)


@pytest.mark.parametrize("cls", [MBConv, FusedMBConv])
def test_without_gates_the_kernel_is_the_reach(cls):
    moved = cls(8, kernel=5, squeeze=0).influence(torch.randn(1, 30, 8), queries=[12], probes=None)[0, 0]
    assert (moved > 0).nonzero().flatten().tolist() == list(range(10, 15))
    assert (cls(8, kernel=5).influence(torch.randn(1, 30, 8), queries=[12], probes=None) > 0).all()
    assert "total" not in cls(8, kernel=5, squeeze=0, causal=True).init_state(1)


def test_crops_do_not_meet():
    moved = MLPMixer(8, crop=7).influence(torch.randn(1, 20, 8), probes=None)[0] > 0
    crop = torch.arange(20) // 7
    assert torch.equal(moved, crop[:, None] == crop)


def test_a_mixer_without_bias_keeps_silence_silent():
    mixer = MLPMixer(8, crop=7)
    for layer in (mixer.inner, mixer.outer):
        nn.init.zeros_(layer.bias)
    assert (mixer(torch.zeros(1, 20, 8)) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 7, 9, 30, 31])
def test_a_circular_filter_commutes_with_turning_the_ring(n):
    x, filters = torch.randn(2, n, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    assert torch.allclose(circular(x.roll(3, 1), filters), circular(x, filters).roll(3, 1))


@pytest.mark.parametrize("causal, reach", [(False, [6, 10, 14]), (True, [2, 6, 10])])
def test_a_shift_reaches_three_frames(causal, reach):
    moved = TSMLP(8, shift=4, causal=causal).influence(torch.randn(1, 20, 8), queries=[10], probes=None)[0, 0]
    assert (moved > 0).nonzero().flatten().tolist() == reach


def test_utterances_shorter_than_what_they_are_mixed_with():
    x, mask = small_batch((3, 2, 1))
    for mixer in (ConvNeXtBlock(16), ConvNeXtV2(16), MBConv(16), FusedMBConv(16), CMLP(16), TSMLP(16), FMLP(16), MLPMixer(16)):
        y = mixer.double()(x, mask)
        assert y.isfinite().all() and (y[~mask] == 0).all(), type(mixer).__name__


def hand_counts(T, D):
    return {
        ConvNeXtBlock: 8 * T * D**2 + 31 * T * D,
        ConvNeXtV2: 8 * T * D**2 + 31 * T * D,
        MBConv: 8 * T * D**2 + 15 * T * 4 * D + 2 * D**2,
        FusedMBConv: (5 + 1) * 4 * T * D**2 + 2 * D**2,
        MLPMixer: 2 * T * 100 * D,
        CMLP: 3 * T * D**2 + 31 * T * D,
        TSMLP: 3 * T * D**2,
    }


@pytest.mark.parametrize("cls", hand_counts(1, 1))
def test_macs_are_those_counted_by_hand(cls):
    assert math.isclose(cls(64).macs(300), hand_counts(300, 64)[cls])


def test_state_bytes_do_not_grow():
    sizes = {cls: [cls(64, causal=True).state_bytes(T) for T in (100, 200)] for cls in (ConvNeXtBlock, ConvNeXtV2, MBConv, FusedMBConv, CMLP, TSMLP)}
    by_hand = {
        ConvNeXtBlock: 4 * 30 * 64, ConvNeXtV2: 4 * 34 * 64, MBConv: 4 * 15 * 256 + 8,
        FusedMBConv: 4 * (4 * 64 + 256) + 8, CMLP: 4 * 30 * 64, TSMLP: 4 * 8 * 64,
    }
    assert sizes == {cls: [by_hand[cls]] * 2 for cls in sizes}
    assert MLPMixer(64).state_bytes(100) is None and FMLP(64).state_bytes(100) is None
