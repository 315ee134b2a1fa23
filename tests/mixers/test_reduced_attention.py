"""Window, RelPos, Luna: what the battery and the parity cases do not ask."""
import math

import pytest
import torch
import torch.nn.functional as F

from essl_nb.core.registry import EsslError
from essl_nb.core.shapes import lengths_to_mask, zero_pads
from essl_nb.mixers.attention import Attention
from essl_nb.mixers.checks import LargestTensor, frames_of, gradients, same, small_batch
from essl_nb.mixers.luna import Luna, running_attention
from essl_nb.mixers.relpos import RelPos, encodings, shift
from essl_nb.mixers.window import Window, neighbours
from essl_nb.ops.temporal import attend


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def in_steps(mixer, x, sizes):
    "Stream x in portions of the given sizes."
    state, out = mixer.init_state(len(x)), []
    for some in x.split(sizes, 1):
        y, state = mixer.step(some, state)
        out.append(y)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk, beside", [(21, 0), (30, 0), (8, 2), (4, 5), (1, 20)])
def test_a_window_over_everything_is_full_attention(causal, chunk, beside):
    window = Window(16, num_heads=2, chunk=chunk, left=beside, right=0 if causal else beside, causal=causal).double()
    full = Attention(16, num_heads=2, causal=causal).double()
    full.load_state_dict(window.state_dict())
    x, mask = small_batch()
    for m in (None, mask):
        same(window(x, m), full(x, m), "outputs", 1e-12)
        mine, theirs = (gradients(mixer, x, m, x.flip(2)) for mixer in (window, full))
        for name in theirs:
            same(mine[name], theirs[name], f"gradients of {name}", 1e-12)
    same(window.maps(x, mask)["weights"].values, full.maps(x, mask)["weights"].values, "maps", 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 3, 4, 5, 8, 17, 40])
@pytest.mark.parametrize("chunk, left, right", [(4, 1, 1), (4, 0, 0), (4, 2, 0), (1, 3, 2), (5, 0, 2)])
def test_a_window_is_attention_under_a_mask(causal, T, chunk, left, right):
    window = Window(16, num_heads=2, chunk=chunk, left=left, right=0 if causal else right, causal=causal).double()
    x, t = torch.randn(2, T, 16, dtype=torch.float64), torch.arange(T)
    apart = t // chunk - t[:, None] // chunk
    seen = (apart >= -left) & (apart <= window.right) & (t <= t[:, None] if causal else True)
    q, k, v = window.heads(x)
    by_mask = window.join(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
    same(window(x), by_mask, "outputs", 1e-12)
    same(window.join(window.maps(x)["weights"].values @ v), by_mask, "outputs by the map", 1e-12)


@pytest.mark.parametrize("lengths", [(40, 1), (40, 16), (40, 17), (33, 15)])
def test_padding_in_whole_chunks_harms_nothing(lengths):
    window, n = Window(16, num_heads=2, chunk=4).double(), torch.tensor(lengths)
    mask = lengths_to_mask(n, 60)
    x = torch.randn(2, 60, 16, dtype=torch.float64).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y = window(x, mask)
    y.sum().backward()
    assert x.grad.isfinite().all() and (y[~mask] == 0).all()
    for b, length in enumerate(lengths):
        same(y[b, :length], window(x[b : b + 1, :length])[0], "alone and in the batch", 1e-12)


@pytest.mark.parametrize("sizes", [1, 3, 7, 64, [1, 4, 50, 2, 43]], ids=str)
@pytest.mark.parametrize("chunk, left", [(4, 2), (16, 0), (1, 3), (3, 1)])
def test_a_windows_stream_is_its_forward_and_its_state_is_bounded(sizes, chunk, left):
    window = Window(16, num_heads=2, chunk=chunk, left=left, causal=True).double()
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    y, state = in_steps(window, x, sizes)
    same(y, window(x), "steps and forward", 1e-12)
    assert state["k"].shape[2] == state["v"].shape[2] == (left + 1) * chunk - 1 and bool((state["position"] == 100).all())


def test_a_step_of_many_frames_stores_nothing_quadratic():
    window, x = Window(8, num_heads=2, causal=True), torch.randn(1, 1000, 8)
    with LargestTensor() as seen, torch.no_grad():
        window.step(x, window.init_state(1))
    assert seen.numel <= 1000 * 3 * 8


def test_the_default_window_reaches_as_many_chunks_in_both_forms():
    both, back = Window(8), Window(8, causal=True)
    assert (both.left, both.right) == (1, 1) and (back.left, back.right) == (2, 0)
    assert both.macs(320) == back.macs(320)


@pytest.mark.parametrize("arguments, message", [(dict(chunk=0), "1 frame or more"), (dict(left=-1), "0 chunks or more"), (dict(right=-2), "0 chunks or more"),
                                                (dict(right=1, causal=True), "looks ahead"), (dict(num_heads=3), "does not fit")], ids=str)
def test_window_answers_wrong_arguments(arguments, message):
    with pytest.raises(EsslError, match=message):
        Window(16, **arguments)


def test_a_window_that_looks_ahead_has_no_stream():
    with pytest.raises(EsslError, match="causal=True"):
        Window(16, right=0).init_state(1)


def test_neighbours_lie_in_order_with_zeros_beyond_the_ends():
    x = torch.arange(1, 7).view(1, 3, 2)
    assert neighbours(x, 2, 1)[0].tolist() == [[0, 0, 0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0, 0]]
    assert torch.equal(neighbours(x, 0, 0), x)
    assert neighbours(torch.ones(1, 3, 2, dtype=torch.bool), 1, 0).dtype == torch.bool


def test_attend_keeps_the_type_and_the_exactness_of_float32():
    q, k = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 3, 40, 8).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), k.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attend(q, k, k)
        assert y.dtype == torch.bfloat16 and attend(q.double(), k.double(), k.double()).dtype == torch.float64
    same(y.double(), exact, "bfloat16", 2**-8)


