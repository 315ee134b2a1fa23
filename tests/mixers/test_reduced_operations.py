"""Linformer, Fastformer, HyperMixing, SummaryMixing-lite, PoM: what the battery and the parity cases do not ask."""
import pytest
import torch
import torch.nn.functional as F

from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask
from essl_nb.mixers.base import mixers
from essl_nb.mixers.checks import same, small_batch
from essl_nb.mixers.fastformer import Fastformer, running_softmax
from essl_nb.mixers.hyper import Hyper, positions
from essl_nb.mixers.linformer_attention import SHARING, Linformer, LinformerPooled, segments
from essl_nb.mixers.pom import PoM
from essl_nb.mixers.summary import Summary, SummaryLite


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def running(a, v, **options):
    B, H, _, K = v.shape
    return running_softmax(a, v, a.new_full((B, H), -torch.inf), v.new_zeros(B, H, K + 1), **options)


def by_hand(a, v):
    return torch.stack([torch.einsum("bht,bhtk->bhk", a[..., : t + 1].softmax(-1), v[:, :, : t + 1]) for t in range(a.shape[-1])], 2)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 150])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_running_softmax_is_the_softmax_of_each_prefix(T, chunk):
    a, v = 5 * torch.randn(2, 3, T, dtype=torch.float64), torch.randn(2, 3, T, 4, dtype=torch.float64)
    same(running(a, v, chunk=chunk)[0], by_hand(a, v), "means")


@pytest.mark.parametrize("shape", ["falling", "rising", "one peak", "huge"])
def test_a_running_softmax_survives_any_logits(shape):
    t = torch.arange(300, dtype=torch.float64)
    a = {"falling": -50 * t, "rising": 50 * t, "one peak": -1e4 * (t - 150).abs(), "huge": 1e30 * torch.sin(t)}[shape].expand(1, 1, -1)
    a, v = a.clone().requires_grad_(), torch.randn(1, 1, 300, 2, dtype=torch.float64, requires_grad=True)
    y = running(a, v)[0]
    same(y, by_hand(a, v), "means")
    weights = torch.randn_like(y)
    for mine, other, what in zip(torch.autograd.grad((y * weights).sum(), (a, v)), torch.autograd.grad((by_hand(a, v) * weights).sum(), (a, v)), ("logits", "values")):
        same(mine, other, f"gradients of the {what}", tolerance=1e-8)


def test_a_running_softmax_in_single_precision_with_logits_that_fall():
    a, v = -10 * torch.arange(500.0).expand(1, 1, -1), torch.randn(1, 1, 500, 2)
    y = running(a, v)[0]
    assert y.dtype == torch.float32 and torch.allclose(y, by_hand(a.double(), v.double()).float(), atol=1e-5)


