"""The selective scan, and the recurrent mixers beyond the battery."""
import math

import pytest
import torch
from torch import nn

from essl_nb.core.count import count_macs
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.checks import LargestTensor
from essl_nb.mixers.mamba import Mamba, SelectiveSSM
from essl_nb.mixers.recurrent import GRU, LSTM, Recurrent
from essl_nb.ops.temporal import reverse_within
from essl_nb.ops.scan import (chunk_frames, scan_backward_chunks, scan_forward_chunks, scan_forward_compiled, selective_scan,
                                 selective_scan_reference)
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def inputs(T, E=5, N=4, batch=2, dtype=torch.float64):
    "u, delta, A, B, C and a first state."
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)
    given = draw(batch, T, E), draw(batch, T, E).abs(), -3 * draw(N, E).abs(), draw(batch, T, N), draw(batch, T, N), draw(batch, N, E)
    return [x.requires_grad_() for x in given]


def near(a, b, dtype):
    return (a - b).abs().max() <= (1e-12 if dtype == torch.float64 else 5e-6) * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("E", [5, 64, 130])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 32, 97, 257])
def test_every_form_of_the_scan_is_the_reference(T, E, dtype):
    x = inputs(T, E, dtype=dtype)
    y, last = selective_scan_reference(*x)
    dy, dlast = torch.randn_like(y), torch.randn_like(last)
    true = torch.autograd.grad([y, last], x, [dy, dlast])
    fast, end = selective_scan(*x)
    assert near(fast, y, dtype) and near(end, last, dtype)
    assert all(near(a, b, dtype) for a, b in zip(torch.autograd.grad([fast, end], x, [dy, dlast]), true))
    with torch.no_grad():
        chunked, starts = scan_forward_chunks(*x)
        assert near(chunked, y, dtype) and near(starts, scan_forward_compiled(*x)[1], dtype)
        assert all(near(a, b, dtype) for a, b in zip(scan_backward_chunks(dy, dlast, *x[:-1], starts), true))


def test_the_scans_gradient_is_that_of_finite_differences():
    torch.autograd.gradcheck(selective_scan, inputs(19, 3, 2))


def test_a_second_derivative_of_the_scan_is_refused_with_what_has_one():
    from essl_nb.core.registry import EsslError

    x = inputs(19, 3, 2)
    first, = torch.autograd.grad(selective_scan(*x)[0].square().sum(), x[0], create_graph=True)
    with pytest.raises(EsslError, match="selective_scan_reference"):
        first.square().sum().backward()
    same, = torch.autograd.grad(selective_scan_reference(*x)[0].square().sum(), x[0], create_graph=True)
    assert torch.allclose(first, same)
    same.square().sum().backward()


def test_a_scan_in_pieces_is_the_whole():
    u, delta, A, B, C, state = inputs(50)
    whole, end = selective_scan(u, delta, A, B, C, state)
    pieces = []
    for piece in torch.arange(50).split([1, 16, 30, 3]):
        y, state = selective_scan(u[:, piece], delta[:, piece], A, B[:, piece], C[:, piece], state)
        pieces.append(y)
    assert torch.allclose(torch.cat(pieces, 1), whole) and torch.allclose(state, end)


@pytest.mark.parametrize("form", [selective_scan, lambda *x: scan_forward_chunks(*x, x[0].new_zeros(2, 4, 5))])
def test_hard_decays_overflow_nothing(form):
    u, delta, A, B, C, _ = inputs(300, dtype=torch.float32)
    with torch.no_grad():
        y = form(u, 1e4 * delta, A, B, C)[0]
        assert y.isfinite().all()
        assert torch.allclose(y, 1e4 * (delta * u) * (B * C).sum(-1, keepdim=True), rtol=1e-3, atol=1e-2 * y.abs().max())


def test_what_is_not_a_number_does_not_pass_for_one():
    u, delta, A, B, C, _ = inputs(40, dtype=torch.float32)
    with torch.no_grad():
        for spoilt in (u, delta, B, C):
            kept = spoilt[:, 20].clone()
            spoilt[:, 20] = torch.nan
            y = selective_scan(u, delta, A, B, C)[0]
            assert y[:, 20].isnan().all() and y[:, :20].isfinite().all()
            spoilt[:, 20] = kept


@pytest.mark.parametrize("T", [400, 4000])
def test_the_scan_stores_no_more_than_its_input(T):
    x = inputs(T, 32, 16, batch=1, dtype=torch.float32)
    filled = chunk_frames(T) * math.ceil(T / chunk_frames(T)) * 32  # T·E, filled up to whole chunks
    with LargestTensor() as seen:
        y, _ = selective_scan(*x)
        y.sum().backward()
    assert seen.numel <= T * 32
    with LargestTensor() as seen, torch.no_grad():
        y, starts = scan_forward_chunks(*x)
        scan_backward_chunks(y, x[-1], *x[:-1], starts)
    assert seen.numel <= filled <= 1.05 * T * 32