@pytest.mark.parametrize("Q, S, P", [(4, 4, 8), (4, 4, 5), (1, 1, 2), (1, 6, 7), (3, 6, 9)])
def test_shift_lines_distances_up_with_keys(Q, S, P):
    distances = torch.arange(S - 1, S - 1 - P, -1).expand(2, 3, Q, P).contiguous()
    table = shift(distances, S)
    expected = torch.arange(S - Q, S)[:, None] - torch.arange(S)
    known = expected > S - 1 - P  # the causal table ends at −1, and what it lacks is masked
    assert table.shape == (2, 3, Q, S) and torch.equal(table[1, 2][known], expected[known])
    assert table.data_ptr() == distances.data_ptr() + (Q - 1) * distances.element_size()


def test_encodings_are_signed_sinusoids():
    r = encodings(5, 11, 8, dtype=torch.float64)
    assert torch.equal(r[:, ::2], -r.flip(0)[:, ::2]) and torch.equal(r[:, 1::2], r.flip(0)[:, 1::2])
    assert torch.allclose(r[3, :2], torch.tensor([math.sin(2), math.cos(2)], dtype=torch.float64))
    assert encodings(5, 11, 7).shape == (11, 7)
    same(encodings(30_000, 2, 64).double(), encodings(30_000, 2, 64, dtype=torch.float64), "far distances", 2e-3)


def test_speechbrains_encodings_have_no_sign_for_the_future():
    attention = pytest.importorskip("speechbrain.nnet.attention")
    ours, theirs = encodings(9, 19, 16), attention.RelPosEncXL(16)(torch.zeros(1, 10, 16))[0]
    assert torch.allclose(ours[:10], theirs[:10], atol=1e-5)
    assert torch.equal(theirs, theirs.flip(0)) and torch.allclose(ours[10:, ::2], -theirs[10:, ::2], atol=1e-5)