def test_a_running_softmax_keeps_its_digits_under_autocast():
    a, v = torch.randn(1, 1, 4000), 1 + 1e-3 * torch.randn(1, 1, 4000, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = running(a, v)[0]
    assert y.dtype == torch.float32 and torch.allclose(y, by_hand(a, v), atol=1e-5)


def test_a_learnt_projection_says_how_long_it_is_and_what_has_no_longest_length():
    mixer = Linformer(16, num_heads=2, rank=4, n_max=20)
    mixer(torch.randn(1, 20, 16))
    with pytest.raises(EsslError, match=f"n_max=20 .* given 21: .* {LinformerPooled.registered_name}"):
        mixer(torch.randn(1, 21, 16))
    LinformerPooled(16, num_heads=2, rank=4)(torch.randn(1, 5000, 16))
    Linformer(16, **mixers.get(Linformer.registered_name).meta["long"])(torch.randn(1, 8192, 16))


@pytest.mark.parametrize("arguments, match", [
    ((Linformer, dict(sharing="layerwise")), "none, headwise, kv"),
    ((Linformer, dict(num_heads=3)), "num_heads=3"),
    ((Linformer, dict(rank=0)), "rank=0"),
    ((LinformerPooled, dict(kernel=4)), "odd number"),
    ((LinformerPooled, dict(causal=True)), "whole utterance"),
    ((Fastformer, dict(num_heads=3)), "num_heads=3"),
    ((Hyper, dict(num_heads=4, hidden=30)), "hidden=30"),
    ((Hyper, dict(causal=True)), "hidden layer for each frame"),
    ((PoM, dict(degree=0)), "degree=0"),
], ids=str)
def test_bad_arguments_are_answered(arguments, match):
    cls, kw = arguments
    with pytest.raises(EsslError, match=match):
        cls(16, **kw)


def test_sharing_saves_parameters():
    sizes = [Linformer(16, num_heads=4, rank=8, n_max=100, sharing=s).project.numel() for s in SHARING]
    assert sizes == [2 * 4 * 800, 2 * 800, 800]


def test_segments_are_those_of_adaptive_pooling():
    for k in (1, 3, 8):
        lengths = torch.arange(1, 30)
        parts = segments(lengths, k, 29).double()
        pool = parts / parts.sum(-1, keepdim=True)
        z = torch.randn(29, 2, dtype=torch.float64)
        for n, weights in zip(lengths.tolist(), pool):
            same(weights @ z, F.adaptive_avg_pool1d(z[:n].T[None], k)[0].T, f"{k} parts of {n} frames")
    assert not segments(torch.tensor([0]), 4, 5).any()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_pooling_an_utterance_shorter_than_the_slots(length):
    mixer, x = LinformerPooled(16, num_heads=2, rank=64).double(), torch.randn(2, 200, 16, dtype=torch.float64)
    mask = lengths_to_mask(torch.tensor([200, length]))
    same(mixer(x, mask)[1, :length], mixer(x[1:, :length])[0], "alone and in the batch")


@pytest.mark.parametrize("mixer", [Linformer(16, num_heads=2, rank=4), LinformerPooled(16, num_heads=2, rank=4), Hyper(16, num_heads=2, hidden=8)], ids=lambda m: type(m).__name__)
def test_products_of_unpacking_and_packing_are_shares(mixer):
    x, mask = small_batch(dtype=torch.float32)
    kind, weights = mixer.maps(x, mask)["weights"]
    assert kind == "weights" and weights.shape == (3, 2, 21, 21) and (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), mask[:, None].float().expand(-1, 2, -1), atol=1e-5)
    assert (weights[~mask[:, None, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_fastformers_weightings_are_shares_of_the_utterance(causal):
    x, mask = small_batch(pads=torch.nan)
    mixer = Fastformer(16, num_heads=2, causal=causal).double()
    for name, (kind, values) in mixer.maps(x, mask).items():
        assert kind == "pool" and values.shape == (3, 2, 21)
        assert torch.allclose(values.sum(-1), torch.ones(3, 2, dtype=torch.float64)) and (values[~mask[:, None].expand_as(values)] == 0).all()
        for b, n in enumerate(mask.sum(1).tolist()):
            same(values[b, :, :n], mixer.maps(x[b : b + 1, :n])[name].values[0], f"{name} of utterance {b} alone and in the batch")


def test_fastformers_last_causal_weighting_is_the_one_used():
    mixer, x = Fastformer(16, num_heads=2, causal=True).double(), torch.randn(1, 90, 16, dtype=torch.float64)
    q, k, _ = mixer.heads(x)
    p, global_k, _ = mixer.run(q, k, mixer.start(1, None, q.dtype))
    beta = mixer.maps(x)["key"].values
    same(torch.einsum("bht,bhtk->bhk", beta, p), global_k[:, :, -1], "the last global key")


def test_poms_gate_is_its_selection():
    x, mask = small_batch(dtype=torch.float32, pads=torch.nan)
    kind, gate = PoM(16, degree=2, expand=1).maps(x, mask)["gate"]
    assert kind == "gate" and gate.shape == (3, 21, 32) and ((gate[mask] > 0) & (gate[mask] < 1)).all() and (gate[~mask] == 0).all()


def test_hypers_positions_are_those_of_the_paper():
    like = torch.empty(0, dtype=torch.float64)
    P = positions(50, 12, like)
    for t, i in ((0, 0), (7, 4), (49, 10)):
        angle = torch.tensor(t / 1e4 ** (i / 12), dtype=torch.float64)
        same(P[t, i : i + 2], torch.stack([angle.sin(), angle.cos()]), "sine and cosine")
    assert positions(5, 7, like).shape == (5, 7)


def test_hyper_without_its_norm_grows_with_the_utterance():
    x = torch.randn(1, 100, 16)
    plain, normed = Hyper(16, num_heads=2, norm=False), Hyper(16, num_heads=2)
    sizes = [[m(x[:, :n]).std() for n in (10, 100)] for m in (plain, normed)]
    assert sizes[0][1] > 1.5 * sizes[0][0] and abs(sizes[1][1] / sizes[1][0] - 1) < 0.1


def test_tied_hyper_has_one_hypernetwork():
    count = lambda **kw: sum(p.numel() for p in Hyper(16, num_heads=2, norm=False, **kw).parameters())
    assert count() == 2 * count(tied=True)


@pytest.mark.parametrize("cls", [SummaryLite, PoM])
def test_a_long_running_mean_keeps_its_digits_in_half_precision(cls):
    mixer, x = cls(8, causal=True), torch.ones(1, 6000, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert torch.allclose(y[:, -1], y[:, 10], rtol=0.02, atol=1e-3)


def test_the_lite_form_is_summary_with_one_transformation():
    lite, full = SummaryLite(16), Summary(16)
    shared = {f"{part}.{kind}": p for kind, p in lite.shared.named_parameters() for part in ("local", "summary")}
    full.load_state_dict({**shared, **{f"combine.{kind}": p for kind, p in lite.combine.named_parameters()}})
    x, mask = small_batch(dtype=torch.float32)
    assert torch.equal(lite(x, mask), full(x, mask))


@pytest.mark.parametrize("cls, per_frame", [(Fastformer, 4), (SummaryLite, 3), (PoM, 18)])
def test_work_counted_by_hand(cls, per_frame):
    assert cls(64).macs(300) == 300 * per_frame * 64**2


@pytest.mark.parametrize("cls", [Fastformer, SummaryLite, PoM])
def test_a_stream_keeps_as_much_after_a_minute_as_after_a_second(cls):
    mixer = cls(64, causal=True)
    assert mixer.state_bytes(50) == mixer.state_bytes(3000) < 4 * 64 * 64
