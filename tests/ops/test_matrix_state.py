"""The recurrence over matrices: every form is the plain equation, at any length, with any decay, from either side."""
import pytest
import torch
import torch.nn.functional as F

from essl_nb.core.count import count_macs
from essl_nb.core.registry import EsslError
from essl_nb.mixers.checks import LargestTensor
from essl_nb.ops.matrix_state import (CHUNK, FEATURE_CHUNK, LEAST_LOG_DECAY, SEGMENT, matrix_state, matrix_state_chunks, matrix_state_reference,
                                      matrix_state_written)

LENGTHS = sorted({1, 2, 3, FEATURE_CHUNK - 1, FEATURE_CHUNK, FEATURE_CHUNK + 1, CHUNK - 1, CHUNK, CHUNK + 1, SEGMENT + 1, 50, 97})
kinds = pytest.mark.parametrize("erases", [False, True], ids=["plain", "erasing"])
decays = pytest.mark.parametrize("per_feature", [False, True], ids=["one decay a head", "one a feature"])


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def inputs(T, *, per_feature=False, erases=True, batch=2, H=3, K=6, V=5, shared=False, dtype=torch.float64):
    "q, k, v, log_w, a, b and a first state; a and b are None where nothing is erased."
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)
    heads = 1 if shared else H
    key = F.normalize(draw(batch, T, H, K), dim=-1)
    log_w = (-F.softplus(2 * draw(batch, T, H, K if per_feature else 1))).clamp(min=LEAST_LOG_DECAY)
    erased = (log_w.exp() * key, torch.rand(batch, T, H, 1, dtype=dtype) * key) if erases else (None, None)
    given = draw(batch, T, heads, K), draw(batch, T, heads, K), draw(batch, T, H, V), log_w, *erased, draw(batch, H, K, V)
    return [x if x is None else x.requires_grad_() for x in given]


def by_chunks(*given, reversed_frames=None, own=True):
    "The chunks alone, as `matrix_state` calls them on a GPU."
    from essl_nb.core.shapes import reversal
    from essl_nb.ops.matrix_state import in_order

    *x, state = given
    rows = None if reversed_frames is None else reversal(reversed_frames, x[0].shape[1])
    y, last = matrix_state_chunks(*(in_order(z, rows) for z in x), state)
    y = in_order(y, rows)
    return y if own else y - (x[0] * x[1]).sum(-1, keepdim=True) * x[2], last


def agree(found, true, given, dtype=torch.float64):
    "Outputs, last states and all gradients."
    there = [x for x in given if x is not None]
    weights = [torch.randn_like(z) for z in true]
    pairs = [*zip(found, true), *zip(torch.autograd.grad(found, there, weights), torch.autograd.grad(true, there, weights))]
    for mine, other in pairs:
        assert (mine - other).abs().max() <= (1e-10 if dtype == torch.float64 else 2e-5) * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("form", [matrix_state, by_chunks], ids=["compiled", "chunks"])
@decays
@kinds
@pytest.mark.parametrize("T", LENGTHS)
def test_every_form_is_the_equation(T, erases, per_feature, form):
    given = inputs(T, per_feature=per_feature, erases=erases)
    agree(form(*given), matrix_state_reference(*given), given)


@pytest.mark.parametrize("form", [matrix_state, by_chunks], ids=["compiled", "chunks"])
@decays
@kinds
@pytest.mark.parametrize("reversed_frames", [(37, 37), (37, 0), (20, 1)], ids=str)
def test_from_the_right_a_frame_reads_what_the_others_wrote(reversed_frames, erases, per_feature, form):
    given = inputs(37, per_feature=per_feature, erases=erases)
    for own in (True, False):
        options = dict(reversed_frames=torch.tensor(reversed_frames), own=own)
        agree(form(*given, **options), matrix_state_reference(*given, **options), given)


@pytest.mark.parametrize("form", [matrix_state, by_chunks], ids=["compiled", "chunks"])
def test_heads_may_share_queries_and_keys(form):
    given = inputs(40, erases=False, shared=True)
    agree(form(*given), matrix_state_reference(*given), given)
    options = dict(reversed_frames=torch.tensor([40, 11]), own=False)
    agree(form(*given, **options), matrix_state_reference(*given, **options), given)


@decays
@kinds
def test_float32_is_near_float64(erases, per_feature):
    given = inputs(97, per_feature=per_feature, erases=erases)
    true = matrix_state_reference(*given)[0]
    narrow = [x if x is None else x.float() for x in given]
    for form in (matrix_state, by_chunks):
        y = form(*narrow)[0]
        assert y.dtype == torch.float32 and (y - true).abs().max() < 2e-5 * true.abs().max()