@pytest.mark.parametrize("sizes", [1, 7, 100, [1, 60, 2, 37]], ids=str)
def test_a_stream_of_relative_positions_is_its_forward(sizes):
    relpos = RelPos(16, num_heads=2, causal=True).double()
    for p in (relpos.u, relpos.v):
        torch.nn.init.normal_(p)
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    same(in_steps(relpos, x, sizes)[0], relpos(x), "steps and forward", 1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_relative_maps_are_the_weights_used(causal):
    relpos = RelPos(16, num_heads=2, causal=causal).double()
    x, mask = small_batch()
    weights = relpos.maps(x, mask)["weights"].values
    same(zero_pads(relpos.join(weights @ relpos.heads(zero_pads(x, mask))[2]), mask), relpos(x, mask), "outputs by the map", 1e-12)
    same(weights.sum(-1), mask[:, None].double().expand(-1, 2, -1), "sums of rows", 1e-12)
    assert relpos.macs(50) == 50 * 6 * 16**2 + (4 if not causal else 3) * 50**2 * 16 - (0 if not causal else 50 * 16**2 - 16**2 - 50 * 16)


def test_only_relative_distance_matters():
    relpos, x = RelPos(16, num_heads=2).double(), torch.randn(1, 20, 16, dtype=torch.float64)
    torch.nn.init.normal_(relpos.v)
    inside = torch.cat([x.new_full((1, 7, 16), torch.nan), x], 1)
    scores = relpos.weights(*relpos.heads(x)[:2])
    later = relpos.weights(*(z[:, :, 7:] for z in relpos.heads(inside)[:2]))
    same(later, scores, "weights of frames that begin later", 1e-12)


def test_relpos_answers_wrong_arguments():
    with pytest.raises(EsslError, match="does not fit"):
        RelPos(16, num_heads=3)


@pytest.mark.parametrize("T, chunk", [(1, 4), (4, 4), (5, 4), (21, 4), (21, 1), (21, 32), (70, 32)])
def test_running_attention_is_the_definition(T, chunk):
    q, c = torch.randn(2, 2, 3, T, 5, dtype=torch.float64)
    a, sums = torch.rand(2, 3, T, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y, u, last = running_attention(q, c, a, sums, torch.tensor([6, 6]), chunk)
    for t in range(T):
        sums = sums + c[:, :, t, :, None] * a[:, :, t, None]
        weights = (torch.einsum("bhk,bhkl->bhl", q[:, :, t], sums) / (7 + t)).softmax(-1)
        same(u[:, :, t], weights, "unpack weights", 1e-12)
        same(y[:, :, t], torch.einsum("bhl,bhkl->bhk", weights, sums) / (7 + t), "outputs", 1e-12)
    same(last, sums, "sums", 1e-12)


@pytest.mark.parametrize("sizes", [1, 33, 100, [1, 60, 2, 37]], ids=str)
def test_lunas_stream_is_its_forward(sizes):
    luna, x = Luna(16, num_heads=2, packed=4, causal=True).double(), torch.randn(2, 100, 16, dtype=torch.float64)
    y, state = in_steps(luna, x, sizes)
    same(y, luna(x), "steps and forward", 1e-12)
    assert state["sums"].shape == (2, 2, 8, 4) and state["count"].tolist() == [100, 100]


def test_lunas_long_streams_keep_their_precision():
    luna, x = Luna(16, num_heads=2, packed=4, causal=True), torch.randn(1, 20_000, 16) + 1
    exact = Luna(16, num_heads=2, packed=4, causal=True).double()
    exact.load_state_dict(luna.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rough = luna(x)
    away = (rough.double() - exact(x.double()))[:, -1000:].norm() / exact(x.double())[:, -1000:].norm()
    assert away < 0.02


@pytest.mark.parametrize("causal", [False, True])
def test_lunas_maps_are_the_weights_used(causal):
    luna = Luna(16, num_heads=2, packed=4, causal=causal).double()
    x, mask = small_batch()
    weights, c = luna.maps(x, mask)["weights"].values, luna.split(luna.query_context(zero_pads(x, mask)).chunk(2, -1)[1])
    same(weights.sum(-1), mask[:, None].double().expand(-1, 2, -1), "sums of rows", 1e-12)
    assert (weights >= 0).all() and (weights.transpose(2, 3)[~mask[:, None].expand(-1, 2, -1)] == 0).all()
    if causal:
        assert (weights.triu(1) == 0).all()
        mean = F.normalize(weights @ c, dim=-1)
        same(mean, F.normalize(luna.unpack_causal(zero_pads(x, mask), **luna.empty_sums(3, x.device, x.dtype))[0], dim=-1) * mask[:, None, :, None], "directions", 1e-9)
    else:
        luna.packed_context.load_state_dict(dict(weight=torch.eye(16), bias=torch.zeros(16)))
        same(zero_pads(luna.join(luna.maps(x, mask)["weights"].values @ c), mask), luna(x, mask), "outputs by the map", 1e-12)


def test_a_following_luna_needs_a_carry_and_gives_up_its_slots():
    first, second, causal = Luna(16, packed=4), Luna(16, packed=4), Luna(16, packed=4, causal=True)
    whole = {name for name, _ in second.named_parameters()}
    second.follow(), causal.follow()
    assert whole - {name for name, _ in second.named_parameters()} == {"packed"} and causal.packed is not None and not causal.passes_state
    x, mask = small_batch(dtype=torch.float32)
    with pytest.raises(EsslError, match="follows another"):
        second(x, mask)
    y, layer_state = first.mix(x, mask)
    z, handed = second.mix(y, mask, layer_state)
    assert handed["packed"].shape == layer_state["packed"].shape == (3, 4, 16)
    assert second.maps(y, mask, layer_state)["weights"].values.shape == (3, 4, 21, 21)
    z.sum().backward()
    assert all(p.grad is not None for m in (first, second) for p in m.parameters())
    assert isinstance(causal(x, mask), torch.Tensor) and frames_of(first(x)).shape == x.shape


def test_slots_are_few_and_utterances_long():
    for causal in (False, True):
        luna, x = Luna(8, num_heads=2, packed=4, causal=causal), torch.randn(1, 4000, 8, requires_grad=True)
        with LargestTensor() as seen:
            frames_of(luna(x)).sum().backward()
        assert seen.numel <= 4032 * 2 * 32, f"{seen.numel} numbers in a tensor for 4000 frames"


@pytest.mark.parametrize("arguments", [dict(packed=0), dict(num_heads=3), dict(num_heads=0)], ids=str)
def test_luna_answers_wrong_arguments(arguments):
    with pytest.raises(EsslError, match="one slot or more"):
        Luna(16, **arguments)


def test_the_bidirectional_luna_has_no_stream():
    with pytest.raises(EsslError, match="causal=True"):
        Luna(16).init_state(1)