def test_the_scan_takes_half_precision_and_sums_in_float32():
    u, delta, A, B, C, _ = inputs(60, dtype=torch.float32)
    y, last = selective_scan(u.bfloat16(), delta, A, B.bfloat16(), C.bfloat16())
    assert y.dtype == last.dtype == torch.float32
    assert torch.allclose(y, selective_scan(u.bfloat16().float(), delta, A, B.bfloat16().float(), C.bfloat16().float())[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_scans_work_is_counted_forwards_and_backwards(device):
    x = [z.detach().to(device).requires_grad_() for z in inputs(40)]

    def both():
        with torch.enable_grad():
            selective_scan(*x)[0].sum().backward()

    assert count_macs(lambda: selective_scan(*x)) == 4 * 2 * 40 * 5 * 4
    assert count_macs(both) == (4 + 11) * 2 * 40 * 5 * 4


def test_reversing_within_lengths_twice_changes_nothing():
    x, lengths = torch.randn(4, 9, 3), torch.tensor([9, 5, 1, 0])
    mask = lengths_to_mask(lengths)
    y = reverse_within(x, mask)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(y[b, :n], x[b, :n].flip(0)) and torch.equal(y[b, n:], x[b, n:])
    assert torch.equal(reverse_within(y, mask), x)
    assert torch.equal(reverse_within(x, torch.ones(4, 9, dtype=torch.bool)), reverse_within(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cls", [GRU, LSTM, Mamba])
def test_work_on_the_meta_device_is_that_of_the_cpu(cls, causal):
    mixer, x = cls(12, causal=causal), torch.randn(1, 17, 12)
    assert mixer.macs(17) == count_macs(lambda: mixer(x))


def test_widths():
    assert GRU(10).hidden == 5 and GRU(10, causal=True).hidden == 10 and GRU(9).hidden == 5 and GRU(10, hidden=7).out.in_features == 14
    with pytest.raises(EsslError, match="1 unit or more"):
        GRU(10, hidden=0)
    with pytest.raises(EsslError, match="d_conv=0"):
        Mamba(10, d_conv=0)
    with pytest.raises(NotImplementedError, match="Recurrent has no cell"):
        Recurrent(10)
    assert Mamba(10, d_conv=1)(torch.randn(1, 4, 10)).shape == (1, 4, 10)


def test_a_cell_that_needs_the_mask_gets_it():
    class Counts(nn.Module):
        def __init__(self, dim, hidden):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(hidden))

    class Counting(Recurrent):
        def cell(self, dim, hidden):
            return Counts(dim, hidden)

        def run(self, cell, x, mask=None, state=None):
            return mask.cumsum(1)[..., None] * cell.gain, state

    mixer, mask = Counting(4), lengths_to_mask(torch.tensor([3, 2]))
    with torch.no_grad():
        mixer.out.weight.copy_(torch.eye(4))
        mixer.out.bias.zero_()
    assert mixer(torch.randn(2, 3, 4), mask)[..., 0].tolist() == [[1, 2, 3], [1, 2, 0]]
    assert mixer(torch.randn(2, 3, 4), mask)[..., 3].tolist() == [[3, 2, 1], [2, 1, 0]]


@pytest.mark.parametrize("cls", [GRU, LSTM])
def test_the_recurrence_stays_in_float32_under_autocast(cls):
    mixer, x = cls(16), torch.randn(2, 30, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer.run(mixer.ahead, x.bfloat16())
    assert y.dtype == torch.float32 and torch.equal(y, mixer.ahead(x.bfloat16().float())[0])


def test_mambas_first_steps_are_the_papers():
    ssm = SelectiveSSM(4000, d_state=16, d_conv=4, dt_rank=2)
    step = nn.functional.softplus(ssm.dt_bias).detach()
    assert 1e-3 * 0.99 < step.min() < 1.1e-3 and 0.09 < step.max() < 0.1 * 1.01 and abs(step.log().mean() - math.log(1e-2)) < 0.1
    assert torch.allclose(-ssm.A_log.exp().view(16, -1)[:, 7], -torch.arange(1.0, 17))


def test_an_encoder_leaves_mambas_steps_as_they_are():
    mixer = build_encoder(EncoderConfig(Mamba.registered_name, dim=16, depth=1), seed=0).blocks[0].mixer
    for ssm in (mixer.ahead, mixer.back):
        step = nn.functional.softplus(ssm.dt_bias)
        assert 9e-4 < step.min() and step.max() < 0.11 and (ssm.D == 1).all()
        assert ssm.A_log.ndim == 1  # the optimiser decays tensors of two dimensions and more