@kinds
def test_the_gradient_is_that_of_finite_differences(erases):
    given = inputs(5, erases=erases, batch=1, H=2, K=3, V=2)
    there = [x for x in given if x is not None]
    put = lambda *x: x if erases else (*x[:4], None, None, x[4])
    for options in ({}, dict(reversed_frames=torch.tensor([4]), own=False)):
        torch.autograd.gradcheck(lambda *x: matrix_state(*put(*x), **options), there)


def test_a_second_derivative_is_refused_with_what_has_one():
    given = inputs(9)
    first, = torch.autograd.grad(matrix_state(*given)[0].square().sum(), given[0], create_graph=True)
    with pytest.raises(EsslError, match="matrix_state_reference"):
        first.square().sum().backward()
    same, = torch.autograd.grad(matrix_state_chunks(*given)[0].square().sum(), given[0], create_graph=True)
    assert torch.allclose(first, same)
    same.square().sum().backward()


def test_transforms_of_torch_take_the_chunks():
    q, *given = (x.detach() for x in inputs(19))
    forward = lambda q: matrix_state(q, *given)[0]
    _, pushed = torch.func.jvp(forward, (q,), (torch.ones_like(q),))
    assert torch.allclose(pushed, forward(torch.ones_like(q)) - forward(torch.zeros_like(q)))


def test_in_any_division_the_state_goes_on():
    *given, state = inputs(50)
    whole, end = matrix_state(*given, state)
    parts = []
    for part in torch.arange(50).split([1, 16, 30, 3]):
        y, state = matrix_state(*(x[:, part] for x in given), state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole) and torch.allclose(state, end)


@pytest.mark.parametrize("erases, per_feature, log_decay", [(False, False, -1e4), (True, False, -1e4), (True, True, LEAST_LOG_DECAY), (False, True, LEAST_LOG_DECAY)])
def test_hard_decays_overflow_nothing(erases, per_feature, log_decay):
    for where in (slice(None), slice(3, None, 7)):  # everywhere, and now and then
        q, k, v, log_w, _, _, state = (x if x is None else x.detach().float() for x in inputs(100, per_feature=per_feature, erases=erases))
        log_w[:, where] = log_decay
        key = F.normalize(k, dim=-1)
        given = [x.requires_grad_() for x in (q, k, v, log_w, *((log_w.exp() * key, key) if erases else ()))]
        put = lambda x: (*x[:4], *(x[4:] if erases else (None, None)))
        wide = [x.detach().double() for x in given]
        true = matrix_state_reference(*put(wide), state.double())[0]
        for form in (matrix_state, by_chunks):
            y = form(*put(given), state)[0]
            assert (y - true).abs().max() < 1e-4 * true.abs().max()
            assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), given))


def test_what_is_not_a_number_does_not_pass_for_one():
    with torch.no_grad():
        given = [x.detach() for x in inputs(40)]
        for i in range(6):
            spoilt = [x.clone() for x in given]
            spoilt[i][:, 20] = torch.nan
            y = matrix_state(*spoilt)[0]
            assert y[:, 20].isnan().all() and y[:, :20].isfinite().all()


def test_one_scan_for_other_runtimes_is_the_equation():
    for erases in (False, True):
        given = inputs(9, erases=erases)
        y, last = matrix_state_written(*given)
        true = matrix_state_reference(*given)
        assert torch.allclose(y, true[0]) and torch.allclose(last, true[1])


def test_half_precision_is_summed_in_float32():
    *given, state = (x.detach().to(torch.bfloat16) for x in inputs(60, dtype=torch.float32))
    y, last = matrix_state(*given, state)
    assert y.dtype == last.dtype == torch.float32
    assert torch.equal(y, matrix_state(*(x.float() for x in given), state.float())[0])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@kinds
def test_the_work_is_counted_by_the_equation(erases, device):
    given = [x if x is None else x.detach().to(device).requires_grad_() for x in inputs(40, erases=erases)]

    def both():
        with torch.enable_grad():
            matrix_state(*given)[0].sum().backward()

    forward, backward = (5, 14) if erases else (3, 8)
    assert count_macs(lambda: matrix_state(*given)) == forward * 2 * 40 * 3 * 6 * 5
    assert count_macs(both) == (forward + backward) * 2 * 40 * 3 * 6 * 5


def test_memory_grows_with_states_of_segments_and_no_more():
    given = inputs(2000, batch=1, H=1, K=8, V=8, dtype=torch.float32)
    with LargestTensor() as seen:
        matrix_state(*given)[0].sum().backward()
    assert seen.numel <= max(2000 * 8, (2000 // SEGMENT + 2) * 64)
