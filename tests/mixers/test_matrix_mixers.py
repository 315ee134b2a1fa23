"""Mixers over a matrix of state, minGRU and the short convolution, beyond the battery: bad input, what the encoder leaves alone, two directions."""
import math

import pytest
import torch
from torch import nn

from essl_nb.core.count import count_macs
from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.checks import MIXER_CHECKS
from essl_nb.mixers.gated_delta import GatedDelta
from essl_nb.mixers.mamba2 import Mamba2
from essl_nb.mixers.matrix_recurrence import MatrixState
from essl_nb.mixers.mingru import MinGRU, share_of_step
from essl_nb.mixers.mlstm import MLSTM, stabiliser
from essl_nb.mixers.rwkv7 import RWKV7
from essl_nb.mixers.short_conv import ShortConv
from essl_nb.models.config import EncoderConfig
from essl_nb.models.encoder import build_encoder
from essl_nb.ops.matrix_state import LEAST_LOG_DECAY

SIX = (GatedDelta, RWKV7, Mamba2, MLSTM, MinGRU, ShortConv)
MATRICES = [cls for cls in SIX if issubclass(cls, MatrixState)]
six = pytest.mark.parametrize("cls", SIX, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("cls, arguments, message", [
    (GatedDelta, dict(num_heads=5), "num_heads=5 was given with a width of 24"),
    (GatedDelta, dict(num_heads=0), "num_heads=0"),
    (GatedDelta, dict(num_heads=True), "num_heads=True"),
    (GatedDelta, dict(decay="frame"), "decay='frame' was given; allowed: 'head', 'channel'"),
    (GatedDelta, dict(kernel=0), "kernel=0"),
    (GatedDelta, dict(kernel=4), "an odd number unless causal"),
    (RWKV7, dict(num_heads=5), "num_heads=5"),
    (RWKV7, dict(rank=0), "rank=0 was given"),
    (RWKV7, dict(rank=2.5), "rank=2.5 was given"),
    (Mamba2, dict(head_dim=7), "head_dim=7 was given with 48 inner features"),
    (Mamba2, dict(head_dim=0), "head_dim=0"),
    (Mamba2, dict(d_state=0), "d_state=0"),
    (Mamba2, dict(expand=0), "expand=0"),
    (Mamba2, dict(kernel=-1), "kernel=-1"),
    (MLSTM, dict(num_heads=5), "num_heads=5"),
    (MinGRU, dict(hidden=0), "hidden=0"),
    (ShortConv, dict(kernel=0), "kernel=0"),
    (ShortConv, dict(kernel=2), "an odd number unless causal"),
    (ShortConv, dict(kernel=True), "kernel=True"),
    (ShortConv, dict(gates="none"), "it can be both, before, after"),
], ids=str)
def test_what_cannot_be_built_is_refused_with_what_can(cls, arguments, message):
    with pytest.raises(EsslError) as refused:
        cls(24, **arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("cls", [c for c in SIX if c is not ShortConv], ids=lambda cls: cls.__name__)
def test_dropping_a_direction_needs_two(cls):
    with pytest.raises(EsslError, match="one direction only"):
        cls(24, causal=True, direction_dropout=0.5)
    mixer, x = cls(24, direction_dropout=0.5).eval(), torch.randn(1, 9, 24)
    mixer.set_chunk(1)
    alone = mixer(x)
    assert torch.allclose(alone[:, :5], mixer(x[:, :5]), atol=1e-6)


@six
def test_a_state_of_another_configuration_is_refused(cls):
    mixer, x = cls(24, causal=True), torch.randn(2, 3, 24)
    for other in (cls(48, causal=True).init_state(2), mixer.init_state(1), {}):
        with pytest.raises(EsslError, match=f"this {cls.__name__} takes .* Start with init_state\\(2\\)"):
            mixer.step(x, other)
    mixer.step(x, mixer.init_state(2))


@pytest.mark.parametrize("dim", [1, 5, 16, 64, 96, 192, 384, 576])
def test_heads_of_mamba2_fit_any_width(dim):
    mixer = Mamba2(dim, d_state=4)
    assert mixer.heads * mixer.state_shape[2] == 2 * dim and mixer.state_shape[2] <= 64
    assert mixer(torch.randn(1, 3, dim)).shape == (1, 3, dim)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("arguments", [{}, dict(decay="channel")], ids=str)
@pytest.mark.parametrize("cls", SIX, ids=lambda cls: cls.__name__)
def test_work_on_the_meta_device_is_that_of_the_cpu(cls, arguments, causal):
    if arguments and cls is not GatedDelta:
        return
    mixer, x = cls(24, causal=causal, **arguments), torch.randn(1, 17, 24)
    assert mixer.macs(17) == count_macs(lambda: mixer(x))
    assert mixer.macs(340) == pytest.approx(20 * mixer.macs(17))


@pytest.mark.parametrize("check", ["padding gradient", "batch", "streaming", "chunks", "gradient"])
def test_a_decay_for_each_feature_keeps_the_contract(check):
    class Entry:
        name, obj, meta = "features", GatedDelta, {"tiny": dict(num_heads=2, decay="channel")}

    MIXER_CHECKS[check](Entry)


@pytest.mark.parametrize("cls", MATRICES, ids=lambda cls: cls.__name__)
def test_both_directions_read_a_frame_once(cls):
    "One frame alone gives the same from both sides as from the left: the pass from the right reads nothing."
    mixer, x = cls(24).double(), torch.randn(3, 1, 24, dtype=torch.float64)
    u = mixer.local(torch.nn.functional.pad(made[0] if isinstance(made := mixer.project(x), tuple) else made, (0, 0, mixer.past, mixer.future)),
                    *(made[1:] if isinstance(made, tuple) else ()))
    given = mixer.recurrence(u[..., :mixer.entering])
    left, right = mixer.run(given)[0], mixer.run(given, reversed_frames=torch.ones(3, dtype=torch.int64))[0]
    assert left.abs().max() > 0 and right.abs().max() < 1e-12


@pytest.mark.parametrize("cls", [GatedDelta, Mamba2], ids=lambda cls: cls.__name__)
def test_a_mirrored_utterance_gives_mirrored_frames(cls):
    mixer = cls(24, kernel=1).double()
    x, mask = torch.randn(1, 12, 24, dtype=torch.float64), lengths_to_mask(torch.tensor([7]), 12)
    mirrored = torch.cat([x[:, :7].flip(1), x[:, 7:]], 1)
    assert torch.allclose(mixer(mirrored, mask)[:, :7].flip(1), mixer(x, mask)[:, :7])


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_an_encoder_leaves_decays_as_they_are(decay):
    mixer = build_encoder(EncoderConfig(GatedDelta.registered_name, dim=16, depth=1, mixer_kw=dict(decay=decay)), seed=0).blocks[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.linspace(1, 16, 4)) and mixer.A_log.ndim == mixer.dt_bias.ndim == 1
    step = nn.functional.softplus(mixer.dt_bias).detach()
    assert step.min() == pytest.approx(1e-3, rel=1e-3) and step.max() == pytest.approx(0.1, rel=1e-3)


def test_an_encoder_leaves_what_is_no_linear_weight():
    build = lambda cls: build_encoder(EncoderConfig(cls.registered_name, dim=16, depth=1), seed=0).blocks[0].mixer
    mamba, rwkv, lstm = build(Mamba2), build(RWKV7), build(MLSTM)
    assert torch.allclose(mamba.A_log.exp(), torch.linspace(1, 16, mamba.heads)) and (mamba.D == 1).all()
    assert torch.allclose(rwkv.w0, torch.linspace(-6, 1, 16)) and 0.25 <= rwkv.mu.min() and rwkv.mu.max() <= 0.75
    assert lstm.gate_bias.tolist() == pytest.approx([0, 0, 0, 0, 3, 4, 5, 6])
    decayed = {name for m in (mamba, rwkv, lstm) for name, p in m.named_parameters() if p.ndim > 1}
    assert not decayed & {"A_log", "dt_bias", "D", "mu", "w0", "a0", "k_k", "k_a", "r_k", "gate_bias", "norm_weight", "norm.weight"}


def test_decays_of_features_stop_where_chunks_need_it():
    mixer = GatedDelta(24, decay="channel")
    log_w = mixer.recurrence(100 * torch.randn(1, 5, mixer.entering))["log_w"]
    assert log_w.min() == LEAST_LOG_DECAY and log_w.max() <= 0
    assert GatedDelta(24).recurrence(100 * torch.randn(1, 5, GatedDelta(24).entering))["log_w"].min() < LEAST_LOG_DECAY


@pytest.mark.parametrize("T", [3, 4000])
def test_gates_of_mlstm_overflow_nothing(T):
    log_i, log_f = 15 * torch.randn(1, T, 2).sign(), -15 * torch.rand(1, T, 2)
    m = stabiliser(log_f.double(), log_i.double(), torch.zeros(1, 1, 2).double())
    before = torch.cat([torch.zeros(1, 1, 2).double(), m[:, :-1]], 1)
    assert (log_f + before - m).max() < 1e-9 and (log_i - m).max() < 1e-9
    mixer, x = MLSTM(24), 100 * torch.randn(1, T, 24)
    x.requires_grad_()
    y = mixer(x)
    assert y.isfinite().all() and torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_the_share_of_a_step_is_smooth_where_it_changes_its_form():
    delta = torch.tensor([0, 1e-9, 9.99e-4, 1.01e-3, 0.1, 30.0], dtype=torch.float64, requires_grad=True)
    share = share_of_step(delta)
    assert torch.allclose(share[1:], -torch.expm1(-delta[1:]) / delta[1:], rtol=1e-9) and share[0] == 1
    slope, = torch.autograd.grad(share.sum(), delta)
    assert slope[0] == -0.5 and torch.allclose(slope[2], slope[3], rtol=1e-4) and slope.isfinite().all()


def test_memory_reaches_as_far_as_decays_do():
    mixer = Mamba2(64, causal=True, head_dim=32)
    reach = mixer.influence(torch.randn(1, 400, 64), queries=[399], probes=2, generator=torch.Generator().manual_seed(0))[0, 0]
    assert reach[0] > 0 and reach[390:].mean() > reach[:200].mean() and math.isfinite(reach.sum())


@pytest.mark.parametrize("gates", ["before", "after"])
def test_a_filter_with_one_gate_streams_as_it_runs_and_hears_no_padding(gates):
    m, x = ShortConv(24, gates=gates, causal=True), torch.randn(2, 11, 24)
    mask = torch.arange(11) < torch.tensor([[11], [7]])
    whole, state, heard = m(x), m.init_state(2), []
    for part in x.split((1, 4, 6), 1):
        y, state = m.step(part, state)
        heard.append(y)
    torch.testing.assert_close(torch.cat(heard, 1), whole, atol=1e-6, rtol=1e-5)
    y = m(x.masked_fill(~mask[..., None], float("nan")), mask)
    assert not y[1, 7:].any()
    torch.testing.assert_close(y[1, :7], whole[1, :7], atol=1e-6, rtol=1e-5)
